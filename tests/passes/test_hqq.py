"""Ranges that suit most weights of a block, found without data; zero points stay integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import PipelineError, QGraphError
from qgraph.graph.annotation import INTEGERS
from qgraph.graph.reading import array
from qgraph.numerics.blocks import full_range, rounding_error
from qgraph.numerics.noise import sqnr_db
from qgraph.numerics.spec import PerAxis, PerBlock, QuantSpec
from qgraph.passes.annotate import Annotate, Rule
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.hqq import BETA, HQQ, KAPPA, half_quadratic, lp_norm, shrink
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.pipeline.pass_manager import Pass, PassManager
from tests.models import build, if_model, outputs, weight
from tests.pipelines import COMMIT, apply, body, golden, initializer, specs

INT4 = QuantSpec(ir.DataType.INT4, PerBlock(0, 16), observer="absmax")
UINT4 = QuantSpec(ir.DataType.UINT4, PerBlock(0, 16), symmetric=False, observer="absmax")
SPECS = (INT4, UINT4, INT4.with_(granularity=PerAxis(1)), UINT4.with_(bits=3))


def annotate(spec: QuantSpec = UINT4) -> tuple[Pass, ...]:
    return Canonicalize(), Annotate("dynamic", rules=(Rule(("matmul", "gemm"), spec, (None,)),))


def some_weight(k: int, n: int, seed: int = 0) -> np.ndarray:
    """Heavy tails, float32 (k, n)."""
    return np.random.default_rng(seed).standard_t(3, (k, n)).astype(np.float32)


def product(k: int = 64, n: int = 24, *, trans_b: bool = False) -> ir.Model:
    op = "Gemm <transB = 1> (x, w)" if trans_b else "MatMul (x, w)"
    text = f"g (float[batch,{k}] x) => (float[batch,{n}] y) {{ y = {op} }}"
    w = some_weight(k, n)
    return build(text, ir.Tensor(np.ascontiguousarray(w.T) if trans_b else w, name="w"))


# --- the mathematics ------------------------------------------------------------------------------


def test_shrinkage() -> None:
    x = np.array([0.0, 0.05, -0.5, 3.0])
    np.testing.assert_allclose(shrink(x, 10, 1.0), [0, 0, -0.4, 2.9])
    np.testing.assert_allclose(shrink(x, 10, 0.5), [0, 0, -0.5 + 0.1 / 0.5**0.5, 3 - 0.1 / 3**0.5])


def reference(w: np.ndarray, p: float, iterations: int) -> tuple[float, float, np.ndarray]:
    """One block of uint4, in float64, straight from the paper; the zero point rounded in between.

    Returns the scale, the zero point and the dequantized block.
    """
    scale = (max(w.max(), 0) - min(w.min(), 0)) / 15
    zero = float(np.rint(-min(w.min(), 0) / scale))
    for i in range(iterations):
        q = np.clip(np.rint(w / scale + zero), 0, 15)
        e = shrink(w / scale - (q - zero), BETA * KAPPA**i, p)
        zero = float((q - (w / scale - e)).mean())
    zero = float(np.clip(np.rint(zero), 0, 15))
    for i in range(iterations):
        v = np.clip(np.rint(w / scale), -zero, 15 - zero)
        e = shrink(w / scale - v, BETA * KAPPA**i, p) * scale
        scale = float(((w - e) * v).sum() / (v * v).sum())
    return scale, zero, scale * np.clip(np.rint(w / scale), -zero, 15 - zero)


@pytest.mark.parametrize("p", [0.7, 1.0, 1.5])
def test_against_float64(p: float) -> None:
    w = some_weight(16, 40)
    scale, zero = half_quadratic(w, UINT4, p, 8)
    nearest = full_range(w, UINT4)
    norms = lp_norm(rounding_error(w, *nearest, UINT4), UINT4, p)[0]
    fitted = 0
    for n in range(40):
        wanted, shift, block = reference(w[:, n].astype(np.float64), p, 8)
        better = (np.abs(block - w[:, n]) ** p).sum() < norms[n]
        found = wanted if better else nearest[0][0, n]
        if scale[0, n] == pytest.approx(found, rel=1e-3):
            fitted += zero[0, n] == (shift if better else nearest[1][0, n])
    assert fitted >= 38  # a weight halfway between two steps may round otherwise in float32


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 70), st.integers(1, 6), st.sampled_from([2, 3, 4, 8]), st.booleans(),
    st.booleans(), st.floats(0.1, 2), st.integers(1, 6), st.integers(0, 2**16),
)  # fmt: skip
def test_no_block_is_worse_than_rounding_to_nearest(
    k: int, n: int, bits: int, symmetric: bool, blocks: bool, p: float, iterations: int, seed: int
) -> None:
    small, large = (
        (ir.DataType.INT4, ir.DataType.INT8)
        if symmetric
        else (ir.DataType.UINT4, ir.DataType.UINT8)
    )
    granularity = PerBlock(0, 16) if blocks else PerAxis(1)
    spec = QuantSpec(small if bits <= 4 else large, granularity, symmetric, "absmax", bits=bits)
    w = some_weight(k, n, seed)
    w[:, 0] *= seed % 3  # zeros, too
    scale, zero = half_quadratic(w, spec, p, iterations)
    before, after = (
        lp_norm(rounding_error(w, *scales, spec), spec, p)
        for scales in (full_range(w, spec), (scale, zero))
    )
    assert (after <= before).all()
    assert np.isfinite(scale).all()
    assert scale.all()
    assert zero.dtype == np.int32
    assert ((zero >= min(spec.qmin, 0)) & (zero <= spec.qmax)).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_most_weights_have_smaller_errors(spec: QuantSpec) -> None:
    w = some_weight(64, 200)
    before, after = (
        np.abs(rounding_error(w, *scales, spec))
        for scales in (full_range(w, spec), half_quadratic(w, spec))
    )
    assert after.mean() < 0.99 * before.mean()


# --- the pass -------------------------------------------------------------------------------------


def test_before_and_after() -> None:
    model = product(32, 3)
    context = apply(model, (*annotate(), HQQ()))
    assert body(model) == golden("""
        %y: f32[batch, 3] = MatMul(%x, %w_hqq <uint4 per-block(0, 16) asym absmax>)
    """)
    assert list(model.graph.initializers) == ["w_hqq"]
    (remark,) = (r for r in context.remarks if r.pass_name == "hqq")
    assert (remark.kind, remark.site) == ("applied", "y")
    assert 0 < remark.numbers["norm_ratio"] < 1


@pytest.mark.parametrize("trans_b", [False, True], ids=["MatMul", "Gemm"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_outputs_come_nearer_to_float(spec: QuantSpec, trans_b: bool) -> None:
    x = {"x": np.random.default_rng(1).normal(size=(200, 64)).astype(np.float32)}
    wanted = outputs(product(trans_b=trans_b), x)[0]
    found = []
    for middle in ((), (HQQ(),)):
        model = product(trans_b=trans_b)
        apply(model, (*annotate(spec), *middle, *COMMIT))
        found.append(sqnr_db(wanted, outputs(model, x)[0]))
    assert found[1] > found[0]


@pytest.mark.parametrize("trans_b", [False, True], ids=["MatMul", "Gemm"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zero_points_are_integers_and_written_as_they_are(spec: QuantSpec, trans_b: bool) -> None:
    model = product(trans_b=trans_b)
    apply(model, (*annotate(spec), HQQ()))
    value = model.graph.initializers["w_hqq"]
    wanted, found = value.meta[INTEGERS]
    assert str(wanted) == specs(model)["y"][1]
    np.testing.assert_array_equal(array(value), found.float())
    apply(model, [InsertQDQ()])
    np.testing.assert_array_equal(initializer(model, "w_hqq_q").astype(int), found.q)
    if found.zero.any():
        np.testing.assert_array_equal(initializer(model, "w_hqq_zero").astype(int), found.zero)


def test_what_it_leaves_alone() -> None:
    text = """
    g (float[batch,16] x, int64[2] ids) => (float[batch,16] y, float[2,16] e) {
      y = MatMul (x, w)
      e = Gather (w, ids)
    }"""
    model = build(text, weight("w", 16, 16))
    context = apply(model, (*annotate(), HQQ()))
    assert [(r.site, r.message) for r in context.remarks if r.pass_name == "hqq"] == [
        ("y", "stays rounded to nearest: others read its weight too, and need it as it is")
    ]
    branches = if_model()
    apply(branches, (*annotate(), HQQ()))
    assert not any("hqq" in name for name in branches.graph.initializers)


@pytest.mark.parametrize(("p", "iterations"), [(0, 1), (2.1, 1), (-1, 1), (1, 0)])
def test_bad_inputs(p: float, iterations: int) -> None:
    with pytest.raises(QGraphError, match="out of range: use"):
        HQQ(p, iterations)
    with pytest.raises(PipelineError, match="annotated"):
        PassManager([HQQ()])
