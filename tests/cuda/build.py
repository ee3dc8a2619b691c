"""The kernels, the emulator and the stub driver, compiled by g++ into a cache of this user's.

`QGRAPH_CACHE_EMULATOR` names another folder. Whatever a file is made of is in its name, so nothing
in the cache is ever out of date.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from qgraph.backends.cuda.variants import pasted, source
from qgraph.io.files import aside

HERE = Path(__file__).parent
EMULATOR = HERE / "emulator"
CXX = os.environ.get("CXX", "g++")
PRIMITIVES = "primitives"
"""A kernel that runs every wrapper of prims.cuh once."""
Changed = Mapping[str, str]


class BuildError(Exception):
    """The compiler refuses: a mutant may be no C++."""


@functools.cache
def cache() -> Path:
    """Where compiled files are kept from one run of the tests to the next."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("QGRAPH_CACHE_EMULATOR") or home / "qgraph-emulator")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def compiler() -> str:
    """The compiler and its version, a part of every name."""
    return subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout


def text_of(kernel: str, changed: Changed | None = None) -> str:
    """The CUDA source of a kernel of the package or of the tests."""
    if kernel != PRIMITIVES:
        return source(kernel, changed)
    own = {"primitives.cu": (HERE / "primitives.cu").read_text()}
    return f"#define NAME {PRIMITIVES}\n" + pasted("primitives.cu", own | dict(changed or {}))


def kernel_object(
    kernel: str, sanitize: tuple[str, ...] = (), changed: Changed | None = None
) -> Path:
    """A kernel for the CPU, instrumented where sanitizers are named."""
    text = f"{text_of(kernel, changed)}\nEMU_KERNEL({kernel})\n"
    header = EMULATOR / "emu.h"
    flags = [*(f"-fsanitize={s}" for s in sanitize), *(("-g1", "-O0") if sanitize else ("-O1",))]
    flags += ["-ffp-contract=off", "-DEMU", "-w", "-fPIC", "-include", str(header)]
    return _compiled(kernel, text, [header.read_text()], flags)


@functools.cache
def runtime() -> Path:
    """The scheduler, never instrumented."""
    return _part("runtime.cpp", "-O2")


@functools.cache
def library(kernel: str, changed: tuple[tuple[str, str], ...] = ()) -> Path:
    """A shared object with the emulator and one kernel."""
    parts = [runtime(), kernel_object(kernel, (), dict(changed))]
    return _linked(f"{kernel}.so", parts, ["-shared"])


def program(kernel: str, sanitize: tuple[str, ...], changed: Changed | None = None) -> Path:
    """A program that makes one launch: sanitizers may end it."""
    flags = [f"-fsanitize={s}" for s in sanitize]
    runner = _part("run_case.cpp", "-O1", *flags)
    parts = [kernel_object(kernel, sanitize, changed), runner, runtime()]
    return _linked(kernel, parts, flags)


@functools.cache
def stub(kernels: tuple[str, ...]) -> Path:
    """A libcuda.so.1 that launches these kernels on the emulator."""
    parts = [runtime(), *map(kernel_object, kernels), _part("stub_driver.cpp", "-O1")]
    return _linked("libcuda-stub.so", parts, ["-shared"])


def _part(name: str, *flags: str) -> Path:
    text, header = (EMULATOR / name).read_text(), (EMULATOR / "emu.h").read_text()
    return _compiled(name, text, [header], [*flags, "-w", "-fPIC", "-I", str(EMULATOR)])


def _compiled(name: str, text: str, read: Iterable[str], flags: list[str]) -> Path:
    command = [CXX, "-std=c++17", *flags, "-x", "c++", "-c", "-"]
    known = [flag for flag in command if not flag.startswith("/")]
    target = cache() / f"{name}.{_hash(text, *read, *known, compiler())}.o"
    if not target.exists():
        with aside(target) as unfinished:
            _run([*command, "-o", str(unfinished)], text)
    return target


def _linked(name: str, parts: list[Path], flags: list[str]) -> Path:
    stem, dot, ending = name.partition(".")
    target = cache() / f"{stem}.{_hash(*flags, *(part.name for part in parts))}{dot}{ending}"
    if not target.exists():
        with aside(target) as unfinished:
            _run([CXX, *flags, "-o", str(unfinished), *map(str, parts), "-ldl"])
    return target


def _hash(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _run(command: list[str], text: str = "") -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(" ".join(command) + "\n" + done.stderr)
