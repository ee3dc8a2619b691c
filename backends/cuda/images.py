"""The compiled kernels that come with the package: one archive an architecture."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from qgraph.backends.cuda import nvrtc
from qgraph.backends.cuda.variants import source

FOLDER = Path(__file__).parent / "cubins"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
OLDEST = ARCHITECTURES[0]


def archive(arch: int) -> Path:
    """Where the cubins of an architecture are."""
    return FOLDER / f"sm_{arch}.zip"


def manifest() -> dict[str, Any]:
    """What made the cubins: the compiler, its options, and the hash of each kernel's source."""
    loaded: dict[str, Any] = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
    return loaded


def fitting(arch: int) -> int | None:
    """Whose cubins a device runs: the highest of its major version at or below it."""
    fits = (known for known in ARCHITECTURES if known // 10 == arch // 10 and known <= arch)
    return max(fits, default=None)


def image(kernel: str, arch: int) -> bytes:
    """The cubin of a kernel for a device; compiled now if none that is here fits.

    Raises:
        QGraphError: the compiler is needed and missing.
    """
    fits = fitting(arch)
    if fits is None:
        return nvrtc.cubin(source(kernel), arch)
    with zipfile.ZipFile(archive(fits)) as cubins:
        return cubins.read(f"{kernel}.cubin")
