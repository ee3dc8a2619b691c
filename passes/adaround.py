"""AdaRound: learn for each weight whether it is rounded up or down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.errors import check_counts
from qgraph.graph.annotation import Stage
from qgraph.graph.cuts import around_sites
from qgraph.numerics.blocks import lowest
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.spec import QuantSpec
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass

if TYPE_CHECKING:
    from qgraph.torch.block import Block
    from qgraph.torch.learned_rounding import UpOrDown


@dataclass(frozen=True)
class AdaRound(Pass):
    """Learn for each weight of a product or convolution whether it is rounded up or down.

    The problem: rounding to nearest serves every single weight, but what counts is the output, and
    weights can make up for each other's errors. Which of two integers a weight becomes is made a
    number h(V) between 0 and 1 that gradients can move, while a penalty drives it to either end::

        W / scale ── floor ── + h(V) ── clip ── · scale ─┐
                                                         x' ── Conv ── bias ── Relu ── y'

        minimize over V:   |y' - y|²  +  penalty · sum of 1 - |2h(V) - 1|^beta

    Sites are learned one after the other, each with its bias and the activation function behind
    it. Its data x' is what the rounded sites before it make of the calibration data, y what the
    float model has there. Beta falls from 20 to 2: first the errors decide, then nothing stays
    between. Scales stay what they are.

    Sites that rounding to nearest serves better on the calibration data keep it, and so do those
    whose weight others read too, that sit in bodies of control flow, or that calibration never
    reaches. insert-qdq takes the integers as they are. Needs torch.

    Attributes:
        steps: of the descent, for each site.
        batch: calibration feeds of each step.

    Source: Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization",
    eq. 21 and 23 to 25. Their 10,000 steps of 0.001 are some hundred larger ones here.
    """

    name: ClassVar[str] = "adaround"
    version: ClassVar[int] = 1
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})

    steps: int = 200
    batch: int = 2

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, batch=self.batch)

    def run(self, model: ir.Model, context: Context) -> bool:
        from qgraph.torch.reconstruction import learnable, reconstruct

        sites = learnable(model, self, context)
        if sites:
            reconstruct(model, sites, around_sites(model, sites), context, self)
        return bool(sites)

    def start(self, w: NDArray[Any], nearest: Quantized, spec: QuantSpec) -> UpOrDown:
        """See :class:`qgraph.torch.reconstruction.Method`."""
        from qgraph.torch.learned_rounding import UpOrDown

        return UpOrDown(w, nearest, lowest(spec), spec.qmax)

    def learn(self, block: Block, weights: Sequence[UpOrDown], plain: float, seed: int) -> None:
        """See :class:`qgraph.torch.reconstruction.Method`."""
        from qgraph.torch.learned_rounding import batches, learn_up_or_down

        order = batches(len(block.seen), self.batch, self.steps, seed)
        learn_up_or_down(block, weights, plain, self.steps, order)
