"""AWQ's second half: the scale of each block of a weight, searched by the error of the outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qgraph.calibration.capture import Capture, Rows, first_feeds
from qgraph.calibration.resume import Resumable
from qgraph.errors import check_counts
from qgraph.graph.annotation import Stage, annotated_weight_spec, product_groups
from qgraph.graph.editing import remove_dead
from qgraph.graph.sites import Site
from qgraph.numerics.blocks import Scales, full_range, rounding_error
from qgraph.numerics.quantized import Arrays, Quantized, from_arrays, to_arrays
from qgraph.numerics.reference import Float
from qgraph.numerics.spec import QuantSpec
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass
from qgraph.weights.clipping import SWEEPS, clipped_scales, gram, output_error
from qgraph.weights.search import columns, rounded_site, searchable, some_columns
from qgraph.weights.site_weight import replace_weight

TOKENS = 2048
"""About so many tokens are captured of each product's data."""
COLUMNS = 256
"""Outputs, picked at random, by which the weight of a token is found."""


@dataclass(frozen=True)
class ClipWeights(Pass):
    """Shrink the range of each block of a weight as far as the outputs gain by it.

    The problem: in a block of 64 weights, one that is large sets the scale, and the other 63 get
    few levels. A clipped peak costs little where its channel of the data is small, and much where
    it is large, so only the outputs can tell::

        W[:, n] in blocks      |  ........#  |  ..#......  |        # peak, . other weights
        scale = peak / 8       |  1.00       |  0.70       |        shares of the peak that are best

    Blocks of a column are searched one after the other, each with the errors of the others before
    its eyes: the output's error is the sum of theirs, so a block can make up for what another one
    did. Each block tries some shares of its range, takes the best, then the scale at which its
    integers fit best (least squares); in later sweeps it looks for better ones nearby. All of it
    needs of the data but its Gram matrix, see :func:`clipping.gram`. insert-qdq takes the integers
    as they are. With a cache folder in the context, what is found is kept, and an interrupted run
    goes on from there.

    Attributes:
        sweeps: how often each block is visited.

    Source: Lin et al. 2023, "AWQ", whose code searches each block's range by itself. With blocks
    that see each other, SmolLM2's products lose a sixth less.
    """

    name: ClassVar[str] = "clip-weights"
    version: ClassVar[int] = 1
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})

    sweeps: int = SWEEPS

    def __post_init__(self) -> None:
        check_counts(sweeps=self.sweeps)

    def run(self, model: ir.Model, context: Context) -> bool:
        groups = {
            x: chosen
            for x, sites in product_groups(model, "weight").items()
            if (chosen := [s for s in sites if searchable(s, self, context, "not clipped")])
        }
        if not groups:
            return False

        def clip(x: ir.Value) -> Arrays:
            tokens = capture.tokens(x)
            results = [self._clip(site, tokens, context) for site in groups[x]]
            weights, ratios = zip(*results, strict=True)
            return {**to_arrays(weights), "ratios": np.array(ratios)}

        resumable = Resumable.of(self, model, first_feeds(context), context)
        capture = Capture(model, list(groups), context, TOKENS)
        progress = context.progress(list(groups), "clipping weights", len(groups))
        # Nothing is rewritten before all has been seen: the data is that of the float model.
        clipped: list[tuple[Site, Quantized]] = []
        for x, arrays in resumable.steps(progress, clip):
            ratios = arrays["ratios"].tolist()
            for site, weight, ratio in zip(groups[x], from_arrays(arrays), ratios, strict=True):
                assert weight is not None
                clipped.append((site, weight))
                why = "clipped: the scales of its blocks are those that serve its outputs best"
                self.remark(context, site, "applied", why, noise_ratio=ratio)
        for site, weight in clipped:
            replace_weight(model, site, weight, "clipped")
        remove_dead(model)
        return True

    def _clip(self, site: Site, tokens: Rows, context: Context) -> tuple[Quantized, float]:
        """The rounded weight, and what clipping leaves of the noise."""
        sample = some_columns(columns(site), COLUMNS, context.seed)
        metric = gram(tokens, sample, annotated_weight_spec(site))
        errors = np.zeros(2)

        def search(w: Float, spec: QuantSpec) -> Scales:
            clipped = clipped_scales(w, metric, spec, self.sweeps)
            for i, scales in enumerate((full_range(w, spec), clipped)):
                errors[i] += output_error(rounding_error(w, *scales, spec), metric)
            return clipped

        weight = rounded_site(site, search)
        return weight, errors[1] / errors[0] if errors[0] else 1.0
