"""How far the channels of SmolLM2's activations lie apart: as it is, smoothed, and split as well.

    python -m benchmarks.ranges [--out docs/smollm2-ranges.svg] [--json FILE] [--markdown]

The recipe `w8a8` (alpha 0.5) runs up to `split-outliers` on 8 x 512 tokens of the handbook, and
what calibration knows is read after `calibrate`, `smooth` and `split-outliers`. A channel's
magnitude is the largest |x| of all tokens. The table has the largest channel over the median one,
in the median layer and in the worst, and for float the first token over the median token, by their
largest elements, in the worst layer: what scales for each token, and one for all, have to cover.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

import qgraph
from benchmarks import svg, tasks, zoo
from benchmarks.tables import Report, parser
from qgraph.backends import get_target
from qgraph.calibration.capture import captured
from qgraph.graph.annotation import calibrated_stats, product_groups, stats_of
from qgraph.pipeline.pass_manager import Pass
from qgraph.recipes.transformers import w8a8

ALPHA, CHUNKS, TOKENS = 0.5, 8, 256
KINDS = {
    "input of q, k, v": "qkv_proj",
    "input of gate, up": "gate_proj",
    "input of down": "down_proj",
}
"""What the sites' names hold; onnxruntime-genai's builder names them."""
STATES = {
    "calibrate": "float",
    "smooth": f"smooth (alpha {ALPHA})",
    "split-outliers": "smooth, split-outliers",
}
"""What is drawn after which pass."""
CURVES = {"largest": 100.0, "99th percentile": 99.0, "median": 50.0}
_LAYER = re.compile(r"layers\.(\d+)")

Peaks = NDArray[np.float64]


@dataclass
class Ranges:
    """A hook for the pass manager that keeps what there is to draw.

    Attributes:
        peaks: by state and kind, (layers, channels): magnitudes.
        first: by kind, (layers,): the first token's largest element over the median token's.
    """

    peaks: dict[str, dict[str, Peaks]] = field(default_factory=dict)
    first: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self, step: Pass, model: ir.Model, context: qgraph.Context) -> None:
        """Look at the model after `step`."""
        if step.name not in STATES:
            return
        found = {kind: _inputs(model, name) for kind, name in KINDS.items()}
        self.peaks[STATES[step.name]] = {
            kind: np.stack([_peaks(x) for x in xs]) for kind, xs in found.items()
        }
        if step.name == "calibrate":
            for kind, xs in found.items():
                tokens = captured(model, xs, context, TOKENS)
                self.first[kind] = [first_over_median(rows) for _, rows in tokens]


def _inputs(model: ir.Model, name: str) -> list[ir.Value]:
    """The data of the products with `name` in theirs, from the first layer to the last."""
    found: dict[int, ir.Value] = {}
    for x, sites in product_groups(model).items():
        for site in sites:
            layer = _LAYER.search(site.name)
            if layer is not None and name in site.name and stats_of(x) is not None:
                found[int(layer[1])] = x
    return [found[layer] for layer in sorted(found)]


def _peaks(x: ir.Value) -> Peaks:
    peaks = calibrated_stats(x).channel_peak
    assert peaks is not None
    return peaks


def first_over_median(tokens: NDArray[np.float32]) -> float:
    """The largest element of the first token, over that of the median token; (tokens, K) in."""
    largest = np.abs(tokens).max(axis=-1)
    return float(largest[0] / np.median(largest))


def measured() -> Ranges:
    """Run the passes on SmolLM2."""
    folder = zoo.smollm2_genai()
    context = qgraph.Context(get_target("cpu"), tasks.smollm2_calibration(folder, CHUNKS))
    passes = w8a8(alpha=ALPHA).passes
    steps = [*takewhile(lambda step: step.name != "balance-tables", passes)]
    ranges = Ranges()
    qgraph.PassManager(steps, after=[ranges]).run(qgraph.load(folder), context)
    return ranges


def ratios(peaks: Peaks, percentile: float = 100.0) -> Peaks:
    """Each layer's channel at this percentile over its median channel; (layers, channels) in."""
    top: Peaks = np.percentile(peaks, percentile, axis=1) / np.median(peaks, axis=1)
    return top


def drawing(ranges: Mapping[str, Mapping[str, Peaks]]) -> str:
    """A panel for each kind (rows) in each state (columns): magnitudes over layers."""
    panels = [
        [_panel(f"{kind}: {state}", kinds[kind]) for state, kinds in ranges.items()]
        for kind in KINDS
    ]
    title = "SmolLM2-135M: how far the channels of its activations lie apart"
    return svg.log_panels(panels, title, "layer (index)", "channel's largest |x| (no unit)")


def _panel(title: str, peaks: Peaks) -> svg.Panel:
    curves = {name: np.percentile(peaks, at, axis=1) for name, at in CURVES.items()}
    top = ratios(peaks)
    note = f"largest / median: {np.median(top):.1f} (worst layer {top.max():,.1f})"
    return svg.Panel(title, curves, note)


def main() -> None:
    """Measure, draw and print."""
    made = parser(__doc__)
    made.add_argument("--out", type=Path, metavar="FILE", help="write the drawing")
    arguments = made.parse_args()
    ranges = measured()
    columns = ("data", "state", "largest / median", "worst layer", "99 % / median", "first token")
    report = Report(
        f"Channels of SmolLM2's activations, {CHUNKS} x 512 tokens",
        columns, dict.fromkeys(columns[2:], ",.1f"),
    )  # fmt: skip
    for kind in KINDS:
        for state, kinds in ranges.peaks.items():
            top = ratios(kinds[kind])
            numbers = (np.median(top), top.max(), np.median(ratios(kinds[kind], 99)))
            cells = dict(zip(columns[2:5], map(float, numbers), strict=True))
            first = max(ranges.first[kind]) if state == STATES["calibrate"] else None
            report.add({"data": kind, "state": state, **cells, columns[-1]: first})
    report.show(arguments)
    if arguments.out is not None:
        arguments.out.write_text(drawing(ranges.peaks))


if __name__ == "__main__":
    main()
