"""Channels that carry much get finer steps, and the float model computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qgraph
from benchmarks import tasks, zoo
from benchmarks.tables import cores
from qgraph.errors import CalibrationError, PipelineError, QGraphError
from qgraph.graph.annotation import INTEGERS
from qgraph.numerics.noise import sqnr_db
from qgraph.numerics.spec import PerAxis, PerBlock, QuantSpec
from qgraph.passes.annotate import Annotate, Rule
from qgraph.passes.awq import AWQ, awq_factors, data_magnitude, weight_magnitude
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.clip_weights import ClipWeights
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Pass, PassManager
from tests.models import build, outputs, random_graph, transformer_block, weight
from tests.pipelines import COMMIT, ONNX, apply, body, golden

INT4 = QuantSpec(ir.DataType.INT4, PerBlock(0, 16), observer="absmax")
UINT4 = QuantSpec(ir.DataType.UINT4, PerBlock(0, 16), symmetric=False, observer="absmax")
NF4 = QuantSpec(ir.DataType.UINT4, PerBlock(0, 16), observer="absmax", codebook="nf4")
SPECS = (INT4, UINT4, INT4.with_(granularity=PerAxis(1)), INT4.with_(bits=3), NF4)
NORMED = """
g (float[batch,6,32] x) => (float[batch,6,8] y) {
  h = LayerNormalization <axis = -1> (x, gamma, beta)
  y = MatMul (h, w)
}"""
RESIDUAL = """
g (float[batch,6,32] x) => (float[batch,6,8] y, float[batch,6,32] r) {
  h = LayerNormalization <axis = -1> (x, gamma, beta)
  y = MatMul (h, w)
  r = Relu (h)
}"""


def annotate(spec: QuantSpec = INT4) -> tuple[Pass, ...]:
    return Canonicalize(), Annotate("dynamic", rules=(Rule(("matmul", "gemm"), spec, (None,)),))


def norm(outlier: float = 30.0) -> tuple[ir.TensorProtocol, ...]:
    gamma = np.ones(32, np.float32)
    gamma[[5, 20]] = outlier
    tensors = {"gamma": gamma, "beta": np.zeros(32, np.float32)}
    return (*(ir.Tensor(a, name=n) for n, a in tensors.items()), weight("w", 32, 8))


def tokens(seed: int, count: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((8, count, 32)).astype(np.float32)}


def data(seed: int = 0) -> dict[str, np.ndarray]:
    return tokens(seed, 6)


# --- the mathematics ------------------------------------------------------------------------------


def test_a_worked_example() -> None:
    s = awq_factors(np.array([1.0, 4.0, 16.0]), 0.5)
    np.testing.assert_allclose(s, [0.5, 1, 2])
    both = awq_factors(np.array([1.0, 4.0, 16.0]), 0.5, np.array([1.0, 4.0, 1.0]))
    np.testing.assert_allclose(both, np.array([1, 1, 4]) / 2)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.integers(1, 40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_factors_in_float64(seed: int, alpha: float, k: int, weights: bool) -> None:
    random = np.random.default_rng(seed)
    x, w = random.uniform(1e-4, 1e4, k), random.uniform(1e-4, 1, k)
    s = awq_factors(x, alpha, w if weights else None).astype(np.float64)
    wanted = x**alpha / (w ** (1 - alpha) if weights else 1)
    np.testing.assert_allclose(s / s[0], wanted / wanted[0], rtol=1e-5)
    assert s.max() * s.min() == pytest.approx(1, rel=1e-5)


def test_one_token_does_not_own_the_magnitudes() -> None:
    x = np.random.default_rng(0).normal(size=(200, 16))
    x[:, 3] *= 5
    spiked = x.copy()
    spiked[0] = 0
    spiked[0, 7] = 5000
    plain, other = data_magnitude(x), data_magnitude(spiked)
    assert plain.argmax() == other.argmax() == 3
    np.testing.assert_allclose(plain, other, rtol=0.1)


def test_silent_channels_and_no_tokens() -> None:
    x = np.ones((4, 3))
    x[:, 1] = 0
    assert (data_magnitude(x) > 0).all()
    np.testing.assert_array_equal(data_magnitude(np.zeros((4, 3))), 1)
    assert (weight_magnitude(np.zeros((4, 3)), INT4) > 0).all()
    w = np.array([[1.0], [-2.0], [4.0], [8.0]])
    found = weight_magnitude(w, INT4.with_(granularity=PerBlock(0, 2)))
    np.testing.assert_allclose(found, [0.5, 1, 0.5, 1])


# --- the pass -------------------------------------------------------------------------------------


def test_before_and_after() -> None:
    model = build(NORMED, *norm())
    context = apply(model, (*annotate(), AWQ()), [data()])
    assert body(model) == golden("""
        %h: f32[batch, 6, 32] = LayerNormalization(%x, %gamma_scaled, %beta_scaled) {axis = -1}
        %y: f32[batch, 6, 8] = MatMul(%h, %w_scaled <int4 per-block(0, 16) sym absmax>)
    """)
    (remark,) = (r for r in context.remarks if r.pass_name == "awq")
    assert (remark.kind, remark.site) == ("applied", "y")
    assert remark.message == "scaled: factors went into the norm weight of 'h'"
    assert 0 < remark.numbers["alpha"] <= 1
    assert 0 < remark.numbers["noise_ratio"] < 0.9


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_float_outputs_stay(spec: QuantSpec) -> None:
    for model in (build(NORMED, *norm()), transformer_block(width=32, outlier=20.0)):
        given = [tokens(i, 6) for i in range(3)]
        wanted = outputs(model, given[2])[0]
        context = apply(model, (*annotate(spec), AWQ()), given[:2])
        assert any(r.pass_name == "awq" and r.kind == "applied" for r in context.remarks)
        found = outputs(model, given[2])[0]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("clip", [(), (ClipWeights(),)], ids=["scaled", "clipped"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_quantized_outputs_come_nearer_to_float(spec: QuantSpec, clip: tuple[Pass, ...]) -> None:
    wanted = outputs(build(NORMED, *norm()), data(1))[0]
    found = []
    for passes in ((), (AWQ(), *clip)):
        model = build(NORMED, *norm())
        apply(model, (*annotate(spec), *passes, *COMMIT), [data()])
        found.append(sqnr_db(wanted, outputs(model, data(1))[0]))
    assert found[1] > found[0] + 0.5


def test_what_it_leaves_alone() -> None:
    model = build(RESIDUAL, *norm())
    context = apply(model, (*annotate(), AWQ()), [data()])
    (remark,) = (r for r in context.remarks if r.pass_name == "awq")
    assert remark.message == "not scaled: no constant before it can take the factors"
    assert "Mul" not in {n.op_type for n in model.graph}

    model = build(NORMED, *norm())
    context = apply(model, (*annotate(), ClipWeights(), AWQ()), [data()])
    (remark,) = (r for r in context.remarks if r.pass_name == "awq")
    assert remark.message == "not scaled: its weight has been rounded already"
    assert INTEGERS in model.graph.initializers["w_clipped"].meta


def test_factors_that_do_not_help_are_not_used() -> None:
    gamma, w = np.ones(32, np.float32), np.ones((32, 8), np.float32)  # weights that are exact
    tensors = {"gamma": gamma, "beta": np.zeros(32, np.float32), "w": w}
    model = build(NORMED, *(ir.Tensor(a, name=n) for n, a in tensors.items()))
    context = apply(model, (*annotate(), AWQ()), [data()])
    assert "w" in model.graph.initializers
    (remark,) = (r for r in context.remarks if r.pass_name == "awq")
    assert remark.message == "not scaled: no alpha lowers its error"


@given(random_graph(), st.sampled_from(SPECS))
@settings(max_examples=15, deadline=None)
def test_any_graph_computes_the_same(model: ir.Model, spec: QuantSpec) -> None:
    """The pass manager verifies it: the contract is equivalence."""
    apply(model, (*annotate(spec), AWQ(3)))


def test_a_first_token_like_a_language_models() -> None:
    """One token a thousand times larger: the others must still gain."""
    plain = transformer_block(width=32, outlier=20.0)
    given = [tokens(i, 40) for i in (0, 1)]
    for feed in given:
        feed["x"][:, 0] *= 1000
    wanted = outputs(plain, given[1])[0]
    found = []
    for passes in ((), (AWQ(), ClipWeights())):
        model = transformer_block(width=32, outlier=20.0)
        apply(model, (*annotate(), *passes, *COMMIT), given[:1])
        found.append(sqnr_db(wanted[:, 1:], outputs(model, given[1])[0][:, 1:]))
    assert found[1] > found[0] + 1


@pytest.mark.parametrize("steps", [0, -3])
def test_bad_inputs(steps: int) -> None:
    with pytest.raises(QGraphError, match=r"out of range: use 1 or more"):
        AWQ(steps)
    with pytest.raises(PipelineError, match="annotated"):
        PassManager([AWQ()])
    with pytest.raises(CalibrationError, match="calibration data"):
        PassManager((*annotate(), AWQ())).run(build(NORMED, *norm()), Context(ONNX))
    assert not AWQ().run(build(NORMED, *norm()), Context(ONNX))


# --- real models ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    """At int4 g64 it loses less than rounding to nearest, on four chunks."""
    model = zoo.smollm2_genai()
    chunks = tasks.smollm2_chunks(n=4)

    def perplexity(path: Path) -> float:
        return tasks.perplexity(tasks.session(path, threads=cores()), chunks)

    def quantized(recipe: str, **feeds: Any) -> float:
        folder = qgraph.compile(model, recipe, **feeds).save(tmp_path / recipe)
        return perplexity(folder) / plain - 1

    plain = perplexity(model)
    nearest = quantized("rtn")
    assert quantized("awq", calibration=tasks.smollm2_calibration(model, 8, 512)) < nearest
