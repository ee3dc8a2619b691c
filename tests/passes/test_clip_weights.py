"""The scale of each block of a weight, chosen by what the outputs lose on calibration tokens."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import CalibrationError, PipelineError, QGraphError
from qgraph.graph.annotation import INTEGERS
from qgraph.graph.reading import array
from qgraph.numerics.blocks import Scales, full_range, rounding_error
from qgraph.numerics.noise import relative_noise, sqnr_db
from qgraph.numerics.spec import PerAxis, PerBlock, QuantSpec
from qgraph.passes.annotate import Annotate, Rule
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.clip_weights import ClipWeights
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Pass, PassManager
from qgraph.weights.clipping import DAMPING, Subproblem, clipped_scales, gram
from tests.models import build, if_model, outputs, weight
from tests.pipelines import COMMIT, ONNX, apply, body, golden, initializer, specs

INT4 = QuantSpec(ir.DataType.INT4, PerBlock(0, 16), observer="absmax")
UINT4 = QuantSpec(ir.DataType.UINT4, PerBlock(0, 16), symmetric=False, observer="absmax")
PER_CHANNEL = INT4.with_(granularity=PerAxis(1))
SPECS = (INT4, UINT4, PER_CHANNEL, INT4.with_(bits=3), INT4.with_(bits=2))


def tokens(count: int, k: int, seed: int = 0) -> np.ndarray:
    """Data with unequal, correlated channels, float32 (count, k)."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(k, k)) * np.geomspace(1, 0.05, k)[:, np.newaxis]
    return np.asarray(rng.normal(size=(count, k)) @ mixing, np.float32)


def some_weight(k: int, n: int, seed: int = 0) -> np.ndarray:
    """Heavy tails, float32 (k, n): some blocks have a peak."""
    return np.random.default_rng(seed).standard_t(4, (k, n)).astype(np.float32)


def annotate(spec: QuantSpec = INT4) -> tuple[Pass, ...]:
    rule = Rule(("matmul", "gemm"), spec, (None,))
    return Canonicalize(), Annotate("dynamic", rules=(rule,))


def product(k: int = 32, n: int = 12, *, trans_b: bool = False) -> ir.Model:
    op = "Gemm <transB = 1> (h, w)" if trans_b else "MatMul (h, w)"
    text = f"g (float[batch,{k}] x) => (float[batch,{n}] y) {{ h = Neg (x) y = {op} }}"
    w = some_weight(k, n)
    return build(text, ir.Tensor(np.ascontiguousarray(w.T) if trans_b else w, name="w"))


def feeds(k: int = 32, count: int = 4) -> list[dict[str, np.ndarray]]:
    return [{"x": part} for part in np.split(tokens(64 * count, k), count)]


def column_errors(w: np.ndarray, scales: Scales, metric: np.ndarray, spec: QuantSpec) -> np.ndarray:
    """Float64 Δᵀ · G · Δ of each column."""
    off = rounding_error(w, *scales, spec).astype(np.float64)
    return np.asarray((off * (metric.astype(np.float64) @ off)).sum(axis=0))


# --- the mathematics ------------------------------------------------------------------------------


def test_a_peak_that_nobody_sees_is_clipped() -> None:
    # 7 weights fit steps of 1 exactly; the peak, whose channel is silent, asks for 1.5.
    w = np.array([[1], [2], [-3], [3], [-7], [5], [6], [-12]], np.float32)
    spec = INT4.with_(granularity=PerBlock(0, 8))
    metric = np.diag([1, 1, 1, 1, 1, 1, 1, 1e-6]).astype(np.float32)
    assert full_range(w, spec)[0].tolist() == [[1.5]]
    np.testing.assert_allclose(clipped_scales(w, metric, spec)[0], 1, rtol=1e-4)
    everywhere = np.eye(8, dtype=np.float32)
    np.testing.assert_allclose(clipped_scales(w, everywhere, spec)[0], 1.5, rtol=0.1)


def test_blocks_make_up_for_each_other() -> None:
    """Two channels that are always equal: only the sum of their errors counts."""
    w = some_weight(64, 200)
    together = np.kron(np.ones((4, 4)), np.eye(16)).astype(np.float32)
    apart = np.eye(64, dtype=np.float32)
    errors = [
        column_errors(w, clipped_scales(w, metric, INT4), together, INT4).sum()
        for metric in (apart, together)
    ]
    assert errors[1] < 0.75 * errors[0]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 70), st.integers(1, 6), st.integers(1, 60), st.sampled_from([2, 3, 4, 8]),
    st.booleans(), st.booleans(), st.integers(1, 3), st.integers(0, 2**16),
)  # fmt: skip
def test_no_column_is_worse_than_rounding_to_nearest(
    k: int, n: int, count: int, bits: int, symmetric: bool, blocks: bool, sweeps: int, seed: int
) -> None:
    small, large = (
        (ir.DataType.INT4, ir.DataType.INT8)
        if symmetric
        else (ir.DataType.UINT4, ir.DataType.UINT8)
    )
    granularity = PerBlock(0, 16) if blocks else PerAxis(1)
    spec = QuantSpec(small if bits <= 4 else large, granularity, symmetric, "absmax", bits=bits)
    w, x = some_weight(k, n, seed), tokens(count, k, seed)
    metric = gram(x, w, spec)
    assert np.isfinite(metric).all()
    found = clipped_scales(w, metric, spec, sweeps)
    before = column_errors(w, full_range(w, spec), metric, spec)
    after = column_errors(w, found, metric, spec)
    assert (after <= before + 1e-4 * (1e-6 + before.max())).all()
    scale, zero = found
    assert np.isfinite(scale).all()
    assert scale.all()
    if not symmetric:
        assert ((zero >= 0) & (zero <= spec.qmax)).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_noise_on_other_tokens(spec: QuantSpec) -> None:
    w, x = some_weight(64, 40), tokens(900, 64)
    known, other = x[:600], x[600:]
    noise = [
        relative_noise(other @ w, other @ (w + rounding_error(w, *scales, spec)))
        for scales in (full_range(w, spec), clipped_scales(w, gram(known, w, spec), spec))
    ]
    assert noise[1] < 0.8 * noise[0]


def test_the_gram_matrix_in_float64() -> None:
    """ΔᵀGΔ is noise(Δ) / noise(rounding to nearest), of all tokens together and of each."""
    w, x = some_weight(32, 8).astype(np.float64), tokens(300, 32).astype(np.float64)
    x[0] *= 1000  # a language model's first token
    nearest = rounding_error(w.astype(np.float32), *full_range(w.astype(np.float32), INT4), INT4)
    metric = gram(x, w.astype(np.float32), INT4).astype(np.float64)
    metric[np.diag_indices_from(metric)] /= 1 + DAMPING
    other = np.random.default_rng(5).normal(size=w.shape) * 0.1
    signal = np.square(x @ w).sum(axis=1)
    ours, theirs = (np.square(x @ off).sum(axis=1) for off in (other, nearest.astype(np.float64)))
    wanted = ours.sum() / theirs.sum() + (ours / signal).sum() / (theirs / signal).sum()
    assert (other * (metric @ other)).sum() == pytest.approx(wanted, rel=1e-3)
    # Tokens but the first count, though it has nearly all of the power.
    rest = gram(x[1:], w.astype(np.float32), INT4)
    assert np.linalg.matrix_rank(metric / np.abs(metric).max(), tol=1e-6) > 10
    assert rest.shape == (32, 32)


def test_the_scale_is_refitted_by_least_squares() -> None:
    """Of one block, while the errors of the others stay: against numpy's own, in float64."""
    w, x = some_weight(32, 5), tokens(200, 32).astype(np.float64)
    scale, zero = full_range(w, INT4)
    off = rounding_error(w, scale, zero, INT4)
    metric, here = x.T @ x, slice(0, 16)
    problem = Subproblem(
        w[here],
        metric[here, here].astype(np.float32),
        (metric[here, 16:] @ off[16:]).astype(np.float32),
        INT4,
    )
    (_, found), _ = problem.refitted(scale[0], zero[0], off[here])
    for n in range(5):
        values = (off[here, n] + w[here, n]) / scale[0, n]
        rest = x[:, here] @ w[here, n] - x[:, 16:] @ off[16:, n]
        wanted = np.linalg.lstsq((x[:, here] @ values)[:, np.newaxis], rest, rcond=None)[0]
        assert found[n] == pytest.approx(wanted[0], rel=1e-3)


# --- the pass -------------------------------------------------------------------------------------


def test_before_and_after() -> None:
    model = product(k=32, n=3)
    context = apply(model, (*annotate(), ClipWeights()), feeds())
    assert body(model) == golden("""
        %h: f32[batch, 32] = Neg(%x)
        %y: f32[batch, 3] = MatMul(%h, %w_clipped <int4 per-block(0, 16) sym absmax>)
    """)
    assert list(model.graph.initializers) == ["w_clipped"]
    (remark,) = (r for r in context.remarks if r.pass_name == "clip-weights")
    assert (remark.kind, remark.site) == ("applied", "y")
    assert 0 < remark.numbers["noise_ratio"] < 0.9


@pytest.mark.parametrize("trans_b", [False, True], ids=["MatMul", "Gemm"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_outputs_come_nearer_to_float_on_other_data(spec: QuantSpec, trans_b: bool) -> None:
    data = feeds(count=10)
    wanted = np.concatenate([outputs(product(trans_b=trans_b), feed)[0] for feed in data[4:]])
    found = []
    for middle in ((), (ClipWeights(),)):
        model = product(trans_b=trans_b)
        apply(model, (*annotate(spec), *middle, *COMMIT), data[:4])
        found.append(sqnr_db(wanted, np.concatenate([outputs(model, f)[0] for f in data[4:]])))
    assert found[1] > found[0] + 0.5


@pytest.mark.parametrize("trans_b", [False, True], ids=["MatMul", "Gemm"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_insert_qdq_takes_the_integers_as_they_are(spec: QuantSpec, trans_b: bool) -> None:
    model = product(trans_b=trans_b)
    apply(model, (*annotate(spec), ClipWeights()), feeds())
    value = model.graph.initializers["w_clipped"]
    wanted, clipped = value.meta[INTEGERS]
    assert str(wanted) == specs(model)["y"][1]
    np.testing.assert_array_equal(array(value), clipped.float())
    apply(model, [InsertQDQ()], feeds())
    np.testing.assert_array_equal(initializer(model, "w_clipped_q").astype(int), clipped.q)
    np.testing.assert_array_equal(initializer(model, "w_clipped_scale"), clipped.scale)


def test_what_it_leaves_alone() -> None:
    text = """
    g (float[batch,16] x, int64[2] ids) => (float[batch,16] y, float[batch,16] z, float[2,16] e) {
      h = Neg (x)
      y = MatMul (h, w)
      z = MatMul (h, v)
      e = Gather (w, ids)
    }"""
    model = build(text, weight("w", 16, 16), weight("v", 16, 16))
    data = [{**feed, "ids": np.array([0, 1])} for feed in feeds(16)]
    eight = Rule(("matmul",), QuantSpec(granularity=PerAxis(1), observer="absmax"), layers="z")
    rules = (eight, Rule(("matmul",), INT4, (None,)))
    passes = (Canonicalize(), Annotate("dynamic", rules=rules), ClipWeights())
    context = apply(model, passes, data)
    assert sorted(model.graph.initializers) == ["v", "w"]
    assert [(r.site, r.message) for r in context.remarks if r.pass_name == "clip-weights"] == [
        ("y", "not clipped: others read its weight too, and need it as it is"),
        (
            "z",
            "not clipped: it has 8 bits and a scale for each channel, which lose next to nothing",
        ),
    ]
    branches = if_model()
    apply(branches, (*annotate(), ClipWeights()))
    assert not any("clipped" in name for name in branches.graph.initializers)


def test_few_tokens_or_zeros() -> None:
    for x in (np.zeros((3, 32)), tokens(1, 32), tokens(5, 32)):
        model = product()
        feed = {"x": x.astype(np.float32)}
        apply(model, (*annotate(), ClipWeights(), *COMMIT), [feed])
        assert np.isfinite(outputs(model, feed)[0]).all()


def test_bad_inputs() -> None:
    with pytest.raises(QGraphError, match="sweeps=0 is out of range: use 1 or more"):
        ClipWeights(sweeps=0)
    with pytest.raises(PipelineError, match="annotated"):
        PassManager([ClipWeights()])
    with pytest.raises(CalibrationError, match="calibration data"):
        PassManager((*annotate(), ClipWeights())).run(product(), Context(ONNX))
    assert not ClipWeights().run(product(), Context(ONNX))
