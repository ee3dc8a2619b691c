"""The integers that a site's weight becomes: rounding, bias overflow and saturation together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.analysis import Site
from qgraph.annotation import IN, INTEGERS, MOVES, SCALE, STATS, static_spec
from qgraph.codebooks import (
    FACTORS,
    LEVELS,
    NestedScales,
    best_of,
    codes_at,
    integer_levels,
    nest_scales,
    quantize_to_levels,
)
from qgraph.errors import PipelineError
from qgraph.graph import add_constant, array, attribute, constant, dims, is_op, release, unmap
from qgraph.numerics import (
    along,
    blockwise,
    can_saturate,
    dequantize,
    dequantize_float8,
    quantize,
    quantize_groups,
    quantize_unsaturated,
    quantize_weight,
    scale_zero_point,
    weight_scale_for_bias,
)
from qgraph.observers import Stats, find_range
from qgraph.spec import FLOAT8, Granularity, PerAxis, PerBlock, PerTensor, QuantSpec

CHUNK_BYTES = 16 << 20
"""Weights are quantized in slices of about this size, so that temporaries stay small."""
CACHED_BYTES = 1 << 18
"""Where many candidates are tried, slices of this size, so that they stay in the CPU's cache."""
NUMPY: dict[ir.DataType, type[Any]] = {
    ir.DataType.INT8: np.int8,
    ir.DataType.UINT8: np.uint8,
    ir.DataType.INT4: np.int8,
    ir.DataType.UINT4: np.uint8,
    **{dtype: dtype.numpy().type for dtype in FLOAT8},
}
"""Array types that hold the integers; onnx-ir packs those of 4 bits when it writes them."""
_NIBBLES = (ir.DataType.INT4, ir.DataType.UINT4)


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight in integers, or in float8.

    Attributes:
        q: int8, uint8 or float8, shape of the weight.
        scale: float32, 1-D along `axis`, or 0-D. Of blocks: one for each, (blocks, N), or
            (N, blocks) for a weight (N, K); can be negative.
        zero: zero point, int32, shape of scale.
        axis: output-channel axis, or None for one scale; of blocks the axis K that they divide.
        repaired: channels requantized so that no u8·s8 pair can overflow int16.
        block: elements along `axis` that share a scale, 0 where the weight is not in blocks.
        table: float32 (16,), what integers in blocks stand for; None: for themselves.
        nested: how `scale` is stored if it is quantized, too; None: as it is.
    """

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    axis: int | None
    repaired: int = 0
    block: int = 0
    table: np.ndarray | None = None
    nested: NestedScales | None = None

    def steps(self) -> np.ndarray:
        """What one step of each integer is worth: float32, broadcasts against `q`."""
        if self.axis is None:
            return self.scale
        if not self.block:
            return along(self.scale, self.axis, self.q.ndim)
        return self._blockwise(self.scale)

    def zeros(self) -> np.ndarray:
        """The zero point of each integer: int32, broadcasts against `q`."""
        if self.block:
            return self._blockwise(self.zero)
        return self.zero if self.zero.ndim != 1 else along(self.zero, self.axis or 0, self.q.ndim)

    def float(self) -> np.ndarray:
        """What the integers stand for."""
        if self.table is not None:
            return np.asarray(self.table[self.q] * self.steps(), np.float32)
        if ir.DataType.from_numpy(self.q.dtype) in FLOAT8:
            return dequantize_float8(self.q, self.steps())
        return dequantize(self.q, self.steps(), self.zeros())

    def _blockwise(self, values: np.ndarray) -> np.ndarray:
        if self.axis:
            return blockwise(values.T, self.block, self.q.shape[1]).T
        return blockwise(values, self.block, self.q.shape[0])


def replace_weight(model: ir.Model, site: Site, integers: Quantized, word: str) -> None:
    """Make the site read the float values of these integers, computed when they are read, and
    `insert-qdq` write the integers as they are.

    Args:
        word: what was done to the weight, part of its new name.
    """
    tensor, spec = constant(site.weight), site.node.meta[IN][site.w_index]
    assert tensor is not None
    values = ir.LazyTensor(
        partial(_values, integers, tensor.dtype),
        dtype=tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        cache=False,
    )
    new = add_constant(model, f"{site.weight.name}_{word}", values)
    new.meta[INTEGERS] = (spec, integers)
    site.node.replace_input_with(site.w_index, new)


def _values(integers: Quantized, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.Tensor(integers.float().astype(dtype.numpy()))


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
    trained: tuple[np.ndarray, np.ndarray] | None = value.meta.get(SCALE)
    if trained is not None:
        return trained
    if stats is None or not stats.count:
        raise PipelineError(
            f"'{value.name}' is to be quantized statically but was not calibrated: "
            "put insert-observers,calibrate before insert-qdq"
        )
    low, high = find_range(stats, _writable(spec, PerTensor))
    return scale_zero_point(np.float32(low), np.float32(high), spec)


def _writable(spec: QuantSpec, *kinds: type[Granularity]) -> QuantSpec:
    """`spec`, if insert-qdq can write it."""
    if isinstance(spec.granularity, PerBlock):
        known = spec.dtype in NUMPY
    else:
        known = spec.dtype in NUMPY and (PerAxis in kinds or spec.dtype not in _NIBBLES)
    if known and isinstance(spec.granularity, kinds):
        return spec
    raise PipelineError(
        f"insert-qdq cannot write '{spec}': weights are integers of 4 or 8 bits, per-tensor, "
        "per-axis or in blocks of a matrix, static activations int8 or uint8, per-tensor"
    )


def quantize_site(site: Site, spec: QuantSpec, saturates: bool) -> Quantized:
    """The site's weight in integers, ready for the kernels it will meet.

    Args:
        spec: of the weight.
        saturates: u8·s8 products are added in pairs in int16, see `Target.saturates`.

    Raises:
        PipelineError: the spec cannot be written, or the data is not calibrated.
    """
    wanted, trained = site.weight.meta.get(INTEGERS, (None, None))
    given: QuantSpec | None = site.node.meta.get(IN, {}).get(site.x_index)
    if wanted == spec and isinstance(trained, Quantized):
        return _for_kernel(trained, given)
    w = array(site.weight)
    assert w is not None
    kinds = (PerTensor, PerAxis, *((PerBlock,) if w.ndim == 2 else ()))
    granularity = _writable(spec, *kinds).granularity
    if isinstance(granularity, PerBlock):
        if spec.codebook:
            return _for_kernel(quantize_in_codebook(w, granularity, spec), given)
        return quantize_in_groups(w, granularity, spec)
    axis = granularity.axis if isinstance(granularity, PerAxis) else None
    if spec.dtype in FLOAT8:
        return Quantized(*quantize_in_slices(w, axis, spec), axis)
    data = given
    fixed = activation_scale(site.x) if data is not None and data.observer != "dynamic" else None
    floor = _bias_floor(site, fixed[0]) if fixed is not None else None
    q, scale, zero = quantize_in_slices(w, axis, spec, floor)
    repaired = 0
    if saturates and data is not None and _adds_pairs(site, axis, spec):
        largest = 255 if fixed is None else _largest_pairs(site, *fixed)
        repaired = unsaturated(w, q, scale, site, largest)
    return Quantized(q, scale, zero, axis, repaired)


def _for_kernel(weight: Quantized, data: QuantSpec | None) -> Quantized:
    """The weight with the levels that its product has: beside integers, integers as well."""
    if weight.table is None or data is None:
        return weight
    return replace(weight, table=integer_levels(weight.table))


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


def quantize_in_groups(w: np.ndarray, blocks: PerBlock, spec: QuantSpec) -> Quantized:
    """:func:`numerics.quantize_groups` of a matrix of any size, (K, N) or (N, K).

    Args:
        w: float weight, memory-mapped or not.
        blocks: their size, and which axis of `w` is K.
    """
    rows = w.T if blocks.axis else w
    k, n = rows.shape
    q, count = np.empty(rows.shape, NUMPY[spec.dtype]), -(-k // blocks.size)
    scale, zero = np.empty((count, n), np.float32), np.empty((count, n), np.int32)
    step = max(1, CACHED_BYTES // (4 * max(k, 1)))
    for start in range(0, n, step):
        part = (slice(None), slice(start, start + step))
        piece = np.asarray(rows[part], np.float32)
        q[part], scale[part], zero[part] = quantize_groups(piece, blocks.size, spec)
    if blocks.axis:
        q, scale, zero = (np.ascontiguousarray(a.T) for a in (q, scale, zero))
    return Quantized(q, scale, zero, blocks.axis, block=blocks.size)


def quantize_in_codebook(w: np.ndarray, blocks: PerBlock, spec: QuantSpec) -> Quantized:
    """:func:`codebooks.quantize_to_levels` of a matrix of any size, (K, N) or (N, K).

    Args:
        w: float weight, memory-mapped or not.
        blocks: their size, and which axis of `w` is K.
        spec: names the codebook; `observer="mse"` seeks each block's scale, anything else covers
            the whole range.
    """
    assert spec.codebook is not None
    columns, table = w if blocks.axis else w.T, LEVELS[spec.codebook]
    n, k = columns.shape
    codes = np.empty(columns.shape, np.uint8)
    scale = np.empty((n, -(-k // blocks.size)), np.float32)
    step = max(1, CACHED_BYTES // (4 * max(k, 1)))
    parts = [slice(start, start + step) for start in range(0, n, step)]
    seek = spec.observer == "mse"
    factors = FACTORS if seek else (1.0,)
    for part in parts:
        piece = np.asarray(columns[part], np.float32)
        codes[part], scale[part] = quantize_to_levels(piece, blocks.size, table, factors)
    nested = nest_scales(scale) if spec.double else None
    if nested is not None:  # codes for the scales as they come back: that undoes most of the loss
        shifts = (0, -1, 1) if seek else (0,)
        tried = np.stack([nested.shifted(by).float().reshape(scale.shape) for by in shifts])
        chosen = np.empty(scale.shape, np.intp)
        for part in parts:
            piece = np.asarray(columns[part], np.float32)
            chosen[part] = best_of(tried[:, part], piece, blocks.size, table)
            scale[part] = np.choose(chosen[part], tried[:, part])
            codes[part] = codes_at(piece, scale[part], blocks.size, table)
        nested = nested.shifted(np.take(shifts, chosen.reshape(-1)))
    if not blocks.axis:
        codes, scale = (np.ascontiguousarray(a.T) for a in (codes, scale))
    zero = np.zeros(scale.shape, np.int32)
    return Quantized(codes, scale, zero, blocks.axis, block=blocks.size, table=table, nested=nested)


def unscalable(x: ir.Value, readers: Sequence[Site]) -> str | None:
    """Why the weights that read `x` cannot take factors for its channels; None if they can, by
    :func:`scale_inputs`."""
    stats: Stats = x.meta.get(STATS, Stats())
    if stats.channel_peak is None:
        return "its channels were not calibrated: set channel_ranges=true in insert-observers"
    tensors = [constant(site.weight) for site in readers]
    if any(t is None or t.dtype != ir.DataType.FLOAT for t in tensors):
        return "its weight is not float32"
    return None


def read_elsewhere(weight: ir.Value, readers: Sequence[Site]) -> bool:
    """Whether a product besides these readers has this weight too. The lookup of a tied embedding
    does not count: `balance-tables` finds the scaled weight again."""
    here = {site.node for site in readers}
    return any(n not in here and is_op(n, "MatMul", "Gemm") for n in weight.consumers())


def input_peaks(site: Site) -> np.ndarray:
    """Largest magnitude of the weights that each data channel meets: float32 (K,)."""
    w = array(site.weight)
    assert w is not None
    peaks: np.ndarray = np.maximum(w.max(axis=site.axis), -w.min(axis=site.axis))
    release(site.weight)
    return peaks.astype(np.float32)


def scale_inputs(model: ir.Model, site: Site, factors: np.ndarray) -> None:
    """Multiply the weights that each data channel of a MatMul or Gemm meets by its factor.

    The product is made when the weight is read, and not kept; other readers keep the old weight.

    Args:
        factors: float32 (K,).
    """
    tensor = constant(site.weight)
    assert tensor is not None
    scaled = ir.LazyTensor(
        partial(_product, tensor, along(factors, 1 - site.axis, 2)),
        dtype=tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        cache=False,
    )
    value = add_constant(model, f"{site.weight.name}_scaled", scaled)
    site.node.replace_input_with(site.w_index, value)


def _product(tensor: ir.TensorProtocol, factors: np.ndarray) -> ir.TensorProtocol:
    w = tensor.numpy()
    result = ir.Tensor((w * factors).astype(w.dtype))
    unmap(tensor)
    return result


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
