"""Files appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qgraph.errors import QGraphError
from qgraph.io.files import aside, check_free, folder_aside, sweep, write


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(path, "old")
    with aside(path) as unfinished:
        assert unfinished.parent == tmp_path
        with aside(path) as other:  # other processes write elsewhere
            assert other != unfinished
            other.write_text("older")
        assert path.read_text() == "older"
        unfinished.write_text("half of")
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


def test_what_a_dead_process_has_left_goes(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from qgraph.io.files import aside, folder_aside
here = Path({str(tmp_path)!r})
with aside(here / "a.npz") as file, folder_aside(here / "b.onnx", here) as folder:
    file.write_text("half of")
    (folder / "data").write_text("half of")
    print(file.name, folder.name)
    os._exit(1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == set(done.stdout.split())
    assert len(left) == 2
    (tmp_path / ".mine.qgraph").touch()
    with folder_aside(tmp_path / "c.onnx", tmp_path) as alive:
        sweep(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([alive, tmp_path / ".mine.qgraph"])


def test_what_looks_like_ours_and_is_not_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".a.npz.01234567.qgraph")
    (tmp_path / ".b.npz.01234567.qgraph").symlink_to(tmp_path)
    before = set(tmp_path.iterdir())
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == before


def test_links_are_written_through_and_permissions_stay(tmp_path: Path) -> None:
    page, link = tmp_path / "page.html", tmp_path / "link.html"
    page.write_text("old")
    page.chmod(0o640)
    link.symlink_to(page)
    write(link, "new")
    assert link.is_symlink()
    assert page.read_text() == "new"
    assert page.stat().st_mode & 0o777 == 0o640


def test_devices_and_pipes_are_written_through(tmp_path: Path) -> None:
    null = Path(os.devnull)
    check_free(null, [null])
    write(null, "text")
    assert null.is_char_device()
    reading, writing = os.pipe()
    write(Path(f"/dev/fd/{writing}"), "text")
    assert os.read(reading, 9) == b"text"


def test_read_only_files_are_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.touch(0o444)
    with pytest.raises(QGraphError, match=r"page\.html is read-only"):
        check_free(page, [])
