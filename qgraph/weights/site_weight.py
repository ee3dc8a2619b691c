"""The integers that a site's weight becomes: rounding, bias overflow and saturation together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qgraph.errors import PipelineError
from qgraph.graph.annotation import (
    annotated_weight_spec,
    calibrated_stats,
    data_spec,
    integers_of,
    is_annotated,
    known_static_spec,
    set_integers,
    static_spec,
    stats_of,
    trained_scale,
    weight_spec,
)
from qgraph.graph.editing import add_constant, computed
from qgraph.graph.ops import MOVES
from qgraph.graph.reading import (
    array,
    attribute,
    constant_array,
    constant_tensor,
    dims,
    is_op,
)
from qgraph.graph.sites import Site, reduction_rows, site_of
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.reference import quantize, scale_zero_point, weight_scale_for_bias
from qgraph.numerics.saturation import can_saturate, quantize_unsaturated
from qgraph.numerics.spec import NIBBLES, NUMPY, PerBlock, PerTensor, QuantSpec
from qgraph.numerics.stats import find_range
from qgraph.weights import formats
from qgraph.weights.formats.linear import CHUNK_BYTES


def replace_weight(model: ir.Model, site: Site, integers: Quantized, word: str) -> None:
    """Make the site read the float values of these integers, computed when they are read, and
    `insert-qdq` write the integers as they are.

    Args:
        word: what was done to the weight, part of its new name.
    """
    tensor, spec = constant_tensor(site.weight), annotated_weight_spec(site)
    values = computed(integers.float, tensor.dtype, tensor.shape.numpy())
    new = add_constant(model, f"{site.weight.name}_{word}", values)
    set_integers(new, spec, integers)
    site.node.replace_input_with(site.w_index, new)


def activation_scale(value: ir.Value) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of a value with a fixed-scale spec, its own or a user's.

    What only moves data keeps the scale of its source, so that it can move the integers instead.

    Raises:
        PipelineError: the value has no statistics, or its integers are none of 8 bits.
    """
    spec, stats, producer = known_static_spec(value), stats_of(value), value.producer()
    if is_op(producer, *MOVES) and is_annotated(producer):
        source = producer.inputs[0]
        if source is not None and static_spec(source) == spec:
            return activation_scale(source)
    trained = trained_scale(value)
    if trained is not None:
        return trained
    if stats is None or not stats.count:
        raise PipelineError(
            f"'{value.name}' is to be quantized statically but was not calibrated: "
            "put insert-observers,calibrate before insert-qdq"
        )
    whole = isinstance(spec.granularity, PerTensor) and spec.dtype not in NIBBLES
    if not whole or spec.dtype not in NUMPY:
        raise formats.unwritable(spec)
    low, high = find_range(stats, spec)
    return scale_zero_point(np.float32(low), np.float32(high), spec)


def quantize_site(site: Site, spec: QuantSpec, saturates: bool) -> Quantized:
    """The site's weight in integers, ready for the kernels it will meet.

    Args:
        spec: of the weight.
        saturates: u8·s8 products are added in pairs in int16, see `Target.saturates`.

    Raises:
        PipelineError: the spec cannot be written, or the data is not calibrated.
    """
    rounded, data, form = integers_of(site.weight), data_spec(site), formats.of(spec)
    if rounded is not None and rounded[0] == spec:
        return form.beside(rounded[1], data)
    w = constant_array(site.weight)
    if isinstance(spec.granularity, PerBlock) and w.ndim != 2:
        raise formats.unwritable(spec)
    if form is not formats.LINEAR or data is None:
        return form.beside(form.quantize(w, spec), data)
    # Integers by channel meet biases that must fit, and kernels that saturate: those of all sites
    # that read this weight, which is stored once.
    readers = _readers(site, spec)
    fixed = [(s, *activation_scale(s.x)) for s in readers if _has_fixed_scale(s)]
    floors = [f for s, scale, _ in fixed if (f := _bias_floor(s, scale)) is not None]
    weight = formats.LINEAR.quantize_above(w, spec, np.max(floors, axis=0) if floors else None)
    if not saturates or not _adds_pairs(site, weight.axis, spec):
        return weight
    largest: int | np.ndarray = 255
    if len(fixed) == len(readers):
        tops = [np.asarray(_largest_pairs(*one)) for one in fixed]
        same = len({top.shape for top in tops}) == 1
        largest = np.max(tops, axis=0) if same else int(max(top.max() for top in tops))
    return replace(weight, repaired=unsaturated(w, weight.q, weight.scale, site, largest))


def _readers(site: Site, spec: QuantSpec) -> list[Site]:
    """The sites that multiply this weight, quantized like this, by data in integers."""
    users = [s for use in site.weight.uses() if (s := site_of(use.node)) is not None]
    alike = [s for s in users if s.weight is site.weight and weight_spec(s) == spec]
    return [site, *(s for s in alike if s.node is not site.node and data_spec(s) is not None)]


def _has_fixed_scale(site: Site) -> bool:
    data = data_spec(site)
    return data is not None and not data.dynamic


def _largest_pairs(site: Site, scale: np.ndarray, zero: np.ndarray) -> int | np.ndarray:
    """The largest integer that either activation of each pair takes in calibration: (K // 2, 1)."""
    stats, spec = calibrated_stats(site.x), known_static_spec(site.x)
    tops = stats.channel_high if stats.channel_high is not None else np.asarray(stats.high)
    largest = quantize(tops.astype(np.float32), scale, zero, spec.qmin, spec.qmax)
    largest = np.maximum(largest, zero)  # where a convolution pads, whatever the channel holds
    k = site.kn[0]
    if not largest.ndim or k % largest.size or attribute(site.node, "group", 1) != 1:
        return int(largest.max())  # of several groups, an output meets only some of the channels
    largest = np.tile(largest, k // largest.size)
    even = k // 2 * 2
    return np.asarray(np.maximum(largest[0:even:2], largest[1:even:2])[:, np.newaxis])


def _adds_pairs(site: Site, axis: int | None, spec: QuantSpec) -> bool:
    """Whether x86 kernels add this site's products in pairs, and 8-bit weights fill the pair."""
    if spec.width < 8 or axis is None or not spec.symmetric:
        return False
    depthwise = site.kind == "conv" and dims(site.weight)[1] == 1
    return (site.is_product or site.kind == "conv") and not depthwise


def unsaturated(
    w: np.ndarray, q: np.ndarray, scale: np.ndarray, site: Site, largest: int | np.ndarray
) -> int:
    """Requantize in place the channels of `q` in which u8·s8 pairs can overflow int16.

    Args:
        w: float weight; `q`, `scale`: as :func:`quantize_in_slices` gave them, int8 per channel.
        largest: largest unsigned activation that can occur, one or for each pair (K // 2, 1).

    Returns:
        how many channels were changed.
    """
    rows, floats = reduction_rows(q, site), reduction_rows(w, site)
    changed = 0
    step = max(1, CHUNK_BYTES // (4 * max(rows.shape[0], 1)))
    for start in range(0, rows.shape[1], step):
        part = slice(start, start + step)
        bad = (
            np.flatnonzero(can_saturate(rows[:, part].astype(np.int32), largest).any(axis=0))
            + start
        )
        if not bad.size:
            continue
        changed += bad.size
        piece = np.asarray(floats[:, bad], np.float32)
        rows[:, bad], scale[bad] = quantize_unsaturated(piece, scale[bad], largest)
    if changed and site.kind == "conv":
        shape = (*q.shape[2:], q.shape[1], q.shape[0])
        q[...] = rows.reshape(shape).transpose(q.ndim - 1, q.ndim - 2, *range(q.ndim - 2))
    return changed


def constant_bias(site: Site) -> np.ndarray | None:
    """The bias that an integer Conv or Gemm can add, float32 (N,), or None."""
    bias, n = array(site.bias), site.kn[1]
    if bias is None or site.kind not in ("conv", "gemm"):
        return None
    if attribute(site.node, "alpha", 1.0) != 1.0 or attribute(site.node, "beta", 1.0) != 1.0:
        return None
    if bias.size not in (1, n) or bias.shape not in ((), (bias.size,), (1, bias.size)):
        return None
    return np.array(np.broadcast_to(bias.reshape(-1), n), np.float32)


def _bias_floor(site: Site, x_scale: np.ndarray) -> np.ndarray | None:
    """The smallest weight scales at which the site's bias fits int32; None without such a bias."""
    bias = constant_bias(site)
    if bias is None:
        return None
    return weight_scale_for_bias(np.zeros(bias.size, np.float32), x_scale, bias)
