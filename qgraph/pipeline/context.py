"""What passes share while a model is compiled: target, data, seed, and the remarks they leave."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qgraph.errors import QGraphError
from qgraph.io.feeds import Feed
from qgraph.pipeline.progress import Progress, silent
from qgraph.pipeline.remarks import Kind, Remark, Remarks

if TYPE_CHECKING:
    from qgraph.pipeline.target import Target


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

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 63:
            raise QGraphError(f"seed={self.seed} is out of range: use 0 or more")

    def remark(
        self, kind: Kind, pass_name: str, site: str, op: str, message: str, **numbers: float
    ) -> None:
        """Leave a remark."""
        self.remarks.append(Remark(kind, pass_name, site, op, message, numbers))
