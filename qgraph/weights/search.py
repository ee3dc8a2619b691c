"""Weights in blocks whose scales and zero points are free: what passes that search them share.

A weight is (K, N) here, each column in blocks of some rows; a weight with one scale for each
channel has one block of K rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qgraph.graph.annotation import annotated_weight_spec, data_spec, weight_spec
from qgraph.graph.reading import constant_array, release
from qgraph.graph.sites import Site, reduction_rows
from qgraph.numerics.blocks import Scales, block_size, integers
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.reference import Float
from qgraph.numerics.spec import NUMPY, PerAxis, PerBlock, QuantSpec
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Pass
from qgraph.weights import formats

STRIP = 128
"""Columns that are searched together: what is tried stays in the CPU's cache."""


def fixed_scales(weight: QuantSpec, data: QuantSpec | None) -> str | None:
    """Why the scales of this weight, beside such data, are not free; None if they are."""
    blocks = isinstance(weight.granularity, PerBlock)
    if not formats.of(weight).even:
        return "its levels are not evenly spaced"
    if data is not None and not data.dynamic:
        return "its bias must fit the scale of its data"
    if not blocks and not (isinstance(weight.granularity, PerAxis) and weight.width < 8):
        return "it has 8 bits and a scale for each channel, which lose next to nothing"
    return None


def unsearchable(site: Site) -> str | None:
    """Why a pass cannot choose the scales of the site's weight; None if it can."""
    weight = weight_spec(site)
    if weight is None:
        return "its weight stays float"
    if len(site.weight.uses()) > 1:
        return "others read its weight too, and need it as it is"
    return fixed_scales(weight, data_spec(site))


def searchable(site: Site, asking: Pass, context: Context, otherwise: str) -> bool:
    """Whether the scales of its weight are free; where not, `asking` remarks why, after what it
    says of such a site, `otherwise`."""
    why = unsearchable(site)
    if why is not None:
        asking.remark(context, site, "declined", f"{otherwise}: {why}")
    return why is None


def unroundable(site: Site, specs: Mapping[int, QuantSpec], context: Context) -> str | None:
    """Why a pass cannot choose the integers of the site's weight; None if it can."""
    data, weight = specs.get(site.x_index), specs[site.w_index]
    if len(site.weight.uses()) > 1:
        return "others read its weight too"
    if site.x.dtype == ir.DataType.BFLOAT16:
        return "its data is bfloat16, which numpy does not know"
    if not formats.of(weight).even:
        return "its weight does not become integers at even distances"
    per_column = data is not None and not isinstance(data.granularity, PerBlock)
    if context.target.saturates and weight.width == 8 and per_column:
        return "its kernel adds pairs of products in 16 bits, and these fit"
    return None


def columns(site: Site) -> Float:
    """The site's weight as (K, N), a view. Reads it: see :func:`qgraph.graph.reading.release`."""
    weight = constant_array(site.weight)
    return reduction_rows(weight, site)


def some_columns(w: Float, count: int, seed: int) -> Float:
    """Not more than `count` columns, picked at random; a copy."""
    if w.shape[1] <= count:
        return np.array(w, np.float32)
    chosen = np.random.default_rng(seed).choice(w.shape[1], count, replace=False)
    return np.array(w[:, np.sort(chosen)], np.float32)


def rounded_site(site: Site, search: Callable[[Float, QuantSpec], Scales]) -> Quantized:
    """The site's weight, rounded with the scales that `search` finds for some of its columns."""
    spec = annotated_weight_spec(site)
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
