"""Weights in blocks whose scales and zero points are free: what passes that search them share.

A weight is (K, N) here, each column in blocks of some rows; a weight with one scale for each
channel has one block of K rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.analysis import Site
from qgraph.annotation import IN
from qgraph.context import Context
from qgraph.graph import array, release
from qgraph.numerics import (
    Int,
    blockwise,
    dequantize,
    group_qmin,
    group_scales,
    quantize,
    scale_zero_point,
)
from qgraph.spec import FLOAT8, PerAxis, PerBlock, QuantSpec
from qgraph.weights import NUMPY, Quantized, reduction_rows

Float = NDArray[np.float32]
Scales = tuple[Float, Int]
"""Scale (float32) and zero point (int32) of each block, (blocks, N)."""
STRIP = 128
"""Columns that are searched together: what is tried stays in the CPU's cache."""
_INTEGERS = (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.UINT8)


def fixed_scales(weight: QuantSpec, data: QuantSpec | None) -> str | None:
    """Why the scales of this weight, beside such data, are not free; None if they are."""
    blocks = isinstance(weight.granularity, PerBlock)
    if weight.codebook or weight.dtype not in _INTEGERS:
        return "its levels are not evenly spaced"
    if data is not None and data.observer != "dynamic":
        return "its bias must fit the scale of its data"
    if not blocks and not (isinstance(weight.granularity, PerAxis) and weight.width < 8):
        return "it has 8 bits and a scale for each channel, which lose next to nothing"
    return None


def unsearchable(site: Site) -> str | None:
    """Why a pass cannot choose the scales of the site's weight; None if it can."""
    specs: dict[int, QuantSpec] = site.node.meta.get(IN, {})
    if site.w_index not in specs:
        return "its weight stays float"
    if len(site.weight.uses()) > 1:
        return "others read its weight too, and need it as it is"
    return fixed_scales(specs[site.w_index], specs.get(site.x_index))


def unroundable(site: Site, specs: Mapping[int, QuantSpec], context: Context) -> str | None:
    """Why a pass cannot choose the integers of the site's weight; None if it can."""
    data, weight = specs.get(site.x_index), specs[site.w_index]
    if len(site.weight.uses()) > 1:
        return "others read its weight too"
    if site.x.dtype == ir.DataType.BFLOAT16:
        return "its data is bfloat16, which numpy does not know"
    if weight.codebook or weight.dtype in FLOAT8:
        return "its weight does not become integers at even distances"
    per_column = data is not None and not isinstance(data.granularity, PerBlock)
    if context.target.saturates and weight.width == 8 and per_column:
        return "its kernel adds pairs of products in 16 bits, and these fit"
    return None


def columns(site: Site) -> Float:
    """The site's weight as (K, N), a view. Reads it: see :func:`qgraph.graph.release`."""
    weight = array(site.weight)
    assert weight is not None
    return reduction_rows(weight, site)


def some_columns(w: Float, count: int, seed: int) -> Float:
    """Not more than `count` columns, picked at random; a copy."""
    if w.shape[1] <= count:
        return np.array(w, np.float32)
    chosen = np.random.default_rng(seed).choice(w.shape[1], count, replace=False)
    return np.array(w[:, np.sort(chosen)], np.float32)


def rounded_site(site: Site, search: Callable[[Float, QuantSpec], Scales]) -> Quantized:
    """The site's weight, rounded with the scales that `search` finds for some of its columns."""
    spec: QuantSpec = site.node.meta[IN][site.w_index]
    w = columns(site)
    q = np.empty(w.shape, NUMPY[spec.dtype])
    scale = np.empty((-(-len(w) // block_size(spec, len(w))), w.shape[1]), np.float32)
    zero = np.empty(scale.shape, np.int32)
    for start in range(0, w.shape[1], STRIP):
        part = (slice(None), slice(start, start + STRIP))
        strip = np.ascontiguousarray(w[part], np.float32)
        scale[part], zero[part] = search(strip, spec)
        q[part] = integers(strip, scale[part], zero[part], spec)
    release(site.weight)
    if site.axis == 0:
        q, scale, zero = (np.ascontiguousarray(a.T) for a in (q, scale, zero))
    if isinstance(spec.granularity, PerBlock):
        return Quantized(q, scale, zero, 1 - site.axis, block=spec.granularity.size)
    return Quantized(q, scale.ravel(), zero.ravel(), site.axis)


def block_size(spec: QuantSpec, k: int) -> int:
    """Rows that share a scale: all `k` of them where each channel has one."""
    return spec.granularity.size if isinstance(spec.granularity, PerBlock) else k


def block_sums(values: NDArray[np.float32], spec: QuantSpec) -> Float:
    """Sums over the rows of each block, (blocks, N)."""
    starts = np.arange(0, len(values), block_size(spec, len(values)))
    return np.add.reduceat(values, starts, axis=0)


def spread(values: Scales, spec: QuantSpec, k: int) -> Scales:
    """What blocks have, for each of their rows: (k, N)."""
    size = block_size(spec, k)
    return blockwise(values[0], size, k), blockwise(values[1], size, k)


def lowest(spec: QuantSpec) -> int:
    """The lowest integer: in blocks the dtype's own."""
    return group_qmin(spec) if isinstance(spec.granularity, PerBlock) else spec.qmin


def full_range(w: Float, spec: QuantSpec) -> Scales:
    """The scales at which no weight is clipped: those of rounding to nearest."""
    starts = np.arange(0, len(w), block_size(spec, len(w)))
    low, high = np.minimum.reduceat(w, starts, axis=0), np.maximum.reduceat(w, starts, axis=0)
    own = isinstance(spec.granularity, PerBlock)
    return group_scales(low, high, spec) if own else scale_zero_point(low, high, spec)


def integers(w: Float, scale: Float, zero: Int, spec: QuantSpec) -> Int:
    """w rounded with these scales, int32 (K, N)."""
    wide = spread((scale, zero), spec, len(w))
    return quantize(w, *wide, lowest(spec), spec.qmax)


def rounding_error(w: Float, scale: Float, zero: Int, spec: QuantSpec) -> Float:
    """What that rounding adds to w."""
    wide = spread((scale, zero), spec, len(w))
    return dequantize(quantize(w, *wide, lowest(spec), spec.qmax), *wide) - w
