"""Bias correction takes the mean error out of every channel, where it knows the mean."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.backends.onnx import OnnxTarget
from qgraph.errors import PipelineError
from qgraph.graph.annotation import IN, STATS, Stage
from qgraph.graph.reading import array
from qgraph.graph.sites import Site, sites
from qgraph.graph.text.printer import to_text
from qgraph.numerics.spec import PerAxis, PerBlock, PerTensor, QuantSpec
from qgraph.numerics.stats import Stats, Wanted
from qgraph.passes.bias_correction import BiasCorrection, expected_shift
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import PassManager
from qgraph.weights.site_weight import quantize_site
from tests.models import build, ops, outputs, random_graph, weight

INT4 = QuantSpec(ir.DataType.INT8, PerAxis(0), observer="absmax", bits=4)
CALIBRATED = frozenset({Stage.CALIBRATED})

CONV = """
g (float[64,6,5,5] x) => (float[64,8,N,N] y) { y = Conv (x, w) }"""
CONV_BIAS = """
g (float[64,6,5,5] x) => (float[64,8,N,N] y) { y = Conv (x, w, b) }"""
DEPTHWISE = """
g (float[64,8,5,5] x) => (float[64,8,N,N] y) { y = Conv <group = 8> (x, w, b) }"""
GROUPED = """
g (float[64,12,5,5] x) => (float[64,8,N,N] y) { y = Conv <group = 2> (x, w, b) }"""
GEMM = """
g (float[512,6] x) => (float[512,8] y) { y = Gemm (x, w) }"""
GEMM_T = """
g (float[512,6] x) => (float[512,8] y) { y = Gemm <transB = 1> (x, w, b) }"""
MATMUL = """
g (float[32,16,6] x) => (float[32,16,8] y) {
  m = MatMul (x, w)
  y = Add (b, m)
}"""

CASES: dict[str, tuple[str, tuple[int, ...]]] = {
    "conv": (CONV, (8, 6, 3, 3)),
    "conv with bias": (CONV_BIAS, (8, 6, 3, 3)),
    "depthwise": (DEPTHWISE, (8, 1, 3, 3)),
    "grouped": (GROUPED, (8, 6, 3, 3)),
    "gemm": (GEMM, (6, 8)),
    "gemm transposed": (GEMM_T, (8, 6)),
    "matmul": (MATMUL, (6, 8)),
}


def case(name: str, spec: QuantSpec = INT4) -> tuple[ir.Model, np.ndarray]:
    """A calibrated and annotated model of one site, and the data it was calibrated on."""
    text, shape = CASES[name]
    model = build(
        text, weight("w", *shape), *([weight("b", 8)] if " b" in text or "(b" in text else [])
    )
    (site,) = sites(model)
    x = np.random.default_rng(0).gamma(1.0, size=tuple(site.x.shape or ())).astype(np.float32)  # type: ignore[arg-type]
    calibrate(site, x, spec)
    return model, x


def calibrate(site: Site, x: np.ndarray, spec: QuantSpec) -> None:
    axis = 1 if site.kind == "conv" else -1
    site.x.meta[STATS] = Stats.of(x, Wanted(channel_mean_axis=axis))
    site.node.meta[IN] = {site.w_index: spec}


def correct(model: ir.Model) -> Context:
    context = Context(OnnxTarget())
    PassManager([BiasCorrection()], verify=True, given=CALIBRATED).run(model, context)
    return context


def with_rounded_weights(model: ir.Model) -> ir.Model:
    """What insert-qdq makes of the weights, still float."""
    result = model.clone()
    for original, site in zip(sites(model), sites(result), strict=True):
        w = array(original.weight)
        assert w is not None
        spec = original.node.meta[IN][original.w_index]
        rounded = quantize_site(original, spec, False).float()
        site.weight.const_value = ir.Tensor(rounded, name=site.weight.name)
    return result


def channel_errors(reference: np.ndarray, y: np.ndarray, site: Site) -> np.ndarray:
    """|mean error| of each output channel."""
    channel = 1 if site.kind == "conv" else y.ndim - 1
    others = tuple(i for i in range(y.ndim) if i != channel)
    mean: np.ndarray = np.abs((y - reference).mean(axis=others, dtype=np.float64))
    return mean


# --- what it does ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [INT4, INT4.with_(granularity=PerTensor())], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_mean_error_of_every_channel_vanishes(name: str, spec: QuantSpec) -> None:
    model, x = case(name, spec)
    (site,) = sites(model)
    reference = outputs(model, {"x": x})[0]
    before = channel_errors(reference, outputs(with_rounded_weights(model), {"x": x})[0], site)
    (remark,) = correct(model).remarks
    after = channel_errors(reference, outputs(with_rounded_weights(model), {"x": x})[0], site)
    assert remark.kind == "applied"
    assert after.max() < before.max() / 5
    assert after.sum() < before.sum() / 5
    # valid convolutions see the borders less often than the middle, products see all alike
    assert after.max() < (0.02 if site.kind == "conv" else 1e-5)


def test_before_and_after() -> None:
    model = build(
        """
        g (float[2,2] x) => (float[2,2] y) {
          m = Gemm (x, w)
          r = Relu (m)
          y = Gemm (r, w, b)
        }""",
        ir.Tensor(np.array([[7, -7], [3.25, 1.5]], np.float32), name="w"),
        ir.Tensor(np.array([1, 2], np.float32), name="b"),
    )
    first, second = sites(model)
    for site, mean in ((first, [0.0, 2.0]), (second, [1.0, 4.0])):
        site.x.meta[STATS] = Stats(8, -1, 4, channel_mean=np.array(mean))
        site.node.meta[IN] = {1: INT4.with_(granularity=PerAxis(1))}
    correct(model)
    lines = [line.strip() for line in to_text(model).splitlines()]
    # 3.25 becomes 3 and 1.5 becomes 2 (ties to even): the first column loses, the second gains
    assert "weight %m_corrected = f32[2] {0.5, -1.0}" in lines
    assert "weight %y_corrected = f32[2] {2.0, 0.0}" in lines
    assert ops(model) == ["Gemm", "Relu", "Gemm"]
    assert "b" not in model.graph.initializers


def test_a_bias_that_others_read_is_not_changed_for_them() -> None:
    model = build(
        """
        g (float[4,6] x) => (float[4,8] y, float[8] z) {
          y = Gemm (x, w, b)
          z = Neg (b)
        }""",
        weight("w", 6, 8),
        weight("b", 8),
    )
    (site,) = sites(model)
    calibrate(site, np.ones((4, 6), np.float32), INT4.with_(granularity=PerAxis(1)))
    before = outputs(model, {"x": np.ones((4, 6), np.float32)})
    correct(model)
    after = outputs(model, {"x": np.ones((4, 6), np.float32)})
    assert np.array_equal(before[1], after[1])
    assert not np.array_equal(before[0], after[0])


def test_the_last_layers_mean_error_shrinks_in_a_net() -> None:
    model = build(
        """
        net (float[256,16] x) => (float[256,8] y) {
          h1 = Gemm (x, w1, b1)
          r1 = Relu (h1)
          h2 = Gemm (r1, w2, b2)
          r2 = Relu (h2)
          y = Gemm (r2, w3)
        }""",
        weight("w1", 16, 64),
        weight("b1", 64),
        weight("w2", 64, 64),
        weight("b2", 64),
        weight("w3", 64, 8),
    )
    x = np.random.default_rng(0).normal(size=(256, 16)).astype(np.float32)
    probe = model.clone()
    probe.graph.outputs.extend(n.outputs[0] for n in list(probe.graph)[:-1])
    values = dict(zip((o.name for o in probe.graph.outputs), outputs(probe, {"x": x}), strict=True))
    for site in sites(model):
        data = x if site.x.name == "x" else values[site.x.name]
        calibrate(site, data, INT4.with_(granularity=PerAxis(1)))
    reference = values["y"]
    last = list(sites(model))[-1]
    before = channel_errors(reference, outputs(with_rounded_weights(model), {"x": x})[0], last)
    correct(model)
    after = channel_errors(reference, outputs(with_rounded_weights(model), {"x": x})[0], last)
    assert after.mean() < before.mean() / 2


# --- what it declines -----------------------------------------------------------------------------


def drop_stats(model: ir.Model) -> None:
    next(sites(model)).x.meta.clear()


def drop_means(model: ir.Model) -> None:
    next(sites(model)).x.meta[STATS] = Stats(3, 0, 1)


def wrong_means(model: ir.Model) -> None:
    next(sites(model)).x.meta[STATS] = Stats(3, 0, 1, channel_mean=np.ones(99))


def nan_means(model: ir.Model) -> None:
    next(sites(model)).x.meta[STATS] = Stats(3, 0, 1, channel_mean=np.full(6, np.nan))


def blockwise(model: ir.Model) -> None:
    site = next(sites(model))
    site.node.meta[IN] = {site.w_index: INT4.with_(granularity=PerBlock(0, 2))}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (drop_stats, "the mean of its input is unknown: set channel_means=true"),
        (drop_means, "the mean of its input is unknown: set channel_means=true"),
        (wrong_means, "has other channels"),
        (nan_means, "has other channels"),
        (blockwise, "its weight is quantized per-block(0, 2)"),
    ],
)
def test_what_it_cannot_know(spoil: Callable[[ir.Model], None], reason: str) -> None:
    model, _ = case("conv with bias")
    spoil(model)
    before = to_text(model, weights=True)
    (remark,) = correct(model).remarks
    assert remark.kind == "declined"
    assert reason in remark.message
    assert to_text(model, weights=True) == before


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = MatMul (x, w)", "no bias follows this MatMul"),
        ("m = MatMul (x, w) y = Relu (m)", "no bias follows this MatMul"),
        ("m = MatMul (x, w) y = Add (m, x)", "no bias follows this MatMul"),
        ("c = Relu (b) y = Gemm (x, w, c)", "its bias is computed"),
        ("y = Gemm <beta = 2.0> (x, w, b)", "its alpha or beta is not 1"),
    ],
)
def test_products_without_a_bias_to_correct(body: str, reason: str) -> None:
    text = f"g (float[4,6] x, float[6] b) => (float[4,6] y) {{ {body} }}"
    model = build(text, weight("w", 6, 6))
    if "beta" in body:
        model = build(text.replace(", float[6] b", ""), weight("w", 6, 6), weight("b", 6))
    (site,) = sites(model)
    calibrate(site, np.ones((4, 6), np.float32), INT4)
    (remark,) = correct(model).remarks
    assert (remark.kind, reason in remark.message) == ("declined", True), remark


def test_a_value_that_means_two_kinds_of_channel() -> None:
    model = build(
        """
        g (float[1,4,4,4] x) => (float[1,4,4,4] y, float[1,4,4,4] z) {
          y = Conv (x, w1)
          z = MatMul (x, w2)
        }""",
        weight("w1", 4, 4, 1, 1),
        weight("w2", 4, 4),
    )
    first, _ = sites(model)
    calibrate(first, np.ones((1, 4, 4, 4), np.float32), INT4)
    (remark,) = correct(model).remarks
    assert "disagree on channels" in remark.message


def test_float_sites_and_transposed_convolutions() -> None:
    model = build(
        """
        g (float[1,4,4,4] x) => (float[1,4,4,4] y) {
          h = Conv (x, w)
          y = ConvTranspose (h, w)
        }""",
        weight("w", 4, 4, 1, 1),
    )
    _, second = sites(model)
    second.node.meta[IN] = {1: INT4}
    (remark,) = correct(model).remarks
    assert remark.message == "the shift of a ConvTranspose is not corrected"


def test_it_needs_a_calibrated_model() -> None:
    with pytest.raises(PipelineError, match="calibrated"):
        PassManager([BiasCorrection()])


# --- properties -----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(sorted(CASES)), st.integers(0, 1000))
def test_expected_shift_is_the_mean_of_the_difference(name: str, seed: int) -> None:
    """On data that is constant over positions, the only shift is the expected one."""
    model, x = case(name)
    (site,) = sites(model)
    rng = np.random.default_rng(seed)
    w = array(site.weight)
    assert w is not None
    changed = (w + rng.normal(scale=0.1, size=w.shape)).astype(np.float32)
    channel = 1 if site.kind == "conv" else x.ndim - 1
    mean = rng.normal(size=(x.shape[channel],))
    flat = np.broadcast_to(
        mean.reshape([-1 if i == channel else 1 for i in range(x.ndim)]), x.shape
    )
    reference = outputs(model, {"x": flat.astype(np.float32)})[0]
    site.weight.const_value = ir.Tensor(changed, name="w")
    moved = outputs(model, {"x": flat.astype(np.float32)})[0] - reference
    others = tuple(i for i in range(moved.ndim) if i != (1 if site.kind == "conv" else x.ndim - 1))
    assert np.allclose(expected_shift(site, w, changed, mean), moved.mean(axis=others), atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(random_graph(), st.integers(0, 1000))
def test_random_graphs_stay_sound(model: ir.Model, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for site in sites(model):
        if site.kind not in ("conv", "gemm", "matmul"):
            continue
        shape = [int(d) for d in site.x.shape or ()]  # type: ignore[arg-type]
        calibrate(site, rng.normal(size=shape).astype(np.float32), INT4)
    kinds = {r.kind for r in correct(model).remarks}
    assert kinds <= {"applied", "declined"}
