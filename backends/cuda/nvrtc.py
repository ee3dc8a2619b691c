"""NVRTC through ctypes: CUDA C++ to a cubin or PTX, without a GPU, a driver or a toolkit."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qgraph.backends.cpu.table import cache_folder
from qgraph.errors import QGraphError
from qgraph.io.files import aside

OPTIONS = ("--std=c++17", "--fmad=false")
"""A float expression rounds as it does on a CPU."""


@dataclass(frozen=True)
class Compiler:
    """A libnvrtc."""

    library: ctypes.CDLL
    version: tuple[int, int]

    @classmethod
    def at(cls, path: Path | str) -> Compiler:
        """The one in a file.

        Raises:
            OSError: it cannot be loaded.
        """
        library, major, minor = ctypes.CDLL(str(path)), ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return cls(library, (major.value, minor.value))

    def compile(self, source: str, arch: str, options: tuple[str, ...] = OPTIONS) -> bytes:
        """`sm_90` gives a cubin, `compute_90` PTX.

        Raises:
            QGraphError: the source does not compile for this architecture.
        """
        what = "CUBIN" if arch.startswith("sm") else "PTX"
        flags = [f"--gpu-architecture={arch}".encode(), *(option.encode() for option in options)]
        program = ctypes.c_void_p()
        self.library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None
        )
        try:
            status = self.library.nvrtcCompileProgram(
                program, len(flags), (ctypes.c_char_p * len(flags))(*flags)
            )
            if status:
                log = self._read(program, "ProgramLog").rstrip(b"\0").decode()
                reason = next((line for line in log.splitlines() if "error" in line), log.strip())
                raise QGraphError(f"NVRTC {self} does not compile for {arch}: {reason}")
            return self._read(program, what)
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self.library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


def installed() -> list[Compiler]:
    """Those in NVIDIA's Python packages, which come with torch, and the system's; oldest first."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    paths = [path for root in folders or () for path in Path(root).glob("*/lib/libnvrtc.so.*")]
    paths += [path for root in folders or () for path in Path(root).glob("*/bin/**/nvrtc64_*.dll")]
    found = [Compiler.at(path) for path in paths if "alt" not in path.name]
    if not found:
        with suppress(OSError):
            found.append(Compiler.at("libnvrtc.so"))
    return sorted(found, key=lambda compiler: compiler.version)


@functools.cache
def newest() -> Compiler:
    """The compiler for devices that no cubin is for.

    Raises:
        QGraphError: there is none.
    """
    if found := installed():
        return found[-1]
    raise QGraphError(
        "this GPU is newer than the kernels that qgraph brings, and NVRTC, which would compile "
        "them, is missing: pip install nvidia-cuda-nvrtc"
    )


def cubin(source: str, arch: int) -> bytes:
    """Compiled for an architecture by the newest compiler, or read from the user's cache folder."""
    compiler = newest()
    key = hashlib.sha256(repr((source, arch, OPTIONS, compiler.version)).encode()).hexdigest()
    path = cache_folder() / "cuda" / f"{key[:32]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        image = compiler.compile(source, f"sm_{arch}")
    with suppress(OSError):  # a folder that cannot be written to costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path) as unfinished:
            unfinished.write_bytes(image)
    return image
