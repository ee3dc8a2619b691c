"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qgraph.errors import QGraphError


def check_free(path: Path, others: set[Path | None]) -> None:
    """Fail now rather than after long work if `path` cannot be written.

    Raises:
        QGraphError: it is a folder or one of `others`, or its folder does not let us write.
    """
    if path.is_dir():
        raise QGraphError(f"{path} is a folder: name a file")
    if any(other is not None and other.resolve() == path.resolve() for other in others):
        raise QGraphError(f"{path} is named twice: give every output its own file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise QGraphError(f"cannot write {path}: {error.strerror}") from None


def write(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        QGraphError: that fails; nothing is left behind.
    """
    try:
        with aside(path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise QGraphError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, renamed to it at the end.

    Readers find what was there before or all of what is written, also while other processes write
    the same file: the last one counts. If anything fails, what has been written is removed.

    Raises:
        OSError: the file cannot be renamed.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        with suppress(OSError):
            unfinished.unlink()
