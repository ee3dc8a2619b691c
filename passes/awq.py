"""AWQ: weights whose channels matter most get finer steps, by factors that the data takes over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.calibration.capture import Capture, Rows, first_feeds
from qgraph.calibration.resume import Resumable
from qgraph.errors import check_counts
from qgraph.graph.annotation import (
    Stage,
    annotated_weight_spec,
    data_spec,
    integers_of,
    product_groups,
    weight_spec,
)
from qgraph.graph.editing import remove_dead
from qgraph.graph.flow.absorption import Absorption, absorption, divide, merge
from qgraph.graph.flow.scaling import read_elsewhere, scale_inputs
from qgraph.graph.reading import constant, release
from qgraph.graph.sites import Site
from qgraph.numerics.blocks import block_size, rounding_error
from qgraph.numerics.quantized import Arrays
from qgraph.numerics.reference import Float
from qgraph.numerics.spec import QuantSpec, with_channels
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass
from qgraph.weights.clipping import clipped_scales, gram, output_error
from qgraph.weights.formats import rounded_weight
from qgraph.weights.search import columns, fixed_scales, some_columns

TOKENS = 1024
"""About so many tokens are captured of each product's data."""
COLUMNS = 96
"""Outputs of a product, picked at random, by which factors are judged."""
HOPELESS = 1.5
"""Where the error is so many times the least, larger alphas are not tried: it only grows."""
FAINT = 0.01
"""Channels are taken to have at least this share of the median channel's magnitude."""


@dataclass(frozen=True)
class AWQ(Pass):
    """Multiply the weights of channels that carry much by a factor, and divide the data by it.

    The problem: an error of a weight harms the outputs as much as its channel of the data is large,
    and all weights of a block have the same step. Multiplied by s, a weight takes more of the range
    of its block, so its error is smaller relative to it; s cancels in the product, and the step of
    the block, which its largest weight sets, hardly grows as long as s is moderate::

        h ── Norm(γ) ── x ─┬─ MatMul(W)      h ── Norm(γ / s) ── x/s ─┬─ MatMul(s · W)
                           └─ MatMul(V)                               └─ MatMul(s · V)

    with s = mean|x|^α, tokens at unit power, normalized to √(max s · min s) = 1; also
    mean|x|^α / mean|w|^(1-α), with |w| relative to the largest of its block, where that is better.
    α is searched: the one at which the products, their weights rounded and clipped as they will be,
    have the least error on calibration tokens; 0 leaves a product as it is. The factors go where
    the graph has room for them, as in :class:`qgraph.passes.smooth.Smooth`; no Mul is inserted.
    With a cache folder in the context, what is found is kept, and an interrupted run goes on there.

    Attributes:
        steps: how many α between 0 and 1 are tried, 0 apart.

    Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization", section 3.2, eq. 4-5.
    """

    name: ClassVar[str] = "awq"
    version: ClassVar[int] = 1
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})

    steps: int = 10

    def __post_init__(self) -> None:
        check_counts(steps=self.steps)

    def run(self, model: ir.Model, context: Context) -> bool:
        routes: dict[ir.Value, Absorption] = {}
        groups = product_groups(model, "weight")
        for x, sites in groups.items():
            route = absorption(x, [site.node for site in sites])
            why = self._obstacle(sites)
            if why is None and route is None:
                why = "no constant before it can take the factors"
            if why is not None:
                self.remark(context, sites, "declined", f"not scaled: {why}")
            elif route is not None:
                routes[x] = route
        if not routes:
            return False

        def search(x: ir.Value) -> Arrays:
            return self._search(groups[x], routes[x], capture.tokens(x), context)

        resumable = Resumable.of(self, model, first_feeds(context), context)
        capture = Capture(model, list(routes), context, TOKENS)
        progress = context.progress(list(routes), "scaling weights", len(routes))
        changed = False
        for x, factors in resumable.steps(progress, search):
            changed |= self._scale(model, groups[x], routes[x], factors, context)
        if changed:
            remove_dead(model)
        return changed

    def _obstacle(self, sites: list[Site]) -> str | None:
        for site in sites:
            tensor = constant(site.weight)
            if tensor is None or tensor.dtype != ir.DataType.FLOAT:
                return "its weight is not float32"
            if integers_of(site.weight) is not None:
                return "its weight has been rounded already"
            if read_elsewhere(site.weight, sites):
                return "its weight serves other data too, and would have to be stored once for each"
        return None

    def _search(
        self, sites: list[Site], route: Absorption, tokens: Rows, context: Context
    ) -> Arrays:
        """The best factors, their alpha, and what they leave of the noise."""
        trials = [_Trial.of(s, tokens, context.seed) for s in sites if weight_spec(s) is not None]
        data = merge(route.ties, data_magnitude(tokens))
        weights = merge(route.ties, np.mean([trial.magnitude() for trial in trials], axis=0))
        best, alpha = np.ones(len(data), np.float32), 0.0
        least = before = sum(trial.error(best) for trial in trials)
        for other in (None, weights):
            for tried in np.linspace(0, 1, self.steps + 1)[1:]:
                factors = awq_factors(data, tried, other)
                error = sum(trial.error(factors) for trial in trials)
                if error < least:
                    best, alpha, least = factors, float(tried), error
                if error > HOPELESS * least:
                    break
        ratio = least / before if before else 1.0
        return {"factors": best, "alpha": np.array(alpha), "ratio": np.array(ratio)}

    def _scale(
        self,
        model: ir.Model,
        sites: list[Site],
        route: Absorption,
        results: Arrays,
        context: Context,
    ) -> bool:
        factors, alpha, ratio = results["factors"], float(results["alpha"]), float(results["ratio"])
        if not alpha:
            self.remark(context, sites, "declined", "not scaled: no alpha lowers its error")
            return False
        divide(model, route, factors)
        for site in sites:
            scale_inputs(model, site, factors)
        message = f"scaled: factors went into the {route.where}"
        self.remark(context, sites, "applied", message, alpha=alpha, noise_ratio=ratio)
        return True


@dataclass(frozen=True, eq=False)
class _Trial:
    """Some outputs of a product, on which factors are tried.

    Attributes:
        w: float32 (K, N).
        metric: what an error of w costs, float32 (K, K), see :func:`clipping.gram`.
        spec: of the weight, its axes those of (K, N).
        data: spec of the data.
    """

    w: Float
    metric: Float
    spec: QuantSpec
    data: QuantSpec | None

    @staticmethod
    def of(site: Site, tokens: Rows, seed: int) -> _Trial:
        spec, data = annotated_weight_spec(site), data_spec(site)
        spec = with_channels(spec, 1)
        w = some_columns(columns(site), COLUMNS, seed)
        release(site.weight)
        return _Trial(w, gram(tokens, w, spec), spec, data)

    def magnitude(self) -> NDArray[np.float64]:
        return weight_magnitude(self.w, self.spec)

    def error(self, factors: Float) -> float:
        """What is lost if x is divided and w multiplied by these."""
        w = self.w * factors[:, np.newaxis]
        metric = self.metric / np.outer(factors, factors)
        if fixed_scales(self.spec, self.data):
            return output_error(rounded_weight(w, self.spec) - w, metric)
        scales = clipped_scales(w, metric, self.spec, sweeps=1)
        return output_error(rounding_error(w, *scales, self.spec), metric)


def data_magnitude(x: NDArray[Any]) -> NDArray[np.float64]:
    """Mean magnitude of each channel, (K,), over tokens at unit power, (tokens, K): a token that
    is thousands of times larger than the others counts like them. Not 0 for silent channels."""
    power = np.square(x, dtype=np.float64).mean(axis=1)
    alive = power > 0
    if not alive.any():
        return np.ones(x.shape[1])
    mean = (np.abs(x[alive]) / np.sqrt(power[alive])[:, np.newaxis]).mean(axis=0)
    return np.asarray(np.maximum(mean, FAINT * np.median(mean[mean > 0])))


def weight_magnitude(w: NDArray[Any], spec: QuantSpec) -> NDArray[np.float64]:
    """Mean magnitude of the weights of each channel, (K,), relative to the largest in their block.

    Args:
        w: (K, N).
        spec: gives the size of blocks.
    """
    size = block_size(spec, len(w))
    largest = np.maximum.reduceat(np.abs(w), np.arange(0, len(w), size), axis=0)
    largest = np.repeat(largest, size, axis=0)[: len(w)]
    relative = np.divide(np.abs(w), largest, where=largest > 0, out=np.zeros(w.shape))
    mean = relative.mean(axis=1)
    return np.asarray(np.maximum(mean, FAINT * (mean.mean() or 1.0)))


def awq_factors(data: NDArray[Any], alpha: float, weights: NDArray[Any] | None = None) -> Float:
    """s = data^α, or data^α / weights^(1-α), divided by √(max s · min s).

    Args:
        data: (K,) > 0, magnitude of each channel of the data.
        alpha: 0 to 1.
        weights: (K,) > 0, magnitude of the weights that each channel meets.

    Returns:
        float32 (K,), > 0.
    """
    s = np.asarray(data, np.float64) ** alpha
    if weights is not None:
        s = s / np.asarray(weights, np.float64) ** (1 - alpha)
    return np.asarray(s / np.sqrt(s.max() * s.min()), np.float32)
