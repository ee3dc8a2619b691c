"""GPTQ's mathematics: rounding in which weights make up for each other's errors on real data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qgraph.numerics.blocks import group_qmin, group_scales
from qgraph.numerics.noise import unit_power
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.spec import QuantSpec

Matrix = NDArray[np.floating[Any]]
"""float32 or float64."""

ROWS = 2048
"""About so many tokens enter the Gram matrices at a time."""
STRIP = 32
"""Rows of weights whose errors reach all later rows together, in one product of matrices."""
COLUMNS = 2048
"""Columns that are worked on together, so that they stay in the CPU's cache."""
CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Shares of a block's range that are tried."""
CACHED = 128
"""Columns whose candidates are compared together."""
CORRECTION_DAMPING = 1.0
"""Weights move to correct earlier errors only as far as data surely asks for: with a tenth of this,
tokens like those of the calibration gain a little, and others lose as much as they would gain."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What products that share their data have in common.

    Attributes:
        gram: x'ᵀx' of the data, float32 (K, K).
        shift: S, see :func:`correction`.
        root: U, see :func:`inverse_root`, of `gram` in the order of the rows.
        order: in which the rows are rounded.
        importance: of each row, 1 / U[i, i]²: what its squared error costs if rows that come later
            make up for it as well as they can, float32 (K,).
        damping: that U needed.
    """

    gram: NDArray[np.float32]
    shift: NDArray[np.float32]
    root: NDArray[np.float32]
    order: NDArray[np.intp]
    importance: NDArray[np.float32]
    damping: float


@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight that was rounded, and how well.

    Attributes:
        weight: the integers.
        noise, nearest: power of the error in the output, of this weight and of rounding to nearest,
            over the power of the output.
        columns: how many columns stayed rounded to nearest.
        damping: that was needed.
    """

    weight: Quantized
    noise: float
    nearest: float
    columns: int
    damping: float


def problem(gram: Matrix, cross: Matrix, damping: float, act_order: bool) -> Problem | None:
    """Whatever of the work does not depend on the weights; None if there was no data.

    Args:
        gram, cross: see :func:`gram_matrices`.
        damping: see :func:`inverse_root`.
        act_order: rows are rounded in the order of their channels' power, the strongest first.
    """
    power = gram.diagonal()
    if not power.any():
        return None
    order = np.argsort(-power, kind="stable") if act_order else np.arange(len(power))
    root, damping = inverse_root(gram[np.ix_(order, order)], damping)
    shift = correction(gram, cross.astype(np.float32), CORRECTION_DAMPING)
    costs = np.empty(len(power))
    costs[order] = 1 / np.square(root.diagonal())
    matrices = [a.astype(np.float32) for a in (gram, shift, root, costs / costs.mean())]
    gram, shift, root, importance = matrices
    return Problem(gram, shift, root, order, importance, damping)


def round_weight(
    weight: NDArray[Any], axis: int, nearest: Quantized, spec: QuantSpec, problem: Problem
) -> Rounded:
    """A weight rounded by :func:`gptq`, columns that rounding to nearest serves better excepted.

    Blocks get the scales of :func:`fitted_scales`; channels keep theirs.

    Args:
        weight: of the product, (K, N), or (N, K).
        axis: which of them is N.
        nearest: the weight rounded to nearest.
        spec: of the weight.
    """
    low = group_qmin(spec) if nearest.block else spec.qmin
    q, scale, zero = nearest.q.copy(), nearest.scale.copy(), nearest.zero.copy()
    noise = plain = signal = 0.0
    unmoved = 0

    def turned(values: NDArray[Any]) -> NDArray[Any]:
        """(N, K) as (K, N), or back."""
        return values if axis else values.T

    for start in range(0, weight.shape[axis], COLUMNS):
        part = slice(start, start + COLUMNS)
        index = (slice(None), part) if axis else (part, slice(None))
        w, given = np.asarray(turned(weight[index]), np.float32), _columns(nearest, part, axis)
        goal = w + problem.shift @ w
        old = output_power(turned(given.float()) - goal, problem.gram)
        fresh = given
        if nearest.block:
            own = fitted_scales(goal, nearest.block, spec, problem.importance)
            fresh = replace(given, scale=turned(own[0]), zero=turned(own[1]))
        shape = given.q.shape
        steps, zeros = (turned(np.broadcast_to(a, shape)) for a in (fresh.steps(), fresh.zeros()))
        rounded, order = np.empty_like(goal), problem.order
        rounded[order] = gptq(goal[order], steps[order], zeros[order], problem.root, low, spec.qmax)
        new = output_power((rounded - zeros) * steps - goal, problem.gram)
        better = new < old
        choose = better if axis else better[:, np.newaxis]
        q[index] = np.where(choose, turned(rounded).astype(q.dtype), given.q)
        if nearest.block:
            scale[index] = np.where(choose, fresh.scale, given.scale)
            zero[index] = np.where(choose, fresh.zero, given.zero)
        noise += float(np.where(better, new, old).sum())
        plain += float(old.sum())
        signal += float(output_power(goal, problem.gram).sum())
        unmoved += int((~better).sum())
    signal = signal or 1.0
    result = replace(nearest, q=q, scale=scale, zero=zero)
    return Rounded(result, noise / signal, plain / signal, unmoved, problem.damping)


def _columns(weight: Quantized, part: slice, axis: int) -> Quantized:
    """Some output channels of a weight."""

    def cut(values: NDArray[Any]) -> NDArray[Any]:
        if values.ndim < 2:
            return values[part] if values.ndim else values
        return values[:, part] if axis else values[part]

    q, scale, zero = (cut(values) for values in (weight.q, weight.scale, weight.zero))
    return replace(weight, q=q, scale=scale, zero=zero)


def fitted_scales(
    w: NDArray[np.float32], size: int, spec: QuantSpec, importance: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Scale and zero point at which each block loses least by rounding to nearest.

    Ranges are shrunk as far as the error gains by it, and symmetric ones reach one step further on
    either side. (Not :func:`reference.search_clipping`: a range and its mirror image share the
    division and the rounding, which are most of the work.)

    Args:
        w: (K, N).
        size: rows of a block; the last one may be shorter.
        spec: of the weight.
        importance: what the squared error of a row counts, (K,).

    Returns:
        (blocks, N) each.
    """
    blocks, columns = -(-len(w) // size), w.shape[1]
    scale, zero = np.empty((blocks, columns), np.float32), np.empty((blocks, columns), np.int32)
    missing = ((0, blocks * size - len(w)), (0, 0))
    counts = np.pad(importance[:, np.newaxis], missing).reshape(blocks, 1, size)
    starts = np.arange(0, len(w), size)
    for start in range(0, columns, CACHED):
        part = (slice(None), slice(start, start + CACHED))
        piece = np.pad(w[part], missing).reshape(blocks, size, -1)
        low, high = (f.reduceat(w[part], starts, axis=0) for f in (np.minimum, np.maximum))
        least = np.full(low.shape, np.inf, np.float32)
        for ratio in CLIPPING:
            tried, at = group_scales(low * np.float32(ratio), high * np.float32(ratio), spec)
            exact = piece / tried[:, np.newaxis]
            nearest = np.rint(exact)
            bottom, top = ((end - at)[:, np.newaxis] for end in (group_qmin(spec), spec.qmax))
            ranges = ((1, bottom, top), (-1, -top, -bottom))
            for sign, first, last in ranges if spec.symmetric else ranges[:1]:
                off = np.clip(nearest, first, last, dtype=np.float32)
                off -= exact
                off *= off
                error = np.square(tried) * (counts @ off)[:, 0]
                better = error < least
                least = np.where(better, error, least)
                scale[part] = np.where(better, np.float32(sign) * tried, scale[part])
                zero[part] = np.where(better, at, zero[part])
    return scale, zero


def gram_matrices(
    meant: Sequence[np.ndarray], seen: Sequence[np.ndarray], masks: Sequence[np.ndarray | None]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the sum of squared errors over tokens depends on, each token at unit power.

    Of all tokens, which arrive feed by feed, so in float64; and of what is missing in the data,
    x - x', which is all that :func:`correction` needs.

    Args:
        meant, seen: of each feed, data x of the float model and what the rounded one has in its
            place, x', (..., K).
        masks: of each feed, 0 for tokens that do not count; used where its shape is that of x
            without channels.

    Returns:
        x'ᵀx' and x'ᵀ(x - x'), float64 (K, K).
    """
    k = meant[0].shape[-1]
    gram, cross = np.zeros((k, k)), np.zeros((k, k))
    for x, other in _batches(meant, seen, masks):
        even = unit_power(x)
        x *= even
        other *= even
        own = other.T @ other
        gram += own
        cross += other.T @ x - own
    return gram, cross


def _batches(
    meant: Sequence[np.ndarray], seen: Sequence[np.ndarray], masks: Sequence[np.ndarray | None]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Copies of tokens of both, (about :data:`ROWS`, K); small feeds are put together."""
    batch: list[list[np.ndarray]] = [[], []]
    held = 0
    for x, other, mask in zip(meant, seen, masks, strict=True):
        fits = mask is not None and mask.shape == x.shape[:-1] and not mask.all()
        counts = mask != 0 if fits else ...
        for rows, values in zip(batch, (x, other), strict=True):
            rows.append(values[counts].reshape(-1, x.shape[-1]))
        held += len(batch[0][-1])
        if held >= ROWS:
            yield _joined(batch[0]), _joined(batch[1])
            batch, held = [[], []], 0
    if held:
        yield _joined(batch[0]), _joined(batch[1])


def _joined(rows: list[np.ndarray]) -> NDArray[np.float32]:
    return np.concatenate(rows, dtype=np.float32)


def inverse_root(gram: Matrix, damping: float) -> tuple[Matrix, float]:
    """Cholesky factor of the inverse Gram matrix, damped as far as it must be.

    Args:
        gram: float64 (K, K), symmetric, not all 0.
        damping: what is added to the diagonal, in units of its mean; raised tenfold, from 1e-8 on,
            until the matrix is positive definite.

    Returns:
        U, upper triangular with (gram + damping · I)⁻¹ = UᵀU, and the damping.
    """
    mean, identity = gram.diagonal().mean(), np.eye(len(gram))
    while True:
        try:
            # Of the matrix backwards, the lower factor is, backwards, the upper one: G = R Rᵀ.
            damped = (gram + damping * mean * identity)[::-1, ::-1]
            backwards = triangular_inverse(np.linalg.cholesky(damped))
            return np.ascontiguousarray(backwards[::-1, ::-1]), damping
        except np.linalg.LinAlgError:
            damping = max(10 * damping, 1e-8)


def triangular_inverse(lower: Matrix) -> Matrix:
    """The inverse of a lower triangular matrix, by products of matrices, which are fast."""
    if len(lower) <= STRIP:
        return np.tril(np.linalg.inv(lower))
    half = len(lower) // 2
    inverse = np.zeros_like(lower)
    inverse[:half, :half] = triangular_inverse(lower[:half, :half])
    inverse[half:, half:] = triangular_inverse(lower[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ lower[half:, :half] @ inverse[:half, :half]
    return inverse


def correction(gram: Matrix, cross: Matrix, damping: float) -> Matrix:
    """How weights must move so that x'(W + SW) is nearest to xW, for data x' in place of x.

    Args:
        gram, cross: x'ᵀx' and x'ᵀ(x - x'), see :func:`gram_matrices`. `cross` may be float32, and
            halves the time then.
        damping: weight of staying where they are, in units of the mean diagonal of `gram`.

    Returns:
        S = (x'ᵀx' + damping · I)⁻¹ x'ᵀ(x - x'), (K, K).
    """
    root = inverse_root(gram, damping)[0].astype(cross.dtype)
    return root.T @ (root @ cross)


def gptq(w: Matrix, steps: Matrix, zeros: Matrix, root: Matrix, low: int, high: int) -> Matrix:
    """Integers for one row of weights after the other, later rows making up for their errors.

    Args:
        w: float weights, (K, N), in the order in which they are rounded.
        steps, zeros: what one step of each integer is worth, and the integer that stands for 0.
        root: U of :func:`inverse_root`, rows and columns in the same order.
        low, high: range of the integers.

    Returns:
        integers as floats, (K, N).
    """
    w, q = w.copy(), np.empty_like(w)
    for start in range(0, len(w), STRIP):
        end = min(start + STRIP, len(w))
        errors = np.empty_like(w[start:end])
        for i in range(start, end):
            q[i] = np.clip(np.rint(w[i] / steps[i]) + zeros[i], low, high)
            errors[i - start] = (w[i] - (q[i] - zeros[i]) * steps[i]) / root[i, i]
            w[i + 1 : end] -= np.outer(root[i, i + 1 : end], errors[i - start])
        w[end:] -= root[start:end, end:].T @ errors
    return q


def output_power(errors: Matrix, gram: Matrix) -> Matrix:
    """Power of x · errors for each column: the diagonal of eᵀ(xᵀx)e, (N,)."""
    return np.asarray((errors * (gram @ errors)).sum(axis=0))
