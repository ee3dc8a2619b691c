"""Cross-layer equalization keeps the function, evens out the channels, and knows where to stop."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qgraph.backends.onnx import OnnxTarget
from qgraph.errors import PipelineError
from qgraph.graph.annotation import Stage
from qgraph.graph.reading import array
from qgraph.graph.sites import sites
from qgraph.graph.text.printer import to_text
from qgraph.numerics.noise import relative_error, sqnr_db
from qgraph.numerics.reference import dequantize, quantize_weight
from qgraph.numerics.spec import QuantSpec
from qgraph.passes.equalize import Equalize, equalizing_scales
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import PassManager
from tests.models import build, feed, mlp, outputs, random_graph, small_convnet, weight

CANONICAL = frozenset({Stage.CANONICAL})


def equalize(model: ir.Model, iterations: int = 20) -> Context:
    """Run the pass, verified; returns the context with its remarks."""
    context = Context(OnnxTarget())
    PassManager([Equalize(iterations)], verify=True, given=CANONICAL).run(model, context)
    return context


def tensor(name: str, values: object) -> ir.TensorProtocol:
    return ir.Tensor(np.asarray(values, np.float32), name=name)


def chain(between: str, first: str = "Conv", second: str = "Conv") -> ir.Model:
    """Two linear operators of 4 channels; `between` reads `a` and writes `h`."""
    shape = "1,4,6,6" if first == "Conv" else "6,4"
    size = (4, 4, 1, 1) if first == "Conv" else (4, 4)
    text = f"""
    chain (float[{shape}] x) => (float[{shape}] y) {{
      a = {first} (x, w1)
      {between}
      y = {second} (h, w2)
    }}"""
    return build(
        text,
        weight("w1", *size, spread=50),
        weight("w2", *size),
        tensor("slope", np.full((4, 1, 1) if first == "Conv" else 4, 0.1)),
        tensor("six", 6.0),
        tensor("zero", 0.0),
        tensor("bias", [1, 2, 3, 4]),
    )


def mobile_block(spread: float, seed: int = 0) -> ir.Model:
    """Pointwise, depthwise, pointwise; channels differ by `spread`, which the next one undoes."""
    rng = np.random.default_rng(seed)
    up, down = (np.geomspace(1, spread, 16)[rng.permutation(16)] for _ in range(2))
    w1 = rng.normal(size=(16, 8, 1, 1)) * up[:, None, None, None]
    w2 = rng.normal(size=(16, 1, 3, 3)) * (down / up)[:, None, None, None]
    w3 = rng.normal(size=(8, 16, 1, 1)) / down[None, :, None, None]
    return build(
        """
        block (float[1,8,8,8] x) => (float[1,8,8,8] y) {
          c1 = Conv (x, w1, b1)
          r1 = Relu (c1)
          c2 = Conv <group = 16, pads = [1,1,1,1]> (r1, w2, b2)
          r2 = Relu (c2)
          y = Conv (r2, w3)
        }""",
        tensor("w1", w1),
        tensor("w2", w2),
        tensor("w3", w3),
        tensor("b1", rng.normal(size=16) * up),
        tensor("b2", rng.normal(size=16) * down),
    )


def with_rounded_weights(model: ir.Model) -> ir.Model:
    """The model with every weight rounded to int8 with one scale."""
    rounded = model.clone()
    for site in sites(rounded):
        w = array(site.weight)
        assert w is not None
        q, scale, zero = quantize_weight(w, None, QuantSpec())
        site.weight.const_value = tensor(site.weight.name or "", dequantize(q, scale, zero))
    return rounded


# --- what it does ---------------------------------------------------------------------------------


def test_before_and_after() -> None:
    model = build(
        """
        pair (float[1,1,2,2] x) => (float[1,1,2,2] y) {
          c = Conv (x, w1, b1)
          h = Relu (c)
          y = Conv (h, w2, b2)
        }""",
        tensor("w1", np.reshape([4, 1], (2, 1, 1, 1))),
        tensor("b1", [8, 1]),
        tensor("w2", np.reshape([1, -4], (1, 2, 1, 1))),
        tensor("b2", [3]),
    )
    context = equalize(model)
    assert body(model) == [
        "weight %b2 = f32[1] {3.0}",
        "weight %w1_equal = f32[2, 1, 1, 1] {2.0, 2.0}",
        "weight %b1_equal = f32[2] {4.0, 2.0}",
        "weight %w2_equal = f32[1, 2, 1, 1] {2.0, -2.0}",
        "%c: f32[1, 2, 2, 2] = Conv(%x, %w1_equal, %b1_equal)",
        "%h: f32[1, 2, 2, 2] = Relu(%c)",
        "%y: f32[1, 1, 2, 2] = Conv(%h, %w2_equal, %b2)",
    ]
    (done,) = [r for r in context.remarks if r.kind == "applied"]
    assert done.numbers == {"spread_before": 4.0, "spread_after": 1.0}


def body(model: ir.Model) -> list[str]:
    lines = [line.strip() for line in to_text(model).splitlines()]
    return [line for line in lines if line.startswith(("weight", "%"))]


def test_per_tensor_weights_gain_more_than_10_db() -> None:
    model = mobile_block(spread=100)
    inputs = feed(model)
    reference = outputs(model, inputs)[0]
    before = sqnr_db(reference, outputs(with_rounded_weights(model), inputs)[0])
    equalize(model)
    assert relative_error(reference, outputs(model, inputs)[0]) < 1e-4
    after = sqnr_db(reference, outputs(with_rounded_weights(model), inputs)[0])
    assert after > before + 10
    assert after > 30


def test_sweeps_go_on_until_a_chain_is_balanced() -> None:
    model = mobile_block(spread=100)
    equalize(model)
    w1, w2, w3 = (np.abs(w) for s in sites(model) if (w := array(s.weight)) is not None)
    first, middle, last = w1.max(axis=(1, 2, 3)), w2.max(axis=(1, 2, 3)), w3.max(axis=(0, 2, 3))
    assert np.allclose(first, middle, rtol=1e-2)
    assert np.allclose(middle, last, rtol=1e-2)
    again = [array(s.weight) for s in sites(model)]
    equalize(model)
    for old, site in zip(again, sites(model), strict=True):
        assert np.allclose(old, array(site.weight), rtol=1e-2)  # type: ignore[arg-type]


def test_one_sweep_balances_the_pairs_it_meets() -> None:
    model = chain("h = Relu (a)")
    equalize(model, iterations=1)
    w1, w2 = (np.abs(w) for s in sites(model) if (w := array(s.weight)) is not None)
    assert np.allclose(w1.max(axis=(1, 2, 3)), w2.max(axis=(0, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize(
    ("between", "first", "second"),
    [
        ("h = Relu (a)", "Conv", "Conv"),
        ("h = LeakyRelu <alpha = 0.2> (a)", "Conv", "Conv"),
        ("h = PRelu (a, slope)", "Conv", "Conv"),
        ("h = Identity (a)", "Conv", "Conv"),
        ("r = Relu (a) h = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (r)", "Conv", "Conv"),
        ("h = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1]> (a)", "Conv", "Conv"),
        ("h = Relu (a)", "MatMul", "MatMul"),
        ("h = PRelu (a, slope)", "Gemm", "MatMul"),
        ("s = Add (a, bias) h = Relu (s)", "MatMul", "Gemm"),
        ("s = Add (six, a) h = Relu (s)", "MatMul", "Gemm"),
    ],
)
def test_what_passes_a_scale_on(between: str, first: str, second: str) -> None:
    model = chain(between, first, second)
    context = equalize(model)
    (done,) = [r for r in context.remarks if r.kind == "applied"]
    assert done.numbers["spread_after"] < done.numbers["spread_before"]


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_orientations_and_biases(transposed: int) -> None:
    model = build(
        f"""
        two (float[3,5] x) => (float[3,7] y) {{
          a = Gemm <transB = {transposed}, alpha = 0.5, beta = 2.0> (x, w1, b1)
          h = Relu (a)
          y = Gemm <transB = {transposed}> (h, w2, b2)
        }}""",
        *(weight(n, *(s[::-1] if transposed else s), spread=30) for n, s in _GEMMS.items()),
        weight("b1", 1, 6),
        weight("b2", 7),
    )
    assert [r.kind for r in equalize(model).remarks] == ["declined", "applied"]


_GEMMS = {"w1": (5, 6), "w2": (6, 7)}


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_convolutions(groups: int) -> None:
    model = build(
        f"""
        grouped (float[1,4,5,5] x) => (float[1,8,5,5] y) {{
          c1 = Conv <group = {groups}> (x, w1, b1)
          h = Relu (c1)
          y = Conv <group = {groups}> (h, w2)
        }}""",
        weight("w1", 4, 4 // groups, 1, 1, spread=40),
        weight("b1", 4),
        weight("w2", 8, 4 // groups, 1, 1),
    )
    assert "applied" in [r.kind for r in equalize(model).remarks]


def test_channels_of_zeros_stay() -> None:
    model = chain("h = Relu (a)")
    first, second = sites(model)
    w1, w2 = np.array(array(first.weight)), np.array(array(second.weight))
    w1[1], w2[:, 2] = 0, 0
    first.weight.const_value, second.weight.const_value = tensor("w1", w1), tensor("w2", w2)
    equalize(model)
    new1, new2 = (array(s.weight) for s in sites(model))
    assert new1 is not None
    assert new2 is not None
    assert np.array_equal(new1[[1, 2]], w1[[1, 2]])
    assert np.array_equal(new2[:, [1, 2]], w2[:, [1, 2]])
    assert not np.array_equal(new1, w1)


def test_a_weight_that_others_read_is_not_changed_for_them() -> None:
    model = build(
        """
        shared (float[1,4,5,5] x) => (float[1,4,5,5] y, float[1,4,5,5] z) {
          a = Conv (x, w1)
          h = Relu (a)
          y = Conv (h, w2)
          z = Conv (x, w1)
        }""",
        weight("w1", 4, 4, 1, 1, spread=30),
        weight("w2", 4, 4, 1, 1),
    )
    equalize(model)
    assert "w1" in model.graph.initializers


def test_weights_in_a_branch() -> None:
    model = build(
        """
        branch (bool flag, float[1,4,5,5] x) => (float[1,4,5,5] y) {
          y = If (flag) <
            then_branch = yes () => (float[1,4,5,5] y1) {
              a = Conv (x, w1)
              h = Relu (a)
              y1 = Conv (h, w2)
            },
            else_branch = no () => (float[1,4,5,5] y2) { y2 = Relu (x) }
          >
        }""",
        weight("w1", 4, 4, 1, 1, spread=30),
        weight("w2", 4, 4, 1, 1),
    )
    inputs = feed(model) | {"flag": np.array(True)}
    reference = outputs(model, inputs)[0]
    assert "applied" in [r.kind for r in equalize(model).remarks]
    assert relative_error(reference, outputs(model, inputs)[0]) < 1e-4


# --- what it declines -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "first", "second", "reason"),
    [
        ("h = Clip (a, zero, six)", "Conv", "Conv", "Clip 'h' does not pass a scale on"),
        ("h = Sigmoid (a)", "Conv", "Conv", "Sigmoid 'h' does not pass a scale on"),
        ("h = Add (a, six)", "Conv", "Conv", "Add 'h' does not pass a scale on"),
        ("h = Add (a, x)", "MatMul", "MatMul", "Add 'h' does not pass a scale on"),
        ("b = Relu (a) h = Add (a, b)", "Conv", "Conv", "'a' has several readers or is an output"),
        ("h = Relu (a)", "Conv", "MatMul", "MatMul 'y' has other channels"),
        ("h = PRelu (six, a)", "MatMul", "MatMul", "PRelu 'h' does not pass a scale on"),
    ],
)
def test_what_stops_a_scale(between: str, first: str, second: str, reason: str) -> None:
    if second == "MatMul" and first == "Conv":
        model = build(
            """
            mixed (float[1,4,4,4] x) => (float[1,4,4,4] y) {
              a = Conv (x, w1)
              h = Relu (a)
              y = MatMul (h, w2)
            }""",
            weight("w1", 4, 4, 1, 1),
            weight("w2", 4, 4),
        )
    else:
        model = chain(between, first, second)
    before = to_text(model, weights=True)
    context = equalize(model)
    assert to_text(model, weights=True) == before
    messages = [str(r.message) for r in context.remarks]
    assert any(reason in m for m in messages), messages


def test_it_needs_a_canonical_model() -> None:
    with pytest.raises(PipelineError, match="canonical"):
        PassManager([Equalize()])


def test_no_iterations_change_nothing() -> None:
    model = chain("h = Relu (a)")
    before = to_text(model, weights=True)
    equalize(model, iterations=0)
    assert to_text(model, weights=True) == before


# --- properties -----------------------------------------------------------------------------------

magnitudes = hnp.arrays(np.float64, 5, elements=st.floats(1e-3, 1e3))


@given(magnitudes, magnitudes)
def test_scales_make_both_ranges_the_geometric_mean(r1: np.ndarray, r2: np.ndarray) -> None:
    s = equalizing_scales(r1, r2)
    alive = (r1 > 1e-4 * r1.max()) & (r2 > 1e-4 * r2.max())
    assert np.allclose((r1 / s)[alive], np.sqrt(r1 * r2)[alive])
    assert np.allclose((r2 * s)[alive], np.sqrt(r1 * r2)[alive])
    assert (s[~alive] == 1).all()


@settings(deadline=None, max_examples=40)
@given(random_graph())
def test_random_graphs_keep_their_function(model: ir.Model) -> None:
    inputs = feed(model)
    reference = outputs(model, inputs)
    equalize(model)
    for old, new in zip(reference, outputs(model, inputs), strict=True):
        assert relative_error(old, new) < 1e-4


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.floats(1, 300))
def test_models_keep_their_function(seed: int, spread: float) -> None:
    for model in (
        mlp((8, 16, 16, 4), seed=seed, spread=spread),
        small_convnet(seed=seed, spread=spread),
    ):
        inputs = feed(model, seed)
        reference = outputs(model, inputs)[0]
        equalize(model)
        assert relative_error(reference, outputs(model, inputs)[0]) < 1e-4
