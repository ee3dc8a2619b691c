"""Floats of 8 bits: their numerics, how they are written, and that every runtime takes them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qgraph.errors import QGraphError
from qgraph.io.models import load, save
from qgraph.io.session import open_session, run
from qgraph.numerics.noise import sqnr_db
from qgraph.numerics.reference import dequantize_float8, quantize_float8
from qgraph.numerics.spec import PerAxis, QuantSpec
from qgraph.numerics.tokens import rounded_data
from qgraph.passes.annotate import Annotate
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.lower import Lower
from qgraph.pipeline.pass_manager import Pass
from qgraph.recipes import get_recipe
from qgraph.recipes.weight_types import fp8
from qgraph.weights.formats import rounded_weight
from tests.models import build, feed, if_model, mlp, ops, outputs, small_convnet, weight
from tests.pipelines import CPU, ONNX, apply, body, both, golden, initializer

E4M3, E5M2 = ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2
TYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def product(k: int = 32, n: int = 6) -> ir.Model:
    text = f"g (float[batch,{k}] x) => (float[batch,{n}] y) {{ y = MatMul (x, w) }}"
    return build(text, weight("w", k, n, spread=3.0))


def committed(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    return tuple(step for step in passes if not isinstance(step, Lower))


# --- numerics -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "largest"), [(E4M3, 448), (E5M2, 57344)])
def test_casts_saturate(dtype: ir.DataType, largest: int) -> None:
    spec = QuantSpec(dtype)
    assert (spec.qmin, spec.qmax, spec.width) == (-largest, largest, 8)
    x = np.array([1e30, -1e30, 1.5 * largest, np.inf, 0, 1], np.float32)
    back = dequantize_float8(quantize_float8(x, np.float32(1), spec), np.float32(1))
    np.testing.assert_array_equal(back, [largest, -largest, largest, largest, 0, 1])


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float32, 7, elements=st.floats(-1e6, 1e6, width=32)),
    st.sampled_from([E4M3, E5M2]),
    st.sampled_from([0.01, 1.0, 300.0]),
)
def test_rounding_is_to_the_mantissa(x: np.ndarray, dtype: ir.DataType, scale: float) -> None:
    spec, step = QuantSpec(dtype), np.float32(scale)
    back = dequantize_float8(quantize_float8(x, step, spec), step)
    clipped = np.clip(x, spec.qmin * step, spec.qmax * step)
    half = 2.0**-4 if dtype == E4M3 else 2.0**-3
    least = 2.0**-10 if dtype == E4M3 else 2.0**-17
    assert (np.abs(back - clipped) <= np.abs(clipped) * half * 1.001 + least * step).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_onnxruntime_rounds_alike(dtype: ir.DataType) -> None:
    model = product()
    given_ = {"x": np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32) * 9}
    recipe = fp8(dtype="e4m3" if dtype == E4M3 else "e5m2", activations=True)
    apply(model, recipe.passes, [given_])
    spec = QuantSpec(dtype)
    scale = initializer(model, "x_scale")
    np.testing.assert_allclose(scale, np.abs(given_["x"]).max() / spec.qmax, rtol=1e-6)
    wide = {"x": given_["x"] * np.float32(1.7)}  # what calibration has not seen saturates
    x = dequantize_float8(quantize_float8(wide["x"], scale, spec), scale)
    w = rounded_weight(weight("w", 32, 6, spread=3.0).numpy(), QuantSpec(dtype, PerAxis(1)))
    for optimized in (False, True):
        found = run(open_session(model, optimized=optimized), wide)[0]
        np.testing.assert_allclose(found, x @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rounded_data(given_["x"], spec), dequantize_float8(
        quantize_float8(given_["x"], scale, spec), scale))  # fmt: skip


def test_the_spec_is_its_text() -> None:
    spec = QuantSpec(E4M3, PerAxis(1), observer="absmax")
    assert str(spec) == "float8e4m3fn per-axis(1) sym absmax"
    assert QuantSpec.parse(str(spec)) == spec


@pytest.mark.parametrize("changes", [{"symmetric": False}, {"bits": 4}])
def test_what_a_spec_refuses(changes: dict[str, object]) -> None:
    with pytest.raises(QGraphError, match="FLOAT8E4M3FN has neither fewer bits nor zero points"):
        QuantSpec(E4M3).with_(**changes)


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"dtype": "e3m4"}, "dtype 'e3m4' is unknown: use one of e4m3, e5m2"),
        ({"activations": 1}, "activations=1 is no bool"),
        ({"bits": 8}, "recipe 'fp8' has no parameter 'bits'"),
    ],
)
def test_what_fp8_refuses(parameters: dict[str, object], why: str) -> None:
    with pytest.raises(QGraphError, match=why):
        get_recipe("fp8", parameters)


# --- before and after -----------------------------------------------------------------------------


@pytest.mark.parametrize("target", [CPU, ONNX], ids=["cpu", "onnx"])
def test_before_and_after(target: object) -> None:
    model = product()
    context = apply(model, fp8(activations=True).passes, target=target)  # type: ignore[arg-type]
    assert body(model) == golden("""
        %x_q: f8e4m3fn[batch, 32] = QuantizeLinear(%x, %x_scale) {output_dtype = 17}
        %x_wide: f32[batch, 32] = Cast(%x_q) {to = 1}
        %x_dq: f32[batch, 32] = Mul(%x_wide, %x_scale)
        %w_Cast: f32[32, 6] = Cast(%w_q) {to = 1}
        %w_Mul: f32[32, 6] = Mul(%w_Cast, %w_scale)
        %y: f32[batch, 6] = MatMul(%x_dq, %w_Mul)
    """)
    assert context.remarks.verdicts()["y"].message == (
        "weights float8e4m3fn per-channel, activations float8e4m3fn per-tensor"
    )
    assert any("no faster than before" in r.message for r in context.remarks)
    assert initializer(model, "w_q").dtype == ml_dtypes.float8_e4m3fn
    assert initializer(model, "w_scale").shape == (1, 6)


def test_weights_alone_need_no_data() -> None:
    model = mlp()
    wanted = outputs(model, feed(model))[0]
    assert not fp8().calibrates
    apply(model, fp8().passes, [], CPU)
    assert "QuantizeLinear" not in ops(model)
    assert sqnr_db(wanted, both(model, feed(model))[0]) > 25


def test_convolutions_have_weights_alone() -> None:
    model = small_convnet()
    wanted = outputs(model, feed(model))[0]
    apply(model, fp8(activations=True).passes, target=CPU)
    held = [v for v in model.graph.initializers.values() if v.dtype == E4M3]
    assert sorted(v.const_value.numpy().ndim for v in held if v.const_value) == [2, 4, 4]
    assert sqnr_db(wanted, both(model, feed(model))[0]) > 20


def test_bodies_of_control_flow_keep_their_data() -> None:
    model = if_model()
    wanted = outputs(model, feed(model))
    context = apply(model, fp8(activations=True).passes, target=CPU)
    inside = [r for r in context.remarks if r.kind == "quantized" and "float act" in r.message]
    assert inside
    for a, b in zip(wanted, both(model, feed(model)), strict=True):
        assert sqnr_db(a, b) > 18


def test_older_opsets_know_no_float8() -> None:
    model = product()
    model.graph.opset_imports[""] = 13
    (rule,) = (step for step in fp8().passes if isinstance(step, Annotate))
    context = apply(model, (Canonicalize(), rule))
    assert any("opset 13 knows no float8" in r.message for r in context.remarks)


# --- every form, at both levels of optimization ---------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activations", [False, True])
@pytest.mark.parametrize("gemm", ["", "transB = 0", "transB = 1"])
@pytest.mark.parametrize("target", [CPU, ONNX], ids=["cpu", "onnx"])
def test_both_levels_agree(dtype: str, activations: bool, gemm: str, target: object) -> None:
    w = weight("w", *((6, 32) if "= 1" in gemm else (32, 6)), spread=3.0)
    first = f"Gemm <{gemm}> (x, w, b)" if gemm else "MatMul (x, w)"
    text = f"""
    g (float[batch,32] x) => (float[batch,5] y) {{
      h = {first}
      r = Relu (h)
      y = MatMul (r, v)
    }}"""
    model = build(text, w, weight("v", 6, 5), *([weight("b", 6)] if gemm else []))
    wanted = outputs(model, feed(model))[0]
    recipe = get_recipe("fp8", {"dtype": dtype, "activations": activations})
    apply(model, recipe.passes, target=target)  # type: ignore[arg-type]
    plain, optimized = (
        run(open_session(model, optimized=level, threads=1), feed(model))[0]
        for level in (False, True)
    )
    np.testing.assert_allclose(plain, optimized, rtol=1e-5, atol=1e-5)
    assert sqnr_db(wanted, plain) > (20 if dtype == "e4m3" else 14)


def test_optimized_weights_are_computed_once(tmp_path: Path) -> None:
    import onnx
    import onnxruntime as ort

    model = mlp()
    apply(model, fp8(activations=True).passes, target=CPU)
    path = tmp_path / "out.onnx"
    save(model, path)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(path), options)
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    left = {node.op_type for node in graph.node}
    assert "DequantizeLinear" not in left
    assert [node.op_type for node in graph.node].count("Cast") == 2  # of the data


@settings(deadline=None, max_examples=8)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=4), st.sampled_from(sorted(TYPES)),
       st.booleans())  # fmt: skip
def test_random_networks(widths: list[int], dtype: str, activations: bool) -> None:
    model = mlp(tuple(widths))
    wanted = outputs(model, feed(model))[0]
    recipe = get_recipe("fp8", {"dtype": dtype, "activations": activations})
    for target in (CPU, ONNX):
        made = model.clone()
        apply(made, recipe.passes, target=target)
        found = both(made, feed(model))[0]
        assert np.abs(found - wanted).max() <= 0.5 * np.abs(wanted).max() + 1e-3


@pytest.mark.parametrize("dtype", TYPES)
def test_saved_models_are_the_same_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    model = product(256, 40)
    recipe = get_recipe("fp8", {"dtype": dtype, "activations": True})
    apply(model, recipe.passes, target=CPU)
    save(model, tmp_path / "out.onnx")
    again = load(tmp_path / "out.onnx")
    for optimized in (False, True):
        a, b = (run(open_session(m, optimized=optimized, threads=1), feed(model))[0]
                for m in (model, again))  # fmt: skip
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parameters", "least"),
    [({}, 0.998), ({"activations": True}, 0.99), ({"dtype": "e5m2"}, 0.99)],
    ids=["e4m3", "e4m3 activations", "e5m2"],
)
def test_sentences_keep_their_embeddings(
    parameters: dict[str, object], least: float, tmp_path: Path
) -> None:
    import qgraph
    from benchmarks import tasks, zoo

    source = zoo.minilm_onnx()
    feeds = tasks.minilm_feeds("calibration", 64)
    path = qgraph.compile(source, get_recipe("fp8", parameters), feeds).save(tmp_path / "out.onnx")
    cosine = tasks.embedding_cosine(tasks.session(source), tasks.session(path))
    assert cosine >= least
