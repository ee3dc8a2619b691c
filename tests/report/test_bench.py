"""Benchmarks compare what they should, and progress bars show what goes on."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from rich.console import Console

from qgraph.cli.progress import _Bars, display, peak_memory
from qgraph.errors import QGraphError
from qgraph.report.bench import benchmark
from tests import models

FEED = {"x": np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)}


def test_a_model_against_itself_and_a_noisy_copy() -> None:
    model, noisy = models.mlp(), models.mlp()
    value = noisy.graph.initializers["w0"]
    assert value.const_value is not None
    value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(1.01), name="w0")
    first, same, other = benchmark([model, model, noisy], [FEED, FEED], rounds=3)
    assert (first.speedup, first.low, first.high) == (1.0, 1.0, 1.0)
    assert same.sqnr_db == float("inf")
    assert 30 < other.sqnr_db < 60
    assert other.low <= other.speedup <= other.high
    assert other.milliseconds > 0


def test_paths_serve_as_models(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    ir.save(models.mlp(), path)
    assert [r.name for r in benchmark([path, str(path)], [FEED], rounds=1)] == [str(path)] * 2


def test_outputs_of_another_shape_are_not_compared() -> None:
    _, other = benchmark([models.mlp(), models.mlp((16, 32, 9))], [FEED], rounds=1)
    assert np.isnan(other.sqnr_db)


@pytest.mark.parametrize(
    ("feeds", "reason"),
    [([], "at least one"), ([{"x": np.zeros((1, 3), np.float32)}], "does not run on this data")],
)
def test_what_cannot_run_is_told(feeds: list[dict[str, np.ndarray]], reason: str) -> None:
    with pytest.raises(QGraphError, match=reason):
        benchmark([models.mlp()], feeds, rounds=1)


def test_bars_inside_bars() -> None:
    stream = io.StringIO()
    bars = _Bars(Console(file=stream, force_terminal=True, width=80))
    seen = [(a, b) for a in bars([1, 2], "outer") for b in bars(iter("xy"), "inner", 2)]
    assert seen == [(1, "x"), (1, "y"), (2, "x"), (2, "y")]
    assert "outer" in stream.getvalue()
    assert not bars._progress.tasks


def test_a_loop_that_is_left_early_takes_its_bar_along() -> None:
    bars = _Bars(Console(file=io.StringIO(), force_terminal=True))
    loop = bars(range(3), "left")
    next(loop)
    loop.close()  # type: ignore[attr-defined]
    assert not bars._progress.tasks


def test_without_a_terminal_there_are_no_bars(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(display()([1, 2], "quiet", None)) == [1, 2]
    assert capsys.readouterr().err == ""
    assert peak_memory() > 1e6
