"""Compile every kernel for every architecture into the package.

    python -m qgraph.backends.cuda.make_cubins [FOLDER]

The same sources and compiler give the same bytes. Cubins of NVRTC 12.9 load on drivers from 525 on;
those of NVRTC 13 would need 580.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

from qgraph.backends.cuda import images, nvrtc
from qgraph.backends.cuda.variants import KERNELS, digest, source
from qgraph.errors import QGraphError

VERSION = (12, 9)


def pinned() -> nvrtc.Compiler:
    """The compiler that makes the cubins.

    Raises:
        QGraphError: it is not installed.
    """
    for compiler in nvrtc.installed():
        if compiler.version == VERSION:
            return compiler
    raise QGraphError("NVRTC 12.9 is missing: pip install nvidia-cuda-nvrtc-cu12==12.9.86")


def make(folder: Path) -> None:
    """Write the archives and the manifest."""
    compiler = pinned()
    folder.mkdir(parents=True, exist_ok=True)
    for arch in images.ARCHITECTURES:
        # Stored, for the wheel compresses; of 1980, for the date of a zip's entry is part of it.
        with zipfile.ZipFile(folder / f"sm_{arch}.zip", "w", zipfile.ZIP_STORED) as archive:
            for kernel in KERNELS:
                cubin = compiler.compile(source(kernel), f"sm_{arch}")
                archive.writestr(zipfile.ZipInfo(f"{kernel}.cubin"), cubin)
    made_of = {
        "nvrtc": str(compiler),
        "options": nvrtc.OPTIONS,
        "sources": {kernel: digest(kernel) for kernel in KERNELS},
    }
    (folder / "manifest.json").write_text(json.dumps(made_of, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else images.FOLDER)
