"""Small float models that the tests share, and a strategy for random ones.

All weights come from a seed, all values carry types and shapes, and every model runs in plain
onnxruntime: `outputs(model, feed(model))`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from hypothesis import strategies as st
from onnx_ir.passes.common import ShapeInferencePass

from qgraph.graph.reading import dims
from qgraph.io.session import open_session, run

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
DYNAMIC_DIM = 3
"""What `feed` puts in place of a symbolic dimension."""


def weight(name: str, *shape: int, seed: int = 0, spread: float = 1.0) -> ir.TensorProtocol:
    """A Gaussian float32 weight scaled by its fan-in; each name draws other numbers.

    Args:
        spread: ratio between the largest and the smallest output channel (last axis of a matrix,
            first of anything else); above 1, per-channel scales pay.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    fan_in = shape[0] if len(shape) == 2 else int(np.prod(shape[1:]))
    data = rng.standard_normal(shape) / np.sqrt(max(fan_in, 1))
    channels = -1 if len(shape) == 2 else 0
    along = [1] * len(shape)
    along[channels] = shape[channels]
    data *= np.geomspace(1.0, spread, shape[channels]).reshape(along)
    return ir.Tensor(data.astype(np.float32), name=name)


def parsed(text: str, *tensors: ir.TensorProtocol) -> ir.Model:
    """A model from the textual syntax of ONNX and these initializers, as it is written.

    Args:
        text: of the graph, or of the model if it begins with a header of its own.
    """
    header = "" if text.lstrip().startswith("<") else HEADER
    proto = onnx.parser.parse_model(header + text)
    for tensor in tensors:
        initializer = ir.to_proto(tensor)
        assert isinstance(initializer, onnx.TensorProto)
        proto.graph.initializer.append(initializer)
    return ir.from_proto(proto)


def build(text: str, *tensors: ir.TensorProtocol) -> ir.Model:
    """A model as :func:`parsed` gives it, with shapes inferred."""
    model = parsed(text, *tensors)
    ShapeInferencePass()(model)
    return model


def mlp(widths: tuple[int, ...] = (16, 32, 8), *, seed: int = 0, spread: float = 1.0) -> ir.Model:
    """x -> (MatMul -> Add -> Relu)... -> y, no Relu at the end; the batch is symbolic."""
    tensors: list[ir.TensorProtocol] = []
    lines: list[str] = []
    last = len(widths) - 2
    value = "x"
    for i, (k, n) in enumerate(itertools.pairwise(widths)):
        tensors += [weight(f"w{i}", k, n, seed=seed, spread=spread), weight(f"b{i}", n, seed=seed)]
        lines += [f"m{i} = MatMul({value}, w{i})"]
        lines += [f"{'y' if i == last else f'a{i}'} = Add(m{i}, b{i})"]
        if i < last:
            lines += [f"h{i} = Relu(a{i})"]
        value = f"h{i}"
    signature = f"mlp (float[batch,{widths[0]}] x) => (float[batch,{widths[-1]}] y)"
    return build(signature + " {\n" + "\n".join(lines) + "\n}", *tensors)


def small_convnet(*, channels: int = 8, seed: int = 0, spread: float = 1.0) -> ir.Model:
    """Conv -> BatchNormalization -> Relu, a residual Conv + BatchNormalization, pooling, Gemm.

    Input x (batch, 3, 12, 12), output y (batch, 5).
    """
    c = channels
    rng = np.random.default_rng(seed)
    norms = {
        name: rng.uniform(low, high, c).astype(np.float32)
        for n in (1, 2)
        for name, low, high in (
            (f"g{n}", 0.5, 1.5),
            (f"t{n}", -0.5, 0.5),
            (f"m{n}", -0.5, 0.5),
            (f"v{n}", 0.5, 2.0),
        )
    }
    text = """
    convnet (float[batch,3,12,12] x) => (float[batch,5] y) {
      c1 = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w1)
      n1 = BatchNormalization (c1, g1, t1, m1, v1)
      r1 = Relu (n1)
      c2 = Conv <pads = [1,1,1,1]> (r1, w2)
      n2 = BatchNormalization (c2, g2, t2, m2, v2)
      sum = Add (n2, r1)
      r2 = Relu (sum)
      pool = GlobalAveragePool (r2)
      flat = Flatten (pool)
      y = Gemm <transB = 1> (flat, w3, b3)
    }"""
    weights = [
        weight("w1", c, 3, 3, 3, seed=seed, spread=spread),
        weight("w2", c, c, 3, 3, seed=seed, spread=spread),
        weight("w3", 5, c, seed=seed),
        weight("b3", 5, seed=seed),
    ]
    return build(text, *weights, *(ir.Tensor(data, name=name) for name, data in norms.items()))


def transformer_block(*, width: int = 16, seed: int = 0, outlier: float = 1.0) -> ir.Model:
    """One pre-norm block with a single attention head and a gated MLP.

    Input x (batch, time, width), output y of the same shape. `q`, `k`, `v` share one input, as do
    `gate` and `up`; the products of two computed values are the MatMuls `scores` and `mixed`.

    Args:
        outlier: factor on one channel of the first norm's weight, as in large language models.
    """
    d, h = width, 2 * width
    text = f"""
    block (float[batch,time,{d}] x) => (float[batch,time,{d}] y) {{
      n1 = LayerNormalization <axis = -1> (x, g1, b1)
      q = MatMul (n1, wq)
      k = MatMul (n1, wk)
      v = MatMul (n1, wv)
      kt = Transpose <perm = [0,2,1]> (k)
      scores = MatMul (q, kt)
      scaled = Div (scores, root)
      prob = Softmax <axis = -1> (scaled)
      mixed = MatMul (prob, v)
      o = MatMul (mixed, wo)
      ob = Add (o, bo)
      mid = Add (ob, x)
      n2 = LayerNormalization <axis = -1> (mid, g2, b2)
      gate = MatMul (n2, wgate)
      up = MatMul (n2, wup)
      act = Sigmoid (gate)
      silu = Mul (gate, act)
      gated = Mul (silu, up)
      down = MatMul (gated, wdown)
      y = Add (down, mid)
    }}"""
    norm = np.ones(d, np.float32)
    norm[d // 2] = outlier
    weights = [weight(f"w{n}", d, d, seed=seed) for n in "qkvo"]
    weights += [weight("wgate", d, h, seed=seed), weight("wup", d, h, seed=seed)]
    weights += [weight("wdown", h, d, seed=seed), weight("bo", d, seed=seed)]
    weights += [ir.Tensor(norm, name="g1"), ir.Tensor(np.ones(d, np.float32), name="g2")]
    weights += [weight("b1", d, seed=seed), weight("b2", d, seed=seed)]
    weights += [ir.Tensor(np.asarray(np.sqrt(d), np.float32), name="root")]
    return build(text, *weights)


def if_model(*, seed: int = 0) -> ir.Model:
    """An If whose branches hold a MatMul and a Gemm on weights of the main graph.

    Inputs flag (bool) and x (batch, 8), output y (batch, 4).
    """
    text = """
    choice (bool flag, float[batch,8] x) => (float[batch,4] y) {
      y = If (flag) <
        then_branch = yes () => (float[batch,4] y1) { y1 = MatMul (x, wa) },
        else_branch = no () => (float[batch,4] y2) { y2 = Gemm <transB = 1> (x, wb) }
      >
    }"""
    return build(text, weight("wa", 8, 4, seed=seed), weight("wb", 4, 8, seed=seed))


def feed(model: ir.Model, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs by name: Gaussian floats, integers 0 and 1, booleans."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        assert value.name is not None
        assert value.dtype is not None
        shape = [DYNAMIC_DIM if d is None else d for d in dims(value)]
        drawn = rng.standard_normal(shape)
        floating = value.dtype.is_floating_point()
        found[value.name] = np.asarray(drawn if floating else drawn > 0, value.dtype.numpy())
    return found


def outputs(model: ir.Model, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What the model computes in onnxruntime without its optimizations."""
    return run(open_session(model, optimized=False, threads=1), inputs)


def ops(model: ir.Model) -> list[str]:
    """Operator types of the main graph in order."""
    return [node.op_type for node in model.graph]


@st.composite
def random_graph(draw: st.DrawFn, max_nodes: int = 8) -> ir.Model:
    """A random float graph of MatMul, Gemm, Conv, Add, Relu, Concat, Transpose and Reshape.

    One input `x` (2-D or 4-D), shapes all known, some values used twice; every value that nothing
    uses is an output, so nothing is dead.
    """
    seed = draw(st.integers(0, 2**16))
    side = st.integers(1, 5)
    shape = draw(st.one_of(st.tuples(side, side), st.tuples(st.just(1), side, side, side)))
    x = ir.val("x", ir.DataType.FLOAT, shape)
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="random")
    values = [x]

    def constant(name: str, *size: int) -> ir.Value:
        return initializer(weight(name, *size, seed=seed))

    def initializer(tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(tensor.numpy().shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(value)
        return value

    for i in range(draw(st.integers(1, max_nodes))):
        a = draw(st.sampled_from(values))
        size = [d or 0 for d in dims(a)]
        same = [v for v in values if dims(v) == size]
        kinds = ["MatMul", "Add", "AddBias", "Relu", "Concat", "Transpose", "Reshape"]
        kinds += ["Gemm"] if len(size) == 2 else ["Conv"]
        kind = draw(st.sampled_from(kinds))
        inputs, attributes, result = [a], dict[str, int | list[int]](), list(size)
        if kind in ("MatMul", "Gemm"):
            n = draw(side)
            result = [*size[:-1], n]
            transposed = kind == "Gemm" and draw(st.booleans())
            inputs.append(constant(f"w{i}", *((n, size[-1]) if transposed else (size[-1], n))))
            if transposed:
                attributes["transB"] = 1
            if kind == "Gemm" and draw(st.booleans()):
                inputs.append(constant(f"b{i}", n))
        elif kind == "Conv":
            n = draw(side)
            kernel = 3 if draw(st.booleans()) else 1
            result = [size[0], n, *size[2:]]
            inputs.append(constant(f"w{i}", n, size[1], kernel, kernel))
            attributes["pads"] = [kernel // 2] * 4
            if draw(st.booleans()):
                inputs.append(constant(f"b{i}", n))
        elif kind == "Add":
            inputs.append(draw(st.sampled_from(same)))
        elif kind == "AddBias":
            inputs.append(constant(f"b{i}", size[-1]))
        elif kind == "Concat":
            axis = draw(st.integers(0, len(size) - 1))
            inputs.append(draw(st.sampled_from(same)))
            attributes["axis"] = axis
            result[axis] *= 2
        elif kind == "Transpose":
            permutation = draw(st.permutations(range(len(size))))
            attributes["perm"] = list(permutation)
            result = [size[p] for p in permutation]
        elif kind == "Reshape":
            result = [1, *size, 1] if len(size) == 2 else [size[0] * size[1], size[2] * size[3]]
            target = ir.Tensor(np.array(result, np.int64), name=f"shape{i}")
            inputs.append(initializer(target))
        output = ir.val(f"v{i}", ir.DataType.FLOAT, result)
        graph.append(
            ir.node(kind.removesuffix("Bias"), inputs, attributes, outputs=[output], name=f"n{i}")
        )
        values.append(output)
    graph.outputs.extend(v for v in values if not v.uses() and v.producer() is not None)
    return ir.Model(graph, ir_version=10)
