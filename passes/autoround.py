"""AutoRound: learn how each weight is rounded, and the range of its scale, by signed gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.errors import check_counts
from qgraph.graph.annotation import Stage
from qgraph.graph.cuts import narrow_points
from qgraph.numerics.blocks import lowest
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.spec import QuantSpec
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass

if TYPE_CHECKING:
    from qgraph.torch.block import Block
    from qgraph.torch.learned_rounding import Offset


@dataclass(frozen=True)
class AutoRound(Pass):
    """Learn an offset for each weight before it is rounded, and the ends of each scale's range.

    The problem: what counts is the output of a whole block, attention or an inverted residual,
    whose sites can make up for each other's errors. All of its weights are learned together, by
    gradients that pass the rounding as if it were not there::

        W / s ── + V ── round ── clip ── · s ─┐        V in -0.5 .. 0.5
                                              x' ── the block ── y'

        s = (top · high - bottom · low) / steps        minimize over V, top, bottom:  |y' - y|²

    Only the signs of the gradients count: everything moves by the same rate, which falls from
    1 / steps to 0, so that an offset can reach what rounds the other way. What was best on all
    calibration data is kept. Blocks lie between the points of the graph through which everything
    flows. Their data x' is what the rounded blocks before make of the calibration data, y what the
    float model has there.

    Blocks that rounding to nearest serves better on the calibration data keep it, and so do sites
    whose weight others read too, that sit in bodies of control flow, or that calibration never
    reaches. insert-qdq takes the integers as they are. Needs torch.

    Attributes:
        steps: of the descent, for each block.
        batch: calibration feeds of each step.

    Source: Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent for the
    Quantization of LLMs", eq. 3 and algorithm 1. Theirs can only shrink ranges; here they start
    where rounding to nearest loses least, and move both ways.
    """

    name: ClassVar[str] = "autoround"
    version: ClassVar[int] = 1
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})

    steps: int = 200
    batch: int = 2

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, batch=self.batch)

    def run(self, model: ir.Model, context: Context) -> bool:
        from qgraph.torch.reconstruction import learnable, reconstruct

        sites = learnable(model, self, context, scales=True)
        if sites:
            reconstruct(model, sites, narrow_points(model, sites), context, self)
        return bool(sites)

    def start(self, w: NDArray[Any], nearest: Quantized, spec: QuantSpec) -> Offset:
        """See :class:`qgraph.torch.reconstruction.Method`."""
        from qgraph.torch.learned_rounding import Offset

        return Offset(w, nearest, lowest(spec), spec.qmax, spec.symmetric)

    def learn(self, block: Block, weights: Sequence[Offset], plain: float, seed: int) -> None:
        """See :class:`qgraph.torch.reconstruction.Method`."""
        from qgraph.torch.learned_rounding import batches, learn_offsets

        order = batches(len(block.seen), self.batch, self.steps, seed)
        learn_offsets(block, weights, plain, self.steps, order)
