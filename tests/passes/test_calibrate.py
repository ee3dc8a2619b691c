"""Calibration sees what the model computes, exactly, once, and whatever the batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.calibration import collect as module
from qgraph.calibration.collect import reductions
from qgraph.errors import CalibrationError, PipelineError
from qgraph.graph.annotation import STATS, WANTED, Stage
from qgraph.graph.functions import OBSERVER, declare, is_call
from qgraph.graph.reading import nodes
from qgraph.io.feeds import Feed
from qgraph.numerics.stats import Stats, Wanted
from qgraph.passes.annotate import Annotate
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.insert_observers import InsertObservers
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import PassManager
from tests.models import build, feed, mlp, ops, outputs, random_graph, small_convnet, weight
from tests.pipelines import CPU, ONNX, annotate, apply, body, golden

ALL = Wanted(histogram=True, channel_mean_axis=-1, channel_range_axis=-1, token_power=True)
OBSERVED = frozenset({Stage.OBSERVED})


def observed(text: str, *tensors: ir.TensorProtocol, wanted: Wanted = ALL) -> ir.Model:
    """A model whose Identity nodes are observers."""
    model = build(text.replace("Observer", "Identity"), *tensors)
    for node in model.graph:
        if node.op_type == "Identity":
            declare(model, OBSERVER)
            node.domain, node.op_type, node.meta[WANTED] = "qgraph", OBSERVER, wanted
    return model


SIMPLE = """
g (float[N,3] x) => (float[N,3] y) {
  o = Observer (x)
  y = Relu (o)
}"""


def calibrate(
    model: ir.Model, feeds: object, cache: Path | None = None, progress: object = None
) -> dict[str, Stats]:
    """Calibrate; the statistics by value name."""
    context = Context(ONNX, feeds, cache=cache)  # type: ignore[arg-type]
    if progress is not None:
        context.progress = progress  # type: ignore[assignment]
    PassManager([Calibrate()], given=OBSERVED).run(model, context)
    values = [*model.graph.inputs, *(v for n in model.graph for v in n.outputs)]
    return {str(v.name): v.meta[STATS] for v in values if STATS in v.meta}


def same(a: Stats, b: Stats) -> None:
    """Equal up to the rounding of means."""
    assert (a.count, a.low, a.high) == (b.count, b.low, b.high)
    assert a.histogram == b.histogram
    for name in ("channel_low", "channel_high"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    np.testing.assert_allclose(a.channel_mean, b.channel_mean, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_before_and_after() -> None:
    model = observed(SIMPLE)
    assert body(model) == golden("""
        %o: f32[N, 3] = qgraph::Observer(%x)
        %y: f32[N, 3] = Relu(%o)
        """)
    calibrate(model, [{"x": np.array([[-1, 0, 2.5]], np.float32)}])
    assert body(model) == "%y: f32[N, 3] = Relu(%x)"
    assert str(model.graph.inputs[0].meta[STATS]) == "[-1, 2.5] n=3"
    assert not model.functions
    assert "qgraph" not in model.opset_imports


def test_what_runs_are_reductions_and_nothing_behind_the_last_of_them() -> None:
    text = """
    g (float[N,3] x) => (float[N,4] y) {
      r = Relu (x)
      o = Observer (r)
      y = MatMul (o, w)
    }"""
    model = observed(text, weight("w", 3, 4), wanted=Wanted())
    probe = reductions(model, {"r": Wanted()})
    assert ops(probe)[0] == "Relu"
    assert "MatMul" not in ops(probe)
    assert {str(v.name).split("|")[0] for v in probe.graph.outputs} == {"r"}
    assert not probe.graph.initializers
    assert ops(model) == ["Relu", OBSERVER, "MatMul"]


@pytest.mark.parametrize("version", [13, 17, 21])
def test_statistics_are_those_of_the_data(version: int) -> None:
    model = observed(SIMPLE)
    model.graph.opset_imports[""] = version
    x = rows(7, 3)
    same(calibrate(model, [{"x": x}])["x"], Stats.of(x, ALL))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
    st.integers(0, 99),
)
def test_neither_batches_nor_their_order_matter(
    sizes: list[int], random: object, seed: int
) -> None:
    whole = np.concatenate([rows(1, 3, seed=seed), *(rows(n, 3, seed=seed + n) for n in sizes)])
    parts = np.split(whole, np.cumsum([1, *sizes])[:-1])
    random.shuffle(parts)  # type: ignore[attr-defined]
    same(calibrate(observed(SIMPLE), [{"x": p} for p in parts])["x"], Stats.of(whole, ALL))


def test_raw_values_leave_the_session_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
    g (float[N,3] x) => (float[N,3] y) {
      a = Observer (x)
      b = Relu (a)
      c = Observer (b)
      d = Exp (c)
      e = Observer (d)
      y = Neg (e)
    }"""
    feeds = [{"x": rows(0, 3)}, {"x": rows(9, 3)}, {"x": rows(0, 3)}]
    at_once = calibrate(observed(text), feeds)
    monkeypatch.setattr(module, "RAW_BYTES", 0)
    one_by_one = calibrate(observed(text), feeds)
    assert sorted(at_once) == sorted(one_by_one) == ["b", "d", "x"]
    for name in at_once:
        same(at_once[name], one_by_one[name])


def test_half_precision_is_observed_as_it_is() -> None:
    model = observed(SIMPLE.replace("float", "float16"))
    x = rows(5, 3).astype(np.float16)
    same(calibrate(model, [{"x": x}])["x"], Stats.of(x.astype(np.float32), ALL))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 4, 8])
@pytest.mark.parametrize("wanted", [Wanted(), ALL])
def test_values_that_become_nan_or_infinite(bad: float, position: int, wanted: Wanted) -> None:
    text = """
    g (float[N,3] x, float[N,3] z) => (float[N,3] y) {
      q = Div (x, z)
      o = Observer (q)
      y = Relu (o)
    }"""
    x, z = np.ones((3, 3), np.float32), np.ones((3, 3), np.float32)
    z.flat[position] = 0
    x.flat[position] = {"nan": 0, "inf": 1, "-inf": -1}[str(bad)]
    with pytest.raises(CalibrationError, match="'q' becomes NaN or infinite"):
        calibrate(observed(text, wanted=wanted), [{"x": x, "z": z}])


def test_a_value_that_no_sample_reaches() -> None:
    model = observed(SIMPLE)
    context = Context(ONNX, [{"x": rows(0, 3)}])
    PassManager([Calibrate()], given=OBSERVED).run(model, context)
    assert model.graph.inputs[0].meta[STATS].count == 0
    assert [r.message for r in context.remarks.warnings()] == ["calibration data never reached it"]


def test_no_data_and_no_samples() -> None:
    with pytest.raises(CalibrationError, match="needs calibration data"):
        calibrate(observed(SIMPLE), None)
    with pytest.raises(CalibrationError, match="no samples"):
        calibrate(observed(SIMPLE), [])


@pytest.mark.parametrize("bad", [0, 1])
def test_a_feed_on_which_the_model_does_not_run(bad: int) -> None:
    feeds = [{"x": rows(2, 3)}, {"x": rows(2, 3)}]
    feeds[bad] = {"x": rows(2, 4)}
    with pytest.raises(CalibrationError, match=f"does not run on calibration feed {bad}: "):
        calibrate(observed(SIMPLE), feeds)


def test_a_model_without_observers_needs_no_data() -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    assert calibrate(model, None) == {}


def test_calibration_needs_observers() -> None:
    with pytest.raises(PipelineError, match="observed"):
        PassManager([Canonicalize(), Annotate("static"), Calibrate()])


def test_progress_knows_how_many_feeds_there_are() -> None:
    seen: list[tuple[str, int | None]] = []

    def progress(items: Iterator[object], title: str, total: int | None) -> Iterator[object]:
        seen.append((title, total))
        return iter(items)

    class Feeds:
        def __iter__(self) -> Iterator[Feed]:
            yield {"x": rows(2, 3)}

        def __length_hint__(self) -> int:
            return 1

    calibrate(observed(SIMPLE), Feeds(), progress=progress)
    calibrate(observed(SIMPLE), (f for f in Feeds()), progress=progress)
    assert seen == [("calibrating", 1), ("calibrating", None)]


def test_an_annotated_model_is_what_it_was_but_for_its_statistics() -> None:
    model = small_convnet()
    given_ = feed(model)
    before = outputs(model, given_)
    apply(model, annotate("static"), target=CPU)
    assert not any(is_call(n, OBSERVER) for n in nodes(model))
    np.testing.assert_allclose(before[0], outputs(model, given_)[0], rtol=1e-5, atol=1e-5)


# --- the cache ------------------------------------------------------------------------------------


def never(*_: object, **__: object) -> None:
    raise AssertionError("the session ran")


def test_a_second_run_does_not_run_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds = [{"x": rows(7, 3)}]
    first = calibrate(observed(SIMPLE), feeds, tmp_path)["x"]
    monkeypatch.setattr(module, "open_session", never)
    second = calibrate(observed(SIMPLE), feeds, tmp_path)["x"]
    same(first, second)
    assert first.token_power == second.token_power


BIG = "b = Add (o, big) \n y = Neg (b)"
MORE = """
g (float[N,3] x, float[N,3] z) => (float[N,3] y) {
  a = Relu (x)
  b = Exp (z)
  c = Sub (a, b)
  o = Observer (c)
  y = Neg (o)
}"""


def big(last: float, name: str = "k") -> ir.TensorProtocol:
    """A tensor that differs from others where a printed one is cut short."""
    data = np.zeros((2000, 3), np.float32)
    data[1000] = last
    return ir.Tensor(data, name=name)


def changes() -> Iterator[tuple[str, ir.Model, list[Feed]]]:
    """Models and data that all differ in what calibration would find."""
    pair: list[Feed] = [{"x": rows(2, 3), "z": rows(2, 3, seed=1)}]
    yield "first", observed(MORE), pair
    yield "other data", observed(MORE), [{**pair[0], "x": rows(2, 3, seed=2)}]
    yield "other shape", observed(MORE), [{k: v.reshape(1, 2, 3) for k, v in pair[0].items()}]
    yield "crossed names", observed(MORE.replace("Sub (a, b)", "Sub (b, a)")), pair
    yield "other wishes", observed(MORE, wanted=replace(ALL, histogram=False)), pair
    swapped = MORE.replace("a = Relu", "t = Relu").replace("b = Exp", "a = Exp")
    yield "swapped results", observed(swapped.replace("t = Relu", "b = Relu")), pair
    for value in (1.0, 2.0):
        text = MORE.replace("Neg (o)", "Neg (o)").replace("c = Sub (a, b)", "c = Add (a, k)")
        yield f"weight {value}", observed(text, big(value)), [{**pair[0], "x": rows(2000, 3)}]
    for value in (1.0, 2.0):
        model = observed(MORE.replace("c = Sub (a, b)", "k = Identity (b) \n c = Add (a, k)"))
        for n in model.graph:
            if n.outputs[0].name == "k":
                n.domain, n.op_type = "", "Constant"
                n.replace_input_with(0, None)
                n.resize_inputs(0)
                n.attributes["value"] = ir.AttrTensor("value", big(value))
        yield f"constant {value}", model, [{**pair[0], "x": rows(2000, 3)}]
    for value in (1.0, 2.0):
        text = """
        g (bool flag, float[2000,3] x) => (float[2000,3] y) {
          c = If (flag) <
            then_branch = yes () => (float[2000,3] a) { a = Relu (x) },
            else_branch = no () => (float[2000,3] b) { b = Add (x, k) }
          >
          o = Observer (c)
          y = Neg (o)
        }"""
        model = observed(text, big(value))
        branch = next(n for n in model.graph.all_nodes() if n.op_type == "Add").graph
        assert isinstance(branch, ir.Graph)
        moved = model.graph.initializers["k"]
        inner = ir.Value(
            name="k", shape=moved.shape, type=moved.type, const_value=moved.const_value
        )
        for use in list(moved.uses()):
            use.node.replace_input_with(use.idx, inner)
        del model.graph.initializers["k"]
        branch.register_initializer(inner)
        yield f"branch {value}", model, [{"flag": np.asarray(False), "x": rows(2000, 3)}]


def test_whatever_changes_the_result_is_calibrated_anew(tmp_path: Path) -> None:
    names = []
    for name, model, feeds in changes():
        if name != "other shape":
            calibrate(model, feeds, tmp_path)
            names.append(name)
    assert len(list(tmp_path.iterdir())) == len(names)


def test_the_shape_of_the_data_counts(tmp_path: Path) -> None:
    text = SIMPLE.replace("N,3", "N,M")
    for shape in ((2, 3), (3, 2)):
        found = calibrate(observed(text), [{"x": rows(2, 3).reshape(shape)}], tmp_path)
        assert found["x"].channel_low is not None
        assert found["x"].channel_low.size == shape[1]


def test_what_feeds_no_observer_does_not_count(tmp_path: Path) -> None:
    text = SIMPLE.replace("y = Relu (o)", "y = MatMul (o, w)")
    for seed in (0, 1):
        calibrate(observed(text, weight("w", 3, 3, seed=seed)), [{"x": rows(2, 3)}], tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"\0" * 100])
def test_a_broken_cache_file_is_written_anew(tmp_path: Path, content: bytes) -> None:
    feeds = [{"x": rows(7, 3)}]
    first = calibrate(observed(SIMPLE), feeds, tmp_path)["x"]
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    same(first, calibrate(observed(SIMPLE), feeds, tmp_path)["x"])
    assert file.stat().st_size > 100


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    model, context = observed(SIMPLE), Context(ONNX, [{"x": rows(2, 3)}], cache=file)
    PassManager([Calibrate()], given=OBSERVED).run(model, context)
    assert model.graph.inputs[0].meta[STATS].count == 6
    assert "cannot be kept" in context.remarks.warnings()[0].message


@settings(max_examples=25, deadline=None)
@given(random_graph())
def test_every_observed_value_has_the_range_that_a_run_shows(model: ir.Model) -> None:
    feeds = [feed(model, seed) for seed in range(2)]
    passes = [Canonicalize(), Annotate("static"), InsertObservers(), Calibrate()]
    apply(model, passes, feeds)
    values = [v for n in model.graph for v in n.outputs if STATS in v.meta]
    model.graph.outputs.extend(v for v in values if not v.is_graph_output())
    index = {str(v.name): i for i, v in enumerate(model.graph.outputs)}
    runs = [outputs(model, given_) for given_ in feeds]
    for value in values:
        seen = np.stack([run[index[str(value.name)]] for run in runs])
        stats: Stats = value.meta[STATS]
        assert stats.count == seen.size
        np.testing.assert_allclose(
            [stats.low, stats.high], [seen.min(), seen.max()], rtol=1e-4, atol=1e-5
        )
    assert mlp().graph.inputs[0].meta == {}
