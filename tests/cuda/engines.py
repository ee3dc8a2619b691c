"""Where a launch runs without a GPU: the emulator, alone or sanitized; the interpreter of PTX."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qgraph.backends.cuda.engine import ENGINES, Engine
from qgraph.backends.cuda.make_cubins import pinned
from tests.cuda import build
from tests.cuda.ptx.machine import Machine

Bytes = NDArray[np.uint8]
Argument = Tensor | int | float | None
MULTIPROCESSORS = 3
"""So few that small cases reach the kernels of large ones."""
COUNTERS = (
    "switches",
    "barriers",
    "mma",
    "shared_requests",
    "shared_waves",
    "shared_ideal",
    "global_requests",
    "global_sectors",
    "global_bytes",
)


class LaunchError(Exception):
    """What an engine saw go wrong in a launch."""


@contextmanager
def launching_on(engine: Engine) -> Iterator[None]:
    """Tensors of the CPU are launched on this engine."""
    before = ENGINES.get(-1)
    ENGINES[-1] = engine
    try:
        yield
    finally:
        del ENGINES[-1]
        if before is not None:
            ENGINES[-1] = before


@dataclass(frozen=True)
class Schedule:
    """An order of threads and blocks, when copies land, what unwritten memory holds."""

    order: int = 0
    """0 round robin, 1 random, 2 one warp as far as it can go, 3 reversed."""
    late: bool = True
    poison: int = 0xCD
    seed: int = 0

    @property
    def settings(self) -> tuple[int, int, int, int]:
        """For the emulator."""
        return self.seed, self.order, int(self.late), self.poison


SCHEDULES = (
    Schedule(0, True, 0xCD, 0),
    Schedule(1, False, 0x33, 1),
    Schedule(2, True, 0xFF, 2),
    Schedule(3, False, 0x7E, 3),
)


@dataclass
class Emulated:
    """In this process, on the tensors themselves."""

    schedule: Schedule = field(default_factory=Schedule)
    changed: dict[str, str] = field(default_factory=dict)
    """Texts by source file in the place of the package's."""
    arch: int = 80
    multiprocessors: int = MULTIPROCESSORS
    counters: dict[str, int] = field(default_factory=dict)
    """Of the last launch."""
    watched: int | None = None
    """Which argument's reads are counted by bytes, into `reads`."""
    reads: Bytes = field(default_factory=lambda: np.zeros(0, np.uint8))

    def load(self, kernel: str) -> None:
        """Compile it."""
        _emulator(kernel, tuple(self.changed.items()))

    def run(
        self, kernel: str, grid: tuple[int, int], threads: int, shared: int, *arguments: Argument
    ) -> None:
        """Launch.

        Raises:
            LaunchError: what the emulator found.
        """
        emulator = _emulator(kernel, tuple(self.changed.items()))
        array, _alive = _addresses(arguments)
        emulator.emu_reset()
        emulator.emu_set(*self.schedule.settings)
        watched = None if self.watched is None else arguments[self.watched]
        if isinstance(watched, Tensor):
            self.reads = np.zeros(watched.numel() * watched.element_size(), np.uint8)
            where = ctypes.c_void_p(watched.data_ptr())
            emulator.emu_watch(where, ctypes.c_size_t(self.reads.size), self.reads.ctypes)
        if emulator.emu_launch(kernel.encode(), *grid, 1, threads, 1, 1, shared, array):
            raise LaunchError(f"{kernel}: {emulator.emu_error().decode()}")
        self.counters = dict(zip(COUNTERS, emulator.emu_stats().contents, strict=True))


@functools.cache
def _emulator(kernel: str, changed: tuple[tuple[str, str], ...]) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build.library(kernel, changed)))
    loaded.emu_error.restype = ctypes.c_char_p
    loaded.emu_stats.restype = ctypes.POINTER(ctypes.c_longlong * len(COUNTERS))
    return loaded


def _addresses(arguments: tuple[Argument, ...]) -> tuple[ctypes.Array[ctypes.c_void_p], list[Any]]:
    """The void** of cuLaunchKernel, and what must stay alive during the call."""
    values: list[Any] = []
    for a in arguments:
        if isinstance(a, Tensor):
            values.append(ctypes.c_void_p(a.data_ptr()))
        elif isinstance(a, float):
            values.append(ctypes.c_float(a))
        else:
            values.append(ctypes.c_void_p() if a is None else ctypes.c_int(a))
    return (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values)), values


@dataclass
class Sanitized:
    """In a process of its own, with buffers of exact size."""

    sanitize: tuple[str, ...] = ()
    """`thread`, or `address` and `undefined`, or none."""
    schedule: Schedule = field(default_factory=Schedule)
    changed: dict[str, str] = field(default_factory=dict)
    arch: int = 80
    multiprocessors: int = MULTIPROCESSORS
    timeout: float = 120

    def load(self, kernel: str) -> None:
        """Compile it."""
        build.program(kernel, self.sanitize, self.changed)

    def run(
        self, kernel: str, grid: tuple[int, int], threads: int, shared: int, *arguments: Argument
    ) -> None:
        """Launch.

        Raises:
            LaunchError: what the sanitizer or the emulator found.
        """
        program = build.program(kernel, self.sanitize, self.changed)
        with tempfile.TemporaryDirectory() as folder:
            case, result = Path(folder, "case"), Path(folder, "result")
            case.write_bytes(_case_file(kernel, (*grid, 1, threads, 1, 1, shared), arguments))
            command = [str(program), str(case), str(result), *map(str, self.schedule.settings)]
            try:
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    env=os.environ | OPTIONS,
                    timeout=self.timeout,
                )
            except subprocess.TimeoutExpired:
                raise LaunchError(f"{kernel}: no end after {self.timeout} s") from None
            if done.returncode:
                raise LaunchError(f"{kernel}: {_summary(done.stderr) or f'exit {done.returncode}'}")
            data, at = result.read_bytes(), 0
        for a in arguments:
            if isinstance(a, Tensor):
                memory = bytes_of(a)
                memory[:] = np.frombuffer(data, np.uint8, memory.size, at)
                at += memory.size


OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=0",
}


def _summary(stderr: str) -> str:
    telling = ("SUMMARY", "runtime error", "emulator:")
    lines = [line for line in stderr.splitlines() if any(text in line for text in telling)]
    return "; ".join(lines) or stderr[:300]


def bytes_of(t: Tensor) -> Bytes:
    """The memory of a tensor."""
    assert t.is_contiguous()
    if not t.numel():
        return np.zeros(0, np.uint8)
    memory: Bytes = t.view(-1).view(torch.uint8).numpy()
    return memory


def _case_file(kernel: str, sizes: tuple[int, ...], arguments: tuple[Argument, ...]) -> bytes:
    out = [struct.pack("<I", len(kernel)), kernel.encode(), struct.pack("<7I", *sizes)]
    out.append(struct.pack("<I", len(arguments)))
    for a in arguments:
        if isinstance(a, Tensor):
            raw = bytes_of(a).tobytes()
            out += [struct.pack("<IQ", 1, len(raw)), raw]
        elif isinstance(a, float):
            out.append(struct.pack("<IQf", 0, 4, a))
        else:
            out.append(struct.pack("<IQQ", 0, 8, 0) if a is None else struct.pack("<IQi", 0, 4, a))
    return b"".join(out)


@dataclass
class Interpreted:
    """The PTX that the pinned NVRTC makes of the kernel, instruction by instruction."""

    changed: dict[str, str] = field(default_factory=dict)
    target: int = 80
    """Which architecture's PTX."""
    arch: int = 80
    multiprocessors: int = MULTIPROCESSORS

    def load(self, kernel: str) -> None:
        """Compile it."""
        ptx_of(build.text_of(kernel, self.changed), self.target)

    def run(
        self, kernel: str, grid: tuple[int, int], threads: int, shared: int, *arguments: Argument
    ) -> None:
        """Launch.

        Raises:
            PtxError: a trap.
        """
        machine = Machine(ptx_of(build.text_of(kernel, self.changed), self.target), kernel)
        plain = [bytes_of(a) if isinstance(a, Tensor) else a for a in arguments]
        machine.launch(grid, threads, shared, plain)


@functools.cache
def ptx_of(text: str, arch: int) -> str:
    """What the pinned compiler emits."""
    return pinned().compile(text, f"compute_{arch}").rstrip(b"\0").decode()
