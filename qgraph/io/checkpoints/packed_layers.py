"""Weights as GPTQ, AWQ and bitsandbytes pack them into tensors, and how to unpack them.

Each layout is undone by a function on arrays; what comes out is a :class:`Layer`, integers and
scales as they were stored.

Source: the published formats. GPTQ: AutoGPTQ and GPTQModel, `gptq` (zero points stored minus one)
and `gptq_v2`. AWQ: AutoAWQ, version `gemm`. bitsandbytes: `Linear4bit`, NF4 and FP4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.numerics.codebooks import SCALES_PER_BLOCK, NestedScales
from qgraph.numerics.packing import WORD, Array, Codes, unpack
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.reference import Float
from qgraph.numerics.spec import Codebook, PerAxis, PerBlock, QuantSpec

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring columns each nibble of a word holds, from the lowest."""


@dataclass(frozen=True, eq=False)
class Layer:
    """The weight of a linear layer as its checkpoint has it.

    Attributes:
        q: uint8 (K, N).
        scale: float32 (groups, N), what one step is worth, or the level 1 of a table.
        zero: int32 (groups, N).
        bits: of each integer.
        size: rows of `q`, one after the other, that share a scale; the last group may be shorter.
        order: int64 (K,), the input channel that each row is for; None: they are in order.
        codebook: name of the table, None for integers that stand for themselves.
        table: float32 (16,), the level of each code, or None.
        nested: how the scales are stored if they are quantized, too.
    """

    q: Codes
    scale: Float
    zero: NDArray[np.int32]
    bits: int
    size: int
    order: NDArray[np.int64] | None = None
    codebook: Codebook | None = None
    table: Float | None = None
    nested: NestedScales | None = None

    def float(self) -> Float:
        """What it stands for: float32 (K, N), rows in the order of input channels."""
        rows = self.quantized(1)[1].float()
        if self.order is None:
            return rows
        channels = np.empty_like(rows)
        channels[self.order] = rows
        return channels

    def quantized(self, axis: int) -> tuple[QuantSpec, Quantized]:
        """The weight for insert-qdq, rows in the order that they have here.

        Integers are signed where all zero points are the middle of their range.

        Args:
            axis: of the output channels: 1 for a weight (K, N), 0 for (N, K).
        """
        q: Array = self.q
        scale, zero, middle = self.scale, self.zero, 1 << (self.bits - 1)
        symmetric = bool((zero == middle).all()) or self.table is not None
        dtype = ir.DataType.UINT4 if self.bits <= 4 else ir.DataType.UINT8
        if symmetric and self.table is None:
            q, zero = (q - np.uint8(middle)).view(np.int8), np.zeros_like(zero)
            dtype = ir.DataType.INT4 if self.bits <= 4 else ir.DataType.INT8
        if axis == 0:
            q, scale, zero = (np.ascontiguousarray(q.T), scale.T.copy(), zero.T.copy())
        spec = QuantSpec(
            dtype,
            PerBlock(1 - axis, self.size),
            symmetric,
            "absmax",
            bits=0 if self.bits in (4, 8) else self.bits,
            codebook=self.codebook,
            double=self.nested is not None,
        )
        if self.scale.shape[0] == 1 and self.table is None:
            spec = spec.with_(granularity=PerAxis(axis))
            return spec, Quantized(q, scale.reshape(-1), zero.reshape(-1), axis)
        table, nested = self.table, self.nested
        weight = Quantized(q, scale, zero, 1 - axis, block=self.size, table=table, nested=nested)
        return spec, weight


def joined(layers: Sequence[Layer]) -> Layer | None:
    """Layers that read the same data as one, side by side; None where their groups differ."""
    first = layers[0]
    if len(layers) == 1:
        return first
    for other in layers[1:]:
        if (first.bits, first.size, first.codebook) != (other.bits, other.size, other.codebook):
            return None
        if len(first.q) != len(other.q) or not _equal(first.order, other.order):
            return None
        if not _equal(first.table, other.table):
            return None
    q, scale, zero = (
        np.concatenate([getattr(layer, name) for layer in layers], axis=1)
        for name in ("q", "scale", "zero")
    )
    # Scales that were quantized apart have no common offset: they stay as exact floats.
    return replace(first, q=q, scale=scale, zero=zero, nested=None)


def _equal(a: Array | None, b: Array | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def gptq_layer(
    qweight: Array, qzeros: Array, scales: Array, g_idx: Array | None, bits: int, *, v2: bool
) -> Layer:
    """A layer of GPTQ, its rows in the order of their groups.

    Args:
        qweight: int32 (K · bits / 32, N), packed along K.
        qzeros: int32 (groups, N · bits / 32), packed along N; of the first version minus one.
        scales: (groups, N), any float.
        g_idx: (K,), the group of each row, in any order ("act-order"); None: in order.
        bits: 2, 3, 4 or 8, for layers without `g_idx`; with it the shapes tell.
        v2: zero points are stored as they are.

    Raises:
        ValueError: the shapes do not fit each other, or groups are not of one size.
    """
    _check_words(qweight, qzeros, scales)
    _check(g_idx is not None or bits > 0, f"{bits} bits")
    words, (groups, n) = len(qweight), scales.shape
    k = words * WORD // bits if g_idx is None else g_idx.size
    bits = words * WORD // max(k, 1)
    _check(bits in (2, 3, 4, 8) and words * WORD == k * bits, f"{bits} bits for {k} rows")
    _check(qweight.shape[1] == n, f"qweight has {qweight.shape[1]} columns, scales have {n}")
    expected = (groups, -(-n * bits // WORD))
    _check(qzeros.shape == expected, f"qzeros have shape {qzeros.shape}, not {expected}")
    zero = _gptq_zeros(qzeros, bits, v2)[:, :n]
    q, size, order = unpack(qweight, bits), -(-k // groups), None
    if g_idx is not None:
        group = np.asarray(g_idx, np.int64)
        order = np.argsort(group, kind="stable")
        counts = np.bincount(group[order], minlength=groups) if group.min() >= 0 else group
        size = int(counts.max())
        even = len(counts) == groups and (counts[:-1] == size).all()
        _check(bool(even), "groups of different sizes")
        if (np.diff(group) >= 0).all():
            order = None
        else:
            q = q[order]
    _check(-(-k // size) == groups, f"{groups} groups of {size} for {k} rows")
    return Layer(q, scales.astype(np.float32), zero.astype(np.int32), bits, size, order)


def _gptq_zeros(qzeros: Array, bits: int, v2: bool) -> Codes:
    words = np.ascontiguousarray(qzeros).view(np.uint32)
    if v2:
        return unpack(words.T, bits).T
    if WORD % bits:
        return (unpack(words.T, bits).T + np.uint8(1)) & np.uint8((1 << bits) - 1)
    # Writers subtract one from all fields of a word in one go: what a zero point of 0 borrows
    # from its neighbour comes back if that is undone in one go, too.
    ones = np.uint32(sum(1 << shift for shift in range(0, WORD, bits)))
    return unpack((words + ones).T, bits).T


def awq_layer(qweight: Array, qzeros: Array, scales: Array) -> Layer:
    """A layer of AWQ in its GEMM layout, 4 bits.

    Args:
        qweight: int32 (K, N / 8), packed along N in :data:`AWQ_ORDER`.
        qzeros: int32 (groups, N / 8), in the same way.
        scales: (groups, N), any float.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    _check_words(qweight, qzeros, scales)
    (k, columns), (groups, n) = qweight.shape, scales.shape
    _check(columns * 8 == n, f"qweight has {columns * 8} columns, scales have {n}")
    _check(qzeros.shape == (groups, columns), f"qzeros have shape {qzeros.shape}")
    _check(groups > 0 and k % groups == 0, f"{groups} groups for {k} rows")
    q, zero = _awq_columns(qweight), _awq_columns(qzeros).astype(np.int32)
    return Layer(q, scales.astype(np.float32), zero, 4, k // groups)


def _awq_columns(words: Array) -> Codes:
    nibbles = unpack(words.T, 4)  # (N, rows)
    eights = nibbles.reshape(-1, 8, nibbles.shape[1])[:, np.argsort(AWQ_ORDER)]
    return np.ascontiguousarray(eights.reshape(nibbles.shape).T)


def bnb_layer(
    weight: Array,
    absmax: Array,
    quant_map: Array,
    state: Mapping[str, Any],
    nested: Sequence[Array],
) -> Layer:
    """A layer of bitsandbytes, 4 bits.

    Args:
        weight: uint8 (N · K / 2, 1), the weight (N, K) row by row, of two codes the first is in the
            upper half.
        absmax: float32 (blocks,), or uint8 with double quantization.
        quant_map: float32 (16,), the level of each code.
        state: `quant_type`, `blocksize`, `shape`, and of nested scales `nested_blocksize`,
            `nested_offset`.
        nested: with double quantization, nested_absmax (blocks / 256,) and nested_quant_map (256,).

    Raises:
        ValueError: the shapes do not fit each other, or blocks run across rows.
    """
    (n, k), size, kind = state["shape"], int(state["blocksize"]), state["quant_type"]
    _check(kind in ("nf4", "fp4"), f"quant_type '{kind}' is neither nf4 nor fp4")
    _check(min(n, k, size) > 0, f"blocks of {size} in {n} x {k}")
    _check(weight.dtype == np.uint8 and quant_map.size == 16, "codes or their levels")
    _check(k % size == 0, f"blocks of {size} run across its rows of {k}")
    _check(weight.size * 2 == n * k, f"{weight.size} bytes for {n} x {k} codes")
    _check(absmax.size * size == n * k, f"{absmax.size} scales for {n} x {k} codes")
    codes = np.stack([weight.reshape(-1) >> 4, weight.reshape(-1) & 15], axis=-1).reshape(n, k)
    double = None
    if nested:
        _check(state["nested_blocksize"] == SCALES_PER_BLOCK, "nested_blocksize is not 256")
        offset = np.float32(state["nested_offset"])
        double = NestedScales(absmax.reshape(-1), nested[0].reshape(-1), offset, nested[1])
        absmax = double.float()
    _check_scales(absmax)
    scale = np.ascontiguousarray(absmax.astype(np.float32).reshape(n, k // size).T)
    return Layer(
        np.ascontiguousarray(codes.T),
        scale,
        np.zeros(scale.shape, np.int32),
        4,
        size,
        codebook=kind,
        table=quant_map.astype(np.float32),
        nested=double,
    )


def _check_words(qweight: Array, qzeros: Array, scales: Array) -> None:
    for name, words in (("qweight", qweight), ("qzeros", qzeros)):
        _check(words.dtype.kind in "iu" and words.itemsize == 4, f"{name} are {words.dtype}")
        _check(words.ndim == 2, f"{name} have {words.ndim} axes")
    _check(scales.ndim == 2 and 0 not in scales.shape, f"scales have shape {scales.shape}")
    _check_scales(scales)


def _check_scales(scales: Array) -> None:
    _check(bool(np.isfinite(scales.astype(np.float32)).all()), "scales are not finite")


def _check(fits: bool, problem: str) -> None:
    if not fits:
        raise ValueError(problem)
