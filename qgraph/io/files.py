"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
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
    """Write a file aside and rename it.

    Raises:
        QGraphError: that fails; nothing is left behind.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise QGraphError(f"cannot write {path}: {error.strerror}") from None
    finally:
        aside.unlink(missing_ok=True)
