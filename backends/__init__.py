"""The backends, one file or folder each. Imported as `qgraph.backends`.

A module here is a target, or several whose names begin with its own and a colon, if it offers

- `make(name, optimize_for)`: the target called so; a QGraphError where it has none,
- `TARGETS`: pairs of a name and a one-line description,
- `describe()`: what it knows of this machine, as text.

It is loaded when one of its targets is asked for; no list of modules is kept.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import get_args

from qgraph.errors import QGraphError
from qgraph.pipeline.target import Purpose, Target

if __name__ != "qgraph.backends":
    raise ImportError("import this package as qgraph.backends")

TARGETS: tuple[tuple[str, str], ...]
"""Names and one-line descriptions of all targets, gathered from their modules when asked for."""


def get_target(name: str, optimize_for: Purpose = "both") -> Target:
    """The target called `name`.

    Args:
        optimize_for: which runs of a language model decide between lowerings.

    Raises:
        QGraphError: there is none, or no such runs; the message lists those there are.
    """
    if optimize_for not in (known := get_args(Purpose)):
        raise QGraphError(f"optimize_for='{optimize_for}': use one of {', '.join(known)}")
    backend = _backend(name.partition(":")[0])
    if backend is None:
        raise unknown(name)
    target: Target = backend.make(name, optimize_for)
    return target


def describe() -> str:
    """What the targets know of this machine."""
    return "\n".join(filter(None, (backend.describe() for backend in _backends())))


def unknown(name: str) -> QGraphError:
    """The error that there is no target of this name."""
    known = ", ".join(known for known, _ in _targets())
    return QGraphError(f"unknown target '{name}': use one of {known}")


def _targets() -> tuple[tuple[str, str], ...]:
    return tuple(entry for backend in _backends() for entry in backend.TARGETS)


def _backends() -> Iterator[ModuleType]:
    return filter(None, map(_backend, _names()))


def _backend(name: str) -> ModuleType | None:
    """The module of this name, if it is there and makes targets."""
    if name not in _names():
        return None
    module = importlib.import_module(f"{__name__}.{name}")
    return module if hasattr(module, "make") else None


def _names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


def __getattr__(name: str) -> tuple[tuple[str, str], ...]:
    if name != "TARGETS":
        raise AttributeError(f"module 'qgraph.backends' has no attribute '{name}'")
    return _targets()
