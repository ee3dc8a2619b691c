"""Results as a table: on the screen, as Markdown, as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime
from rich.console import Console

from qgraph.backends.cpu.isa import host_isa, host_model
from qgraph.report.tables import row, table

Cell = str | float | int | None


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host() -> str:
    """What decides about speed and rounding: CPU, instruction set, number of CPUs, runtime."""
    runtime = f"onnxruntime {onnxruntime.__version__}"
    return f"{host_model()}, {host_isa()}, {cores()} CPUs, {runtime}"


@dataclass
class Report:
    """A table under way.

    Attributes:
        title: what was measured; the host is added to it.
        columns: keys of every row; numbers are right-aligned.
        rows: plain values by column, as the JSON file has them.
        styles: format specification of a column's numbers.
    """

    title: str
    columns: tuple[str, ...]
    styles: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Cell]] = field(default_factory=list)

    def add(self, cells: dict[str, Cell]) -> None:
        """Add a row, and say it on stderr at once: the table may take long."""
        named = {name: cells.get(name) for name in self.columns}
        self.rows.append(named)
        print("  ".join(filter(None, self._texts(named))), file=sys.stderr, flush=True)

    def _texts(self, cells: dict[str, Cell]) -> list[str]:
        return [_text(cells[name], self.styles.get(name, ".4g")) for name in self.columns]

    def show(self, arguments: argparse.Namespace) -> None:
        """Print, and write the JSON file if one is asked for."""
        if arguments.json is not None:
            content = {"title": self.title, "host": host(), "rows": self.rows}
            arguments.json.write_text(json.dumps(content, indent=1, allow_nan=True) + "\n")
        if arguments.markdown:
            print(self.markdown())
            return
        made = table(*self.columns, right=tuple(self.styles))
        made.title = f"{self.title}\n{host()}"
        for cells in self.rows:
            row(made, *self._texts(cells))
        console = Console()
        if not console.is_terminal:
            console.width = 200
        console.print(made)

    def markdown(self) -> str:
        """The table in Markdown."""
        rule = ["---:" if name in self.styles else "---" for name in self.columns]
        body = [self._texts(cells) for cells in self.rows]
        lines = ["| " + " | ".join(cells) + " |" for cells in (list(self.columns), rule, *body)]
        return "\n".join([f"{self.title}. {host()}.", "", *lines])


def _text(cell: Cell, style: str) -> str:
    if cell is None:
        return ""
    return format(cell, style) if isinstance(cell, float) else str(cell)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all measuring scripts share."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    made.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return made
