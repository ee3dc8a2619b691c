"""Small multiples with a logarithmic axis, as SVG: without a plotting library, light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT, LEFT, TOP, GAP, BELOW = 250, 130, 70, 70, 22, 60
"""Of a panel, and around it."""
STYLE = """
  .page { fill: #ffffff } text { fill: #24292f; font: 11px sans-serif }
  .title { font-size: 15px; font-weight: bold } .head { font-weight: bold }
  .note { font-size: 10px } .frame, .grid { fill: none; stroke: #57606a; stroke-width: 0.7 }
  .grid { stroke-opacity: 0.3 } path { fill: none; stroke-width: 1.8 }
  .c0 { stroke: #d55e00 } .c1 { stroke: #0072b2; stroke-dasharray: 6 3 }
  .c2 { stroke: #57606a; stroke-dasharray: 1.5 2.5 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } text { fill: #e6edf3 } .frame, .grid { stroke: #9da7b3 }
    .c0 { stroke: #ff8c42 } .c1 { stroke: #56b4e9 } .c2 { stroke: #c9d1d9 }
  }
"""
"""Colours that the colour-blind tell apart (Okabe and Ito 2008), and a dash pattern for each."""


@dataclass(frozen=True, eq=False)
class Panel:
    """One plot.

    Attributes:
        title: above it.
        curves: at most three, by name: positive values at x = 0, 1, ...
        note: in its upper corner.
    """

    title: str
    curves: Mapping[str, NDArray[np.float64]]
    note: str = ""


def log_panels(rows: Sequence[Sequence[Panel]], title: str, x_label: str, y_label: str) -> str:
    """A page of panels that share the x axis, and in each row the y axis."""
    page_width = LEFT + len(rows[0]) * (WIDTH + GAP)
    page_height = TOP + len(rows) * (HEIGHT + BELOW)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {page_width} {page_height}"'
        f' role="img"><title>{escape(title)}</title><style>{STYLE}</style>',
        '<rect class="page" width="100%" height="100%"/>',
        _text(LEFT, 22, title, "title"),
    ]
    for i, name in enumerate(rows[0][0].curves):
        x = LEFT + i * 150
        parts.append(f'<path class="c{i}" d="M{x} 38h30"/>' + _text(x + 36, 42, name))
    for i, row in enumerate(rows):
        top = TOP + i * (HEIGHT + BELOW)
        values = np.concatenate([curve for panel in row for curve in panel.curves.values()])
        low, high = math.floor(np.log10(values.min())), math.ceil(np.log10(values.max()) + 0.5)
        middle = top + HEIGHT / 2
        turned = f'transform="rotate(-90 18 {middle:g})"'
        parts.append(_text(18, middle, y_label, "note", f'text-anchor="middle" {turned}'))
        for k in range(low, high + 1):
            y = top + HEIGHT * (high - k) / (high - low)
            parts.append(_text(LEFT - 6, y + 4, f"{10.0**k:g}", "", 'text-anchor="end"'))
        for j, panel in enumerate(row):
            parts += _panel(panel, LEFT + j * (WIDTH + GAP), top, low, high, x_label)
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, left: int, top: int, low: int, high: int, x_label: str) -> list[str]:
    last = max(curve.size for curve in panel.curves.values()) - 1
    right, bottom = left + WIDTH, top + HEIGHT
    parts = [_text(left, top - 6, panel.title, "head")]
    for k in range(low + 1, high):
        y = top + HEIGHT * (high - k) / (high - low)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}h{WIDTH}"/>')
    for i in range(0, last + 1, 5):
        x = left + WIDTH * i / last
        parts.append(f'<path class="grid" d="M{x:.1f} {bottom}v4"/>')
        parts.append(_text(x, bottom + 15, str(i), "note", 'text-anchor="middle"'))
    parts.append(_text(left + WIDTH / 2, bottom + 28, x_label, "note", 'text-anchor="middle"'))
    parts.append(f'<rect class="frame" x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}"/>')
    for i, curve in enumerate(panel.curves.values()):
        xs = left + WIDTH * np.arange(curve.size) / last
        ys = top + HEIGHT * (high - np.log10(curve)) / (high - low)
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
        parts.append(f'<path class="c{i}" d="M{line}"/>')
    parts.append(_text(right - 5, top + 13, panel.note, "note", 'text-anchor="end"'))
    return parts


def _text(x: float, y: float, text: str, kind: str = "", more: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{named} {more}>{escape(text)}</text>'
