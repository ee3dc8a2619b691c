"""The integers that a site's weight becomes: rounding, bias overflow and saturation together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph.analysis import Site
from qgraph.annotation import IN, MOVES, STATS, static_spec
from qgraph.errors import PipelineError
from qgraph.graph import array, attribute, dims, is_op
from qgraph.numerics import (
    along,
    can_saturate,
    dequantize,
    quantize,
    quantize_unsaturated,
    quantize_weight,
    scale_zero_point,
    weight_scale_for_bias,
)
from qgraph.observers import find_range
from qgraph.spec import Granularity, PerAxis, PerTensor, QuantSpec

CHUNK_BYTES = 16 << 20
"""Weights are quantized in slices of about this size, so that temporaries stay small."""
NUMPY = {ir.DataType.INT8: np.int8, ir.DataType.UINT8: np.uint8}


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight in integers.

    Attributes:
        q: int8 or uint8, shape of the weight.
        scale: float32, 1-D along `axis`, or 0-D.
        zero: zero point, int32, shape of scale.
        axis: output-channel axis, or None for one scale.
        repaired: channels requantized so that no u8·s8 pair can overflow int16.
    """

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    axis: int | None
    repaired: int = 0

    def float(self) -> np.ndarray:
        """What the integers stand for."""
        if self.axis is None:
            return dequantize(self.q, self.scale, self.zero)
        rank = self.q.ndim
        wide = along(self.scale, self.axis, rank), along(self.zero, self.axis, rank)
        return dequantize(self.q, *wide)


def activation_scale(value: ir.Value) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of a value with a fixed-scale spec, its own or a user's.

    What only moves data keeps the scale of its source, so that it can move the integers instead.

    Raises:
        PipelineError: the value has no statistics, or its integers are none of 8 bits.
    """
    spec, stats, producer = static_spec(value), value.meta.get(STATS), value.producer()
    assert spec is not None
    if producer is not None and is_op(producer, *MOVES) and IN in producer.meta:
        source = producer.inputs[0]
        if source is not None and static_spec(source) == spec:
            return activation_scale(source)
    if stats is None or not stats.count:
        raise PipelineError(
            f"'{value.name}' is to be quantized statically but was not calibrated: "
            "put insert-observers,calibrate before insert-qdq"
        )
    low, high = find_range(stats, _writable(spec, PerTensor))
    return scale_zero_point(np.float32(low), np.float32(high), spec)


def _writable(spec: QuantSpec, *kinds: type[Granularity]) -> QuantSpec:
    """`spec`, if insert-qdq can write it."""
    if spec.dtype in NUMPY and isinstance(spec.granularity, kinds):
        return spec
    raise PipelineError(
        f"insert-qdq cannot write '{spec}': weights are int8 or uint8, per-tensor or per-axis, "
        "static activations int8 or uint8, per-tensor"
    )


def quantize_site(site: Site, spec: QuantSpec, saturates: bool) -> Quantized:
    """The site's weight in integers, ready for the kernels it will meet.

    Args:
        spec: of the weight.
        saturates: u8·s8 products are added in pairs in int16, see `Target.saturates`.

    Raises:
        PipelineError: the spec cannot be written, or the data is not calibrated.
    """
    w = array(site.weight)
    assert w is not None
    granularity = _writable(spec, PerTensor, PerAxis).granularity
    axis = granularity.axis if isinstance(granularity, PerAxis) else None
    data: QuantSpec | None = site.node.meta.get(IN, {}).get(site.x_index)
    fixed = activation_scale(site.x) if data is not None and data.observer != "dynamic" else None
    floor = _bias_floor(site, fixed[0]) if fixed is not None else None
    q, scale, zero = quantize_in_slices(w, axis, spec, floor)
    repaired = 0
    if saturates and data is not None and _adds_pairs(site, axis, spec):
        largest = 255 if fixed is None else _largest_pairs(site, *fixed)
        repaired = unsaturated(w, q, scale, site, largest)
    return Quantized(q, scale, zero, axis, repaired)


def _largest_pairs(site: Site, scale: np.ndarray, zero: np.ndarray) -> int | np.ndarray:
    """The largest integer that either activation of each pair takes in calibration: (K // 2, 1)."""
    stats, spec = site.x.meta[STATS], static_spec(site.x)
    assert spec is not None
    tops = stats.channel_high if stats.channel_high is not None else np.asarray(stats.high)
    largest = quantize(tops.astype(np.float32), scale, zero, spec.qmin, spec.qmax)
    largest = np.maximum(largest, zero)  # where a convolution pads, whatever the channel holds
    k = site.kn[0]
    if not largest.ndim or k % largest.size or attribute(site.node, "group", 1) != 1:
        return int(largest.max())  # of several groups, an output meets only some of the channels
    largest = np.tile(largest, k // largest.size)
    even = k // 2 * 2
    return np.asarray(np.maximum(largest[0:even:2], largest[1:even:2])[:, np.newaxis])


def quantize_in_slices(
    w: np.ndarray, axis: int | None, spec: QuantSpec, floor: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Round-to-nearest of a weight of any size, holding little more than the result.

    Args:
        w: float weight, memory-mapped or not.
        axis: one scale for each index of this axis, or None for one scale.
        spec: integer dtype and range.
        floor: smallest scale allowed for each channel, 1-D, or None.

    Returns:
        q in the spec's dtype, scale float32, zero point int32; as :func:`numerics.quantize_weight`.
    """
    dtype = NUMPY[spec.dtype]
    if axis is None:
        whole = np.asarray(w, np.float32)
        q, scale, zero = quantize_weight(whole, None, spec)
        if floor is not None and floor.max() > scale:
            scale = floor.max()
            q = quantize(whole, scale, zero, spec.qmin, spec.qmax)
        return q.astype(dtype), scale, zero
    channels = w.shape[axis]
    step = max(1, CHUNK_BYTES * channels // max(w.nbytes, 1))
    result = np.empty(w.shape, dtype)
    scales, zeros = np.empty(channels, np.float32), np.empty(channels, np.int32)
    for start in range(0, channels, step):
        part = (slice(None),) * axis + (slice(start, start + step),)
        piece = np.asarray(w[part], np.float32)
        q, scale, zero = quantize_weight(piece, axis, spec)
        if floor is not None and (floor[start : start + step] > scale).any():
            scale = np.maximum(scale, floor[start : start + step]).astype(np.float32)
            wide = along(scale, axis, w.ndim), along(zero, axis, w.ndim)
            q = quantize(piece, *wide, spec.qmin, spec.qmax)
        result[part], scales[start : start + step], zeros[start : start + step] = q, scale, zero
    return result, scales, zeros


def reduction_rows(q: np.ndarray, site: Site) -> np.ndarray:
    """The weight as (K, N), K in the order in which kernels add products; a view if possible."""
    if site.kind == "conv":
        # onnxruntime convolves with the channels last: kernel position first, then channel.
        order = (*range(2, q.ndim), 1, 0)
        return q.transpose(order).reshape(-1, q.shape[0])
    return q.T if site.axis == 0 else q


def _adds_pairs(site: Site, axis: int | None, spec: QuantSpec) -> bool:
    """Whether x86 kernels add this site's products in pairs, and 8-bit weights fill the pair."""
    if spec.width < 8 or axis is None or not spec.symmetric or site.kind == "conv_transpose":
        return False
    depthwise = site.kind == "conv" and dims(site.weight)[1] == 1
    return site.kind in ("matmul", "gemm", "conv") and not depthwise


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
