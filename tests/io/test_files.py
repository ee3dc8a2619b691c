"""Files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qgraph.errors import QGraphError
from qgraph.io.files import aside, write


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(path, "old")
    with aside(path) as unfinished:
        assert unfinished.parent == tmp_path
        assert str(os.getpid()) in unfinished.name  # other processes write elsewhere
        unfinished.write_text("half of")
        assert path.read_text() == "old"
        unfinished.write_text("all of it")
    assert path.read_text() == "all of it"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_is_not_finished_is_removed(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "0.npz"
    path.write_text("old")

    def fail() -> None:
        with aside(path) as unfinished:
            unfinished.write_text("half of")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, why in (("missing", "No such file"), ("file", "Not a directory")):
        with pytest.raises(QGraphError, match=f"cannot write .*: {why}"):
            write(tmp_path / folder / "report.html", "text")
