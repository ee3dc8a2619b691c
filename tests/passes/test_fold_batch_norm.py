"""Batch normalization and per-channel scales and shifts, folded into the operator before them."""

from __future__ import annotations

import re
from unittest.mock import Mock

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.graph.reading import array
from qgraph.graph.text.printer import to_text
from qgraph.io.session import open_session, run
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.fold_batch_norm import FoldBatchNorm, batch_norm_affine, scale_channels
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import PassManager
from qgraph.pipeline.target import Target
from tests.models import feed, if_model, ops, outputs, random_graph, small_convnet, weight

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'


def parse(text: str, *tensors: ir.TensorProtocol) -> ir.Model:
    """A model from ONNX's text; of the tensors, those that its nodes read."""
    body = re.findall(r"\w+", text.partition("{")[2])
    proto = onnx.parser.parse_model(HEADER + text)
    used = [tensor for tensor in tensors if tensor.name in body]
    proto.graph.initializer.extend(ir.serde.serialize_tensor(tensor) for tensor in used)
    return ir.from_proto(proto)


def norm(channels: int, seed: int = 0, **fixed: np.ndarray) -> list[ir.TensorProtocol]:
    """Parameters g, t, m, v of a normalization."""
    rng = np.random.default_rng(seed)
    drawn = {
        "g": rng.uniform(-1.5, 1.5, channels),
        "t": rng.uniform(-0.5, 0.5, channels),
        "m": rng.uniform(-0.5, 0.5, channels),
        "v": rng.uniform(0.1, 2.0, channels),
        **fixed,
    }
    return [ir.Tensor(data.astype(np.float32), name=name) for name, data in drawn.items()]


def folded(model: ir.Model, rtol: float = 1e-5) -> Context:
    """Fold in place, checking that the results stay."""
    given = feed(model)
    before = outputs(model, given)
    context = Context(target=Mock(spec=Target))
    PassManager([Canonicalize(), FoldBatchNorm()], verify=True).run(model, context)
    for optimized in (False, True):
        after = run(open_session(model, optimized=optimized, threads=1), given)
        for old, new in zip(before, after, strict=True):
            np.testing.assert_allclose(new, old, rtol=rtol, atol=rtol * np.abs(old).max())
    return context


def test_golden_text() -> None:
    model = parse(
        """
    f (float[1,1,2,2] x) => (float[1,2,2,2] y)
    <float[2,1,1,1] w = {1, 2}, float[2] b = {1, 1}, float[2] g = {2, 0}, float[2] t = {1, 3},
     float[2] m = {1, 0}, float[2] v = {1, 4}, float[2,1,1] c = {10, 20}> {
      h = Conv (x, w, b)
      n = BatchNormalization <epsilon = 0.0> (h, g, t, m, v)
      a = Add (n, c)
      y = Relu (a)
    }"""
    )
    context = folded(model)
    assert (
        to_text(model)
        == """\
ir_version = 8

graph f {
  opset 17
  input %x: f32[1, 1, 2, 2]
  weight %w_1_1 = f32[2, 1, 1, 1] {2.0, 0.0}
  weight %h_bias_1 = f32[2] {11.0, 23.0}
  %h: f32[1, 2, 2, 2] = Conv(%x, %w_1_1, %h_bias_1)
  %y: f32[1, 2, 2, 2] = Relu(%h)
  output %y: f32[1, 2, 2, 2]
}
"""
    )
    norm_remark = next(r for r in context.remarks if "BatchNormalization" in r.message)
    assert norm_remark.numbers == {"channels": 2, "zero_channels": 1}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_convolutions(op: str, groups: int, bias: bool) -> None:
    """A ConvTranspose holds its output channels on axis 1, one group's at a time."""
    shape = (12, 6 // groups, 3, 3) if op == "Conv" else (6, 12 // groups, 3, 3)
    b = "float[12] b," if bias else ""
    model = parse(
        f"""
    f (float[1,6,7,7] x) => (float[1,12,k,k] y)
    <float[{",".join(map(str, shape))}] w, {b}
     float[12] g, float[12] t, float[12] m, float[12] v> {{
      h = {op} <group = {groups}, pads = [1,1,1,1]> (x, w{", b" if bias else ""})
      y = BatchNormalization (h, g, t, m, v)
    }}""",
        weight("w", *shape),
        *([weight("b", 12)] if bias else []),
        *norm(12),
    )
    folded(model)
    assert ops(model) == [op]
    assert model.graph.outputs[0].name == "y"


@pytest.mark.parametrize("bias", ["", ", b", ", row", ", one"])
@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(transposed: int, bias: str) -> None:
    shape = (5, 4) if transposed else (4, 5)
    model = parse(
        f"""
    f (float[3,4] x) => (float[3,5] y)
    <float[{shape[0]},{shape[1]}] w, float[5] b, float[1,5] row, float[1] one,
     float[5] g, float[5] t, float[5] m, float[5] v> {{
      h = Gemm <transB = {transposed}> (x, w{bias})
      y = BatchNormalization (h, g, t, m, v)
    }}""",
        weight("w", *shape),
        weight("b", 5),
        weight("row", 1, 5),
        weight("one", 1),
        *norm(5),
    )
    folded(model)
    assert ops(model) == ["Gemm"]


@pytest.mark.parametrize("bias", [False, True])
def test_matmul(bias: bool) -> None:
    add = "a = Add (b, h)" if bias else "a = Identity (h)"
    model = parse(
        f"""
    f (float[3,4] x) => (float[3,5] y)
    <float[4,5] w, float[5] b, float[5] g, float[5] t, float[5] m, float[5] v> {{
      h = MatMul (x, w)
      {add}
      y = BatchNormalization (a, g, t, m, v)
    }}""",
        weight("w", 4, 5),
        weight("b", 5),
        *norm(5),
    )
    folded(model)
    assert ops(model) == ["MatMul", "Add"]


def test_the_channels_of_a_matmul_of_rank_3_are_not_those_of_the_normalization() -> None:
    model = parse(
        """
    f (float[2,5,4] x) => (float[2,5,5] y)
    <float[4,5] w, float[5] g, float[5] t, float[5] m, float[5] v> {
      h = MatMul (x, w)
      y = BatchNormalization (h, g, t, m, v)
    }""",
        weight("w", 4, 5),
        *norm(5),
    )
    folded(model)
    assert ops(model) == ["MatMul", "BatchNormalization"]


@pytest.mark.parametrize(
    ("expression", "shape", "left"),
    [
        ("Add (h, c)", "3,1,1", []),
        ("Sub (h, c)", "1,3,1,1", []),
        ("Sub (c, h)", "3,1,1", []),
        ("Mul (c, h)", "1", []),
        ("Div (h, c)", "", []),
        ("Div (c, h)", "3,1,1", ["Div"]),
        ("Add (h, c)", "3", ["Add"]),
        ("Add (h, c)", "1,1,3,1,1", ["Add"]),
        ("Add (h, c)", "2,3,1,1", ["Add"]),
        ("Add (h, h)", "1", ["Add"]),
        ("Pow (h, c)", "1", ["Pow"]),
    ],
)
def test_scales_and_shifts(expression: str, shape: str, left: list[str]) -> None:
    kind = f"float[{shape}]" if shape else "float"
    size = [int(d) for d in shape.split(",") if d]
    c = np.random.default_rng(0).uniform(0.5, 2, size).astype(np.float32)
    model = parse(
        f"""
    f (float[1,2,3,3] x) => (float[k,3,3,3] y) <float[3,2,1,1] w, float[3] b, {kind} c> {{
      h = Conv (x, w, b)
      y = {expression}
    }}""".replace(
            "float[k,3,3,3]", "float[1,k,3,3,3]" if shape == "1,1,3,1,1" else "float[k,3,3,3]"
        ),
        weight("w", 3, 2, 1, 1),
        ir.Tensor(np.full(3, 5, np.float32), name="b"),
        ir.Tensor(c, name="c"),
    )
    folded(model)
    assert ops(model) == ["Conv", *left]


def test_a_division_by_zero_stays() -> None:
    model = parse(
        """
    f (float[1,1,1,1] x) => (float[1,1,1,1] y) <float[1,1,1,1] w = {1}, float c = {0}> {
      h = Conv (x, w)
      y = Div (h, c)
    }"""
    )
    PassManager([Canonicalize(), FoldBatchNorm()]).run(model, Context(target=Mock(spec=Target)))
    assert ops(model) == ["Conv", "Div"]


@pytest.mark.parametrize("reader", ["z = Relu (h)", "z = Identity (h)"])
def test_what_others_read_stays(reader: str) -> None:
    model = parse(
        f"""
    f (float[1,2,3,3] x) => (float[1,4,3,3] y, float[1,4,3,3] z)
    <float[4,2,1,1] w, float[4] g, float[4] t, float[4] m, float[4] v> {{
      h = Conv (x, w)
      y = BatchNormalization (h, g, t, m, v)
      {reader}
    }}""",
        weight("w", 4, 2, 1, 1),
        *norm(4),
    )
    folded(model)
    assert "BatchNormalization" in ops(model)


def test_a_weight_shared_by_two_convolutions_is_not_changed_for_the_other() -> None:
    model = parse(
        """
    f (float[1,2,3,3] x) => (float[1,4,3,3] y, float[1,4,3,3] z)
    <float[4,2,1,1] w, float[4] g, float[4] t, float[4] m, float[4] v> {
      h = Conv (x, w)
      y = BatchNormalization (h, g, t, m, v)
      z = Conv (x, w)
    }""",
        weight("w", 4, 2, 1, 1),
        *norm(4),
    )
    folded(model)
    assert ops(model) == ["Conv", "Conv"]


def test_dead_channels_become_zeros_and_nothing_is_nan() -> None:
    """As in EfficientNet-lite0: weights, means and variances all near zero, some scales zero."""
    gamma = np.array([0, 1, 1e-7, 1], np.float32)
    var = np.array([0, 1e-12, 1e-30, 1], np.float32)
    tensor = weight("w", 4, 2, 1, 1).numpy() * np.array([1, 1e-6, 1e-20, 1]).reshape(4, 1, 1, 1)
    model = parse(
        """
    f (float[1,2,3,3] x) => (float[1,4,3,3] y)
    <float[4,2,1,1] w, float[4] g, float[4] t, float[4] m, float[4] v> {
      h = Conv (x, w)
      y = BatchNormalization (h, g, t, m, v)
    }""",
        ir.Tensor(tensor.astype(np.float32), name="w"),
        *norm(4, g=gamma, v=var),
    )
    context = folded(model)
    assert ops(model) == ["Conv"]
    found = array(model.graph[0].inputs[1])
    assert found is not None
    assert np.isfinite(found).all()
    assert not found[0].any()
    assert context.remarks[-1].numbers["zero_channels"] == 1


def test_a_variance_that_has_no_root_is_declined() -> None:
    model = parse(
        """
    f (float[1,2,3,3] x) => (float[1,4,3,3] y)
    <float[4,2,1,1] w, float[4] g, float[4] t, float[4] m, float[4] v> {
      h = Conv (x, w)
      y = BatchNormalization <epsilon = 0.0> (h, g, t, m, v)
    }""",
        weight("w", 4, 2, 1, 1),
        *norm(4, v=np.array([1, 0, 1, -1], np.float32)),
    )
    context = Context(target=Mock(spec=Target))
    PassManager([Canonicalize(), FoldBatchNorm()]).run(model, context)
    assert ops(model) == ["Conv", "BatchNormalization"]
    assert context.remarks[-1].kind == "declined"


def test_half_floats() -> None:
    half = [
        ir.Tensor(t.numpy().astype(np.float16), name=t.name)
        for t in (weight("w", 4, 2, 1, 1), *norm(4))
    ]
    model = parse(
        """
    f (float16[1,2,3,3] x) => (float16[1,4,3,3] y)
    <float16[4,2,1,1] w, float16[4] g, float16[4] t, float16[4] m, float16[4] v> {
      h = Conv (x, w)
      y = BatchNormalization (h, g, t, m, v)
    }""",
        *half,
    )
    given = feed(model)
    before = outputs(model, given)[0]
    PassManager([Canonicalize(), FoldBatchNorm()]).run(model, Context(target=Mock(spec=Target)))
    assert ops(model) == ["Conv"]
    np.testing.assert_allclose(outputs(model, given)[0], before, rtol=1e-2, atol=1e-2)


def test_training_stays() -> None:
    model = parse(
        """
    f (float[2,2,3,3] x) => (float[2,4,3,3] y, float[4] rm)
    <float[4,2,1,1] w, float[4] g, float[4] t, float[4] m, float[4] v> {
      h = Conv (x, w)
      y, rm, rv = BatchNormalization <training_mode = 1> (h, g, t, m, v)
    }""",
        weight("w", 4, 2, 1, 1),
        *norm(4),
    )
    PassManager([Canonicalize(), FoldBatchNorm()]).run(model, Context(target=Mock(spec=Target)))
    assert ops(model) == ["Conv", "BatchNormalization"]


def test_the_bodies_of_control_flow_are_visited() -> None:
    model = parse(
        """
    f (bool c, float[1,2,3,3] x) => (float[1,4,3,3] y)
    <float[4,2,1,1] w, float[4] g, float[4] t, float[4] m, float[4] v> {
      y = If (c) <
        then_branch = a () => (float[1,4,3,3] o) {
          h = Conv (x, w)
          o = BatchNormalization (h, g, t, m, v)
        },
        else_branch = b () => (float[1,4,3,3] o) { k = Conv (x, w) o = Relu (k) }>
    }""",
        weight("w", 4, 2, 1, 1),
        *norm(4),
    )
    folded(model)
    assert [node.op_type for node in model.graph.all_nodes()] == ["If", "Conv", "Conv", "Relu"]


def test_other_models() -> None:
    convnet = small_convnet()
    folded(convnet)
    assert "BatchNormalization" not in ops(convnet)
    folded(if_model())


@settings(deadline=None, max_examples=25)
@given(random_graph(), st.data())
def test_random_graphs_with_normalizations_keep_their_results(
    model: ir.Model, data: st.DataObject
) -> None:
    """A normalization behind a random value of rank 2 or 4."""
    graph = model.graph
    values = [v for n in graph for v in n.outputs if v.shape is not None and len(v.shape) in (2, 4)]
    if values:
        value = data.draw(st.sampled_from(values))
        assert value.shape is not None
        parameters = norm(int(str(value.shape[1])), data.draw(st.integers(0, 9)))
        inputs = [value]
        for tensor in parameters:
            initializer = ir.Value(
                name=tensor.name,
                shape=ir.Shape(tensor.shape.numpy()),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            graph.register_initializer(initializer)
            inputs.append(initializer)
        node = ir.node("BatchNormalization", inputs)
        node.outputs[0].name = "normalized"
        node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
        graph.append(node)
        graph.outputs.append(node.outputs[0])
        if data.draw(st.booleans()) and value.is_graph_output() and len(graph.outputs) > 1:
            graph.outputs.remove(value)
    folded(model, rtol=1e-4)


def test_pure_functions() -> None:
    one = np.ones(2, np.float32)
    scale, shift = batch_norm_affine(2 * one, one, 3 * one, 4 * one, 0.0)
    np.testing.assert_array_equal(scale, [1, 1])
    np.testing.assert_array_equal(shift, [-2, -2])
    grouped = scale_channels(np.ones((4, 2, 1), np.float32), np.arange(1, 5.0), axis=1, groups=2)
    np.testing.assert_array_equal(grouped[:, :, 0], [[1, 2], [1, 2], [3, 4], [3, 4]])
    rows = scale_channels(np.ones((3, 2), np.float32), np.arange(3.0), axis=0)
    np.testing.assert_array_equal(rows, [[0, 0], [1, 1], [2, 2]])
