"""The backends, one file or folder each. Imported as `qgraph.backends`."""

from __future__ import annotations

if __name__ != "qgraph.backends":
    raise ImportError("import this package as qgraph.backends")

from qgraph.backends import cpu
from qgraph.backends.cpu.isa import ISAS
from qgraph.backends.onnx import OnnxTarget
from qgraph.errors import QGraphError
from qgraph.pipeline.target import Target

TARGETS: tuple[tuple[str, str], ...] = (
    ("cpu", "stock onnxruntime on this machine; kernels are chosen by measuring them here"),
    *((f"cpu:{isa}", f"stock onnxruntime on another CPU with {isa}") for isa in ISAS),
    ("onnx", "standard operators only, for any runtime that reads ONNX"),
)
"""Names and one-line descriptions."""


def get_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        QGraphError: there is none; the message lists those there are.
    """
    if name == "onnx":
        return OnnxTarget()
    if name == "cpu" or name.startswith("cpu:"):
        return cpu.make(name)
    known = ", ".join(n for n, _ in TARGETS)
    raise QGraphError(f"unknown target '{name}': use one of {known}")
