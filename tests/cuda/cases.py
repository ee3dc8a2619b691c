"""Launches with known answers: what every engine, and a device, is put to.

A case calls the real launch code with an engine in the place of the CPU's and compares what comes
out with `references`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qgraph.backends.cuda import launches, references
from qgraph.backends.cuda.choice import choose
from qgraph.backends.cuda.driver import engine_of
from qgraph.backends.cuda.engine import Engine
from qgraph.backends.cuda.packing import pad_columns, row_sums
from tests.cuda.build import PRIMITIVES
from tests.cuda.engines import MULTIPROCESSORS, Argument, LaunchError, launching_on
from tests.cuda.ptx.parse import PtxError

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
FLOOR = 2.0**-60
ANSWERS = Path(__file__).parent / "fixtures" / "primitives.txt"


class WrongAnswerError(Exception):
    """A launch gave other bits than the reference: what it gave and what was right."""

    def __init__(self, what: str, got: NDArray[Any], expected: NDArray[Any]) -> None:
        super().__init__(what)
        self.got, self.expected = got, expected


@dataclass
class Chosen:
    """An engine that gets the kernels of another architecture, and of a small device."""

    engine: Engine
    arch: int
    multiprocessors: int = MULTIPROCESSORS

    def load(self, kernel: str) -> None:
        """As the engine does."""
        self.engine.load(kernel)

    def run(
        self, kernel: str, grid: tuple[int, int], threads: int, shared: int, *arguments: Argument
    ) -> None:
        """As the engine does."""
        self.engine.run(kernel, grid, threads, shared, *arguments)


@dataclass(frozen=True)
class Case:
    """A launch, or two."""

    name: str
    body: Callable[[], None]
    small: bool
    """Quick enough for sanitizers and the interpreter."""
    arch: int = 80
    """Whose kernels are chosen."""
    once: bool = False
    """A product whose weights are read once: one block has all tokens, and channels are whole."""

    def run(self, engine: Engine) -> None:
        """Raises:
        WrongAnswerError, LaunchError, PtxError: it fails.
        """
        with launching_on(Chosen(engine, self.arch)):
            self.body()

    def failure(self, engine: Engine) -> str:
        """What is wrong; empty if nothing is."""
        try:
            self.run(engine)
        except (WrongAnswerError, LaunchError, PtxError) as error:
            return f"{self.name}: {error}"
        return ""


def array_of(t: Tensor) -> NDArray[Any]:
    """The same numbers in numpy."""
    if t.dtype == BF16:
        return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: NDArray[Any] = t.numpy()
    return array


def _same(what: str, got: Tensor, expected: NDArray[Any]) -> None:
    """Bits are the same; a NaN is any NaN."""
    found = array_of(got.cpu())
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise WrongAnswerError(f"{what} is {found.dtype}{found.shape}", found, expected)
    bits = f"u{found.dtype.itemsize}"
    same = found.view(bits) == expected.view(bits)
    if expected.dtype.kind not in "iu":
        same |= np.isnan(found.astype(np.float32)) & np.isnan(expected.astype(np.float32))
    if not same.all():
        differ = f"{what}: {(~same).sum()} of {same.size} differ"
        raise WrongAnswerError(differ, found, expected)


def primitives_case() -> Case:
    """Every wrapper of prims.cuh on one warp; what the models of the emulator gave is kept."""

    def body() -> None:
        r = np.random.default_rng(1)
        words = r.integers(-(2**31), 2**31, (32, 16), dtype=np.int64).astype(np.int32)
        words[:, 0] &= ~0x0400  # no NaN of 16 bits: which one it becomes is nobody's promise
        for column in (1, 13):
            words[:, column] = (r.standard_normal(32) * 100).astype(np.float32).view(np.int32)
        words[3, 13] = np.float32(np.nan).view(np.int32)
        given, got = torch.from_numpy(words), torch.full((32, 20), -1, dtype=torch.int32)
        engine_of(-1).run(PRIMITIVES, (1, 1), 32, 512, given, got)
        expected = np.loadtxt(ANSWERS, np.int32)
        wrong = sorted(set((got.numpy() != expected).nonzero()[1].tolist()))
        if wrong:
            raise WrongAnswerError(f"words {wrong} of {PRIMITIVES}", got.numpy(), expected)

    return Case(PRIMITIVES, body, True)


def quantize_case(
    m: int, k: int, dtype: torch.dtype, zero: int, small: bool, kind: str = ""
) -> Case:
    """`kind`: `special` has a silent token, an infinite one and one with a NaN; `odd` begins at an
    address that is no multiple of 16; others have quotients next to ties.
    """
    step = 1 / 127 if zero == 128 else 1 / 255

    def body() -> None:
        torch.manual_seed(k)
        x = torch.randn(m, k)
        if kind == "special":
            x[0], x[1, k // 2], x[2, k - 1] = 0, float("inf"), float("nan")
        else:  # the peak of each token is another thread's
            peaks = torch.tensor([141 / 32, 136 / 64, 132 / 64, 135 / 32, 138 / 64]).repeat(m)[:m]
            x = ((x * 64).round() / 64).clamp(-peaks[:, None], peaks[:, None])
            x[torch.arange(m), torch.arange(m) * 37 % k] = peaks
        x = x.to(dtype)
        if kind == "odd":
            x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(m, k)
        q, largest = launches.quantize_per_token(x, step, zero, FLOOR)
        expected = references.quantize_per_token(array_of(x), step, zero, FLOOR)
        _same("q", q, expected[0])
        _same("largest", largest, expected[1])

    name = f"quantize {m}x{k} {launches.element(dtype)} zero {zero} {kind}".rstrip()
    return Case(name, body, small)


def product_case(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    zero: int,
    bias: bool,
    small: bool,
    arch: int = 80,
    library: bool = False,
) -> Case:
    """Any integers by any integers; by the library's product, however small, if it says so."""

    def body() -> None:
        r = np.random.default_rng(m * 31 + n * 7 + k)
        q, w = (
            pad_columns(r.integers(-128, 128, size).astype(np.int8)) for size in ((m, k), (n, k))
        )
        largest = r.random(m, np.float32) + np.float32(0.5)
        scale = (r.random(n, np.float32) + np.float32(0.5)) * np.float32(1e-4)
        add = r.standard_normal(n).astype(np.float32) if bias else None
        sums = None if zero == 128 else row_sums(w)
        q_, largest_, w_, scale_ = (torch.tensor(a) for a in (q, largest, w, scale))
        sums_, add_ = (None if a is None else torch.tensor(a) for a in (sums, add))
        given = (q_, largest_, w_, scale_, sums_, add_, zero)
        if library:
            got = torch.empty(m, n, dtype=dtype)
            launches.multiply_by_library(engine_of(-1), got, *given)
        else:
            got = launches.int8_linear(*given, dtype)
        out = array_of(torch.zeros(1, dtype=dtype)).dtype
        _same("y", got, references.int8_linear(q, largest, w, scale, sums, add, zero, out))

    kind = "library" if library else "w8a8"
    name = f"{kind} {m}x{n}x{k} {launches.element(dtype)} zero {zero}{' bias' if bias else ''}"
    product = choose(m, n, k, arch, MULTIPROCESSORS)
    once = product is not None and 0 < m <= product.tokens and n % product.channels == 0
    return Case(name if arch == 80 else f"{name} sm_{arch}", body, small, arch, once)


def cases() -> Iterator[Case]:
    """All of them."""
    yield primitives_case()
    yield quantize_case(3, 200, F16, 128, True, "special")
    yield quantize_case(4, 1001, BF16, 0, True)
    yield quantize_case(3, 104, F16, 32, True, "odd")
    yield quantize_case(3, 72, F32, 0, True, "special")
    yield quantize_case(5, 520, BF16, 128, True, "special")
    yield quantize_case(24, 2304, BF16, 128, False)
    yield quantize_case(2, 4168, F32, 32, False)
    yield quantize_case(3, 7, F16, 0, True)
    yield quantize_case(0, 64, F16, 128, True)

    yield product_case(1, 48, 576, F16, 128, True, True)
    yield product_case(7, 51, 80, F32, 32, True, True)
    yield product_case(13, 130, 1100, BF16, 0, False, True)
    yield product_case(32, 33, 2112, F16, 0, True, False)
    yield product_case(0, 64, 64, F16, 128, False, True)
    yield product_case(3, 1, 64, F16, 128, False, True)
    yield product_case(25, 32, 320, F32, 128, False, False)
    yield product_case(70, 66, 208, F16, 128, True, True)  # 64x64 tiles
    yield product_case(65, 51, 400, F32, 0, True, True)
    yield product_case(66, 51, 64, F16, 128, False, True)  # an odd row of 16-bit results
    yield product_case(64, 128, 320, BF16, 128, False, False)
    yield product_case(128, 128, 1024, BF16, 32, False, False)
    yield product_case(257, 130, 320, F16, 0, True, False)  # 128x128 tiles: 6, 3 multiprocessors
    yield product_case(130, 257, 64, F32, 128, False, False)
    yield product_case(128, 384, 128, F16, 128, False, False)
    yield product_case(257, 1160, 1024, F32, 128, False, False, 100)  # by the library's product
    yield product_case(130, 256, 1024, F16, 32, True, False, 100)
    yield product_case(3, 264, 64, BF16, 0, True, True, library=True)


def named(*beginnings: str) -> list[Case]:
    """Those whose names begin so."""
    return [case for case in cases() if case.name.startswith(beginnings)]
