"""What compiling takes: peak memory of real command lines, and their time.

    python -m benchmarks.memory [--only calibration recipes synthetic] [--json FILE] [--markdown]
                                [--recipes dynamic "static bits=4" ...]

SmolLM2 is compiled by `qgraph compile -r static` with few and with many calibration samples: memory
must not grow with their number. Each recipe is measured on it against the time that onnxruntime
takes for the calibration samples in float. A model larger than most machines would like is
quantized by `-r dynamic`. Each command runs in a process of its own, whose peak includes the pages
of memory-mapped weights.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

SAMPLES, LENGTH = (8, 64), 256
LAYERS, WIDTH = 40, 4096
RECIPES = ("static", "dynamic", "rtn", "gptq", "awq")
"""Each with its parameters, as in "static bits=4"."""
BARS = {"rtn": (2.5, 0.5), "gptq": (2.5, 5.0), "awq": (2.5, 5.0)}
"""The most that a recipe may take, of memory over the model's size and of time over float."""
OTHERS = (3.0, 4.0)

_COMMAND = "import sys; from benchmarks.memory import command; command(sys.argv[1:])"
_TIMINGS = "import sys; from benchmarks.memory import timings; timings(*sys.argv[1:])"
_FLOAT = (
    "import sys; from benchmarks.memory import float_seconds; print(float_seconds(*sys.argv[1:]))"
)


def peak_rss() -> int:
    """The most bytes that this process has held at once.

    Not `ru_maxrss`: Linux carries over into that what the parent held when it forked.
    """
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def command(arguments: list[str]) -> None:
    """Run the command `qgraph` in this process, then print its peak and seconds as last line."""
    from qgraph.cli import main

    began = time.perf_counter()
    status = main(arguments)
    print(peak_rss(), time.perf_counter() - began)
    sys.exit(status)


def cost_of(*arguments: str | Path) -> tuple[int, float]:
    """The peak in bytes and the seconds of `qgraph` with these arguments, in a fresh process.

    Raises:
        RuntimeError: the command failed; the message holds what it said.
    """
    peak, seconds = _child(_COMMAND, *arguments).split()[-2:]
    return int(peak), float(seconds)


def peak_of(*arguments: str | Path) -> int:
    """The peak of :func:`cost_of`."""
    return cost_of(*arguments)[0]


def _child(code: str, *arguments: str | Path) -> str:
    words = [sys.executable, "-c", code, *map(str, arguments)]
    root = Path(__file__).parent.parent
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[3:])}: {done.stderr.strip()[-2000:]}")
    return done.stdout


# ---------------------------------------------------------------------- calibrating a real model


def write_feeds(feeds: list[dict[str, Any]], folder: Path) -> Path:
    """A folder of `.npz` files, one feed each."""
    folder.mkdir()
    for index, feed in enumerate(feeds):
        np.savez(folder / f"{index:04}.npz", **feed)
    return folder


def timings(model: str, data: str) -> None:
    """Print as JSON the seconds of every pass of `static`, and of the float model on the feeds.

    The float model runs before and after, and the faster of these counts.
    """
    import qgraph
    from qgraph.backends import get_target
    from qgraph.io.feeds import open_calibration
    from qgraph.recipes import get_recipe

    source = qgraph.load(model)
    feeds = open_calibration(data, source)
    manager = qgraph.PassManager(get_recipe("static", {}).passes)
    before = float_seconds(model, data)
    manager.run(source, qgraph.Context(get_target("cpu"), feeds))
    found = {timing.name: timing.seconds for timing in manager.timings}
    print(json.dumps({"passes": found, "float": min(before, float_seconds(model, data))}))


def float_seconds(model: str, data: str) -> float:
    """The seconds that onnxruntime takes for a folder of feeds, once it has loaded the model."""
    import onnxruntime

    import qgraph
    from qgraph.io.feeds import open_calibration

    feeds = open_calibration(data, qgraph.load(model))
    file = Path(model) / "model.onnx" if Path(model).is_dir() else Path(model)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    began = time.perf_counter()
    for feed in feeds:
        session.run(None, dict(feed))
    return time.perf_counter() - began


def calibration(scratch: Path) -> Iterator[tuple[str, float, float, str]]:
    """Rows of the table on SmolLM2: what, measured, bar, unit."""
    from benchmarks import tasks, zoo

    model = zoo.smollm2_genai()
    size = sum(file.stat().st_size for file in model.glob("model.onnx*"))
    chunks = tasks.smollm2_chunks("calibration", n=max(SAMPLES), length=LENGTH)
    feeds = [{"input_ids": chunk[None]} for chunk in chunks]
    data = write_feeds(feeds, scratch / "data")
    few, many = (
        peak_of("compile", model, "-o", scratch / f"out{n}", "-c", data, "--samples", str(n))
        for n in SAMPLES
    )
    yield f"peak, {SAMPLES[0]} samples of {LENGTH} tokens", few / 1e9, 3 * size / 1e9, "GB"
    yield f"peak, {SAMPLES[1]} samples of {LENGTH} tokens", many / 1e9, 3 * size / 1e9, "GB"
    yield f"peak of {SAMPLES[1]} over that of {SAMPLES[0]}", many / few, 1.1, "x"
    yield f"peak of {SAMPLES[1]} over the model's size", many / size, 3.0, "x"
    found = json.loads(_child(_TIMINGS, model, data))
    for name, seconds in found["passes"].items():
        if seconds > 1:
            bar = 2.5 if name == "calibrate" else float("nan")
            yield f"pass {name}, over float on the same samples", seconds / found["float"], bar, "x"


def recipes(
    scratch: Path, chosen: Sequence[str] = RECIPES
) -> Iterator[tuple[str, float, float, str]]:
    """Rows of the table for each recipe on SmolLM2: what, measured, bar, unit.

    The float model runs before and after each command, and the faster of these counts.
    """
    from benchmarks import tasks, zoo

    model = zoo.smollm2_genai()
    size = sum(file.stat().st_size for file in model.glob("model.onnx*"))
    data = write_feeds(tasks.smollm2_calibration(model, 32, 512), scratch / "data")
    before = float(_child(_FLOAT, model, data))
    for recipe in chosen:
        name, *settings = recipe.split()
        parameters = [word for setting in settings for word in ("--set", setting)]
        out = scratch / recipe.replace(" ", "-")
        peak, seconds = cost_of("compile", model, "-o", out, "-r", name, "-c", data, *parameters)
        after = float(_child(_FLOAT, model, data))
        most, longest = BARS.get(name, OTHERS)
        yield f"{recipe}: peak over the model's size", peak / size, most, "x"
        yield (
            f"{recipe}: time over float on the samples",
            seconds / min(before, after),
            longest,
            "x",
        )
        before = after


# ------------------------------------------------------------------------ a model larger than RAM


def write_chain(folder: Path, layers: int, width: int) -> Path:
    """A chain of `layers` MatMuls of `width` x `width` float32; weights stream into external data.

    Weights are random with variance 1 / width, so that values keep their size along the chain.
    """
    random = np.random.default_rng(0)
    nbytes = 4 * width * width
    weights = []
    with open(folder / "chain.data", "wb") as data:
        for index in range(layers):
            weight = random.standard_normal((width, width), np.float32) / np.float32(width**0.5)
            data.write(weight.data)
            tensor = TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT)
            tensor.dims.extend([width, width])
            tensor.data_location = TensorProto.EXTERNAL
            place = {"location": "chain.data", "offset": nbytes * index, "length": nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            weights.append(tensor)
    chain = [
        helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], f"layer{i}")
        for i in range(layers)
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
        for name in ("x0", f"x{layers}")
    ]
    graph = helper.make_graph(chain, "chain", ends[:1], ends[1:], weights)
    imports = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    onnx.save(model, folder / "chain.onnx")
    return folder / "chain.onnx"


def synthetic(scratch: Path) -> Iterator[tuple[str, float, float, str]]:
    """Rows of the table on a model of 2.7 GB: what, measured, bar, unit."""
    model = write_chain(scratch, LAYERS, WIDTH)
    size = (scratch / "chain.data").stat().st_size
    peak = peak_of("compile", model, "-o", scratch / "out.onnx", "-r", "dynamic")
    yield f"peak, dynamic, a model of {size / 1e9:.1f} GB", peak / 1e9, 1.5, "GB"


def main() -> None:
    """Measure and print."""
    from benchmarks.tables import Cell, Report, parser

    parts = {"calibration": calibration, "recipes": recipes, "synthetic": synthetic}
    made = parser(__doc__)
    made.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    made.add_argument("--recipes", nargs="+", default=RECIPES, metavar='"NAME KEY=VALUE"')
    arguments = made.parse_args()
    parts["recipes"] = functools.partial(recipes, chosen=arguments.recipes)
    styles = dict.fromkeys(("measured", "at most"), ".2f")
    report = Report("Memory and time", ("what", "measured", "at most", "unit", "holds"), styles)
    for name in arguments.only:
        with tempfile.TemporaryDirectory(prefix="qgraph-memory-") as scratch:
            for what, measured, bar, unit in parts[name](Path(scratch)):
                holds = "" if np.isnan(bar) else "yes" if measured <= bar else "NO"
                cells: dict[str, Cell] = {"what": what, "measured": measured, "at most": bar}
                report.add(cells | {"unit": unit, "holds": holds})
    report.show(arguments)


if __name__ == "__main__":
    main()
