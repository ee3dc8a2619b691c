"""Target `cuda`: quantized layers as kernels of our own, on NVIDIA GPUs from sm_80 on."""

from __future__ import annotations

from qgraph.backends import unknown
from qgraph.backends.cuda.target import CudaTarget
from qgraph.pipeline.target import Purpose

__all__ = ["TARGETS", "CudaTarget", "describe", "make"]

TARGETS = (
    ("cuda", "torch modules with int8 kernels for NVIDIA GPUs; the rest as the model has it"),
)


def make(name: str, optimize_for: Purpose = "both") -> CudaTarget:
    """The target of this name, which is the same whatever the model is optimized for.

    Raises:
        QGraphError: there is none of this name.
    """
    if name not in dict(TARGETS):
        raise unknown(name)
    return CudaTarget(name)


def describe() -> str:
    """Nothing: devices are asked when a module comes to them."""
    return ""
