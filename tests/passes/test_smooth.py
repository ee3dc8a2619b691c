"""Large channels move into the weights, and the model computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import QGraphError
from qgraph.graph.annotation import STATS
from qgraph.numerics.noise import sqnr_db
from qgraph.passes.annotate import Annotate
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.smooth import Smooth, expected_noise, smoothing_factors
from tests.models import build, outputs, weight
from tests.pipelines import COMMIT, apply, body, golden, node

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
OBSERVED = (Canonicalize(), Annotate("dynamic"), InsertObservers(channel_ranges=True), Calibrate())


def norm(outlier: float = 30.0) -> tuple[ir.TensorProtocol, ...]:
    gamma = np.ones(32, np.float32)
    gamma[5] = outlier
    tensors = {"gamma": gamma, "beta": np.zeros(32, np.float32)}
    return (*(ir.Tensor(a, name=n) for n, a in tensors.items()), weight("w", 32, 8))


def data(seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((4, 6, 32)).astype(np.float32)}


def without_statistics(text: str) -> str:
    return "\n".join(line.split("  //")[0] for line in text.splitlines())


def test_factors_go_into_the_norm() -> None:
    model = build(NORMED, *norm())
    context = apply(model, (*OBSERVED, Smooth(0.5)), [data()])
    assert without_statistics(body(model)) == golden("""
        %h: f32[batch, 6, 32] = LayerNormalization(%x, %gamma_scaled, %beta_scaled) {axis = -1}
        %y: f32[batch, 6, 8] = MatMul(%h <A>, %w_scaled <W>)
    """).replace("<A>", "<uint8 per-token sym dynamic>").replace(
        "<W>", "<int8 per-axis(1) sym absmax>"
    )
    assert "norm weight" in next(r.message for r in context.remarks if r.pass_name == "smooth")


def test_a_mul_where_nothing_absorbs_and_it_pays() -> None:
    model = build(RESIDUAL, *norm())
    apply(model, (*OBSERVED, Smooth(0.5)), [data()])
    assert "Mul" in {n.op_type for n in model.graph}
    plain = build(RESIDUAL, *norm(1.0))
    apply(plain, (*OBSERVED, Smooth(0.5)), [data()])
    assert "Mul" not in {n.op_type for n in plain.graph}


@pytest.mark.parametrize("text", [NORMED, RESIDUAL])
@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
def test_float_outputs_stay(text: str, alpha: float) -> None:
    model = build(text, *norm())
    wanted = outputs(model, data(1))
    apply(model, (*OBSERVED, Smooth(alpha)), [data()])
    for a, b in zip(wanted, outputs(model, data(1)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())


def test_quantized_outputs_come_nearer_to_float() -> None:
    wanted = outputs(build(NORMED, *norm()), data(1))[0]
    found = []
    for passes in ((), (Smooth(0.5),)):
        model = build(NORMED, *norm())
        apply(model, (*OBSERVED, *passes, *COMMIT), [data()])
        found.append(sqnr_db(wanted, outputs(model, data(1))[0]))
    assert found[1] > found[0] + 1


def test_statistics_follow() -> None:
    model = build(NORMED, *norm())
    apply(model, OBSERVED, [data()])
    x = node(model, "y").inputs[0]
    assert x is not None
    before = x.meta[STATS].channel_peak
    apply(model, (Smooth(0.5),), [data()])
    after = x.meta[STATS].channel_peak
    assert after.max() / np.median(after) < before.max() / np.median(before)
    h = next(n for n in model.graph if n.op_type == "LayerNormalization").outputs[0]
    model.graph.outputs.append(h)
    np.testing.assert_allclose(
        np.abs(outputs(model, data())[-1]).max(axis=(0, 1)), after, rtol=1e-4
    )


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 1), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_factors_are_those_of_the_paper(seed: int, alpha: float, k: int) -> None:
    random = np.random.default_rng(seed)
    x, w = random.uniform(0.5, 2, k), random.uniform(0.5, 2, k)
    s = smoothing_factors(x, w, alpha)
    wanted = x**alpha / w ** (1 - alpha)
    np.testing.assert_allclose(s / s[0], wanted / wanted[0], rtol=1e-4)
    assert (s > 0).all()


def test_silent_channels_and_empty_weights() -> None:
    s = smoothing_factors(np.array([0, 1, 1]), np.array([1, 0, 1]), 0.5)
    assert np.isfinite(s).all()
    assert (s > 0).all()
    even, uneven = np.ones(3), np.array([1.0, 1.0, 9.0])
    assert expected_noise(uneven, even, even) > expected_noise(even, even, even)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, "foo"])
def test_alphas_out_of_range(alpha: Any) -> None:
    with pytest.raises(QGraphError, match=r"out of range: use 0 to 1"):
        Smooth(alpha)
