"""The table of architectures: its measure, and that the documentation has every row."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks.architectures import cases, signal

PAGE = Path(__file__).parents[2] / "docs/models.md"


def test_the_documentation_has_every_architecture_without_a_failure() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    rows = [row for row in rows if row[0] not in ("architecture", "---")]
    assert [(kind, name) for name, kind, _ in rows] == list(cases())
    cells = [cell for row in rows for cell in row[2].split(" | ")]
    assert all(re.fullmatch(r"\d+ of \d+|-?\d+|inf", cell) for cell in cells)


def test_the_signal_is_that_of_the_middle_token_of_the_worst_output() -> None:
    want: list[np.ndarray] = [
        np.ones((2, 3, 4), np.float32),
        np.ones(5, np.int64),
        np.zeros((2, 2), np.float32),
    ]
    got = [w.copy() for w in want]
    assert signal(want, got) == np.inf
    got[0][0, 0] = 7  # one token of six
    assert signal(want, got) == np.inf
    got[0][:, 1:] *= 1.1
    assert signal(want, got) == pytest.approx(20, abs=1e-3)
    assert signal([np.ones((1, 4))], [np.full((1, 4), 1.01)]) == pytest.approx(40, abs=1e-3)


def test_an_output_of_another_shape_is_no_signal() -> None:
    assert signal([np.ones((2, 4))], [np.ones((1, 4))]) == -np.inf
