"""A pass of one's own, in one's own file: see docs/writing-a-pass.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qgraph.graph import array, release, retract, sites, weight_spec
from qgraph.graph.annotation import Stage
from qgraph.numerics.noise import sqnr_db
from qgraph.numerics.reference import along, dequantize, quantize_weight
from qgraph.numerics.spec import PerAxis, QuantSpec
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass


@dataclass(frozen=True)
class KeepSensitive(Pass):
    """Keep the layers float whose weights would lose too much: mixed precision.

    The problem: with few bits, layers suffer very differently, and a handful of them costs most of
    the accuracy. What rounding does to a weight can be measured before anything is quantized.

        x ── MatMul ── Relu ── MatMul         x ── MatMul ── Relu ── MatMul
        w1:int4 31 dB ┘  w2:int4 9 dB ┘       w1:int4 ────┘  w2:float ────┘

    Parameters:
        min_sqnr: signal-to-noise ratio that a rounded weight must keep, in dB.
    """

    name: ClassVar[str] = "keep-sensitive"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})

    min_sqnr: float = 20.0

    def run(self, model: ir.Model, context: Context) -> bool:
        changed = False
        for site in sites(model):
            spec = weight_spec(site)
            weight = array(site.weight)
            if spec is None or weight is None:
                continue
            sqnr = rounding_sqnr_db(weight, spec)
            release(site.weight)
            if sqnr >= self.min_sqnr:
                continue
            retract(site)
            why = f"its rounded weight would keep less than {self.min_sqnr:g} dB"
            self.remark(context, site, "float", why, weight_db=sqnr)
            changed = True
        return changed


def rounding_sqnr_db(weight: np.ndarray, spec: QuantSpec) -> float:
    """Signal-to-noise ratio of `weight` after quantization by `spec`, in dB; inf if exact."""
    axis = spec.granularity.axis if isinstance(spec.granularity, PerAxis) else None
    q, scale, zero = quantize_weight(weight, axis, spec)
    if axis is not None:
        scale, zero = along(scale, axis, weight.ndim), along(zero, axis, weight.ndim)
    return sqnr_db(weight, dequantize(q, scale, zero))
