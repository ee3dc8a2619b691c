"""Why a site cannot be quantized, whatever the recipe wants and the target can."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.graph.ops import FLOATS
from qgraph.graph.reading import array, constant, constant_array, dims, release
from qgraph.graph.sites import Site
from qgraph.numerics.reference import SMALLEST_SCALE
from qgraph.numerics.spec import PerToken, QuantSpec

PER_CHANNEL, INTEGER_PRODUCTS = 13, 10
"""The opsets that brought DequantizeLinear with an axis, and MatMulInteger."""
SMALLEST_SPAN = 256 * float(SMALLEST_SCALE)
"""Magnitudes below this are no matter of one scale and 256 levels."""
LARGEST_SPAN = 1 / SMALLEST_SPAN
"""Squares of magnitudes above this, summed over the channels of a product, overflow float32."""
SMALL_TABLE = 1 << 16
"""A lookup table of fewer bytes is not worth quantizing."""


def too_old(site: Site, activation: QuantSpec | None, version: int) -> str | None:
    """Why a model whose opset could not be raised cannot say it; products of integers are older."""
    by_token = activation is not None and isinstance(activation.granularity, PerToken)
    if version >= PER_CHANNEL or (by_token and site.is_product and version >= INTEGER_PRODUCTS):
        return None
    return f"opset {version} has no scales for channels, and could not become {PER_CHANNEL}"


def infinite_bias(site: Site, activation: QuantSpec | None) -> str | None:
    """Why its bias cannot be an integer, as it is beside data of a fixed scale; None if it can."""
    bias = None if activation is None or activation.dynamic else array(site.bias)
    if bias is None or np.isfinite(bias).all():
        return None
    return "its bias holds infinities or NaN, which no integer stands for"


def unfit(site: Site) -> str | None:
    """Why this site's own shape or dtype rules quantization out, or None."""
    tensor = constant(site.weight)
    if tensor is None:
        return "both operands are computed: it has no weight"
    if tensor.dtype not in FLOATS[:3]:
        return f"its weight is {tensor.dtype.name}, which no integer kernel replaces"
    if site.kind == "gather" and tensor.nbytes < SMALL_TABLE:
        return "its table is too small to matter"
    if site.kind == "gather" and site.axis != 0:
        return "it gathers along an inner axis, where rows do not keep a scale of their own"
    if site.kind != "gather" and not dims(site.weight):
        return "its weight has no shape"
    return _out_of_range(site.weight)


def _out_of_range(weight: ir.Value) -> str | None:
    """Why integers and scales cannot stand for all elements, or None."""
    w = constant_array(weight)
    largest = max(abs(float(w.min())), abs(float(w.max())))
    release(weight)
    if not np.isfinite(largest):  # a table that masks attention
        return "its weight holds infinities or NaN, which no integer stands for"
    if 0 < largest < SMALLEST_SPAN:
        return f"its weights are all below {SMALLEST_SPAN:.1g}, where scales lose their precision"
    if largest > LARGEST_SPAN:
        return f"it has weights above {LARGEST_SPAN:.1g}, where sums of squares overflow"
    return None
