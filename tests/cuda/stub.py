"""The stub driver in the place of libcuda, and stand-ins for what of torch needs CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from qgraph.backends.cuda import driver, variants
from qgraph.backends.cuda.driver import Driver
from tests.cuda import build
from tests.cuda.engines import launching_on

KERNELS = (build.PRIMITIVES, *variants.KERNELS)
STREAM = 77


@contextmanager
def without_cuda(current: int = 0, capturing: bool = False) -> Iterator[None]:
    """Stand-ins for what of torch the driver calls."""
    devices = [current]

    @contextmanager
    def device(index: int) -> Iterator[None]:
        devices.append(index)
        yield
        devices.pop()

    with (
        patch.object(torch._C, "_cuda_getDevice", lambda: devices[-1], create=True),
        patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: STREAM, create=True),
        patch.object(torch.cuda, "device", device),
        patch.object(torch.cuda, "is_current_stream_capturing", lambda: capturing),
    ):
        yield


@contextmanager
def stub_driver(current: int = 0, capturing: bool = False) -> Iterator[Driver]:
    """A device whose driver is the stub; tensors of the CPU are launched on it.

    Args:
        current: torch's current device, where launches on another one must not go.
        capturing: whether a CUDA graph is being captured.
    """
    library = str(build.stub(KERNELS))
    with without_cuda(current, capturing), patch.object(driver, "LIBRARY", library):
        driver._library.cache_clear()
        made = Driver.of_device(0)
        with launching_on(made):
            yield made
    driver._library.cache_clear()
