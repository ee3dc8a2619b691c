"""Channels with outliers stay in float, and the model computes the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import QGraphError
from qgraph.numerics.noise import sqnr_db
from qgraph.numerics.tokens import dequantize_per_token, quantize_per_token
from qgraph.passes.annotate import Annotate
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.smooth import Smooth
from qgraph.passes.split_outliers import SplitOutliers, outliers
from tests.models import build, outputs, weight
from tests.pipelines import COMMIT, apply, body, both, golden

OBSERVED = (Canonicalize(), Annotate("dynamic"), InsertObservers(channel_ranges=True), Calibrate())
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
PLAIN = """
g (float[batch,6,32] x) => (float[batch,6,8] y) { y = MatMul (x, w) }"""


def norm() -> tuple[ir.TensorProtocol, ...]:
    """A norm with one large channel, and the weight behind it."""
    gamma = np.ones(32, np.float32)
    gamma[5] = 30
    tensors = {"gamma": gamma, "beta": np.zeros(32, np.float32)}
    return (*(ir.Tensor(a, name=n) for n, a in tensors.items()), weight("w", 32, 8))


def data(seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).standard_normal((4, 6, 32)).astype(np.float32)}


def without_statistics(text: str) -> str:
    return "\n".join(line.split("  //")[0] for line in text.splitlines())


def wild(seed: int = 0, channel: int = 5, size: float = 50.0) -> dict[str, np.ndarray]:
    x = data(seed)["x"]
    x[..., channel] *= size
    return {"x": x}


def test_before_and_after_with_a_norm() -> None:
    model = build(NORMED, *norm())
    apply(model, (*OBSERVED, SplitOutliers()), [data()])
    text = without_statistics(body(model)).replace("<uint8 per-token sym dynamic>", "<A>")
    assert text.replace("<int8 per-axis(1) sym absmax>", "<W>") == golden("""
        %h: f32[batch, 6, 32] = LayerNormalization(%x, %gamma_scaled, %beta_scaled) {axis = -1}
        %h_outlying: f32[batch, 6, 1] = Gather(%h, %h_outliers) {axis = -1}
        %y_split: f32[batch, 6, 8] = MatMul(%h <A>, %w_scaled <W>) @y
        %y/outliers: f32[batch, 6, 8] = MatMul(%h_outlying, %w_scaled_outliers)
        %y: f32[batch, 6, 8] = Add(%y_split, %y/outliers) @y_split
    """)


@pytest.mark.parametrize("text", [NORMED, RESIDUAL])
@pytest.mark.parametrize("first", [(), (Smooth(0.5),)])
def test_float_outputs_stay(text: str, first: tuple[Smooth, ...]) -> None:
    model = build(text, *norm())
    wanted = outputs(model, data(1))
    apply(model, (*OBSERVED, *first, SplitOutliers(0.0, share=0.05)), [data()])
    assert "Gather" in {n.op_type for n in model.graph}
    for a, b in zip(wanted, outputs(model, data(1)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())


@pytest.mark.parametrize("text", [NORMED, RESIDUAL])
def test_quantized_outputs_come_nearer_to_float(text: str) -> None:
    wanted = outputs(build(text, *norm()), data(1))[0]
    found = []
    for passes in ((), (SplitOutliers(),)):
        model = build(text, *norm())
        apply(model, (*OBSERVED, *passes, *COMMIT), [data()])
        found.append(sqnr_db(wanted, both(model, data(1))[0]))
    assert found[1] > found[0] + 10


def test_outliers_that_calibration_never_saw_cost_what_a_token_scale_costs() -> None:
    w = weight("w", 32, 8)
    model = build(PLAIN, w)
    apply(model, (*OBSERVED, SplitOutliers(), *COMMIT), [wild()])
    other = wild(1, channel=9)
    x = other["x"].copy()
    kept, hushed = x[..., [5]], x.copy()
    hushed[..., 5] = 0
    rest = dequantize_per_token(*quantize_per_token(hushed))
    wanted = kept @ w.numpy()[[5]] + rest @ w.numpy()
    assert sqnr_db(wanted, outputs(model, other)[0]) > 40  # the rounding of the weights is left


def test_only_products_that_leave_the_model() -> None:
    text = """
    g (float[batch,6,32] x) => (float[batch,6,8] y) {
      h = MatMul (x, v)
      a = Relu (h)
      y = MatMul (a, w)
    }"""
    model = build(text, weight("v", 32, 32), weight("w", 32, 8))
    apply(model, (*OBSERVED, SplitOutliers(0.0, share=0.05, outputs=True)), [wild()])
    split = {n.name for n in model.graph if str(n.name).endswith("/outliers")}
    assert split <= {"y/outliers"}


def test_what_is_an_outlier() -> None:
    peaks = np.array([1, 7, 2, 9, 1, 1, 1, 1, 1, 1], np.float64)
    assert outliers(peaks, 6.0, 0.0, 1.0).tolist() == [1, 3]
    assert outliers(peaks, 6.0, 0.0, 0.1).tolist() == [3]
    assert outliers(peaks, 0.0, 0.1, 1.0).tolist() == [3]
    assert outliers(peaks, 0.0, 0.0, 1.0).size == 0
    assert outliers(np.ones(10), 0.0, 0.5, 1.0).size == 0  # none stands out


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.floats(0, 8))
@settings(max_examples=15, deadline=None)
def test_any_outliers(seed: int, count: int, threshold: float) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_normal((2, 6, 32)).astype(np.float32)
    x[..., random.choice(32, count, replace=False)] *= np.float32(random.uniform(5, 100))
    model = build(PLAIN, weight("w", 32, 8, seed=seed % 1000))
    wanted = outputs(model, {"x": x})[0]
    apply(model, (*OBSERVED, SplitOutliers(threshold, most=0.5)), [{"x": x}])
    found = outputs(model, {"x": x})[0]
    np.testing.assert_allclose(wanted, found, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("parameters", "why"),
    [({"threshold": -1.0}, "negative"), ({"share": 2.0}, "use 0 to 1"), ({"most": -0.5}, "0 to 1")],
)
def test_parameters_out_of_range(parameters: dict[str, float], why: str) -> None:
    with pytest.raises(QGraphError, match=why):
        SplitOutliers(**parameters)  # type: ignore[arg-type]


def test_float_models_stay_valid_files() -> None:
    model = build(NORMED, *norm())
    apply(model, (*OBSERVED, SplitOutliers()), [data()])
    assert ir.from_proto(ir.to_proto(model)).graph.num_nodes() == 5
