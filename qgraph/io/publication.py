"""Several files that appear together: a model with its external data, or a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from qgraph.io.files import folder_aside, read_json, sweep

_JOURNAL = "moves.json"


@contextmanager
def stage(out: Path) -> Iterator[Path]:
    """A folder on the disk of `out`, called like it, that disappears again whatever happens.

    What processes that died have left there is cleared away first, see :func:`publish`.

    Raises:
        OSError: it cannot be made.
    """
    parent = out if out.is_dir() else out.parent
    sweep(parent, _finish)
    with folder_aside(out, parent) as private:
        staged = private / out.name
        staged.mkdir()  # unlike the private one, with the user's usual permissions
        yield staged


def publish(staged: Path, root: Path, name: Path, stale: Collection[str] = ()) -> None:
    """Move everything below `staged` to `root`: `name` last, when all that it needs is there.

    That one renaming is the switch. Should the process die before it, whoever writes there next
    removes the new files that have been moved; should it die after it, the stale ones.

    Args:
        staged: what :func:`stage` gave.
        root: the folder around that of `staged`; or a new one, which appears as a whole.
        name: of the file that refers to the others, below `root`.
        stale: names of files in `root` that nothing refers to after the switch.

    Raises:
        OSError: a file cannot be moved; those that were not there before are removed again.
    """
    if not root.exists():
        os.rename(staged, root)
        return
    others = sorted(
        path.relative_to(staged)
        for path in staged.rglob("*")
        if path.is_file() and path != staged / name
    )
    new = [str(path) for path in others if not (root / path).exists()]
    moves = {"name": str(name), "new": new, "stale": sorted(stale)}
    (staged.parent / _JOURNAL).write_text(json.dumps(moves), encoding="utf-8")
    try:
        for path in others:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged / path, root / path)
        os.replace(staged / name, root / name)
    finally:
        _finish(staged.parent)


def _finish(private: Path) -> None:
    """Remove what is one file too many: before the switch the new ones, after it the stale."""
    journal = private / _JOURNAL
    try:
        moves = read_json(journal)
    except (OSError, ValueError):  # nothing was moved
        return
    (staged,) = (path for path in private.iterdir() if path.is_dir())
    switched = not (staged / moves["name"]).exists()
    for name in moves["stale"] if switched else moves["new"]:
        (private.parent / name).unlink(missing_ok=True)
    journal.unlink()  # before the folder goes: without its files it would tell another story
