"""How far long work has come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """A display that wraps a loop which may take long: `progress(items, title, total)`."""

    def __call__(
        self, items: Iterable[Item], title: str, total: int | None = None
    ) -> Iterator[Item]: ...


def silent(items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
    """The progress display of a library call: none."""
    return iter(items)
