"""Results and states of a long pass, kept in a folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qgraph import resumable
from qgraph.resumable import Resumable


def test_results_and_states_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "OVERHEAD", 1e9)
    kept = Resumable(tmp_path / "new")
    assert kept.result(0) is None
    assert kept.state() is None
    kept.keep_result(0, {"a/b": np.arange(3)})
    kept.keep_state(lambda: {"x": np.ones(2)})
    kept.keep_state(lambda: {"x": np.zeros(2)})
    again = Resumable(tmp_path / "new")
    found, state = again.result(0), again.state()
    assert found is not None
    assert state is not None
    assert found["a/b"].tolist() == [0, 1, 2]
    assert state["x"].tolist() == [0, 0]
    kept.finish()
    assert again.state() is None
    assert again.result(0) is not None
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["0.npz"]


def test_states_cost_a_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 15.0, 60.0, 66.0, 66.0])
    monkeypatch.setattr(resumable, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    kept = Resumable(tmp_path)
    states = iter(range(9))
    state = lambda: {"x": np.array(next(states))}  # noqa: E731
    kept.keep_state(state)  # takes 5 s: until the 65th, no other
    kept.keep_state(state)
    kept.keep_state(state)
    found = kept.state()
    assert found is not None
    assert found["x"] == 1


def test_without_a_folder_nothing_is_kept() -> None:
    kept = Resumable(None)
    kept.keep_result(0, {})
    kept.keep_state(dict)
    kept.finish()
    assert kept.result(0) is None
    assert kept.state() is None


def test_what_cannot_be_read_is_not_there(tmp_path: Path) -> None:
    kept = Resumable(tmp_path)
    for content in (b"", b"PK\x03\x04 cut off", b"\x93NUMPY"):
        (tmp_path / "0.npz").write_bytes(content)
        assert kept.result(0) is None


def test_what_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = Resumable(tmp_path / "file" / "folder")
    kept.keep_result(0, {})
    kept.keep_result(1, {})
    assert kept.failure is not None
    assert "cannot be written" in kept.failure
