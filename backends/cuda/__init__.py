"""Target `cuda`: quantized layers as kernels of our own, on NVIDIA GPUs from sm_80 on."""

from __future__ import annotations

from qgraph.backends import unknown
from qgraph.backends.cuda.target import CudaTarget
from qgraph.pipeline.target import Purpose

__all__ = ["TARGETS", "CudaTarget", "describe", "make"]

TARGETS = (
    ("cuda", "torch modules with int8 kernels for NVIDIA GPUs; floats in the model's own type"),
    ("cuda:f16", "the same, with what stays float multiplied in float16"),
    ("cuda:bf16", "the same, in bfloat16"),
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
