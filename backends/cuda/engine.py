"""Where a launch runs: the driver of a device, or what a test puts in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    Argument = Tensor | int | float | None


class Engine(Protocol):
    """One device."""

    arch: int
    """Its architecture, such as 90."""
    multiprocessors: int

    def load(self, kernel: str) -> None:
        """Make a kernel ready, so that no launch has to: neither in a trace nor in a capture."""

    def run(
        self, kernel: str, grid: tuple[int, int], threads: int, shared: int, *arguments: Argument
    ) -> None:
        """Launch on the current stream and return at once.

        Every int is a C int, every float a C float; before them every tensor is a pointer and None
        a null pointer.
        """


ENGINES: dict[int, Engine] = {}
"""By the number of the device; -1, that of tensors of the CPU, is for tests."""
