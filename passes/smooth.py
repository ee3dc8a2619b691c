"""SmoothQuant: move what makes activations hard to quantize into the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.calibration.capture import Rows, captured
from qgraph.errors import QGraphError
from qgraph.graph.annotation import (
    Stage,
    calibrated_stats,
    data_spec,
    product_groups,
    set_stats,
    weight_spec,
)
from qgraph.graph.editing import add_constant, insert, remove_dead, typed
from qgraph.graph.flow.absorption import Absorption, absorption, divide, merge
from qgraph.graph.flow.scaling import input_peaks, read_elsewhere, scale_inputs, unscalable
from qgraph.graph.ops import lowest_value
from qgraph.graph.reading import constant_array, release
from qgraph.graph.sites import Site
from qgraph.numerics.noise import relative_noise
from qgraph.numerics.reference import Float, along
from qgraph.numerics.tokens import rounded_data
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass
from qgraph.weights.formats import rounded_weight

GRID = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Alphas that a search tries, besides 0."""
NEARLY = 10**0.05
"""A search takes the smallest alpha within half a dB of the least noise: the factors come from the
tokens that they are judged by, and the larger alpha, the worse they serve others."""
COLUMNS = 4096
"""Of wider products, a search looks at so many outputs, picked at random."""
FAINT = 0.01
"""Channels are taken to reach at least this share of the median channel: one that was silent in
calibration must not be amplified without bound."""
LARGEST = 2.0**40
"""Factors stay within this and its inverse, far from where float32 ends."""
WORTH_A_MUL = 2.0
"""A Mul is inserted, where no constant absorbs the factors, if it divides the noise by this."""


@dataclass(frozen=True)
class Smooth(Pass):
    """Divide large activation channels by a factor that their weights take.

    The problem: all channels of a token share a scale, and a few channels that are always large
    leave the others only a few levels. The weights of these channels are no larger than others, so
    they have room for a part of the magnitude::

        h ── Norm(γ) ── x ─┬─ MatMul(W)      h ── Norm(γ / s) ── x/s ─┬─ MatMul(s · W)
                           └─ MatMul(V)                               └─ MatMul(s · V)

    with s_j = max|x_j|^α / max|w_j|^(1-α) over all readers. The factors go where the graph has room
    for them: norm weights, columns of the product before, also through the gating product of an MLP
    and through attention values (:mod:`qgraph.graph.flow.absorption`). Where there is none, as
    behind a normalization that the residual reads too, a Mul is inserted if that at least halves
    the noise.

    Attributes:
        alpha: share of the magnitude that moves into the weights, 0 to 1. The paper uses 0.5 for
            most models, 0.75 and more for models with stronger outliers; here 0 does nothing.
            `search` finds one for each input: the smallest at which its products, computed for a
            few calibration tokens as they will be quantized, have nearly the least noise.
        insert: whether a Mul may be inserted.

    Source: Xiao et al. 2022, "SmoothQuant", eq. 4.
    """

    name: ClassVar[str] = "smooth"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED, Stage.CALIBRATED})

    alpha: float | Literal["search"] = 0.5
    insert: bool = True

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, int | float)
        if self.alpha != "search" and not (number and 0 <= float(self.alpha) <= 1):
            raise QGraphError(f"alpha={self.alpha} is out of range: use 0 to 1, or search")

    def run(self, model: ir.Model, context: Context) -> bool:
        if self.alpha == 0:
            return False
        groups = {
            x: sites for x, sites in product_groups(model).items() if self._fit(x, sites, context)
        }
        work: Iterable[tuple[ir.Value, Rows | None]] = ((x, None) for x in groups)
        if self.alpha == "search":
            work = captured(model, list(groups), context)
        changed = False
        for x, tokens in context.progress(work, "smoothing", len(groups)):
            changed |= self._smooth(model, x, groups[x], tokens, context)
        if changed:
            remove_dead(model)
        return changed

    def _fit(self, x: ir.Value, sites: list[Site], context: Context) -> bool:
        why = unscalable(x, sites)
        if why is None and any(read_elsewhere(site.weight, sites) for site in sites):
            why = "its weight serves other data too, and would have to be stored once for each"
        if why is not None:
            self.remark(context, sites, "declined", f"not smoothed: {why}")
        return why is None

    def _smooth(
        self,
        model: ir.Model,
        x: ir.Value,
        sites: list[Site],
        tokens: Rows | None,
        context: Context,
    ) -> bool:
        stats = calibrated_stats(x)
        quantized = [site for site in sites if data_spec(site) is not None]
        route = absorption(x, [site.node for site in sites])
        factors, numbers = self._choose(x, quantized, route, tokens, context.seed)
        why = None
        if not numbers["alpha"]:
            why = "no alpha lowers the noise of its products by much"
        elif route is None and not (self.insert and numbers["noise_ratio"] >= WORTH_A_MUL):
            why = "no constant before it can take the factors"
        if why is not None:
            self.remark(context, sites, "declined", f"not smoothed: {why}", **numbers)
            return False
        if route is not None:
            divide(model, route, factors)
            smoothed, where = x, f"the {route.where}"
        else:
            sites = quantized  # others read x as it is
            smoothed, where = _insert(model, sites, factors), "a Mul before it"
        set_stats(smoothed, stats.divided(factors))
        for site in sites:
            scale_inputs(model, site, factors)
        self.remark(context, sites, "applied", f"smoothed: factors went into {where}", **numbers)
        return True

    def _choose(
        self,
        x: ir.Value,
        sites: list[Site],
        route: Absorption | None,
        tokens: Rows | None,
        seed: int,
    ) -> tuple[Float, dict[str, float]]:
        """The factors, and alpha and the noise that it leaves, for remarks."""
        stats = calibrated_stats(x)
        x_peaks, w_peaks = stats.channel_peak, np.maximum.reduce([*map(input_peaks, sites)])
        assert x_peaks is not None
        if route is not None:
            x_peaks, w_peaks = merge(route.ties, x_peaks), merge(route.ties, w_peaks)
        alphas = (0.0, *(GRID if isinstance(self.alpha, str) else (self.alpha,)))
        factors = {alpha: smoothing_factors(x_peaks, w_peaks, alpha) for alpha in alphas}
        if tokens is None:
            noise = {alpha: expected_noise(x_peaks, w_peaks, s) for alpha, s in factors.items()}
            alpha = alphas[-1]
        else:
            noise = _measured_noise(x, sites, tokens, factors, seed)
            alpha = next(a for a in alphas if noise[a] <= NEARLY * min(noise.values()))
        ratio = noise[0.0] / noise[alpha] if noise[alpha] else 1.0
        measured = {} if tokens is None else {"noise": noise[alpha]}
        return factors[alpha], {"alpha": alpha, "noise_ratio": ratio, **measured}


def _insert(model: ir.Model, sites: list[Site], factors: Float) -> ir.Value:
    """x / factors, for these readers of x."""
    x, first = sites[0].x, sites[0].node
    inverse = add_constant(model, f"{x.name}_inverse", (1 / factors).astype(np.float32))
    product = insert(model, first, "Mul", [x, inverse], base=f"{x.name}_smooth")
    smooth = typed(product, x.dtype, x.shape)
    for site in sites:
        site.node.replace_input_with(site.x_index, smooth)
    return smooth


def _measured_noise(
    x: ir.Value,
    sites: list[Site],
    tokens: Rows,
    candidates: Mapping[float, Float],
    seed: int,
) -> dict[float, float]:
    """For each of several factors, the noise of the sites' products, quantized: their mean."""
    stats = calibrated_stats(x)
    lowest = lowest_value(x)
    noise = dict.fromkeys(candidates, 0.0)
    for site in sites:
        data, weight = data_spec(site), weight_spec(site)
        assert data is not None
        w = _some_outputs(site, seed)
        y = _times(tokens, w, site.axis)
        for alpha, s in candidates.items():
            scaled = stats.divided(s)
            span = None if data.dynamic else (scaled.low, scaled.high)
            bound = lowest if not lowest or not alpha else None  # a Mul keeps no bound below 0
            x_q, w_s = rounded_data(tokens / s, data, span, bound), w * along(s, 1 - site.axis, 2)
            w_q = w_s if weight is None else rounded_weight(w_s, weight)
            noise[alpha] += relative_noise(y, _times(x_q, w_q, site.axis)) / len(sites)
    return noise


def _times(x: Float, w: Float, axis: int) -> Float:
    """x · w for a weight whose outputs lie along `axis`."""
    return x @ (w if axis == 1 else w.T)


def _some_outputs(site: Site, seed: int) -> Float:
    """The weights of all outputs, or of some of them picked at random."""
    w, count = constant_array(site.weight), site.kn[1]
    if count > COLUMNS:
        chosen = np.random.default_rng(seed).choice(count, COLUMNS, replace=False)
        w = w.take(np.sort(chosen), site.axis)
    copy = np.array(w, np.float32)
    release(site.weight)
    return copy


def smoothing_factors(activations: NDArray[Any], weights: NDArray[Any], alpha: float) -> Float:
    """s_j = max|x_j|^α / max|w_j|^(1-α), by which x is divided and w multiplied (eq. 4).

    Args:
        activations: (K,), largest magnitude of each input channel.
        weights: (K,), largest magnitude of the weights that it meets.
        alpha: 0 to 1; ones for 0, where the formula would move the weights' magnitude into x.

    Returns:
        (K,), > 0; very large for channels without weights, which nobody misses.
    """
    x, w = np.asarray(activations, np.float64), np.asarray(weights, np.float64)
    if not (alpha and x.any() and w.any()):
        return np.ones(x.shape, np.float32)
    x = np.maximum(x, FAINT * np.median(x[x > 0]))
    with np.errstate(divide="ignore"):
        s = x**alpha / w ** (1 - alpha)
    return np.clip(s, 1 / LARGEST, LARGEST).astype(np.float32)


def expected_noise(
    activations: NDArray[Any], weights: NDArray[Any], factors: NDArray[Any]
) -> float:
    """Estimated power of the activations' quantization noise in the product, up to a constant.

    One scale serves all channels, so the noise of each is as large as the largest asks for, and
    reaches the product through the channel's weights.

    Args:
        activations, weights: (K,), largest magnitudes, see :func:`smoothing_factors`.
        factors: (K,).
    """
    x, w, s = (np.asarray(a, np.float64) for a in (activations, weights, factors))
    return float(np.square((x / s).max(initial=0.0)) * np.square(s * w).sum())
