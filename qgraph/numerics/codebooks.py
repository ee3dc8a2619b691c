"""Weights of four bits that are places in a table: NF4, FP4, and scales in eight bits.

A block of weights has one scale, its largest magnitude, and each weight the code of the level
nearest to it, of 16 levels between -1 and 1 that need not be evenly spaced. Tables, codes and the
order of operations are those of bitsandbytes, so that what it has quantized means the same here,
bit for bit.

Source: Dettmers et al. 2023, "QLoRA", section 3 and appendix E (NF4, double quantization);
Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2 (the dynamic map).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qgraph.numerics.packing import Codes
from qgraph.numerics.reference import Float
from qgraph.numerics.spec import Codebook

LEVELS: dict[Codebook, Float] = {
    "nf4": np.array(
        [
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
            -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
            0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ],
        np.float32,
    ),
    "fp4": np.array(
        [0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3], np.float32
    ) / np.float32(12),
}  # fmt: skip
"""The level of each code. NF4: quantiles of the normal distribution, with a 0. FP4: sign, two bits
of exponent, one of mantissa; the second 0 is never written."""

SCALES_PER_BLOCK = 256
"""Scales that share a scale in double quantization."""
FACTORS = (1.0, 1.03, 0.97, 0.94, -1.0, -1.03, -0.97, -0.94)
"""Where a block's scale is sought for the least error, in units of its largest magnitude. Clipped
peaks leave finer levels, the levels of NF4 are finer on one side of 0, and always the same side
would shift the outputs."""


STRIP, PLACES = 1 << 16, 2048
"""Weights that are tried together, and how finely the places between 0 and 1 are told apart."""
STEPS = np.float32(127)
"""Levels of an int8 kernel between 0 and 1."""


@functools.cache
def dynamic_map() -> Float:
    """The 256 levels of scales in eight bits, ascending, float32.

    Seven decades, each of the larger ones with twice the levels of the one below, in the middle of
    equal parts of its range from a tenth to the whole; either sign, 0 and 1.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        bounds = _linspace(0.1, 1.0, 2**i + 1)
        middles = np.float32(10.0 ** (i - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2))
        levels += [*middles, *-middles]
    return np.sort(np.array(levels, np.float32))


def _linspace(start: float, end: float, count: int) -> Float:
    """Evenly spaced numbers as torch has them: from the nearer end, by a step in float32, each
    rounded once."""
    step = np.float64((np.float32(end) - np.float32(start)) / np.float32(count - 1))
    index = np.arange(count)
    up, down = np.float32(start) + step * index, np.float32(end) - step * index[::-1]
    return np.where(index < count // 2, up, down).astype(np.float32)


def integer_levels(levels: Float) -> Float:
    """The levels at the nearest 127ths: what a kernel that multiplies int8 makes of them.

    No level moves by more than 0.4 % of its block's largest magnitude.
    """
    rounded: Float = (np.rint(levels * STEPS) / STEPS).astype(np.float32)
    return rounded


def nearest_codes(x: Float, levels: Float) -> Codes:
    """The code of the level nearest to each element; of two equally near ones, the lower level.

    Args:
        x: any shape.
        levels: (count,) in any order, at most 256.
    """
    known, first = np.unique(levels, return_index=True)
    middles = (known[:-1] + known[1:]) / np.float32(2)
    return first.astype(np.uint8)[np.searchsorted(middles, x)]


def codes_at(w: Float, scales: Float, size: int, levels: Float) -> Codes:
    """The nearest codes in blocks of these scales.

    Args:
        w: (N, K).
        scales: float32 (N, blocks), of either sign; a block with scale 0 is 0 throughout.
        size: columns of a block; the last one may be shorter.
        levels: between -1 and 1, one of them 0.

    Returns:
        (N, K); w ≈ levels[codes] · scales.
    """
    codes = _codes(_in_blocks(w, size), scales, levels)
    return codes.reshape(w.shape[0], -1)[:, : w.shape[1]]


def quantize_to_levels(
    w: Float, size: int, levels: Float, factors: Sequence[float] = (1.0,)
) -> tuple[Codes, Float]:
    """Round-to-nearest in blocks, each with a scale of its own.

    Args:
        w, size, levels: as in :func:`codes_at`.
        factors: the scales that are tried, in units of the block's largest magnitude, see
            :func:`best_of`. 1 alone is bitsandbytes'.

    Returns:
        codes (N, K) and scales, float32 (N, blocks).
    """
    largest = np.abs(_in_blocks(w, size)).max(axis=-1)
    tried = np.stack([largest * np.float32(factor) for factor in factors])
    scales = np.choose(best_of(tried, w, size, levels), tried)
    return codes_at(w, scales, size, levels), scales


def best_of(scales: Float, w: Float, size: int, levels: Float) -> NDArray[np.intp]:
    """Which of some scales is the best for each block.

    That is the one of the least squared error, each weighted by the square of its weight: of the
    weights, the largest matter most, and the plain squared error would clip them.

    Args:
        scales: (candidates, N, blocks).
        w, size, levels: as in :func:`codes_at`.

    Returns:
        (N, blocks); the first one where several are as good.
    """
    best = np.zeros(scales.shape[1:], np.intp)
    rows = max(1, STRIP // max(w.shape[1], 1))  # what is tried stays in the CPU's cache
    for start in range(0, len(w) if len(scales) > 1 else 0, rows):
        part = slice(start, start + rows)
        best[part] = _best_of(scales[:, part], _in_blocks(w[part], size), levels)
    return best


def _best_of(scales: Float, blocks: Float, levels: Float) -> NDArray[np.intp]:
    top = np.abs(blocks).max(axis=-1, keepdims=True)
    share = np.divide(blocks, top, where=top > 0, out=np.zeros_like(blocks))
    # Which level is the nearest is looked up: wrong at most where two are nearly as near.
    nearest = levels[nearest_codes(np.linspace(-1, 1, 2 * PLACES + 1, dtype=np.float32), levels)]
    best, least = np.zeros(scales.shape[1:], np.intp), np.full(scales.shape[1:], np.inf)
    for index, tried in enumerate(scales):
        place = _places(blocks, tried)
        place *= PLACES
        np.rint(place, out=place)
        place += PLACES
        off = nearest[place.astype(np.int32)]
        off *= tried[..., np.newaxis]
        off -= blocks
        off *= share
        error = np.einsum("nbk,nbk->nb", off, off)
        best[error < least], least = index, np.minimum(error, least)
    return best


def _in_blocks(w: Float, size: int) -> Float:
    return np.pad(w, [(0, 0), (0, -w.shape[1] % size)]).reshape(w.shape[0], -1, size)


def _codes(blocks: Float, scales: Float, levels: Float) -> Codes:
    return nearest_codes(_places(blocks, scales), levels)


def _places(blocks: Float, scales: Float) -> Float:
    """Where the weights lie between -1 and 1, in units of their block's scale."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales)
    most = np.finfo(np.float32).max
    inverse = np.clip(inverse, -most, most)  # of the tiniest scales
    with np.errstate(over="ignore"):
        places = blocks * inverse[..., np.newaxis]
    return np.clip(places, -1, 1, out=places)


@dataclass(frozen=True, eq=False)
class NestedScales:
    """Scales in eight bits: double quantization.

    Attributes:
        codes: uint8 (count,), the scales of the rows of (N, blocks) one after the other.
        scale: float32 (ceil(count / 256),), one for each 256 of them.
        offset: float32 (), added to all.
        table: float32 (256,), the level of each code.
    """

    codes: Codes
    scale: Float
    offset: np.float32
    table: Float

    def float(self) -> Float:
        """What they stand for: float32 (count,)."""
        steps = np.repeat(self.scale, SCALES_PER_BLOCK)[: self.codes.size]
        return (self.table[self.codes] * steps + self.offset).astype(np.float32)

    def shifted(self, by: NDArray[np.int64] | int) -> NestedScales:
        """With codes of a level higher or lower, or more; `table` is ascending."""
        shifted = np.clip(self.codes.astype(np.int64) + by, 0, len(self.table) - 1)
        return replace(self, codes=shifted.astype(np.uint8))


def nest_scales(scales: Float) -> NestedScales:
    """Quantize scales: what remains of them without their mean, in blocks, to the dynamic map.

    Args:
        scales: any shape, taken in C order.
    """
    offset = scales.mean(dtype=np.float64).astype(np.float32)
    table = dynamic_map()
    rest = (scales.reshape(1, -1) - offset).astype(np.float32)
    codes, scale = quantize_to_levels(rest, SCALES_PER_BLOCK, table)
    return NestedScales(codes.reshape(-1), scale.reshape(-1), offset, table)
