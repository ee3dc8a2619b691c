"""Target `cpu`: stock onnxruntime on this machine, or on another CPU by name."""

from __future__ import annotations

from qgraph.backends.cpu.isa import ISAS, host_isa, host_model
from qgraph.backends.cpu.table import Decisions
from qgraph.backends.cpu.target import SHIPPED, CpuTarget, host_table
from qgraph.errors import QGraphError
from qgraph.pipeline.target import Purpose

__all__ = ["SHIPPED", "TARGETS", "CpuTarget", "Decisions", "describe", "host_table", "make"]

TARGETS = (
    ("cpu", "stock onnxruntime on this machine; kernels are chosen by measuring them here"),
    *((f"cpu:{isa}", f"stock onnxruntime on another CPU with {isa}") for isa in ISAS),
)


def make(name: str, optimize_for: Purpose = "both") -> CpuTarget:
    """The target called `cpu` or `cpu:<isa>`.

    Args:
        optimize_for: the numbers of rows that count, see :data:`target.ROWS`.

    Raises:
        QGraphError: no such instruction set.
    """
    _, _, isa = name.partition(":")
    if name != "cpu" and isa not in ISAS:
        raise QGraphError(
            f"unknown target '{name}': use cpu or one of {', '.join('cpu:' + i for i in ISAS)}"
        )
    return CpuTarget(name, isa or host_isa(), optimize_for)


def describe() -> str:
    """This host, and what has been measured on it so far."""
    lines = [f"host: {host_model()}, {host_isa()}"]
    entries = list(host_table())
    if not entries:
        lines.append("nothing measured yet: entries are measured when a model first needs them")
    lines += [f"{speedup:7.2f}x float  {key}" for key, speedup in entries]
    return "\n".join(lines)
