"""What passes say about what they did, and what they did not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

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
