"""Graphs that people bring and that no exporter of today makes: each compiles, runs and agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

import qgraph
from qgraph.errors import ModelError
from qgraph.io.session import open_session, use_custom_ops
from qgraph.numerics.noise import sqnr_db
from tests.models import HEADER, build, parsed, weight

LEVELS = (False, True)


def session(model: str | bytes, optimized: bool) -> Any:
    """onnxruntime as users run it, nothing of ours between."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def written(
    model: ir.Model,
    folder: Path,
    recipe: str,
    target: str,
    calibration: Sequence[Mapping[str, np.ndarray]] | None = None,
    **parameters: Any,
) -> Path:
    """The file that compiling `model` gives."""
    compiled = qgraph.compile(model, recipe, calibration, target, **parameters)
    return compiled.save(folder / "out.onnx")


def check(
    model: ir.Model, file: Path, feeds: Sequence[Mapping[str, np.ndarray]], decibels: float
) -> None:
    """The file agrees with the float model at both optimization levels, in shapes and values."""
    plain = session(ir.to_proto(model).SerializeToString(), False)
    for optimized in LEVELS:
        quantized = session(str(file), optimized)
        for feed in feeds:
            for ours, theirs in zip(quantized.run(None, feed), plain.run(None, feed), strict=True):
                assert ours.shape == theirs.shape
                assert ours.dtype == theirs.dtype
                if theirs.size:
                    assert sqnr_db(theirs, ours) > decibels


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- shapes and symbols that lie ------------------------------------------------------------------


def two_towers(middle: str = "Relu({})") -> ir.Model:
    """Both inputs call their first axis `batch`, as exporters do, and nothing makes them agree."""
    return build(
        f"""towers (float[batch,64] a, float[batch,64] b) => (float[p,q] y, float[batch,32] z) {{
            ha = MatMul(a, wa)
            ra = {middle.format("ha")}
            ya = MatMul(ra, va)
            hb = MatMul(b, wb)
            rb = {middle.format("hb")}
            z = MatMul(rb, vb)
            zt = Transpose <perm = [1, 0]> (z)
            y = MatMul(ya, zt)
        }}""",
        *(weight(name, 64, 64) for name in ("wa", "wb")),
        *(weight(name, 64, 32) for name in ("va", "vb")),
    )


@pytest.mark.parametrize("target", ["onnx", "cpu:avx2"])
@pytest.mark.parametrize("recipe", ["dynamic", "rtn"])
def test_two_inputs_call_their_batches_alike(recipe: str, target: str, tmp_path: Path) -> None:
    model = two_towers()
    feed = {"a": normal(2, 64), "b": normal(3, 64, seed=1)}
    check(model, written(model, tmp_path, recipe, target), [feed], 15)


def test_tokens_that_provably_agree_share_their_zero_points(tmp_path: Path) -> None:
    """One Expand for each tower: its two products have the same tokens."""
    file = written(two_towers("Mul({0}, {0})"), tmp_path, "dynamic", "cpu:avx2")
    operators = [node.op_type for node in onnx.load(file).graph.node]
    assert operators.count("Expand") == 2


def test_symbols_of_inputs_that_meet_stay_as_they_are(tmp_path: Path) -> None:
    model = build(
        """m (float[batch,64] a, float[batch,64] b) => (float[batch,48] y) {
            h = Add(a, b)
            y = MatMul(h, w)
        }""",
        weight("w", 64, 48),
    )
    result = onnx.load(written(model, tmp_path, "dynamic", "onnx"))
    assert result.graph.input == ir.to_proto(model).graph.input


def stale() -> ir.Model:
    """A free batch, and inner shapes of the batch of 1 that an exporter saw."""
    model = build(
        """m (float[b,64] x) => (float[b,48] y) {
            h = MatMul(x, w)
            r = Relu(h)
            shape = Shape(r)
            s = Reshape(r, shape)
            y = MatMul(s, v)
        }""",
        weight("w", 64, 64),
        weight("v", 64, 48),
    )
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output() and value.shape is not None and len(value.shape) == 2:
                value.shape = ir.Shape([1, 64])
    return model


@pytest.mark.parametrize("target", ["onnx", "cpu:avx2"])
@pytest.mark.parametrize("recipe", ["dynamic", "static", "rtn"])
def test_inner_shapes_that_are_wrong(recipe: str, target: str, tmp_path: Path) -> None:
    model = stale()
    proto = ir.to_proto(model)
    file = written(model, tmp_path, recipe, target, [{"x": normal(4, 64)}])
    check(stale(), file, [{"x": normal(4, 64)}], 15)
    result = onnx.load(file)
    assert result.graph.input == proto.graph.input
    assert result.graph.output == proto.graph.output
    assert not result.graph.value_info


# --- control flow ---------------------------------------------------------------------------------

IN_IF = """m (float[b,64] x, bool c) => (float[b,48] y) {
    h = If (c) <
        then_branch = t () => (float[b,64] p) { p = MatMul(x, w) },
        else_branch = e () => (float[b,64] q) {
            n = Neg(x)
            o = MatMul(n, w)
            r = Relu(o)
            q = MatMul(r, own)
        }
    >
    y = MatMul(h, v)
}"""
IN_LOOP = """m (float[b,64] x, int64 times, bool c) => (float[b,48] y) {
    h = Loop (times, c, x) <
        body = l (int64 i, bool go, float[b,64] s) => (bool on, float[b,64] t) {
            on = Identity(go)
            o = MatMul(s, w)
            r = Relu(o)
            t = MatMul(r, own)
        }
    >
    y = MatMul(h, v)
}"""
IN_SCAN = """m (float[n,64] x, float[64] state) => (float[n,48] y) {
    last, h = Scan <
        num_scan_inputs = 1,
        body = l (float[64] s, float[64] e) => (float[64] u, float[64] t) {
            a = Add(s, e)
            row = Unsqueeze(a, zero)
            o = MatMul(row, w)
            r = Relu(o)
            p = MatMul(r, own)
            t = Squeeze(p, zero)
            u = Identity(t)
        }
    > (state, x)
    y = MatMul(h, v)
}"""
BODIES = {
    "if": (IN_IF, {"x": normal(4, 64), "c": np.array(True)}),
    "else": (IN_IF, {"x": normal(4, 64), "c": np.array(False)}),
    "loop": (IN_LOOP, {"x": normal(4, 64), "times": np.array(2), "c": np.array(True)}),
    "scan": (IN_SCAN, {"x": normal(4, 64), "state": normal(64, seed=1)}),
}


@pytest.mark.parametrize("target", ["onnx", "cpu:avx2"])
@pytest.mark.parametrize("recipe", ["rtn", "hqq", "nf4", "static"])
@pytest.mark.parametrize("name", BODIES)
def test_products_in_bodies_of_control_flow(
    name: str, recipe: str, target: str, tmp_path: Path
) -> None:
    text, feed = BODIES[name]
    tensors = [weight("w", 64, 64), weight("own", 64, 64), weight("v", 64, 48)]
    zero = ir.Tensor(np.array([0], np.int64), name="zero")
    model = build(text, *tensors, *([zero] if name == "scan" else []))
    check(model, written(model, tmp_path, recipe, target, [feed]), [feed], 10)


def test_bodies_keep_no_constants_that_nothing_reads(tmp_path: Path) -> None:
    """Of each, onnxruntime warns whenever it loads the model."""
    model = build(
        """m (float[b,64] x, bool c) => (float[b,64] y) {
            y = If (c) <
                then_branch = t () => (float[b,64] p) {
                    one = Constant <value = int64[1] {1}> ()
                    two = Add(one, one)
                    shape = Concat <axis = 0> (nowhere, two)
                    h = MatMul(x, w)
                    s = Cast <to = 1> (shape)
                    t = ReduceSum <keepdims = 0> (s)
                    p = Add(h, t)
                },
                else_branch = e () => (float[b,64] q) { q = MatMul(x, w) }
            >
        }""",
        weight("w", 64, 64),
        ir.Tensor(np.array([3], np.int64), name="nowhere"),
    )
    written_model = ir.load(written(model, tmp_path, "dynamic", "onnx"))
    kept = [v for graph in written_model.graphs() for v in graph.initializers.values()]
    assert all(value.uses() for value in kept)


# --- operators that are older or newer than kernels -----------------------------------------------


def of_opset(version: int, text: str, *tensors: ir.TensorProtocol) -> ir.Model:
    """A model as :func:`parsed` gives it, of another opset and of the IR version of its time."""
    model = parsed(text, *tensors)
    model.opset_imports[""], model.ir_version = version, 10 if version > 20 else 8
    return model


@pytest.mark.parametrize("recipe", ["dynamic", "static", "rtn"])
def test_an_opset_that_cannot_be_raised(recipe: str, tmp_path: Path) -> None:
    """Before opset 9, Scan has a batch axis and an input more."""
    text = """m (float[2,t,64] x, float[2,64] h) => (float[2,t,48] y) {
        last, z = Scan <
            num_scan_inputs = 1,
            body = l (float[64] s, float[64] e) => (float[64] u, float[64] o) {
                u = Add(s, e)
                o = Identity(u)
            }
        > (, h, x)
        y = MatMul(z, w)
    }"""
    model = of_opset(8, text, weight("w", 64, 48))
    model.ir_version = 4
    feed = {"x": normal(2, 5, 64), "h": np.zeros((2, 64), np.float32)}
    compiled = qgraph.compile(model, recipe, [feed], "onnx")
    check(model, compiled.save(tmp_path / "out.onnx"), [feed], 100)
    assert "opset 8 has no scales" in next(iter(compiled.remarks.verdicts().values())).message


@pytest.mark.parametrize("target", ["onnx", "cpu:avx2"])
@pytest.mark.parametrize("apart", [1, 2])
def test_pools_with_dilations(apart: int, target: str, tmp_path: Path) -> None:
    text = f"""m (float[1,16,16,16] x) => (float[p,q,r,s] y) {{
        a = Conv <pads = [1, 1, 1, 1]> (x, w)
        p = AveragePool <kernel_shape = [2, 2], dilations = [{apart}, {apart}]> (a)
        y = Conv <pads = [1, 1, 1, 1]> (p, v)
    }}"""
    model = build(text, weight("w", 16, 16, 3, 3), weight("v", 16, 16, 3, 3))
    feed = {"x": normal(1, 16, 16, 16)}
    check(model, written(model, tmp_path, "static", target, [feed]), [feed], 30)


@pytest.mark.parametrize("recipe", ["static", "gptq", "smoothquant"])
def test_an_input_that_masks_with_infinities(recipe: str, tmp_path: Path) -> None:
    model = build(
        """m (float[b,64] x, float[b,48] mask) => (float[b,32] y) {
            h = MatMul(x, w)
            a = Add(h, mask)
            p = Softmax <axis = -1> (a)
            y = MatMul(p, v)
        }""",
        weight("w", 64, 48),
        weight("v", 48, 32),
    )
    mask = np.zeros((4, 48), np.float32)
    mask[:, 40:] = -np.inf
    feed = {"x": normal(4, 64), "mask": mask}
    check(model, written(model, tmp_path, recipe, "onnx", [feed]), [feed], 10)


# --- values at the edge ---------------------------------------------------------------------------


def scaled(tensor: ir.TensorProtocol, factor: float) -> ir.TensorProtocol:
    return ir.Tensor((tensor.numpy() * np.float64(factor)).astype(np.float32), name=tensor.name)


@pytest.mark.parametrize("recipe", ["dynamic", "rtn", "static", "gptq", "awq", "nf4"])
@pytest.mark.parametrize("factor", [1e-44, 1e-38, 1e-20, 1e30])
def test_weights_of_extreme_size(factor: float, recipe: str, tmp_path: Path) -> None:
    text = "m (float[b,64] x) => (float[b,48] y) { y = MatMul(x, w) }"
    model = build(text, scaled(weight("w", 64, 48), factor))
    feed = {"x": normal(8, 64)}
    compiled = qgraph.compile(model, recipe, [feed], "onnx")
    check(model, compiled.save(tmp_path / "out.onnx"), [feed], 15)
    (verdict,) = compiled.remarks.verdicts().values()
    assert verdict.kind == "float"
    assert ("are all below" if factor < 1 else "weights above") in verdict.message


@pytest.mark.parametrize("target", ["onnx", "cpu:avx2"])
@pytest.mark.parametrize("recipe", ["dynamic", "static"])
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_data_of_extreme_size(factor: float, recipe: str, target: str, tmp_path: Path) -> None:
    model = build(
        """m (float[b,8,6,6] x) => (float[b,p,6,6] c, float[b,8,6,16] y) {
            small = Mul(x, s)
            c = Conv <pads = [1, 1, 1, 1]> (small, k)
            y = MatMul(small, w)
        }""",
        weight("k", 8, 8, 3, 3),
        weight("w", 6, 16),
        ir.Tensor(np.array([factor], np.float32), name="s"),
    )
    feed = {"x": normal(2, 8, 6, 6)}
    check(model, written(model, tmp_path, recipe, target, [feed]), [feed], 25)


@pytest.mark.parametrize("target", ["onnx", "cpu:avx2"])
def test_infinities_in_a_bias_and_in_a_weight(target: str, tmp_path: Path) -> None:
    bias = weight("b", 48).numpy().copy()
    bias[[3, 7]] = -np.inf
    kernel = weight("k", 4, 3, 3, 3).numpy().copy()
    kernel[2, 1, 0, 0] = np.inf
    model = build(
        """m (float[n,64] x, float[n,3,6,6] z) => (float[n,48] y, float[n,4,4,4] c) {
            y = Gemm(x, w, b)
            c = Conv(z, k)
        }""",
        weight("w", 64, 48),
        ir.Tensor(bias, name="b"),
        ir.Tensor(kernel, name="k"),
    )
    feed = {"x": normal(4, 64), "z": np.abs(normal(4, 3, 6, 6)) + 0.1}
    file = written(model, tmp_path, "static", target, [feed])
    for optimized in LEVELS:
        y, c = session(str(file), optimized).run(None, feed)
        assert np.isneginf(y[:, [3, 7]]).all()
        assert np.isposinf(c[:, 2]).all()
        assert np.isfinite(np.delete(y, [3, 7], 1)).all()


# --- data that is sent different ways -------------------------------------------------------------


def routed(experts: int = 3) -> ir.Model:
    """A router sends each token to one expert, whose result goes where the token was."""
    lines = ["h = MatMul(x, w)", "l = MatMul(h, router)"]
    lines += ["way = ArgMax <axis = 1, keepdims = 0> (l)", "s0 = Mul(h, zero)"]
    tensors = [weight("w", 16, 16), weight("router", 16, experts)]
    tensors.append(ir.Tensor(np.zeros(1, np.float32), name="zero"))
    for e in range(experts):
        tensors += [weight(f"up{e}", 16, 32), weight(f"down{e}", 32, 16)]
        tensors.append(ir.Tensor(np.array(e, np.int64), name=f"n{e}"))
        lines += [
            f"is{e} = Equal(way, n{e})",
            f"at{e} = NonZero(is{e})",
            f"i{e} = Transpose <perm = [1, 0]> (at{e})",
            f"t{e} = GatherND(h, i{e})",
            f"u{e} = MatMul(t{e}, up{e})",
            f"r{e} = Relu(u{e})",
            f"d{e} = MatMul(r{e}, down{e})",
            f"s{e + 1} = ScatterND(s{e}, i{e}, d{e})",
        ]
    lines.append(f"y = Identity(s{experts})")
    text = "m (float[n,16] x) => (float[n,16] y) {\n" + "\n".join(lines) + "\n}"
    return build(text, *tensors)


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [("gptq", {}), ("adaround", {"steps": 2}), ("autoround", {"steps": 2}), ("awq", {})],
)
def test_tokens_that_rounding_sends_elsewhere(
    recipe: str, parameters: dict[str, int], tmp_path: Path
) -> None:
    if recipe.endswith("round"):
        pytest.importorskip("torch")
    feeds = [{"x": normal(64, 16, seed=seed)} for seed in range(2)]
    file = written(routed(), tmp_path, recipe, "cpu:avx2", feeds, **parameters)
    check(routed(), file, feeds, 0)
    for optimized in LEVELS:  # no tokens at all, and experts to which none are sent
        for few in (0, 1):
            (y,) = session(str(file), optimized).run(None, {"x": normal(few, 16)})
            assert y.shape == (few, 16)


# --- types that are no dense tensors --------------------------------------------------------------


def sparse(name: str, *, flat: bool = True) -> tuple[onnx.SparseTensorProto, np.ndarray]:
    """A weight (16, 8) with five elements that are not 0."""
    dense = np.zeros((16, 8), np.float32)
    places = np.array([3, 20, 41, 77, 127])
    dense.reshape(-1)[places] = [1, -2, 3, 4, -5]
    indices = places if flat else np.stack(np.unravel_index(places, dense.shape), 1)
    values = numpy_helper.from_array(dense.reshape(-1)[places], name)
    given = numpy_helper.from_array(indices.astype(np.int64), f"{name}_at")
    return onnx.helper.make_sparse_tensor(values, given, dense.shape), dense


@pytest.mark.parametrize("flat", [True, False])
def test_sparse_weights_are_made_dense(flat: bool, tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        HEADER + "m (float[n,16] x) => (float[n,8] y, float[n,8] z) { y = MatMul(x, w) }"
    )
    tensor, dense = sparse("w", flat=flat)
    proto.graph.sparse_initializer.append(tensor)
    proto.graph.node.extend(
        [
            onnx.helper.make_node("Constant", [], ["v"], sparse_value=sparse("v", flat=flat)[0]),
            onnx.helper.make_node("MatMul", ["x", "v"], ["z"]),
        ]
    )
    onnx.save(proto, tmp_path / "m.onnx")
    compiled = qgraph.compile(tmp_path / "m.onnx", "dynamic", target="onnx")
    x = normal(4, 16)
    for y in session(str(compiled.save(tmp_path / "out.onnx")), True).run(None, {"x": x}):
        assert sqnr_db(x @ dense, y) > 30
    assert len(compiled.remarks.verdicts()) == 2


def test_sparse_weights_that_do_not_fit(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        HEADER + "m (float[n,16] x) => (float[n,8] y) { y = MatMul(x, w) }"
    )
    tensor, _ = sparse("w")
    tensor.dims[:] = [2, 8]
    proto.graph.sparse_initializer.append(tensor)
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="'w' has indices outside its shape"):
        qgraph.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("target", ["onnx", "cpu:avx2"])
@pytest.mark.parametrize("recipe", ["dynamic", "static", "rtn"])
def test_maps_and_sequences_stay_behind_what_is_quantized(
    recipe: str, target: str, tmp_path: Path
) -> None:
    """As scikit-learn's classifiers end: a list of maps from labels to scores."""
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21, "ai.onnx.ml" : 1]>
        m (float[n,16] x) => (int64[n] label, seq(float[n]) parts, float[n,4] scores) {
            h = MatMul(x, w)
            scores = Softmax <axis = 1> (h)
            label = ArgMax <axis = 1, keepdims = 0> (scores)
            parts = SplitToSequence <axis = 1, keepdims = 0> (h)
            maps = ai.onnx.ml.ZipMap <classlabels_int64s = [3, 5, 7, 9]> (scores)
        }"""
    )
    proto.graph.initializer.append(numpy_helper.from_array(weight("w", 16, 4).numpy(), "w"))
    output = proto.graph.output.add(name="maps")
    output.type.sequence_type.elem_type.map_type.key_type = onnx.TensorProto.INT64
    element = output.type.sequence_type.elem_type.map_type.value_type
    element.tensor_type.elem_type = onnx.TensorProto.FLOAT
    onnx.save(proto, tmp_path / "m.onnx")
    feed = {"x": normal(3, 16)}
    model = qgraph.load(tmp_path / "m.onnx")
    compiled = qgraph.compile(model, recipe, [feed], target, verify=True)
    file = compiled.save(tmp_path / "out.onnx")
    assert onnx.load(file).graph.output == proto.graph.output
    assert [r.kind for r in compiled.remarks.verdicts().values()] == ["quantized"]
    wanted = session(str(tmp_path / "m.onnx"), False).run(None, feed)[3]
    for optimized in LEVELS:
        _, parts, _, maps = session(str(file), optimized).run(None, feed)
        assert len(parts) == 4
        for ours, theirs in zip(maps, wanted, strict=True):
            assert ours == pytest.approx(theirs, abs=0.05)


# --- what is stored -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["onnx", "cpu:avx2"])
@pytest.mark.parametrize("recipe", ["nf4", "fp4"])
def test_a_small_model_does_not_get_larger(recipe: str, target: str, tmp_path: Path) -> None:
    text = "m (float[b,64] x) => (float[b,32] y) { y = MatMul(x, w) }"
    model = build(text, weight("w", 64, 32))
    feed = {"x": normal(4, 64)}
    file = written(model, tmp_path, recipe, target)
    check(model, file, [feed], 12)
    assert file.stat().st_size < 0.7 * 64 * 32 * 4


SHARED = {
    "pyramid": (
        """m (float[b,8,16,16] x) => (float[b,8,16,16] y, float[b,8,8,8] z) {
            a = Conv <pads = [1, 1, 1, 1]> (x, k, bias)
            y = Relu(a)
            down = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)
            far = Mul(down, ten)
            b = Conv <pads = [1, 1, 1, 1]> (far, k, bias)
            z = Relu(b)
        }""",
        {"x": normal(1, 8, 16, 16)},
    ),
    "branches": (
        """m (float[b,64] x, bool c) => (float[b,32] y) {
            o = MatMul(x, w)
            h = If (c) <
                then_branch = t () => (float[b,32] p) { p = MatMul(x, w) },
                else_branch = e () => (float[b,32] q) {
                    n = Neg(x)
                    q = MatMul(n, w)
                }
            >
            y = Add(o, h)
        }""",
        {"x": normal(4, 64), "c": np.array(True)},
    ),
    "tied": (
        """m (int64[n] ids) => (float[n,1024] y) {
            e = Gather(t, ids)
            y = Gemm <transB = 1> (e, t)
        }""",
        {"ids": np.arange(8)},
    ),
}


@pytest.mark.parametrize("target", ["onnx", "cpu:avx2"])
@pytest.mark.parametrize("recipe", ["static", "dynamic"])
@pytest.mark.parametrize("name", SHARED)
def test_a_weight_is_stored_once(name: str, recipe: str, target: str, tmp_path: Path) -> None:
    text, feed = SHARED[name]
    tensors = [
        weight("k", 8, 8, 3, 3),
        weight("bias", 8),
        weight("w", 64, 32),
        weight("t", 1024, 64),
    ]
    tensors.append(ir.Tensor(np.array([10], np.float32), name="ten"))
    model = build(text, *(t for t in tensors if f"{t.name})" in text or f"{t.name}," in text))
    file = written(model, tmp_path, recipe, target, [feed])
    check(model, file, [feed], 25)
    kept = [tuple(tensor.dims) for tensor in onnx.load(file).graph.initializer]
    shape = {"pyramid": (8, 8, 3, 3), "branches": (64, 32), "tied": (1024, 64)}[name]
    assert kept.count(shape) + kept.count(shape[::-1]) == 1


def test_constants_of_one_element_stay_computed_before_range(tmp_path: Path) -> None:
    """onnxruntime's kernel takes one element of any rank, its checks of constants a scalar only."""
    model = build(
        """m (float[b,4] x) => (float[b,8] y, int64[k] r) {
            y = MatMul(x, w)
            shape = Shape(w)
            end = Slice(shape, one, two)
            r = Range(nought, end, step)
        }""",
        weight("w", 4, 8),
        *(ir.Tensor(np.array([n], np.int64), name=k) for k, n in (("one", 1), ("two", 2))),
        *(ir.Tensor(np.array(n, np.int64), name=k) for k, n in (("nought", 0), ("step", 1))),
    )
    file = written(model, tmp_path, "dynamic", "onnx")
    for optimized in LEVELS:
        assert session(str(file), optimized).run(["r"], {"x": normal(2, 4)})[0].tolist() == [
            *range(8)
        ]


@pytest.mark.parametrize("recipe", ["dynamic", "rtn"])
def test_products_that_have_no_kernel_say_why(recipe: str, tmp_path: Path) -> None:
    model = build(
        """m (float[b,1,s,16] x, float[16,n] z) => (float[b,4,s,8] y, float[n,8] g) {
            y = MatMul(x, heads)
            g = Gemm <transA = 1> (z, w)
        }""",
        ir.Tensor(normal(4, 16, 8), name="heads"),
        weight("w", 16, 8),
    )
    compiled = qgraph.compile(model, recipe, target="onnx")
    said = {site: remark.message for site, remark in compiled.remarks.verdicts().items()}
    assert "a batch of matrices" in said["y"]
    assert "transposed" in said["g"]


# --- what onnxruntime cannot run ------------------------------------------------------------------


def test_the_float_model_is_tried_first() -> None:
    """A layout of LSTM that onnxruntime's kernel does not have."""
    model = parsed(
        """m (float[2,5,16] x) => (float[p,q,r,s] y) {
            h = MatMul(x, v)
            y = LSTM <hidden_size = 8, layout = 1> (h, w, u)
        }""",
        weight("v", 16, 16),
        weight("w", 1, 32, 16),
        weight("u", 1, 32, 8),
    )
    with pytest.raises(ModelError, match="cannot run the float model"):
        qgraph.compile(model, "gptq", [{"x": normal(2, 5, 16)}], "onnx")


FOREIGN = """<ir_version: 10, opset_import: ["" : 21, "my.custom" : 1]>
m (float[b,64] x) => (float[b,32] y) {
    h = MatMul(x, w)
    o = my.custom.Own(h)
    y = MatMul(o, v)
}"""


def test_foreign_operators_are_saved_with_a_warning(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(FOREIGN)
    shapes = {"w": (64, 64), "v": (64, 32)}
    for name, shape in shapes.items():
        proto.graph.initializer.append(numpy_helper.from_array(weight(name, *shape).numpy(), name))
    model = ir.from_proto(proto)
    compiled = qgraph.compile(model, "dynamic", target="onnx")
    file = compiled.save(tmp_path / "out.onnx")
    assert "Own" in [node.op_type for node in onnx.load(file).graph.node]
    assert compiled.remarks.verdicts()["h"].kind == "quantized"
    (warning,) = compiled.remarks.warnings()
    assert "saved without being loaded" in warning.message
    assert "'my.custom' as --custom-ops" in warning.message
    with pytest.raises(ModelError, match="give the library of 'my"):
        qgraph.compile(model, "static", [{"x": normal(2, 64)}], "onnx")


def test_what_is_no_library_of_operators(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none.so is no library of operators"):
        use_custom_ops(tmp_path / "none.so")


def test_a_result_is_loaded_and_run_at_both_levels(tmp_path: Path) -> None:
    model = build("m (float[b,64] x) => (float[b,32] y) { y = MatMul(x, w) }", weight("w", 64, 32))
    compiled = qgraph.compile(model, "dynamic", target="onnx")
    levels: list[bool] = []

    def opened(model: ir.Model | Path, *, optimized: bool = True, **others: Any) -> Any:
        levels.append(optimized)
        return open_session(model, optimized=optimized, **others)

    compiled.open_session = opened
    compiled.save(tmp_path / "out.onnx")
    assert set(levels) == {False, True}
    scale = next(v for k, v in compiled.model.graph.initializers.items() if k.endswith("w_scale"))
    scale.const_value = ir.Tensor(np.full(32, np.inf, np.float32), name=scale.name)
    with pytest.raises(ModelError, match="output 'y' of the result is not finite"):
        compiled.save(tmp_path / "bad.onnx")
    assert not (tmp_path / "bad.onnx").exists()
