"""What the first minutes on a GPU are for, stage by stage; `cuda_first_contact.py` runs them.

A stage gets the device and a function that keeps what it has found so far, and returns all of it.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

import qgraph.backends.cuda.ops  # noqa: F401 - registers them
from qgraph.backends.cuda import images, launches, nvrtc
from qgraph.backends.cuda.choice import PRODUCTS, SMALL
from qgraph.backends.cuda.driver import engine_of
from tests.cuda.build import PRIMITIVES, text_of
from tests.cuda.cases import Case, WrongAnswerError, cases

Found = dict[str, Any]
Keep = Callable[[Found], None]
Call = Callable[[], object]

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (576, 1536))
"""Columns and channels."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
CROSSING = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048)
RUNS = 1000
BEYOND_L2 = 256 * 2**20
"""Bytes of different weights, so that none is in a cache."""
SIDE = 8192
"""Of the square products that say what a library reaches."""
DECODER = (30, 576, 1536, 49152)
"""Layers, width, inner width and words of SmolLM2-135M."""
FLOOR = 2.0**-60
METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "sm__inst_executed_pipe_tensor.sum",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
)


class Gpu:
    """The calls of torch that need CUDA; the test on the stub driver has others."""

    name, index = "cuda", 0

    def __init__(self, out: Path) -> None:
        self.out = out

    def synchronize(self) -> None:
        """Wait for all that was launched."""
        torch.cuda.synchronize()

    def captured(self, call: Call) -> Call:
        """A CUDA graph of a call, to be replayed."""
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        replay: Call = graph.replay
        return replay

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Launch on a stream that is not the current one."""
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            yield
        torch.cuda.current_stream().wait_stream(side)

    def seconds(self, call: Call) -> float:
        """Of the device, for one call."""
        event: Any = torch.cuda.Event
        begin, end = (event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def output(self, *command: str, seconds: float = 20) -> str:
        """What a tool prints, or that it is absent."""
        if not shutil.which(command[0]):
            return "absent"
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"no end after {seconds} s"
        return f"rc {done.returncode}\n{done.stdout}\n{done.stderr[-500:]}".strip()

    def timed(self, calls: list[Call], replays: int = 20) -> float:
        """Microseconds a call, by replaying a graph of all the calls, which differ in weights."""
        for call in calls:
            call()
        self.synchronize()
        replay = self.captured(lambda: [call() for call in calls])
        replay()
        total = self.seconds(lambda: [replay() for _ in range(replays)])
        return round(total * 1e6 / replays / len(calls), 2)


def attempt(call: Callable[[], Any]) -> Any:
    """Its result, or what it raised, in a line."""
    try:
        return call()
    except Exception as error:
        if "CUDA error" in str(error) or "illegal" in str(error):
            raise  # nothing more can be learned in this process
        return f"{type(error).__name__}: {str(error)[:200]}"


def environment(gpu: Gpu, keep: Keep) -> Found:
    """Chip, driver, clocks, tools, and which yardsticks are there."""
    engine = engine_of(gpu.index)
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit"
    found: Found = {"torch": torch.__version__, "arch": engine.arch}
    found["cubins"] = images.fitting(engine.arch) or "compiled here"
    found["multiprocessors"] = engine.multiprocessors
    found["nvrtc"] = attempt(lambda: str(nvrtc.newest()))
    found["smi"] = gpu.output("nvidia-smi", query, "--format=csv,noheader")
    for tool in ("compute-sanitizer", "ncu"):
        found[tool] = shutil.which(tool) or "absent"
    for package in ("triton", "bitsandbytes", "humming", "transformers"):
        found[package] = attempt(partial(_version, package))
    return found


def _version(package: str) -> str:
    return str(importlib.import_module(package).__version__)


class OnDevice:
    """An engine for tensors of the CPU: they go to the device for a launch and come back."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.engine = gpu, engine_of(gpu.index)
        self.arch, self.multiprocessors = self.engine.arch, self.engine.multiprocessors

    def load(self, kernel: str) -> None:
        """As the driver does; a kernel of the tests is compiled here."""
        if kernel != PRIMITIVES:
            return self.engine.load(kernel)
        cubin = nvrtc.cubin(text_of(kernel), self.arch)
        with patch.object(images, "image", lambda *_: cubin):
            return self.engine.load(kernel)

    def run(
        self, kernel: str, grid: tuple[int, int], threads: int, shared: int, *arguments: Any
    ) -> None:
        """As the driver does, and wait."""
        self.load(kernel)
        there = [a.to(self.gpu.name) if isinstance(a, Tensor) else a for a in arguments]
        self.engine.run(kernel, grid, threads, shared, *there)
        self.gpu.synchronize()
        for here, moved in zip(arguments, there, strict=True):
            if isinstance(here, Tensor):
                here.copy_(moved.cpu())


def check_cases(gpu: Gpu, keep: Keep) -> Found:
    """Every wrapper against the models, then every case of the emulator; wrong answers are kept."""
    engine, found = OnDevice(gpu), {}
    wrong: dict[str, Any] = {}
    for case in cases():

        def outcome(case: Case = case) -> str:
            try:
                case.run(engine)
            except WrongAnswerError as error:
                pair = {f"{case.name} got": error.got, f"{case.name} expected": error.expected}
                wrong.update({name: a.view(np.uint8) for name, a in pair.items()})
                return str(error)
            return "ok"

        found[case.name] = attempt(outcome)
        keep(found)
    if wrong:
        np.savez_compressed(gpu.out / "answers.npz", **wrong)
    return found


def small_cases(gpu: Gpu, keep: Keep) -> Found:
    """Those for compute-sanitizer."""
    engine = OnDevice(gpu)
    return {case.name: case.failure(engine) or "ok" for case in cases() if case.small}


class Layer(nn.Module):
    """Tokens to int8 and a product, as modules of qgraph call them."""

    def __init__(self, columns: int, channels: int, seed: int = 0) -> None:
        super().__init__()
        r = torch.Generator().manual_seed(seed)
        weight = torch.randint(-127, 128, (channels, columns), dtype=torch.int8, generator=r)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", torch.full((channels,), 0.02 / 127 / columns**0.5))

    def forward(self, x: Tensor) -> Tensor:
        """x (M, K) to (M, N)."""
        q, largest = torch.ops.qgraph.quantize_per_token(x, 1 / 127, 128, FLOOR)
        y: Tensor = torch.ops.qgraph.int8_linear(
            q, largest, self.weight, self.scale, None, None, 128, x.dtype
        )
        return y


def under_torch(gpu: Gpu, keep: Keep) -> Found:
    """Captured graphs, side streams, threads, the same bits every time, torch.compile."""
    layer, x = Layer(256, 512), torch.randn(5, 256).half()
    right, found = layer(x), {}
    layer, x = layer.to(gpu.name), x.to(gpu.name)
    launches.prepare(gpu.index, x.dtype)
    expected = layer(x)
    found["as on the CPU"] = torch.equal(expected.cpu(), right)
    with gpu.side_stream():
        aside = layer(x)
    gpu.synchronize()
    found["side stream"] = torch.equal(aside, expected)
    static, results = x.clone(), []
    replay = gpu.captured(lambda: results.append(layer(static)))  # on a GPU this runs once
    static.copy_(x.flip(0))
    replay()
    gpu.synchronize()
    found["graph"] = torch.equal(results[-1], layer(x.flip(0)))
    many: list[Tensor] = []
    threads = [
        threading.Thread(target=lambda: many.extend(layer(x) for _ in range(RUNS // 4)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found["4 threads"] = len(many) == RUNS // 4 * 4 and all(torch.equal(y, expected) for y in many)
    found["same bits"] = all(torch.equal(layer(x), expected) for _ in range(RUNS))
    keep(found)
    for mode in ("default", "reduce-overhead"):

        def compiled(mode: str = mode) -> bool:
            function = torch.compile(layer, fullgraph=True, mode=mode)
            return all(torch.equal(function(x).clone(), expected) for _ in range(3))

        found[f"torch.compile {mode}"] = attempt(compiled)
        keep(found)
    return found


def ceilings(gpu: Gpu, keep: Keep) -> Found:
    """What memory, libraries and this host reach."""
    found: Found = {}
    a, b = (torch.zeros(BEYOND_L2, dtype=torch.uint8, device=gpu.name) for _ in range(2))
    found["copy TB/s"] = round(2 * a.numel() / gpu.timed([lambda: b.copy_(a)]) / 1e6, 3)
    words = a.view(torch.int32)
    found["read TB/s"] = round(a.numel() / gpu.timed([lambda: words.sum()]) / 1e6, 3)
    x, y = (torch.randn(SIDE, SIDE, device=gpu.name, dtype=torch.float16) for _ in range(2))
    found["f16 TFLOP/s"] = round(2 * SIDE**3 / gpu.timed([lambda: x @ y]) / 1e6, 1)
    q, w = (torch.ones(SIDE, SIDE, dtype=torch.int8, device=gpu.name) for _ in range(2))
    found["_int_mm TOP/s"] = round(
        2 * SIDE**3 / gpu.timed([lambda: torch._int_mm(q, w.t())]) / 1e6, 1
    )
    one = torch.zeros(1, device=gpu.name)
    found["empty kernel us"] = gpu.timed([lambda: one.add_(1)] * 50)
    layer, linear = Layer(64, 64).to(gpu.name), nn.Linear(64, 64).to(gpu.name).half()
    x = torch.randn(1, 64, device=gpu.name).half()
    q, largest = torch.ops.qgraph.quantize_per_token(x, 1 / 127, 128, FLOOR)
    product = torch.ops.qgraph.int8_linear
    with torch.inference_mode():
        for name, call in {
            "nn.Linear": lambda: linear(x),
            "quantize": lambda: torch.ops.qgraph.quantize_per_token(x, 1 / 127, 128, FLOOR),
            "int8_linear": lambda: product(
                q, largest, layer.weight, layer.scale, None, None, 128, x.dtype
            ),
        }.items():
            found[f"host us: {name}"] = host_microseconds(gpu, call)
    return found


def host_microseconds(gpu: Gpu, call: Call, calls: int = 2000) -> float:
    """What a call costs the host."""
    for _ in range(100):
        call()
    gpu.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    spent = time.perf_counter() - start
    gpu.synchronize()
    return round(spent / calls * 1e6, 2)


class Weights:
    """A layer's weights in every form, enough of them not to fit a cache."""

    def __init__(self, gpu: Gpu, columns: int, channels: int) -> None:
        self.columns, self.channels, self.device = columns, channels, gpu.name
        count = max(2, min(64, -(-BEYOND_L2 // (columns * channels))))
        size = (channels, columns)
        self.int8 = [
            torch.randint(-127, 128, size, dtype=torch.int8, device=gpu.name) for _ in range(count)
        ]
        self.f16 = [torch.randn(size, dtype=torch.float16, device=gpu.name) for _ in range(count)]
        self.scale = torch.rand(channels, device=gpu.name) * 1e-4

    def tokens(self, m: int) -> tuple[Tensor, Tensor, Tensor]:
        """m of them: in float16, and quantized."""
        x = torch.randn(m, self.columns, device=self.device, dtype=torch.float16)
        return (x, *torch.ops.qgraph.quantize_per_token(x, 1 / 127, 128, FLOOR))


def ways(weights: Weights, m: int) -> dict[str, list[Call]]:
    """To multiply m tokens by these weights: ours, the library's, other people's."""
    x, q, largest = weights.tokens(m)
    product = torch.ops.qgraph.int8_linear
    rest = (weights.scale, None, None, 128, torch.float16)
    quantize = torch.ops.qgraph.quantize_per_token
    found: dict[str, list[Call]] = {
        "f16": [partial(nn.functional.linear, x, w) for w in weights.f16],
        "quantize": [partial(quantize, x, 1 / 127, 128, FLOOR)] * 4,
        "int8": [partial(product, q, largest, w, *rest) for w in weights.int8],
    }
    if m > 16:
        found["_int_mm"] = [partial(torch._int_mm, q, w.t()) for w in weights.int8]
    try:
        bnb = importlib.import_module("bitsandbytes")
        multiply = bnb.functional.int8_linear_matmul
        found["bitsandbytes int8"] = [partial(multiply, q, w) for w in weights.int8]
    except Exception:
        pass
    try:
        halves = torch.zeros(weights.channels, weights.columns // 2, dtype=torch.uint8)
        pack = torch.ops.aten._convert_weight_to_int4pack
        packed = [pack(halves.to(weights.device), 8) for _ in weights.int8]
        scales = torch.ones(weights.columns // 64, weights.channels, 2, dtype=torch.bfloat16)
        there, y = scales.to(weights.device), x.bfloat16()
        int4 = torch.ops.aten._weight_int4pack_mm
        found["torch int4"] = [partial(int4, y, w, 64, there) for w in packed]
    except Exception:
        pass
    return found


def speed(gpu: Gpu, keep: Keep) -> Found:
    """Microseconds of every way, by shape and tokens."""
    found: Found = {}
    for k, n in SHAPES:
        weights = Weights(gpu, k, n)
        for m in TOKENS:
            row = {way: attempt(partial(gpu.timed, c)) for way, c in ways(weights, m).items()}
            found[f"{m} x {n} x {k}"] = row
            keep(found)
    return found


def crossover(gpu: Gpu, keep: Keep) -> Found:
    """Every kernel at every number of tokens: what the table in `choice.py` is to be."""
    engine, found = engine_of(gpu.index), {}
    for k, n in SHAPES[:2]:
        weights = Weights(gpu, k, n)
        for m in CROSSING:
            _, q, largest = weights.tokens(m)
            y = torch.empty(m, n, dtype=torch.float16, device=gpu.name)

            row = {}
            for product in (p for p in PRODUCTS if p not in SMALL or m <= 128):
                launch = (f"{product.kernel}_f16", product.grid(m, n), product.threads)
                rest = (weights.scale, largest, None, None, y, m, n, k, 0)
                calls: list[Call] = [
                    partial(engine.run, *launch, product.shared, q, w, *rest) for w in weights.int8
                ]
                row[product.kernel] = attempt(partial(gpu.timed, calls))
            if m > 16:
                library = partial(launches.multiply_by_library, engine, y, q, largest)
                calls = [partial(library, w, weights.scale, None, None, 128) for w in weights.int8]
                row["library"] = attempt(partial(gpu.timed, calls))
            found[f"{m} x {n} x {k}"] = row
            keep(found)
    return found


class Decoder(nn.Module):
    """Products of the shapes of a language model, with what is between them left out."""

    def __init__(self, layers: int, width: int, inner: int, words: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = ((width, width), (width, width), (width, inner), (inner, width))
        self.layers = nn.ModuleList(Layer(*size, seed=i) for i in range(layers) for size in sizes)
        self.embedding = nn.Embedding(words, width)
        self.head = Layer(width, words, seed=99)

    def forward(self, ids: Tensor) -> Tensor:
        """The most likely words after ids (M,)."""
        x = self.embedding(ids)
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = x + second(torch.tanh(first(x)))
        words: Tensor = self.head(x).argmax(-1)
        return words


def end_to_end(gpu: Gpu, keep: Keep) -> Found:
    """A decoder's steps, eager and captured, and words like the CPU's; models that were brought."""
    found: Found = {}
    model, ids = Decoder(*DECODER), torch.arange(4)
    words = model(ids)
    model, ids = model.to(gpu.name), ids.to(gpu.name)
    launches.prepare(gpu.index, torch.float32)
    with torch.inference_mode():
        found["words as on the CPU"] = torch.equal(model(ids).cpu(), words)
        step = ids[:1].clone()
        found["eager steps/s"] = round(1e6 / host_microseconds(gpu, lambda: model(step), 50), 1)
        found["captured steps/s"] = round(1e6 / gpu.timed([lambda: model(step)]), 1)
    keep(found)
    for path in sorted(Path("first-contact-models").glob("*.onnx")):
        found[path.name] = attempt(partial(_brought, gpu, path))
    return found


def _brought(gpu: Gpu, path: Path) -> Found:
    """A compiled language model: tokens of a prompt like the CPU's, and its time."""
    import qgraph

    ids = torch.arange(1, 33)[None]
    right = qgraph.load_module(path)(ids)
    module = qgraph.load_module(path, device=gpu.name)
    ids = ids.to(gpu.name)
    with torch.inference_mode():
        same = torch.equal(module(ids).argmax(-1).cpu(), right.argmax(-1))
        return {"same tokens": same, "captured us": gpu.timed([lambda: module(ids)])}


def sanitizer(gpu: Gpu, keep: Keep) -> Found:
    """compute-sanitizer over the small cases."""
    found: Found = {}
    run = [sys.executable, "-m", "benchmarks.cuda_first_contact", "--out", str(gpu.out)]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *run]
        text = gpu.output(*command, "--stage", "small cases", seconds=30)
        found[tool] = [line for line in text.splitlines() if "====" in line or "rc " in line][-4:]
        keep(found)
    return found


def one_of_each(gpu: Gpu, keep: Keep) -> Found:
    """A launch of three kernels for ncu."""
    for m in (1, 32, 2048):
        weights = Weights(gpu, *SHAPES[1])
        ways(weights, m)["int8"][0]()
    gpu.synchronize()
    return {}


def profile(gpu: Gpu, keep: Keep) -> Found:
    """ncu on the kernels that matter: memory, issue slots, bank conflicts, occupancy."""
    run = [sys.executable, "-m", "benchmarks.cuda_first_contact", "--out", str(gpu.out)]
    command = ["ncu", "--clock-control", "none", "--csv", "--metrics", ",".join(METRICS)]
    command += ["-k", "regex:w8a8|quantize", *run, "--stage", "one of each"]
    text = gpu.output(*command, seconds=40)
    (gpu.out / "ncu.csv").write_text(text[: 2**20])
    return {"lines": len(text.splitlines()), "begins": text[:300]}


STAGES: dict[str, tuple[float, Callable[[Gpu, Keep], Found]]] = {
    "environment": (10, environment),
    "cases": (60, check_cases),
    "torch": (60, under_torch),
    "ceilings": (20, ceilings),
    "speed": (120, speed),
    "crossover": (30, crossover),
    "end to end": (60, end_to_end),
    "sanitizer": (120, sanitizer),
    "profile": (45, profile),
}
"""Seconds at most, and what is done; the most important first, for the machine may go."""

HELPERS = {"small cases": small_cases, "one of each": one_of_each}
"""What the tools of the last two stages are run on."""
