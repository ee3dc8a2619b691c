"""Launches through the CUDA driver, on the device and the stream that are torch's current ones.

Neither a toolkit nor an extension is needed: `libcuda` is called through ctypes.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qgraph.backends.cuda import images
from qgraph.backends.cuda.engine import ENGINES, Engine
from qgraph.errors import QGraphError

if TYPE_CHECKING:
    from qgraph.backends.cuda.engine import Argument

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
LEAST_CUDA = 12000
"""What a driver has to know to load cubins of NVRTC 12: those from 525 on do."""
MULTIPROCESSORS, MAJOR, MINOR = 16, 75, 76
"""CUdevice_attribute."""
SIZES, CONFIG = "7I4x", "QQI4x"
"""Of a CUlaunchConfig: blocks, threads and shared memory; stream and attributes."""
AFTER_SIZES = struct.calcsize(SIZES)


@dataclass
class Driver:
    """One device."""

    device: int
    arch: int
    multiprocessors: int
    library: ctypes.CDLL
    context: int
    """torch's, the primary one."""
    functions: dict[str, int] = field(default_factory=dict)
    """Handles of the kernels that are loaded."""
    loading: threading.Lock = field(default_factory=threading.Lock)
    frames: threading.local = field(default_factory=threading.local)

    def __post_init__(self) -> None:
        import torch

        # What every launch calls, looked up once.
        self.launch = self.library.cuLaunchKernelEx
        self.current_device = torch._C._cuda_getDevice
        self.current_stream = torch._C._cuda_getCurrentRawStream

    @classmethod
    def of_device(cls, device: int) -> Driver:
        """The driver of a device by torch's number.

        Raises:
            QGraphError: there is no driver, or it or the device is too old.
        """
        library, known = _library(), ctypes.c_int()
        _check(library, library.cuInit(0), "CUDA")  # which torch may not have done yet
        _check(library, library.cuDriverGetVersion(ctypes.byref(known)), "CUDA")
        if known.value < LEAST_CUDA:
            version = f"{known.value // 1000}.{known.value % 1000 // 10}"
            raise QGraphError(
                f"this NVIDIA driver knows CUDA {version} at most, qgraph's kernels need 12.0: "
                "install driver 525 or later"
            )
        name, context = ctypes.create_string_buffer(256), ctypes.c_void_p()
        _check(library, library.cuDeviceGetName(name, 256, device), f"device {device}")
        arch = 10 * _attribute(library, MAJOR, device) + _attribute(library, MINOR, device)
        if arch < images.OLDEST:
            raise QGraphError(
                f"device {device}, {name.value.decode()}, is sm_{arch}: qgraph's kernels need "
                f"sm_{images.OLDEST} or later; keep the model on the CPU"
            )
        status = library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        _check(library, status, f"device {device}")
        multiprocessors = _attribute(library, MULTIPROCESSORS, device)
        return cls(device, arch, multiprocessors, library, context.value or 0)

    def load(self, kernel: str) -> None:
        """Make a kernel ready.

        Raises:
            QGraphError: it cannot be, or a CUDA graph is being captured.
        """
        import torch

        with self.loading, torch.cuda.device(self.device):
            if kernel in self.functions:
                return
            if torch.cuda.is_current_stream_capturing():
                raise QGraphError(
                    f"{kernel} is not loaded: move the module to the device, or call it once, "
                    "before a CUDA graph is captured"
                )
            self._enter()
            image, module, function = (
                images.image(kernel, self.arch),
                ctypes.c_void_p(),
                ctypes.c_void_p(),
            )
            status = self.library.cuModuleLoadData(ctypes.byref(module), image)
            _check(self.library, status, f"{kernel} on sm_{self.arch}")
            name = kernel.encode()
            status = self.library.cuModuleGetFunction(ctypes.byref(function), module, name)
            _check(self.library, status, kernel)
            self.functions[kernel] = function.value or 0

    def run(
        self, kernel: str, grid: tuple[int, int], threads: int, shared: int, *arguments: Argument
    ) -> None:
        """Launch.

        Raises:
            QGraphError: the driver refuses.
        """
        if self.current_device() != self.device:
            import torch

            with torch.cuda.device(self.device):
                self.run(kernel, grid, threads, shared, *arguments)
            return
        frame = self.frames.__dict__.get(kernel) or self._frame(kernel, arguments)
        if frame.sizes != (sizes := (grid, threads, shared)):
            frame.resize(sizes)
        n = frame.pointers
        tensors: Any = arguments[:n]
        frame.pack(
            frame.memory, AFTER_SIZES, self.current_stream(self.device), 0, 0,
            *[0 if t is None else t.data_ptr() for t in tensors], *arguments[n:],
        )  # fmt: skip
        status = self.launch(frame.config, frame.function, frame.addresses, None)
        if status:
            _check(self.library, status, kernel)

    def _frame(self, kernel: str, arguments: tuple[Argument, ...]) -> Frame:
        """A thread's own memory for the arguments of a kernel."""
        if kernel not in self.functions:
            self.load(kernel)
        self._enter()
        frame = Frame(self.functions[kernel], arguments)
        setattr(self.frames, kernel, frame)
        return frame

    def _enter(self) -> None:
        """Let a thread that has not called CUDA yet use torch's context."""
        current = ctypes.c_void_p()
        _check(self.library, self.library.cuCtxGetCurrent(ctypes.byref(current)), "CUDA")
        if not current.value:
            status = self.library.cuCtxSetCurrent(ctypes.c_void_p(self.context))
            _check(self.library, status, f"device {self.device}")


def engine_of(device: int) -> Engine:
    """The engine of a device, opened when it is asked for first.

    Raises:
        QGraphError: there is no driver, or it or the device is too old.
    """
    engine = ENGINES.get(device)
    if engine is None:
        engine = ENGINES.setdefault(device, Driver.of_device(device))
    return engine


class Frame:
    """A launch of a kernel in memory: a CUlaunchConfig, the arguments' values side by side, and the
    array of their addresses.

    Made once for a kernel and a thread and filled for every launch: objects of ctypes made anew
    cost three times as much. Pointers come before numbers.
    """

    def __init__(self, function: int, arguments: tuple[Argument, ...]) -> None:
        codes = [
            "f" if isinstance(a, float) else "i" if isinstance(a, int) else "Q" for a in arguments
        ]
        self.pointers = codes.count("Q")
        layout = struct.Struct(CONFIG + "".join(codes))
        self.pack = layout.pack_into
        self.memory = ctypes.create_string_buffer(AFTER_SIZES + layout.size)
        self.sizes: tuple[tuple[int, int], int, int] | None = None
        base, head = ctypes.addressof(self.memory), SIZES + CONFIG
        ends = [struct.calcsize(head + "".join(codes[: n + 1])) for n in range(len(codes))]
        starts = (base + end - struct.calcsize(code) for code, end in zip(codes, ends, strict=True))
        self.config, self.function = ctypes.c_void_p(base), ctypes.c_void_p(function)
        self.addresses = (ctypes.c_void_p * len(codes))(*starts)

    def resize(self, sizes: tuple[tuple[int, int], int, int]) -> None:
        """Another grid, number of threads or shared memory than in the launch before."""
        (x, y), threads, shared = self.sizes = sizes
        struct.pack_into(SIZES, self.memory, 0, x, y, 1, threads, 1, 1, shared)


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        raise QGraphError(f"no NVIDIA driver here ({LIBRARY}): run the model on the CPU") from None


def _attribute(library: ctypes.CDLL, attribute: int, device: int) -> int:
    value = ctypes.c_int()
    status = library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    _check(library, status, f"device {device}")
    return value.value


def _check(library: ctypes.CDLL, status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        library.cuGetErrorString(status, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode()
        raise QGraphError(f"{what}: {reason} (CUDA error {status})")
