"""Files that appear whole or not at all, and what dead processes have left of them."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qgraph.errors import QGraphError

SUFFIX = ".qgraph"
"""Ends the names of what is being written, hidden files and folders beside their place: whoever
writes holds a lock on it as long as it lives."""
_OURS = re.compile(rf"\..+\.[0-9a-f]{{8}}{re.escape(SUFFIX)}")


def check_free(path: Path, others: Iterable[Path]) -> None:
    """Fail now rather than after long work if `path` cannot be written.

    Args:
        others: files that are read, or written, in the same run.

    Raises:
        QGraphError: it is a folder or one of `others`, is read-only, or its folder does not let us
            write.
    """
    if path.is_dir():
        raise QGraphError(f"{path} is a folder: name a file")
    if _is_device(path):
        return
    if any(same(path, other) for other in others):
        raise QGraphError(
            f"{path} is read or written in this run already: give every output its own file"
        )
    check_writable(path)
    try:
        with tempfile.TemporaryFile(dir=_place(path).parent):
            pass
    except OSError as error:
        raise QGraphError(f"cannot write {path}: {error.strerror}") from None


def check_writable(path: Path) -> None:
    """Refuse a file that its owner has made read-only, though its folder would let us replace it.

    Raises:
        QGraphError: it is one.
    """
    if path.is_file() and not path.stat().st_mode & 0o222:
        raise QGraphError(f"{path} is read-only: give another name, or make it writable")


def same(path: Path, other: Path) -> bool:
    """Whether both are names of one file, be it there or not."""
    if path.resolve() == other.resolve():
        return True
    try:
        return path.samefile(other)
    except OSError:
        return False


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read, or is no file.
        ValueError: it is not JSON, or nested deeper than any that is meant well.
    """
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "there is no such file", str(path))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write(path: Path, text: str) -> None:
    """Write a text file: through links, and into devices and pipes.

    Raises:
        QGraphError: that fails; nothing is left behind.
    """
    try:
        if _is_device(path):
            path.write_text(text, encoding="utf-8")
            return
        with aside(_place(path)) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    except OSError as error:
        raise QGraphError(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, renamed to it at the end.

    Readers find what was there before or all of what is written, also while other processes write
    the same file: the last one counts. If anything fails, what has been written is removed, at the
    latest by :func:`sweep`. Permissions of a file that is replaced stay.

    Raises:
        OSError: the file cannot be made or renamed.
    """
    sweep(path.parent)
    with _held(path, _create_file) as unfinished:
        yield unfinished
        with suppress(FileNotFoundError):
            shutil.copymode(path, unfinished)
        unfinished.replace(path)


@contextmanager
def folder_aside(path: Path, parent: Path) -> Iterator[Path]:
    """An empty folder in `parent`, named after `path`, that disappears again whatever happens.

    Raises:
        OSError: it cannot be made.
    """
    with _held(parent / path.name, lambda private: private.mkdir(mode=0o700)) as private:
        yield private


def sweep(folder: Path, finish: Callable[[Path], None] = lambda unfinished: None) -> None:
    """Remove what processes that died have left in `folder` while they wrote.

    Args:
        finish: is called with each before it goes.
    """
    for left in folder.glob(f".*{SUFFIX}"):
        with suppress(OSError):
            if not _made_here(left):
                continue
            with _lock(left, wait=False) as ours:
                if ours:
                    finish(left)
                    _remove(left)


def _made_here(path: Path) -> bool:
    """Whether qgraph made it for this user, and not somebody else to look like it."""
    status = path.lstat()
    plain = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    mine = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return plain and mine and _OURS.fullmatch(path.name) is not None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_device(path: Path) -> bool:
    """Whether it is there and neither a file nor a folder."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _place(path: Path) -> Path:
    """Where the file lies that `path` leads to."""
    return path.resolve() if path.is_symlink() else path


def _create_file(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


@contextmanager
def _held(path: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """A new file or folder beside `path`, locked, and removed at the end if it is still there."""
    while True:
        unfinished = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}{SUFFIX}")
        try:
            create(unfinished)
            with _lock(unfinished, wait=True) as ours:
                if ours:  # else it was swept away before it was locked
                    yield unfinished
                    return
        finally:
            with suppress(OSError):
                _remove(unfinished)


@contextmanager
def _lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether `path`, if it is still there, is locked by us now; the lock goes with our process.

    Where the system has no locks, what we make ourselves (`wait`) is ours, and nothing else.

    Raises:
        OSError: it cannot be opened.
    """
    try:
        import fcntl
    except ImportError:  # on Windows
        yield wait
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            ours = path.exists() and os.path.samestat(os.fstat(handle), os.stat(path))
        except BlockingIOError:
            ours = False
        except OSError:  # a disk without locks
            ours = wait
        yield ours
    finally:
        os.close(handle)
