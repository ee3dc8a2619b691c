"""driver.py whole, on a libcuda that launches on the emulator and refuses what a driver does."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any
from unittest.mock import patch

import pytest
import torch

from qgraph.backends.cuda import driver, images, launches
from qgraph.backends.cuda.driver import engine_of
from qgraph.backends.cuda.engine import ENGINES
from qgraph.errors import QGraphError
from tests.cuda import build
from tests.cuda.cases import named
from tests.cuda.stub import KERNELS, STREAM, stub_driver, without_cuda

CASES = named("quantize 2x4168", "w8a8 7x51", "w8a8 65x51", "w8a8 130x257")


def the_driver_is_launched_on() -> None:
    for case in CASES:
        with stub_driver() as device:
            assert not case.failure(device)
            stream = device.library.stub_last_stream
            stream.restype = ctypes.c_void_p
            assert stream() == STREAM


def a_thread_that_never_called_cuda_gets_the_context() -> None:
    found: list[str] = []
    with stub_driver() as device:
        assert not CASES[0].failure(device)
        thread = threading.Thread(target=lambda: found.append(CASES[0].failure(device)))
        thread.start()
        thread.join()
    assert found == [""]


def launches_go_to_the_device_of_the_tensors() -> None:
    with stub_driver(current=1) as device:
        assert not CASES[1].failure(device)
        device.load("quantize_f32")
        device.load("quantize_f32")


def all_kernels_of_a_type_are_loaded_before_a_capture() -> None:
    with stub_driver() as device:
        launches.prepare(-1, torch.float32)
        wanted = {kernel for kernel in KERNELS if kernel.endswith("_f32")}
        assert set(device.functions) == wanted | {"quantize_f16", "quantize_bf16"}
    with stub_driver(capturing=True) as device:
        with pytest.raises(QGraphError, match=r"quantize_f32 is not loaded: .* captured$"):
            device.load("quantize_f32")
        with pytest.raises(QGraphError, match=r"quantize_f32 is not loaded"):
            CASES[0].run(device)


def what_the_driver_refuses_is_said() -> None:
    with stub_driver() as device:
        x = torch.zeros(2, 64)
        q, largest = torch.zeros(2, 64, dtype=torch.int8), torch.zeros(2)
        arguments = (x, q, largest, 64, 64, 0.1, 0, 1.0)
        with pytest.raises(QGraphError, match=r"^quantize_f32: invalid argument \(CUDA error 1\)$"):
            device.run("quantize_f32", (0, 1), 256, 32, *arguments)
        with pytest.raises(QGraphError, match="invalid argument"):
            device.run("quantize_f32", (1, 1), 256, 49153, *arguments)
        with pytest.raises(QGraphError, match=r"deadlock|divergence|live"):
            device.run("quantize_f32", (1, 1), 31, 32, *arguments)
        other = images.image("epilogue_f32", 90)
        with (
            patch.object(images, "image", lambda *_: other),
            pytest.raises(QGraphError, match=r"^epilogue_bf16: named symbol not found"),
        ):
            device.load("epilogue_bf16")
        device.arch = 86
        with pytest.raises(
            QGraphError, match=r"w8a8_64_f32 on sm_86: no kernel image .* \(.* 209\)"
        ):
            device.load("w8a8_64_f32")


def _refusing(message: str, **settings: str) -> Callable[[], None]:
    def refused() -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            for name, value in settings.items():
                monkeypatch.setenv(f"QGRAPH_STUB_{name}", value)
            with pytest.raises(QGraphError, match=message), stub_driver():
                pass

    return refused


def there_is_no_driver_or_no_such_device() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(driver, "LIBRARY", "libcuda-missing.so")
        driver._library.cache_clear()
        with pytest.raises(QGraphError, match=r"no NVIDIA driver here .* run the model on the CPU"):
            engine_of(5)
        monkeypatch.setattr(driver, "LIBRARY", str(build.stub(KERNELS)))
        with pytest.raises(QGraphError, match=r"device 5: invalid device ordinal"):
            engine_of(5)
        with without_cuda():
            assert engine_of(0) is engine_of(0)
        del ENGINES[0]
    driver._library.cache_clear()


SCENARIOS: dict[str, Callable[[], None]] = {
    "launches": the_driver_is_launched_on,
    "threads": a_thread_that_never_called_cuda_gets_the_context,
    "devices": launches_go_to_the_device_of_the_tensors,
    "loading": all_kernels_of_a_type_are_loaded_before_a_capture,
    "refusals": what_the_driver_refuses_is_said,
    "missing": there_is_no_driver_or_no_such_device,
    "old device": _refusing(r"device 0, Stub 75, is sm_75: .* need sm_80 or later", ARCH="75"),
    "no device": _refusing(r"no CUDA-capable device is detected", DEVICES="0"),
    "old driver": _refusing(r"knows CUDA 11\.8 at most.*driver 525 or later", CUDA="11080"),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_driver(name: str) -> None:
    SCENARIOS[name]()


def test_every_line_of_the_driver_runs_in_these_tests() -> None:
    seen: set[int] = set()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != driver.__file__:
            return None
        seen.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        for scenario in SCENARIOS.values():
            scenario()
    finally:
        sys.settrace(before)
        threading.settrace(before)
    with open(driver.__file__) as file:
        text = file.read()
    functions = list(_functions(compile(text, driver.__file__, "exec")))
    lines = {line for code in functions for *_, line in code.co_lines() if line}
    missed = {line for line in lines if line not in seen}
    assert not {text.splitlines()[line - 1] for line in missed}


def _functions(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if "self" in constant.co_varnames or constant.co_flags & 2:  # CO_NEWLOCALS: no class
                yield constant
            yield from _functions(constant)


def test_the_cubin_that_comes_with_the_package_has_the_kernel() -> None:
    assert b".text.w8a8_128_f32\0" in images.image("w8a8_128_f32", 89)
