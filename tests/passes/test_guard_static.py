"""Static quantization is taken back where one scale cannot serve, and only there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.backends.onnx import OnnxTarget
from qgraph.errors import PipelineError
from qgraph.graph.annotation import IN, SPEC, STATS
from qgraph.graph.sites import Site
from qgraph.io.feeds import Feed
from qgraph.numerics.noise import sqnr_db
from qgraph.numerics.reference import scale_zero_point
from qgraph.numerics.spec import PER_RUN, PER_TOKEN, WEIGHT, QuantSpec
from qgraph.numerics.stats import Stats, find_range
from qgraph.passes.annotate import Annotate, Rule, Scheme
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.guard_static import GuardStatic
from qgraph.passes.insert_observers import InsertObservers
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import PassManager
from qgraph.pipeline.target import Target, Verdict
from tests.models import build, feed, mlp, outputs, random_graph, weight
from tests.pipelines import (
    COMMIT,
    ONNX,
    TARGETS,
    annotate,
    apply,
    body,
    both,
    node,
    specs,
    static,
)

U8, TOKEN = "uint8 per-tensor asym minmax", "uint8 per-token sym dynamic"
LINE = "g (float[N,8] x) => (float[N,4] y) { y = MatMul (x, w) }"


@dataclass(frozen=True)
class Refusing(OnnxTarget):
    """No product with scales found at run time."""

    def supports(self, site: Site, activation: QuantSpec | None, weight: QuantSpec) -> Verdict:
        if activation is not None and activation.observer == "dynamic":
            return Verdict(False, "dynamic is slow here")
        return super().supports(site, activation, weight)


@dataclass(frozen=True)
class SlowTokens(OnnxTarget):
    """No product with scales token by token."""

    def supports(self, site: Site, activation: QuantSpec | None, weight: QuantSpec) -> Verdict:
        if activation == PER_TOKEN:
            return Verdict(False, "tokens are slow here")
        return super().supports(site, activation, weight)


def spiky(spike: float) -> list[Feed]:
    """64 tokens, the first one times `spike`."""
    x = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    x[0] *= np.float32(spike)
    return [{"x": x}]


def guard(
    model: ir.Model, feeds: Sequence[Feed], target: Target = ONNX, **parameters: float
) -> Context:
    return apply(model, (*annotate("static"), GuardStatic(**parameters)), feeds, target)


def test_before_and_after() -> None:
    model = build(LINE, weight("w", 8, 4))
    apply(model, annotate("static"), spiky(1000))
    kernel = "<int8 per-axis(1) sym absmax>"
    assert body(model) == f"%y: f32[N, 4] = MatMul(%x <{U8}>, %w {kernel})"
    model = build(LINE, weight("w", 8, 4))
    guard(model, spiky(1000))
    assert body(model) == f"%y: f32[N, 4] = MatMul(%x <{TOKEN}>, %w {kernel})"


def test_a_spike_on_the_first_token_makes_the_scales_dynamic_and_saves_the_others() -> None:
    data = spiky(1000)
    quality = {}
    for name, passes in {"guarded": static(), "bare": (*annotate("static"), *COMMIT)}.items():
        model = build(LINE, weight("w", 8, 4))
        before = outputs(model, data[0])[0]
        apply(model, passes, data)
        quality[name] = sqnr_db(before[1:], both(model, data[0])[0][1:])
    assert quality["bare"] < 5
    assert quality["guarded"] > 35


def test_the_remark_holds_what_the_median_token_would_keep() -> None:
    model = build(LINE, weight("w", 8, 4))
    (given_,) = spiky(1000)
    context = guard(model, [given_])
    verdict = context.remarks.verdicts()["y"]
    assert verdict.message == (
        "weights int8 per-channel, activations dynamic uint8 per-token: "
        "static ones are too coarse for most tokens"
    )
    x = given_["x"]
    step = (x.max() - x.min()) / 255
    power = np.median(np.square(x).mean(axis=1))
    assert verdict.numbers["median_token_db"] == pytest.approx(
        10 * np.log10(12 * power / step**2), abs=0.2
    )


@pytest.mark.parametrize("min_sqnr", [0.0, 25.0, 60.0])
def test_the_threshold_decides(min_sqnr: float) -> None:
    model = build(LINE, weight("w", 8, 4))
    guard(model, spiky(1), min_sqnr=min_sqnr)
    assert specs(model)["y"][0] == (TOKEN if min_sqnr == 60 else U8)


def test_float_where_the_target_has_nothing_dynamic() -> None:
    model = build(LINE, weight("w", 8, 4))
    context = guard(model, spiky(1000), Refusing())
    assert not specs(model)
    verdict = context.remarks.verdicts()["y"]
    assert verdict.kind == "float"
    assert verdict.message.endswith("too coarse for most tokens; dynamic is slow here")


def test_siblings_fall_together_and_a_dynamic_model_is_left_alone() -> None:
    text = """
    g (float[N,8] x) => (a, b) {
      a = MatMul (x, w)
      b = MatMul (x, v)
    }"""
    model = build(text, weight("w", 8, 4), weight("v", 8, 4))
    guard(model, spiky(1000))
    assert [by[0] for by in specs(model).values()] == [TOKEN, TOKEN]
    before = specs(model)
    assert not GuardStatic().run(model, Context(ONNX))
    assert specs(model) == before


# --- scales found for each run --------------------------------------------------------------------

ONE_RUN = (Rule(("matmul", "gemm"), WEIGHT, (PER_RUN,)),)


def guard_runs(
    model: ir.Model, feeds: Sequence[Feed], target: Target = ONNX, **parameters: float
) -> Context:
    """The same for a scale that each run finds for itself."""
    observe = (InsertObservers(channel_ranges=True), Calibrate())
    passes = (*annotate(rules=ONE_RUN), *observe, GuardStatic(**parameters))
    return apply(model, passes, feeds, target)


@pytest.mark.parametrize(("spike", "spec"), [(1, str(PER_RUN)), (1000, TOKEN)])
def test_a_run_with_a_spike_gets_scales_token_by_token(spike: float, spec: str) -> None:
    model = build(LINE, weight("w", 8, 4))
    data = spiky(spike)
    before = outputs(model, data[0])[0]
    context = guard_runs(model, data)
    assert specs(model)["y"][0] == spec
    verdict = context.remarks.verdicts()["y"]
    if spike > 1:
        assert verdict.message == (
            "weights int8 per-channel, activations dynamic uint8 per-token: "
            "one scale a run is too coarse for most tokens"
        )
        assert verdict.numbers["median_token_db"] < 5
    apply(model, COMMIT, data)
    assert sqnr_db(before[1:], both(model, data[0])[0][1:]) > 35


@pytest.mark.parametrize("min_sqnr", [0.0, 25.0, 60.0])
def test_the_threshold_decides_about_runs_too(min_sqnr: float) -> None:
    model = build(LINE, weight("w", 8, 4))
    guard_runs(model, spiky(1), min_sqnr=min_sqnr)
    assert specs(model)["y"][0] == (TOKEN if min_sqnr == 60 else str(PER_RUN))


def test_a_run_stays_float_where_tokens_are_slow() -> None:
    model = build(LINE, weight("w", 8, 4))
    context = guard_runs(model, spiky(1000), SlowTokens())
    assert not specs(model)
    verdict = context.remarks.verdicts()["y"]
    assert verdict.kind == "float"
    assert verdict.message == (
        "float activations: one scale a run is too coarse for most tokens; tokens are slow here"
    )


def test_runs_that_were_not_observed_are_left_alone() -> None:
    """In bodies of If, Loop and Scan, and where data never came."""
    text = """
    g (bool flag, float[N,8] x) => (float[N,4] y) {
      y = If (flag) <
        then_branch = a () => (float[N,4] y1) { y1 = MatMul (x, w) },
        else_branch = b () => (float[N,4] y2) { k = MatMul (x, w) y2 = Neg (k) }
      >
    }"""
    model = build(text, weight("w", 8, 4))
    guard_runs(model, [{**spiky(1000)[0], "flag": np.array(True)}])
    assert {by[0] for by in specs(model).values()} == {str(PER_RUN)}
    model = build(LINE, weight("w", 8, 4))
    guard_runs(model, [{"x": np.zeros((0, 8), np.float32)}])
    assert specs(model)["y"][0] == str(PER_RUN)


# --- joins ----------------------------------------------------------------------------------------

JOIN = """
g (float[1,2,4,4] x) => (y) {
  a = Conv (x, w1)
  b = Conv (x, w2)
  j = OP
  y = Conv (j, w3)
}"""


def joined(op: str, ratio: float) -> ir.Model:
    w = np.eye(2, dtype=np.float32).reshape(2, 2, 1, 1)
    wide = 4 if "Concat" in op else 2
    return build(
        JOIN.replace("OP", op),
        ir.Tensor(w, name="w1"),
        ir.Tensor(w * np.float32(ratio), name="w2"),
        weight("w3", 2, wide, 1, 1),
    )


@pytest.mark.parametrize("op", ["Add (a, b)", "Concat <axis = 1> (a, b)"])
@pytest.mark.parametrize(("ratio", "kept"), [(30.0, True), (34.0, False), (640.0, False)])
def test_joins_of_different_units_stay_float(op: str, ratio: float, kept: bool) -> None:
    model = joined(op, ratio)
    context = guard(model, [feed(model)])
    assert (IN in node(model, "j").meta) is kept
    assert (SPEC in node(model, "j").outputs[0].meta) is kept
    declined = [r for r in context.remarks if r.kind == "declined"]
    if not kept:
        assert (
            declined[0].message == "kept float: its inputs have ranges too different for one scale"
        )
        assert declined[0].numbers["ratio"] == pytest.approx(ratio, rel=0.01)
    assert len(declined) == (not kept)
    given_ = feed(model)
    apply(model, COMMIT, verify=False)
    both(model, given_)


def test_a_product_of_different_units_shares_no_scale() -> None:
    model = joined("Mul (a, b)", 640)
    guard(model, [feed(model)])
    assert IN in node(model, "j").meta


def test_what_calibration_never_reached_goes_float_with_all_that_it_feeds() -> None:
    text = """
    g (float[N,2,4,4] x, float[N,2,4,4] z) => (y, t) {
      a = Conv (x, w1)
      m = MaxPool <kernel_shape = [2,2]> (a)
      s = Add (m, m)
      y = Conv (s, w1)
      t = Relu (z)
    }"""
    model = build(text, weight("w1", 2, 2, 1, 1))
    x = np.zeros((0, 2, 4, 4), np.float32)
    context = guard(model, [{"x": x, "z": x}])
    assert {r.kind for r in context.remarks.verdicts().values()} == {"float"}
    apply(model, COMMIT, [{"x": x, "z": x}], verify=False)
    assert not any("Quantize" in n.op_type for n in model.graph)


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_a_model_without_sites(scheme: Scheme) -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    context = apply(model, (*annotate(scheme), GuardStatic()) if scheme == "static" else annotate())
    assert not context.remarks


def test_guarding_needs_calibration() -> None:
    with pytest.raises(PipelineError, match="calibrated"):
        PassManager([Canonicalize(), Annotate("static"), GuardStatic()])


def test_tokens_of_zeros_do_not_divide_by_zero() -> None:
    model = build(LINE, weight("w", 8, 4))
    data: list[Feed] = [{"x": np.zeros((5, 8), np.float32)}]
    guard(model, data)
    apply(model, COMMIT, data, verify=False)
    assert not both(model, data[0])[0].any()


@settings(max_examples=30, deadline=None)
@given(random_graph(), st.sampled_from(TARGETS), st.floats(1, 1e4))
def test_what_stays_static_serves_most_tokens(
    model: ir.Model, target: Target, spike: float
) -> None:
    feeds = [feed(model, seed) for seed in range(2)]
    for given_ in feeds:
        given_["x"][..., :1, :] *= np.float32(spike)
    context = guard(model, feeds, target)
    for name, by in specs(model).items():
        for index, spec in by.items():
            value = node(model, name).inputs[index]
            assert value is not None
            stats: Stats | None = value.meta.get(STATS)
            if spec != U8 or stats is None or stats.token_power is None:
                continue
            low, high = find_range(stats, QuantSpec(ir.DataType.UINT8, symmetric=False))
            step, _ = scale_zero_point(
                np.float32(low), np.float32(high), QuantSpec(ir.DataType.UINT8, symmetric=False)
            )
            centers, counts = stats.token_power.bins()
            alive = np.repeat(centers, counts)[np.repeat(centers > 0, counts)]  # zeros are exact
            median = np.quantile(alive, 0.5, method="lower")
            if node(model, name).op_type in ("MatMul", "Gemm"):
                assert 10 * np.log10(12 * median / float(step) ** 2) > 24
    assert context.remarks.verdicts().keys() >= specs(model).keys() - _glue(model)


def _glue(model: ir.Model) -> set[str]:
    linear = ("MatMul", "Gemm", "Conv")
    return {str(n.name) for n in model.graph if n.op_type not in linear}


def test_all_of_it_on_an_mlp() -> None:
    model = mlp()
    guard(model, [feed(model, s) for s in range(3)])
    assert [by[0] for by in specs(model).values()] == [U8, U8]
