"""One real model, five ways: float, qgraph's recipes, onnxruntime's own quantizers.

    python -m benchmarks.demo        (or `make demo`)

The model is PP-OCRv4's text recognition, out of a PyPI package. It reads rendered lines; those for
calibration and those for evaluation come from different texts. Speed is a ratio of interleaved
runs. The models stay in `demo-out/`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import onnx
from rich.console import Console

import qgraph
from benchmarks import tasks, zoo
from benchmarks.variants import quiet
from qgraph.cli.progress import display
from qgraph.report.bench import benchmark
from qgraph.report.page import human_size
from qgraph.report.tables import row, table

OUT = Path("demo-out")
CALIBRATION = 32
TIMED = 6


def main() -> None:
    """Download, compile, compare, print."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print("fetching the model and the texts (once) ...", style="dim")
    model, texts = zoo.ppocr("rec"), tasks.ocr_feeds("rec", "calibration", CALIBRATION)
    began = time.monotonic()
    OUT.mkdir(exist_ok=True)
    paths = {"float": model}
    for recipe in ("static", "dynamic"):
        console.print(f"compiling with the recipe {recipe} ...", style="dim")
        feeds = texts if recipe == "static" else None
        compiled = qgraph.compile(model, recipe, feeds, progress=display())
        paths[f"qgraph {recipe}"] = compiled.save(OUT / f"{recipe}.onnx")
        console.print(compiled.remarks.summary(), markup=False, highlight=False)
    console.print("onnxruntime's own quantizers ...", style="dim")
    for name, quantize in {"static": ort_static, "dynamic": ort_dynamic}.items():
        path = OUT / f"ort-{name}.onnx"
        try:
            with quiet():
                quantize(model, path, texts)
            paths[f"onnxruntime {name}"] = path
        except Exception as error:
            console.print(f"onnxruntime {name}: {str(error).splitlines()[0]}", markup=False)
    compare(console, paths)
    console.print(
        f"{time.monotonic() - began:.0f} s after the downloads; models in {OUT}/", style="dim"
    )


def compare(console: Console, paths: dict[str, Path]) -> None:
    """Accuracy, size and speed of each model as a table."""
    console.print("reading 95 lines with each, timing all in turn ...", style="dim")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    errors = {name: tasks.rec_cer(tasks.session(p, threads=threads)) for name, p in paths.items()}
    feeds = tasks.ocr_feeds("rec", "eval", TIMED)
    results = benchmark(list(paths.values()), feeds, rounds=7, progress=display())
    right = ("characters wrong", "size", "speed", "SQNR")
    made = table("PP-OCRv4 recognition", *right[:3], "quartiles", "SQNR", right=right)
    for (name, path), result in zip(paths.items(), results, strict=True):
        row(
            made,
            name,
            f"{100 * errors[name]:.2f} %",
            human_size(path.stat().st_size),
            f"{result.speedup:.2f}x",
            f"{result.low:.2f} to {result.high:.2f}",
            f"{result.sqnr_db:.1f} dB",
        )
    console.print(made)


def ort_static(model: Path, out: Path, feeds: list[tasks.Feed]) -> None:
    """onnxruntime.quantization.quantize_static as its documentation recommends it for CPUs."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> tasks.Feed | None:
            return next(self.feeds, None)

    with _prepared(model) as prepared:
        quantize_static(prepared, out, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)


def ort_dynamic(model: Path, out: Path, _: list[tasks.Feed]) -> None:
    """onnxruntime.quantization.quantize_dynamic, but for Conv: its result would not load."""
    from onnxruntime.quantization import quantize_dynamic

    with _prepared(model) as prepared:
        quantize_dynamic(prepared, out, per_channel=True, op_types_to_quantize=["MatMul"])


@contextlib.contextmanager
def _prepared(model: Path) -> Iterator[Path]:
    """What onnxruntime's quantizers need first: opset 13, weights in initializers, shapes."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = OUT / "prepared.onnx"
    try:
        onnx.save(onnx.version_converter.convert_version(onnx.load(model), 13), path)
        quant_pre_process(path, path, skip_symbolic_shape=True)
        yield path
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
