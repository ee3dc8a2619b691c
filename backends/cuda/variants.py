"""The kernels by name: which source file, compiled with which defines.

`w8a8_small_2_bf16` is `gemm_w8a8_small.cu` for two tiles of 8 tokens and results in bfloat16.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

SOURCES = Path(__file__).parent / "kernels"
ELEMENTS = ("f16", "bf16", "f32")


def _tiles(m: int, n: int, warp_m: int, warp_n: int, stages: int) -> dict[str, int]:
    return {"TILE_M": m, "TILE_N": n, "WARP_M": warp_m, "WARP_N": warp_n, "STAGES": stages}


KINDS: dict[str, tuple[str, dict[str, int]]] = {
    "quantize": ("quantize.cu", {}),
    "epilogue": ("epilogue.cu", {}),
    **{f"w8a8_small_{t}": ("gemm_w8a8_small.cu", {"TOKENS": t}) for t in (1, 2, 4)},
    "w8a8_64": ("gemm_w8a8.cu", _tiles(64, 64, 32, 32, 4)),
    "w8a8_128": ("gemm_w8a8.cu", _tiles(128, 128, 64, 32, 3)),
}
"""File and defines by the part of a kernel's name before its element type."""

KERNELS = tuple(f"{kind}_{element}" for kind in KINDS for element in ELEMENTS)


def source(kernel: str, changed: Mapping[str, str] | None = None) -> str:
    """All that a compiler needs: the defines, then the file with its headers pasted in.

    Args:
        changed: texts by file in the place of those in `kernels/`.
    """
    kind, _, element = kernel.rpartition("_")
    file, defines = KINDS[kind]
    named = {"NAME": kernel, "ELEMENT": element.upper(), **defines}
    top = "".join(f"#define {key} {value}\n" for key, value in named.items())
    return top + pasted(file, changed or {})


def pasted(file: str, changed: Mapping[str, str]) -> str:
    """The text of a file with its headers in it, each once."""
    seen: set[str] = set()

    def paste(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = changed[name] if name in changed else (SOURCES / name).read_text(encoding="utf-8")
        text = re.sub(r"^#pragma once$", "", text, flags=re.MULTILINE)
        return re.sub(
            r'^#include "([\w.]+)"$', lambda match: paste(match[1]), text, flags=re.MULTILINE
        )

    return paste(file)


def digest(kernel: str) -> str:
    """A hash of all that a compiler gets to read."""
    return hashlib.sha256(source(kernel).encode()).hexdigest()
