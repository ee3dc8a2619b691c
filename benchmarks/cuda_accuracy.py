"""Target `cuda` beside target `onnx`: quality, size of files, memory of loading. Needs no GPU.

    python -m benchmarks.cuda_accuracy [--models smollm2 minilm] [--recipes w8a8 ...] [--chunks 12]

SmolLM2-135M (traced): perplexity; MiniLM-L6 (an ONNX file): cosine to the float model. Each recipe
is compiled for both targets; what `cuda` gives is run by onnxruntime, as a module, and for SmolLM2
after `qgraph.apply`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

import qgraph
from benchmarks import tasks, zoo
from qgraph.io.session import open_session

RECIPES: dict[str, dict[str, Any]] = {
    "w8a8": {}, "smoothquant": {}, "llm-int8": {}, "zeroquant": {},
}  # fmt: skip
LENGTH = 256
Score = Callable[[tasks.Runner], float]


def of_onnxruntime(model: ir.Model) -> tasks.Runner:
    session = open_session(model, threads=1)
    return lambda feed: [np.asarray(y) for y in session.run(None, dict(feed))]


def of_tensors(call: Callable[..., Any]) -> tasks.Runner:
    """A runner on what takes tensors by name and gives one."""

    def run(feed: tasks.Feed) -> list[np.ndarray]:
        with torch.inference_mode():
            y = call(**{name: torch.from_numpy(np.asarray(a)) for name, a in feed.items()})
        return [getattr(y, "logits", y).float().numpy()]

    return run


def smollm2(chunks: int) -> tuple[Path, list[Any], Score]:
    path = zoo.smollm2_traced()
    text = tasks.smollm2_chunks("eval", "lee", chunks, LENGTH)
    feeds = tasks.smollm2_calibration(path, 8, LENGTH, "lee")
    return path, feeds, lambda run: tasks.perplexity(run, text)


def minilm(chunks: int) -> tuple[Path, list[Any], Score]:
    path = zoo.minilm_onnx()
    reference, feeds = of_onnxruntime(qgraph.load(path)), tasks.minilm_feeds("eval", 8 * chunks)

    def cosine(run: tasks.Runner) -> float:
        pairs = [(reference(feed)[0].ravel(), run(feed)[0].ravel()) for feed in feeds]
        found = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
        return float(np.mean(found))

    return path, tasks.minilm_feeds("calibration", 64), cosine


MODELS = {"smollm2": smollm2, "minilm": minilm}


def applied(compiled: qgraph.CompiledModel) -> tasks.Runner:
    module: Any = zoo.smollm2_module()[0].model
    print(f"  {qgraph.apply(compiled, module)}", file=sys.stderr)
    return of_tensors(lambda input_ids: module(input_ids=input_ids, use_cache=False))


def scores(name: str, recipe: str, chunks: int) -> Iterator[tuple[str, float]]:
    """What ran, and its score; then what the files take."""
    path, feeds, score = MODELS[name](chunks)
    yield "float", score(of_onnxruntime(qgraph.load(path)))
    other = qgraph.compile(path, recipe, feeds, "onnx", **RECIPES[recipe])
    yield "onnx", score(of_onnxruntime(other.model))
    del other
    compiled = qgraph.compile(path, recipe, feeds, "cuda", **RECIPES[recipe])
    yield "cuda in onnxruntime", score(of_onnxruntime(compiled.model))
    yield "cuda as a module", score(of_tensors(compiled))
    if name == "smollm2":
        yield "cuda after apply", score(applied(compiled))
    yield from files(compiled)


def files(compiled: qgraph.CompiledModel) -> Iterator[tuple[str, float]]:
    """Megabytes of the files and of what they have to hold, and memory that loading takes."""
    with tempfile.TemporaryDirectory() as folder:
        out = compiled.save(Path(folder) / "out.onnx")
        written = sum(file.stat().st_size for file in out.parent.iterdir())
        held = sum(
            value.const_value.nbytes
            for value in compiled.model.graph.initializers.values()
            if value.const_value is not None
        )
        layers = [v.const_value for v in compiled.model.graph.initializers.values()]
        largest = max(tensor.nbytes for tensor in layers if tensor is not None)
        code = (
            "import sys, torch, qgraph, onnx_ir, qgraph.torch.to_module, qgraph.torch.calls\n"
            "import qgraph.backends.cuda.modules\n"
            "def now(key):\n"
            "    lines = open('/proc/self/status').read().splitlines()\n"
            "    return int(next(x for x in lines if x.startswith(key)).split()[1]) / 1024\n"
            "before = now('VmRSS'); open('/proc/self/clear_refs', 'w').write('5')\n"
            "module = qgraph.load_module(sys.argv[1]); print(now('VmHWM') - before)"
        )
        ran = subprocess.run([sys.executable, "-c", code, out], capture_output=True, text=True)
        yield "MB of files", written / 1e6
        yield "MB of tensors", held / 1e6
        yield "MB of the largest tensor", largest / 1e6
        yield "MiB that loading takes", float(ran.stdout or "nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=[*RECIPES])
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--set", default="{}", help="parameters for all recipes, as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for recipe in given.recipes:
        RECIPES[recipe] |= json.loads(given.set)
        for name in given.models:
            for what, number in scores(name, recipe, given.chunks):
                print(f"{name:8} {recipe:12} {what:26} {number:9.4f}", flush=True)


if __name__ == "__main__":
    main()
