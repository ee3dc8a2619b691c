"""What a compilation says about itself, for people (one HTML page) and for programs (JSON)."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape

from qgraph.pipeline.remarks import Remark, Remarks

_SAID_WITH = ("qgraph-compiler", "numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Compilation:
    """One finished compilation.

    Attributes:
        model, output: where the model came from and went to.
        recipe, parameters: how it was compiled.
        target: what it was compiled for.
        bytes_before, bytes_after: size of the files.
        remarks: what the passes said.
    """

    model: str
    output: str
    recipe: str
    target: str
    bytes_before: int
    bytes_after: int
    remarks: Remarks
    parameters: Mapping[str, object] = field(default_factory=dict)


def versions() -> dict[str, str]:
    """Versions of qgraph and of the packages that decide what it produces."""
    return {name: importlib.metadata.version(name) for name in _SAID_WITH}


def human_size(size: int) -> str:
    """Bytes in decimal units: `human_size(17_300_000) == "17.3 MB"`."""
    amount, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def to_json(result: Compilation) -> str:
    """The whole compilation as JSON; numbers that JSON does not have become null."""
    content = {
        "model": result.model,
        "output": result.output,
        "recipe": result.recipe,
        "parameters": {key: _plain(value) for key, value in result.parameters.items()},
        "target": result.target,
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "versions": versions(),
        "remarks": [_as_dict(remark) for remark in result.remarks],
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _as_dict(remark: Remark) -> dict[str, object]:
    numbers = {key: _plain(float(value)) for key, value in remark.numbers.items()}
    return {**asdict(remark), "numbers": numbers}


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str) or value is None else str(value)


def to_html(result: Compilation) -> str:
    """The whole compilation as one page that needs no other file."""
    verdicts = result.remarks.verdicts()
    quantized = sum(remark.kind == "quantized" for remark in verdicts.values())
    facts = {
        "model": result.model,
        "saved as": result.output,
        "recipe": result.recipe,
        "parameters": ", ".join(f"{k}={v}" for k, v in result.parameters.items()) or "the defaults",
        "target": result.target,
        "size": f"{human_size(result.bytes_before)} → {human_size(result.bytes_after)}",
        "quantized": f"{quantized} of {len(verdicts)} sites",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    explained: dict[str, list[Remark]] = {}
    for remark in result.remarks:
        if remark.site and remark is not verdicts.get(remark.site):
            explained.setdefault(remark.site, []).append(remark)
    parts = [
        "<dl>",
        *(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in facts.items()),
        "</dl>",
        *_list("Warnings", result.remarks.warnings()),
        "<h2>Every site</h2>",
        "<table><thead><tr><th>site</th><th>operator</th><th>verdict</th><th>why</th>"
        "<th>numbers</th></tr></thead><tbody>",
        *(_row(remark, explained.get(site, [])) for site, remark in verdicts.items()),
        "</tbody></table>",
        *_list(
            "The whole model", [r for r in result.remarks if not r.site and r.kind != "warning"]
        ),
    ]
    return _PAGE.format(
        title=escape(f"qgraph: {result.output}"), style=_STYLE, body="\n".join(parts)
    )


def _row(remark: Remark, explained: list[Remark]) -> str:
    why = escape(remark.message)
    if explained:
        items = "".join(f"<li>{_sentence(other)}</li>" for other in explained)
        why = f"<details><summary>{why}</summary><ul>{items}</ul></details>"
    cells = [escape(remark.site), escape(remark.op), escape(remark.kind), why, _numbers(remark)]
    return f'<tr class="{escape(remark.kind)}"><td>' + "</td><td>".join(cells) + "</td></tr>"


def _list(title: str, remarks: list[Remark]) -> list[str]:
    if not remarks:
        return []
    items = (f"<li>{escape(r.site)} {_sentence(r)}</li>" for r in remarks)
    return [f"<h2>{title}</h2>", "<ul>", *items, "</ul>"]


def _sentence(remark: Remark) -> str:
    return f"<b>{escape(remark.pass_name)}</b> {escape(remark.message)} {_numbers(remark)}"


def _numbers(remark: Remark) -> str:
    return escape(", ".join(f"{key} {value:.4g}" for key, value in remark.numbers.items()))


_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
dl { display: grid; grid-template-columns: max-content auto; gap: .2rem 1rem } dd { margin: 0 }
dt, th { font-weight: 600; text-align: left }
table { border-collapse: collapse; width: 100% }
td, th { border-bottom: 1px solid #8884; padding: .3rem .6rem; vertical-align: top }
td:first-child { overflow-wrap: anywhere } summary { cursor: pointer }
tr.quantized td:nth-child(3) { color: #2a7f3f } tr.float td:nth-child(3) { color: #b35900 }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
