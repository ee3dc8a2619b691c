"""Ranges of weights that lose least in the outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qgraph.numerics.blocks import Scales, block_size, full_range, lowest, rounding_error
from qgraph.numerics.reference import Float, Int
from qgraph.numerics.spec import QuantSpec

DAMPING = 0.5
"""The diagonal of the Gram matrix grows by this share of itself: in so few tokens, a part of how
channels go together is accidental."""
RATIOS = tuple(np.linspace(1, 0.6, 9).tolist())
"""Shares of a block's range that are tried first."""
NEARBY = (1.0, 0.98, 1.02, 0.95, 1.05)
"""What a scale is multiplied by afterwards, once the scales of other blocks are known."""
SWEEPS = 3
"""How often each block is visited."""


def output_error(off: Float, metric: Float) -> float:
    """Δᵀ · metric · Δ, summed over columns, for an error Δ of the weights."""
    return float(np.einsum("kn,kn->", off, metric @ off))


def gram(x: NDArray[Any], w: Float, spec: QuantSpec) -> Float:
    """The matrix G for which ΔᵀGΔ says how much an error Δ of the weights harms the outputs.

    That is XᵀX with a weight for each token. Unweighted, a language model's first token may own
    all of it; with each output at unit power, it would count no more than any other, though
    attention leans on it everywhere. :func:`noise.relative_noise` is the geometric mean of the
    noise in these two views, so a small step lowers it as it lowers their sum, each view in units
    of the noise that rounding to nearest leaves in it. (GPTQ and distillation give each token unit
    power of the *data*, which needs no weight and serves all products that read it.)

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
    is least at s = vᵀ(G_bb w - p) / vᵀG_bb v. (Not :func:`reference.search_clipping`: what a scale
    costs depends on the other blocks, so each block's candidates meet its errors at once.)

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
            problem = Subproblem(w[rows], own, metric[rows] @ off - own @ off[rows], spec)
            best = problem.best(*_candidates(scale[b], zero[b], sweep, spec))
            scale[b], zero[b], off[rows] = problem.best(*problem.refitted(*best))
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
class Subproblem:
    """The search for the scale of one block, while all others stay as they are.

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
        goal = (slope * self.w).sum(axis=0) - (values * self.pull).sum(axis=0)
        factor = np.divide(goal, curvature, where=curvature > 0, out=np.ones_like(goal))
        other = np.where(factor > 0.5, scale * factor, scale).astype(np.float32)
        return np.stack([scale, other]), np.stack([zero, zero])
