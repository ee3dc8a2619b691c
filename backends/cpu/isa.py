"""Which instructions a CPU has that decide what integer kernels cost."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

ISAS = ("avx512-vnni", "avx-vnni", "avx512", "avx2", "neon-dot", "neon", "generic")
"""From most to least capable within each family."""

SATURATING = ("avx512", "avx2", "generic")
"""These add u8·s8 products in pairs in int16 (`vpmaddubsw`), or may (x86 seen through no
/proc/cpuinfo, or with SSE4.1 alone)."""


@functools.cache
def host_isa() -> str:
    """The ISA of this machine, one of :data:`ISAS`."""
    flags = _flags()
    if {"avx512_vnni", "avx512vnni"} & flags:
        return "avx512-vnni"
    if {"avx_vnni", "avxvnni"} & flags:
        return "avx-vnni"
    if "avx512bw" in flags:
        return "avx512"
    if "avx2" in flags:
        return "avx2"
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "neon-dot" if "asimddp" in flags or platform.system() == "Darwin" else "neon"
    return "generic"


@functools.cache
def host_model() -> str:
    """The CPU's name as the system gives it."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _flags() -> set[str]:
    for line in _cpuinfo():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace").splitlines() if path.exists() else []
