"""Tokens are picked: the first of each feed, evenly spread, a bounded few."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.calibration import walk as pieces
from qgraph.calibration.capture import LEAST, SAMPLES, captured
from qgraph.errors import CalibrationError
from qgraph.graph.text.printer import to_text
from qgraph.io.feeds import Feed, open_calibration
from qgraph.io.session import open_session
from qgraph.pipeline.context import Context
from tests.models import build, feed, mlp, outputs, transformer_block, weight
from tests.pipelines import ONNX


def values(model: ir.Model, *names: str) -> list[ir.Value]:
    """Values of the main graph by name."""
    known = {v.name: v for v in (*model.graph.inputs, *(o for n in model.graph for o in n.outputs))}
    return [known[name] for name in names]


def whole(model: ir.Model, name: str, given_: Feed) -> np.ndarray:
    """All tokens of a value, (tokens, channels)."""
    copy = model.clone()
    copy.graph.outputs.append(values(copy, name)[0])
    found = outputs(copy, given_)[-1]
    return found.reshape(-1, found.shape[-1])


def picked(
    model: ir.Model,
    names: Iterable[str],
    feeds: Iterable[Feed],
    rows: int = 512,
) -> dict[str, np.ndarray]:
    """What is captured, by name."""
    context = Context(ONNX, feeds)
    found = captured(model, values(model, *names), context, rows)
    return {str(value.name): tokens for value, tokens in found}


def block_feeds(count: int, time: int = 7) -> list[Feed]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((2, time, 16)).astype(np.float32)} for _ in range(count)]


def test_all_tokens_where_they_are_few() -> None:
    model, feeds = transformer_block(), block_feeds(2)
    before = to_text(model)
    names = ["x", "n1", "q", "gated"]
    found = picked(model, names, feeds)
    assert list(found) == names
    for name, tokens in found.items():
        assert tokens.dtype == np.float32
        expected = np.concatenate([whole(model, name, f) for f in feeds])
        np.testing.assert_allclose(tokens, expected, rtol=1e-5, atol=1e-6)
    assert to_text(model) == before


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 50))
def test_a_few_evenly_spread_and_the_first_of_each_sample(time: int, count: int, rows: int) -> None:
    model, feeds = transformer_block(), block_feeds(count, time)
    tokens = picked(model, ["x"], feeds, rows)["x"]
    samples = [sample for f in feeds for sample in f["x"]][: max(SAMPLES, -(-LEAST // time))]
    step = (time - 1) // -(-rows // len(samples)) + 1
    np.testing.assert_array_equal(tokens, np.concatenate([sample[::step] for sample in samples]))
    assert len(tokens) <= rows + len(samples)


@pytest.mark.parametrize("size", [2, 3, 8, 16])
def test_how_many_samples_are_put_together_does_not_matter(size: int) -> None:
    model, (whole_,) = transformer_block(), block_feeds(1)
    x = np.resize(whole_["x"], (16, 12, 16)) + np.arange(16, dtype=np.float32)[:, None, None]
    names = ["x", "n1", "gated"]
    alone = picked(model, names, [{"x": sample[None]} for sample in x])
    together = picked(model, names, [{"x": x[i : i + size]} for i in range(0, 16, size)])
    for name in names:
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-4, atol=1e-5)


def test_feeds_of_different_lengths() -> None:
    model = transformer_block()
    feeds = [*block_feeds(1, 3), *block_feeds(1, 100)]
    tokens = picked(model, ["n2"], feeds, 20)["n2"]
    short, long = (whole(model, "n2", f) for f in feeds)
    expected = [short, long[:100:20], long[100::20]]
    np.testing.assert_allclose(tokens, np.concatenate(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", ["4", "3,4", "2,3,4", "2,3,2,4", "N,4", "2,T,4"])
def test_values_of_any_rank(shape: str) -> None:
    model = build(f"g (float[{shape}] x) => (y) {{ y = Exp (x) }}")
    given_ = feed(model)
    expected = np.exp(given_["x"]).reshape(-1, 4)
    np.testing.assert_allclose(picked(model, ["y"], [given_])["y"], expected, rtol=1e-6)


def test_halves_become_float32() -> None:
    model = build("g (float16[2,3,4] x) => (y) { y = Neg (x) }")
    given_ = feed(model)
    tokens = picked(model, ["y"], [given_])["y"]
    assert tokens.dtype == np.float32
    np.testing.assert_array_equal(tokens, -given_["x"].reshape(-1, 4).astype(np.float32))


def test_feeds_of_no_tokens() -> None:
    model = build("g (float[N,4] x) => (y) { y = Neg (x) }")
    feeds = [{"x": np.ones((n, 4), np.float32)} for n in (0, 2)]
    assert picked(model, ["y"], feeds)["y"].shape == (2, 4)


def test_what_is_not_needed_is_not_run() -> None:
    """The last product would not run on these shapes."""
    model = build("g (float[N,4] x) => (z) { y = Neg (x) z = MatMul (y, y) }")
    given_ = {"x": np.ones((3, 4), np.float32)}
    assert picked(model, ["y"], [given_])["y"].shape == (3, 4)


def test_a_language_model_gets_its_cache() -> None:
    text = """
    g (int64[B,T] input_ids, float[B,2,P,4] past_key, int64[B,M] attention_mask) => (y, k) {
      e = Gather (w, input_ids)
      y = Exp (e)
      k = Neg (past_key)
    }"""
    model = build(text, weight("w", 10, 4))
    feeds = [{"input_ids": np.array([[1, 2, 3]])}]
    table = weight("w", 10, 4).numpy()
    tokens = picked(model, ["y"], feeds)["y"]
    np.testing.assert_allclose(tokens, np.exp(table[1:4]), rtol=1e-6)


# --- piece by piece -------------------------------------------------------------------------------


def test_no_session_holds_more_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    model, feeds = transformer_block(), block_feeds(2)
    opened: list[int] = []

    def counting(part: ir.Model) -> object:
        opened.append(len(part.graph))
        return open_session(part)

    monkeypatch.setattr(pieces, "open_session", counting)
    picked(model, ["n1", "q", "n2", "gated"], feeds)
    assert len(opened) == 4
    assert sum(opened) < len(model.graph)  # what follows the last value is not run at all


def test_the_model_may_be_rewritten_between_values() -> None:
    model, feeds = mlp((4, 6, 3)), [{"x": np.ones((2, 4), np.float32)}]
    wanted = whole(model, "h0", feeds[0])
    stream = captured(model, values(model, "x", "h0"), Context(ONNX, feeds))
    next(stream)
    model.graph.initializers["w0"].const_value = weight("w0", 4, 6, seed=7)
    value, tokens = next(stream)
    assert value.name == "h0"
    np.testing.assert_array_equal(tokens, wanted)


# --- bad inputs -----------------------------------------------------------------------------------


def test_no_data() -> None:
    model = mlp((4, 2))
    with pytest.raises(CalibrationError, match="needs calibration data: give some"):
        picked(model, ["x"], [])
    with pytest.raises(CalibrationError, match="needs calibration data: give some"):
        list(captured(model, values(model, "x"), Context(ONNX)))


def test_data_that_can_be_read_only_once() -> None:
    model = mlp((4, 2))
    feeds = open_calibration(iter([feed(model)]), model)
    assert len(list(feeds)) == 1
    with pytest.raises(CalibrationError, match="generator that one pass has used up"):
        picked(model, ["x"], feeds)
