"""AWQ's second half: the scale of each block of a weight, searched by the error of the outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.analysis import Site
from qgraph.annotation import IN, product_groups
from qgraph.block_scales import (
    Float,
    Scales,
    block_size,
    columns,
    full_range,
    lowest,
    rounded_site,
    rounding_error,
    some_columns,
    unsearchable,
)
from qgraph.capture import Rows, captured, first_feeds
from qgraph.context import Context
from qgraph.errors import QGraphError
from qgraph.graph import remove_dead
from qgraph.numerics import Int
from qgraph.pass_manager import Contract, Pass, Stage
from qgraph.resumable import from_arrays, kept_for, to_arrays
from qgraph.spec import QuantSpec
from qgraph.weights import Quantized, replace_weight

TOKENS = 2048
"""About so many tokens are captured of each product's data."""
COLUMNS = 256
"""Outputs, picked at random, by which the weight of a token is found."""
DAMPING = 0.5
"""The diagonal of the Gram matrix grows by this share of itself: in so few tokens, a part of how
channels go together is accidental."""
RATIOS = tuple(np.linspace(1, 0.6, 9).tolist())
"""Shares of a block's range that are tried first."""
NEARBY = (1.0, 0.98, 1.02, 0.95, 1.05)
"""What a scale is multiplied by afterwards, once the scales of other blocks are known."""
SWEEPS = 3
"""How often each block is visited."""


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
    needs of the data but its Gram matrix, see :func:`gram`. insert-qdq takes the integers as they
    are. With a cache folder in the context, what is found is kept, and an interrupted run goes on
    from there.

    Attributes:
        sweeps: how often each block is visited.

    Source: Lin et al. 2023, "AWQ", whose code searches each block's range by itself. With blocks
    that see each other, SmolLM2's products lose a sixth less.
    """

    name: ClassVar[str] = "clip-weights"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})

    sweeps: int = SWEEPS

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise QGraphError(f"sweeps={self.sweeps} is out of range: use 1 or more")

    def run(self, model: ir.Model, context: Context) -> bool:
        groups = {
            x: chosen
            for x, sites in product_groups(model, "weight").items()
            if (chosen := [site for site in sites if self._fits(site, context)])
        }
        if not groups:
            return False
        # Nothing is rewritten before all has been seen: the data is that of the float model.
        kept = kept_for(self, self.name, model, first_feeds(context), context)
        clipped: list[tuple[Site, Quantized]] = []
        work = captured(model, list(groups), context, TOKENS)
        for step, (x, tokens) in enumerate(context.progress(work, "clipping weights", len(groups))):
            found = kept.result(step)
            if found is None:
                results = [self._clip(site, tokens, context) for site in groups[x]]
                weights, ratios = zip(*results, strict=True)
                found = {**to_arrays(weights), "ratios": np.array(ratios)}
                kept.keep_result(step, found)
            for site, weight, ratio in zip(
                groups[x], from_arrays(found), found["ratios"].tolist(), strict=True
            ):
                assert weight is not None
                clipped.append((site, weight))
                why = "clipped: the scales of its blocks are those that serve its outputs best"
                op = site.node.op_type
                context.remark("applied", self.name, site.name, op, why, noise_ratio=ratio)
        kept.finish(self.name, context)
        for site, weight in clipped:
            replace_weight(model, site, weight, "clipped")
        remove_dead(model)
        return True

    def _fits(self, site: Site, context: Context) -> bool:
        why = unsearchable(site)
        if why is not None:
            op, message = site.node.op_type, f"not clipped: {why}"
            context.remark("declined", self.name, site.name, op, message)
        return why is None

    def _clip(self, site: Site, tokens: Rows, context: Context) -> tuple[Quantized, float]:
        """The rounded weight, and what clipping leaves of the noise."""
        sample = some_columns(columns(site), COLUMNS, context.seed)
        metric = gram(tokens, sample, site.node.meta[IN][site.w_index])
        errors = np.zeros(2)

        def search(w: Float, spec: QuantSpec) -> Scales:
            found = clipped_scales(w, metric, spec, self.sweeps)
            for i, scales in enumerate((full_range(w, spec), found)):
                errors[i] += output_error(rounding_error(w, *scales, spec), metric)
            return found

        weight = rounded_site(site, search)
        return weight, errors[1] / errors[0] if errors[0] else 1.0


# --------------------------------------------------------------------------------- the mathematics


def output_error(off: Float, metric: Float) -> float:
    """Δᵀ · metric · Δ, summed over columns, for an error Δ of the weights."""
    return float(np.einsum("kn,kn->", off, metric @ off))


def gram(x: NDArray[Any], w: Float, spec: QuantSpec) -> Float:
    """The matrix G for which ΔᵀGΔ says how much an error Δ of the weights harms the outputs.

    That is XᵀX with a weight for each token. Unweighted, a language model's first token may own
    all of it; with each output at unit power, it would count no more than any other, though
    attention leans on it everywhere. :func:`simulation.relative_noise` is the geometric mean of the
    noise in these two views, so a small step lowers it as it lowers their sum, each view in units
    of the noise that rounding to nearest leaves in it.

    Args:
        x: data, (tokens, K).
        w: the weight, or some of its columns, (K, N).
        spec: of the weight.

    Returns:
        float32 (K, K), the diagonal a little larger, see `DAMPING`.
    """
    x = np.asarray(x, np.float32)
    power = np.square(x @ w, dtype=np.float64).sum(axis=1)
    noise = np.square(x @ rounding_error(w, *full_range(w, spec), spec), dtype=np.float64).sum(1)
    even = np.divide(1.0, power, where=power > 0, out=np.zeros_like(power))
    counts = even / ((even * noise).sum() or 1.0) + 1.0 / (noise.sum() or 1.0)
    rows = (x * np.sqrt(counts)[:, np.newaxis]).astype(np.float32)
    metric: Float = rows.T @ rows
    metric[np.diag_indices_from(metric)] *= np.float32(1 + DAMPING)
    return metric


def clipped_scales(w: Float, metric: Float, spec: QuantSpec, sweeps: int = SWEEPS) -> Scales:
    """Scales and zero points of blocks that make Δᵀ · G · Δ of each column small.

    With the errors of the other blocks fixed, the error Δ of block b costs ΔᵀG_bbΔ + 2Δᵀp, where
    p = Σ G_bc Δ_c over the others. Where Δ = s · v - w with integers v, zero point subtracted, that
    is least at s = vᵀ(G_bb w - p) / vᵀG_bb v.

    Args:
        w: float32 (K, N).
        metric: G, float32 (K, K), see :func:`gram`.
        spec: size of the blocks, integer range and symmetry.
        sweeps: how often each block is visited.

    Returns:
        scale (float32) and zero point (int32), (blocks, N). No column's error is larger than that
        of the full range.
    """
    scale, zero = full_range(w, spec)
    off = rounding_error(w, scale, zero, spec)
    size = block_size(spec, len(w))
    for sweep in range(sweeps):
        for b, start in enumerate(range(0, len(w), size)):
            rows = slice(start, start + size)
            own = metric[rows, rows]
            block = Block(w[rows], own, metric[rows] @ off - own @ off[rows], spec)
            best = block.best(*_candidates(scale[b], zero[b], sweep, spec))
            scale[b], zero[b], off[rows] = block.best(*block.refitted(*best))
    return scale, zero


def _candidates(scale: Float, zero: Int, sweep: int, spec: QuantSpec) -> Scales:
    """What is tried for a block in place of this scale and zero point, (candidates, N)."""
    ratios = np.array(NEARBY if sweep else RATIOS, np.float32)
    shifts = np.zeros(len(ratios), np.int32)
    if sweep and not spec.symmetric:
        ratios, shifts = np.append(ratios, [1, 1]), np.append(shifts, [-1, 1])
    zeros = np.clip(zero + shifts[:, np.newaxis], lowest(spec), spec.qmax)
    return (scale * ratios[:, np.newaxis]).astype(np.float32), zeros.astype(np.int32)


@dataclass(frozen=True, eq=False)
class Block:
    """One block of some columns, while all others stay as they are.

    Attributes:
        w: float32 (size, N).
        own: G_bb, (size, size).
        pull: p, (size, N).
        spec: of the weight.
    """

    w: Float
    own: Float
    pull: Float
    spec: QuantSpec

    def best(self, scales: Float, zeros: Int) -> tuple[Float, Int, Float]:
        """For each column, the candidate of least cost: scale, zero point, error (size, N)."""
        low, high = (
            (end - zeros[:, np.newaxis]).astype(np.float32)
            for end in (lowest(self.spec), self.spec.qmax)
        )
        off = self.w / scales[:, np.newaxis]
        np.clip(np.rint(off, out=off), low, high, out=off)
        off *= scales[:, np.newaxis]
        off -= self.w
        slope = self.own @ off
        slope += 2 * self.pull
        least = np.einsum("ckn,ckn->cn", off, slope).argmin(axis=0)
        columns = np.arange(len(least))
        return scales[least, columns], zeros[least, columns], off[least, :, columns].T

    def refitted(self, scale: Float, zero: Int, off: Float) -> Scales:
        """That, and the scale at which its integers fit best, (2, N)."""
        values = off + self.w
        slope = self.own @ values
        curvature = (values * slope).sum(axis=0)
        wanted = (slope * self.w).sum(axis=0) - (values * self.pull).sum(axis=0)
        factor = np.divide(wanted, curvature, where=curvature > 0, out=np.ones_like(wanted))
        other = np.where(factor > 0.5, scale * factor, scale).astype(np.float32)
        return np.stack([scale, other]), np.stack([zero, zero])
