"""Hand the committed model to the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qgraph.graph.annotation import Stage
from qgraph.graph.editing import remove_dead
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass


@dataclass(frozen=True)
class Lower(Pass):
    """Let the target replace explicit quantization by the operators that it runs fastest.

    What they are is the target's business (see `backends/`); that they give the same integers as
    the Q/DQ form is this pass's contract::

        x ── QuantizePerToken ── DequantizePerToken ── MatMul ── y
                                 W:int8 ────────── DQ ──┘
        x ── QuantizeLinear ── MatMulIntegerToFloat ── Mul ── y          (on x86)
                      W:int8 ──┘
    """

    name: ClassVar[str] = "lower"
    contract: ClassVar[Contract] = Contract.EXACT
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.COMMITTED})
    provides: ClassVar[frozenset[Stage]] = frozenset({Stage.LOWERED})

    def run(self, model: ir.Model, context: Context) -> bool:
        changed = context.target.legalize(model)
        remove_dead(model)
        return changed
