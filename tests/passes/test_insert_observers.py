"""Observers stand where a static range is wanted, ask for what it needs, and change nothing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import PipelineError
from qgraph.graph.annotation import IN, WANTED
from qgraph.graph.functions import OBSERVER, is_call
from qgraph.numerics.spec import PER_RUN, PER_TOKEN, WEIGHT, QuantSpec, RangeMethod
from qgraph.numerics.stats import Wanted
from qgraph.passes.annotate import Annotate, Rule
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.insert_observers import InsertObservers
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import PassManager
from qgraph.pipeline.target import Target
from tests.models import build, feed, mlp, outputs, random_graph, transformer_block, weight
from tests.pipelines import CPU, ONNX, TARGETS, Shipped, apply, body, golden, node

U8 = "<uint8 per-tensor asym minmax>"
VNNI = Shipped("cpu:avx512-vnni", "avx512-vnni")


def observe(
    model: ir.Model,
    observer: RangeMethod = "minmax",
    target: Target = VNNI,
    channel_means: bool = False,
) -> dict[str, Wanted]:
    """Annotate statically and insert observers; what is wanted, by value name."""
    passes = [Canonicalize(), Annotate("static", observer), InsertObservers(channel_means)]
    PassManager(passes, verify=True).run(model, Context(target))
    return {str(n.inputs[0].name): n.meta[WANTED] for n in model.graph if is_call(n, OBSERVER)}  # type: ignore[union-attr]


def test_before_and_after() -> None:
    text = """
    g (float[1,2,4,4] x) => (float[1,3,4,4] y) {
      c = Conv (x, w1)
      r = Relu (c)
      y = Conv (r, w2)
    }"""
    model = build(text, weight("w1", 2, 2, 1, 1), weight("w2", 3, 2, 1, 1))
    observe(model)
    kernel = "<int8 per-axis(0) sym absmax>"
    assert body(model) == golden(f"""
        %x/observer: f32[1, 2, 4, 4] = qgraph::Observer(%x)
        %c: f32[1, 2, 4, 4] = Conv(%x/observer {U8}, %w1 {kernel})
        %r: f32[1, 2, 4, 4] {U8} = Relu(%c)
        %r/observer: f32[1, 2, 4, 4] {U8} = qgraph::Observer(%r)
        %y: f32[1, 3, 4, 4] {U8} = Conv(%r/observer {U8}, %w2 {kernel})
        %y/observer: f32[1, 3, 4, 4] {U8} = qgraph::Observer(%y)
        """)
    assert [f.name for f in model.functions.values()] == [OBSERVER]


def test_only_what_is_needed_is_wanted() -> None:
    assert observe(mlp((4, 3, 2))) == {name: Wanted(token_power=True) for name in ("x", "h0")}


@pytest.mark.parametrize("observer", ["percentile", "entropy", "mse"])
def test_a_histogram_for_ranges_that_clip(observer: RangeMethod) -> None:
    wanted = observe(mlp((4, 2)), observer)
    assert wanted == {"x": Wanted(histogram=True, token_power=True)}


def test_channels_for_bias_correction_and_for_saturation() -> None:
    matrix = observe(mlp((4, 2)), target=CPU, channel_means=True)["x"]
    assert (matrix.channel_mean_axis, matrix.channel_range_axis) == (-1, -1)
    text = "g (float[1,2,4,4] x) => (y) { y = Conv (x, w) }"
    pixels = observe(build(text, weight("w", 2, 2, 1, 1)), target=CPU, channel_means=True)["x"]
    assert (pixels.channel_mean_axis, pixels.channel_range_axis) == (1, 1)


def test_readers_that_disagree_on_the_channels_get_none() -> None:
    text = """
    g (float[1,4,4,4] x) => (y, z) {
      y = Conv (x, w1)
      z = MatMul (x, w2)
    }"""
    model = build(text, weight("w1", 2, 4, 1, 1), weight("w2", 4, 3))
    wanted = observe(model, target=CPU, channel_means=True)["x"]
    assert wanted == Wanted(token_power=True)


def test_a_histogram_if_any_of_several_users_wants_one() -> None:
    """The others may be taken back later."""
    rule = Rule(("matmul",), QuantSpec(), (QuantSpec(observer="entropy"),), layers="z")
    text = """
    g (float[N,4] x) => (y, z) {
      y = MatMul (x, w)
      z = MatMul (x, w)
    }"""
    model = build(text, weight("w", 4, 4))
    passes = [Canonicalize(), Annotate("static", "minmax", (rule,)), InsertObservers()]
    PassManager(passes).run(model, Context(VNNI))
    (observer,) = (n for n in model.graph if is_call(n, OBSERVER))
    assert observer.meta[WANTED] == Wanted(histogram=True, token_power=True)


def test_an_input_shared_by_three_is_observed_once() -> None:
    wanted = observe(transformer_block())
    assert sorted(wanted) == ["gated", "mixed", "n1_0" if "n1_0" in wanted else "n1", "n2"]


def test_values_of_branches_are_reached_from_outside() -> None:
    text = """
    g (bool flag, float[1,2,4,4] x) => (float[1,2,4,4] y) {
      c = Conv (x, w1)
      y = If (flag) <
        then_branch = yes () => (float[1,2,4,4] a) { a = Exp (c) },
        else_branch = no () => (float[1,2,4,4] b) { b = Relu (c) }
      >
    }"""
    model = build(text, weight("w1", 2, 2, 1, 1))
    assert sorted(observe(model)) == ["c", "x"]
    branch = node(model, "a").inputs[0]
    assert branch is not None
    assert is_call(branch.producer(), OBSERVER)


def test_a_graph_output_stays_what_it_was() -> None:
    text = "g (float[1,2,4,4] x) => (y) { y = Conv (x, w) }"
    model = build(text, weight("w", 2, 2, 1, 1))
    observe(model)
    assert [v.name for v in model.graph.outputs] == ["y"]


def test_names_that_are_taken_already() -> None:
    text = "g (float[2,4] x) => (float[2,4] y) { t = Relu (x) \n y = MatMul (t, w) }"
    model = build(text, weight("w", 4, 4))
    model.graph.inputs[0].name = "t/observer"
    assert list(observe(model)) == ["t"]


def test_nothing_to_observe() -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    assert observe(model) == {}
    assert not model.functions
    assert "qgraph" not in model.opset_imports


def test_a_dynamic_model_needs_no_observer() -> None:
    model = mlp((4, 2))
    apply(model, [Canonicalize(), Annotate("dynamic"), InsertObservers()])
    assert not any(is_call(n, OBSERVER) for n in model.graph)


@pytest.mark.parametrize(
    ("activation", "power"), [(PER_RUN, True), (PER_TOKEN, False)], ids=["run", "token"]
)
def test_scales_found_at_run_time_are_observed_for_their_channels(
    activation: QuantSpec, power: bool
) -> None:
    """The power of tokens only where they share a scale."""
    model = mlp((4, 3, 2))
    rule = Rule(("matmul",), WEIGHT, (activation,))
    annotate = Annotate("dynamic", rules=(rule,))
    apply(model, [Canonicalize(), annotate, InsertObservers(channel_ranges=True)], target=VNNI)
    wanted = {str(n.inputs[0].name): n.meta[WANTED] for n in model.graph if is_call(n, OBSERVER)}  # type: ignore[union-attr]
    assert wanted == dict.fromkeys(("x", "h0"), Wanted(token_power=power, channel_range_axis=-1))


def test_one_reader_with_a_scale_a_run_is_enough() -> None:
    text = """
    g (float[N,4] x) => (y, z) {
      y = MatMul (x, w)
      z = MatMul (x, w)
    }"""
    model = build(text, weight("w", 4, 4))
    rule = Rule(("matmul",), WEIGHT, (PER_RUN,), layers="z")
    annotate = Annotate("dynamic", rules=(rule,))
    apply(model, [Canonicalize(), annotate, InsertObservers(channel_ranges=True)], target=VNNI)
    (observer,) = (n for n in model.graph if is_call(n, OBSERVER))
    assert observer.meta[WANTED] == Wanted(token_power=True, channel_range_axis=-1)


def test_observation_needs_annotation() -> None:
    with pytest.raises(PipelineError, match="annotated"):
        PassManager([Canonicalize(), InsertObservers()])


@settings(max_examples=40, deadline=None)
@given(random_graph(), st.sampled_from(TARGETS), st.booleans())
def test_every_static_use_is_observed_and_nothing_changes(
    model: ir.Model, target: Target, means: bool
) -> None:
    given_ = feed(model)
    before = outputs(model, given_)
    observe(model, target=target, channel_means=means)
    for a, b in zip(before, outputs(model, given_), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    for n in model.graph:
        specs: dict[int, QuantSpec] = n.meta.get(IN, {})
        for index, spec in specs.items():
            value = n.inputs[index]
            assert value is not None
            fixed = spec.observer == "minmax" and not value.is_initializer()
            assert fixed is is_call(value.producer(), OBSERVER)
    assert ONNX.saturates
