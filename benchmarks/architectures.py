"""What becomes of architectures: torch modules, and folders of onnxruntime-genai's model builder.

    python -m benchmarks.architectures [--only NAME ...] [--json FILE] [--markdown]

All are small, with random weights. Each row says how many of the layers are quantized and how far
the signal stands above the error of rounding, by recipe; the worse of onnxruntime with and without
its optimizations. The table of docs/models.md is the output of `--markdown`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

import qgraph
from benchmarks import genai_folders, torch_modules
from benchmarks.tables import Report, parser
from benchmarks.variants import must_have_a_verdict, quiet, unaccounted
from qgraph.io.kv_cache import complete_feed
from qgraph.io.session import open_session, run
from qgraph.numerics.noise import decibels

Feeds = Sequence[Mapping[str, NDArray[Any]]]

WAYS: Mapping[str, str] = {"dynamic": "cpu", "static": "onnx", "rtn": "onnx"}
"""The target of each recipe for a torch module; `onnx` quantizes whatever it can."""
FOLDER_WAYS: Mapping[str, str] = {"dynamic": "cpu", "w8a8": "cpu", "rtn": "cpu"}
COLUMNS = ("dynamic", "calibrated", "rtn")
_LEVELS = (False, True)


@dataclass(frozen=True)
class Outcome:
    """What one recipe made of one model.

    Attributes:
        compiled: the result.
        outputs: what it computes, without onnxruntime's optimizations and with them.
        signal: dB over the error, of the worse of both.
        silent: layers that have no verdict.
        layers: how many ought to have one.
    """

    compiled: qgraph.CompiledModel
    outputs: tuple[list[NDArray[Any]], ...]
    signal: float
    silent: list[str]
    layers: int

    @property
    def quantized(self) -> int:
        """How many layers are quantized."""
        return sum(r.kind == "quantized" for r in self.compiled.remarks.verdicts().values())


def traced(example: torch_modules.Example) -> ir.Model:
    """The module as `trace` captures it."""
    feed = example.feeds(1)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # caches that are left out
        return qgraph.trace(example.module, feed, dict(example.free))


def outcome(model: ir.Model, recipe: str, target: str, feeds: Feeds) -> Outcome:
    """Compile `model`, run it on the first of `feeds`, and compare it with what it was."""
    feed = complete_feed(model, feeds[0])
    want = run(open_session(model, optimized=False), feed)
    with quiet():
        compiled = qgraph.compile(model, recipe, list(feeds), target=target)
    outputs = tuple(run(open_session(compiled.model, optimized=level), feed) for level in _LEVELS)
    wanted = must_have_a_verdict(model)
    return Outcome(
        compiled,
        outputs,
        min(signal(want, got) for got in outputs),
        unaccounted(wanted, compiled.remarks),
        len(wanted),
    )


def signal(want: Sequence[NDArray[Any]], got: Sequence[NDArray[Any]]) -> float:
    """dB of the middle token (or pixel row) of the worst output of floats.

    Not of all: a few tokens go to other experts, and have nothing in common then.
    """
    found = [np.inf]
    for w, g in zip(want, got, strict=True):
        if w.shape != g.shape or not np.array_equal(np.isfinite(w), np.isfinite(g)):
            return -np.inf
        if w.dtype.kind != "f":
            continue
        of_signal, of_noise = (np.square(x, dtype=np.float64).sum(-1) for x in (w, w - g))
        alive = of_signal > 0
        if alive.any():
            found.append(decibels(1.0, float(np.median(of_noise[alive] / of_signal[alive]))))
    return min(found)


def cases() -> Iterator[tuple[str, str]]:
    """Kind and name of every architecture."""
    for kind, names in torch_modules.KINDS.items():
        yield from ((kind, name) for name in names)
    yield from (("folder", name) for name in genai_folders.ARCHITECTURES)


def loaded(kind: str, name: str) -> tuple[ir.Model, Feeds]:
    """A model by kind and name, and data for it."""
    if kind == "folder":
        data = genai_folders.data(name, 4, 24)
        feeds = [{key: array[i : i + 1] for key, array in data.items()} for i in range(4)]
        return qgraph.load(genai_folders.folder(name)), feeds
    example = torch_modules.example(name)
    return traced(example), example.feeds(4)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", nargs="+", metavar="NAME", help="these, or a kind of them")
    given = arguments.parse_args()
    columns = [
        f"{recipe}{what}" for recipe in ("dynamic", "calibrated", "rtn") for what in ("", " dB")
    ]
    report = Report(
        "Layers quantized of all, and signal over error",
        ("architecture", "kind", *columns),
        {name: ".0f" for name in columns if name.endswith("dB")},
    )
    for kind, name in cases():
        if given.only is None or {kind, name, f"{kind}/{name}"} & {*given.only}:
            report.add({"architecture": name, "kind": kind, **_cells(kind, name)})
    report.show(given)


def _cells(kind: str, name: str) -> dict[str, Any]:
    """The columns of one row; what fails says why."""
    cells: dict[str, Any] = {}
    ways = FOLDER_WAYS if kind == "folder" else WAYS
    try:
        model, feeds = loaded(kind, name)
    except Exception as error:
        return {COLUMNS[0]: str(error).splitlines()[0]}
    for column, (recipe, target) in zip(COLUMNS, ways.items(), strict=True):
        try:
            found = outcome(model, recipe, target, feeds)
        except Exception as error:
            cells[column] = str(error).splitlines()[0]
            continue
        cells[column] = f"{found.quantized} of {found.layers}"
        cells[f"{column} dB"] = found.signal
        if found.silent:
            cells[column] += f", {len(found.silent)} without a verdict"
    return cells


if __name__ == "__main__":
    main()
