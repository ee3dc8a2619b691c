"""The drawing of activation ranges, and the example of a transformer at 8 bits."""

from __future__ import annotations

import runpy
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from benchmarks.ranges import KINDS, STATES, drawing, first_over_median, ratios

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"


def test_ratios_are_those_of_each_layer() -> None:
    peaks = np.array([[1.0, 2.0, 40.0], [5.0, 5.0, 5.0]])
    np.testing.assert_allclose(ratios(peaks), [20, 1])
    np.testing.assert_allclose(ratios(peaks, 50), [1, 1])


def test_the_first_token_is_compared_by_its_largest_element() -> None:
    tokens = np.array([[1, -100], [1, 2], [-2, 0], [0.5, 1]], np.float32)
    assert first_over_median(tokens) == 50


def test_the_drawing_has_every_kind_in_every_state() -> None:
    peaks = np.random.default_rng(0).lognormal(sigma=3, size=(30, 64))
    page = drawing({state: dict.fromkeys(KINDS, peaks) for state in STATES.values()})
    assert len(page) < 150_000
    texts = [text.text or "" for text in ET.fromstring(page).iter(f"{SVG}text")]
    for kind in KINDS:
        assert sum(text.startswith(kind) for text in texts) == len(STATES)
    assert {"largest", "99th percentile", "median", "layer (index)"} <= set(texts)


def test_the_committed_drawing_is_one() -> None:
    page = ROOT / "docs" / "smollm2-ranges.svg"
    assert page.stat().st_size < 150_000
    assert "prefers-color-scheme: dark" in page.read_text()
    assert len(list(ET.parse(page).iter(f"{SVG}rect"))) == 1 + len(KINDS) * len(STATES)


@pytest.mark.slow
def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    runpy.run_path(str(ROOT / "examples" / "quantize_llama.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "[smooth] applied MatMul model.layers.1.mlp.down_proj/MatMul" in printed
    assert float(printed.split(": ")[-1].strip().rstrip("%")) < 5
