"""What passes share while a model is compiled: target, data, seed, and the remarks they leave."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    from qgraph.target import Target

Feed = Mapping[str, np.ndarray]
"""One run's inputs by name."""

Kind = Literal["quantized", "float", "applied", "declined", "warning", "note"]
"""`quantized` and `float` are verdicts on a site: its last one counts. The others explain."""


@dataclass(frozen=True)
class Remark:
    """What one pass did, declined or noticed, and why.

    Attributes:
        kind: see :data:`Kind`.
        pass_name: the pass that speaks.
        site: name of the layer or node, `""` for the whole model.
        op: its operator, `""` for the whole model.
        message: one sentence.
        numbers: what was measured, by name (unit in the name where it has one).
    """

    kind: Kind
    pass_name: str
    site: str
    op: str
    message: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        numbers = "".join(f" {key}={value:.4g}" for key, value in self.numbers.items())
        where = f" {self.op} {self.site}" if self.site else ""
        return f"[{self.pass_name}] {self.kind}{where}: {self.message}{numbers}"


class Remarks(list[Remark]):
    """All remarks of one compilation, in order."""

    def verdicts(self) -> dict[str, Remark]:
        """The last `quantized` or `float` remark of each site, by site name."""
        return {r.site: r for r in self if r.kind in ("quantized", "float")}

    def warnings(self) -> list[Remark]:
        """What the user should know before using the result."""
        return [r for r in self if r.kind == "warning"]

    def summary(self) -> str:
        """One line for each distinct verdict with the number of its sites, then the warnings."""
        counts: dict[tuple[str, str, str], int] = {}
        for remark in self.verdicts().values():
            key = (remark.kind, remark.op, remark.message)
            counts[key] = counts.get(key, 0) + 1
        ranked = sorted(counts.items(), key=lambda item: (item[0][0] == "float", -item[1], item[0]))
        lines = [f"{kind:9} {count:4} {op}: {text}" for (kind, op, text), count in ranked]
        return "\n".join(lines + [str(r) for r in self.warnings()])


Item = TypeVar("Item")


class Progress(Protocol):
    """A display that wraps a loop which may take long: `progress(items, title, total)`."""

    def __call__(
        self, items: Iterable[Item], title: str, total: int | None = None
    ) -> Iterator[Item]: ...


def silent(items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
    """The progress display of a library call: none."""
    return iter(items)


@dataclass
class Context:
    """Carried from pass to pass.

    Attributes:
        target: what the result must run on.
        calibration: feeds by input name; iterated once per calibration pass, never held whole.
        seed: for everything random.
        remarks: filled by the passes.
        progress: wraps a loop that may take long: `progress(items, title, total)`.
        cache: folder for calibration statistics, or None.
        max_memory: bytes to stay within, or None; calibration takes a quarter for activations.
    """

    target: Target
    calibration: Iterable[Feed] | None = None
    seed: int = 0
    remarks: Remarks = field(default_factory=Remarks)
    progress: Progress = silent
    cache: Path | None = None
    max_memory: int | None = None
    optimize_for: Literal["prompt", "decode", "both"] = "both"

    def remark(
        self, kind: Kind, pass_name: str, site: str, op: str, message: str, **numbers: float
    ) -> None:
        """Leave a remark."""
        self.remarks.append(Remark(kind, pass_name, site, op, message, numbers))
