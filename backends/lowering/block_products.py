"""Products with activations in blocks, on onnxruntime's kernel for weights of few bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from qgraph.backends.lowering.match import INT8_COMPUTE, blocks_of, fewest_bits, gemm_bias
from qgraph.graph.editing import insert, replace, shared_constant, typed
from qgraph.graph.functions import ROUND_IN_BLOCKS, is_call
from qgraph.graph.reading import MICROSOFT, array, attribute, input_of, is_op, nodes, producer
from qgraph.numerics.packing import pack


@dataclass(frozen=True)
class PackedWeight:
    """A weight as MatMulNBits reads it.

    Attributes:
        bytes: uint8, (N, blocks, size · bits / 8), K filled up to whole blocks.
        scales: float32, (N, blocks).
        zeros: uint8, (N, blocks · bits / 8), or None where all are the middle of the range.
        bits, size: of one weight, and of a block.
        k: without the filling.
    """

    bytes: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    bits: int
    size: int
    k: int

    @property
    def filled(self) -> bool:
        """Whether the last block is longer than what is left of K."""
        return self.k % self.size > 0


UNPACKED: Mapping[ir.Value, PackedWeight] = MappingProxyType({})
"""No weight was packed."""


def lower_block_products(model: ir.Model) -> dict[ir.Value, PackedWeight]:
    """Products of activations in blocks and weights of few bits become MatMulNBits.

    ::

        x ── RoundInBlocks ── MatMul ── y          x ── MatMulNBits(accuracy_level=4) ── y
        W:int4 ── DQ <block_size> ──┘              W:uint8 (N, blocks, size / 2) ──┘

    The kernel finds the scales of activations itself and multiplies in integers. Its weights are
    unsigned, the middle of their range being zero, and take 2, 4 or 8 bits, as few as they need.
    Weights with a scale for each channel have it in each block.

    Returns:
        the weights that were packed, by the integers that they were before.
    """
    packed: dict[ir.Value, PackedWeight] = {}
    for node in nodes(model):
        if not is_op(node, "MatMul", "Gemm"):
            continue
        rounded, dq = producer(node, 0), producer(node, 1)
        if rounded is None or dq is None or not is_call(rounded, ROUND_IN_BLOCKS):
            continue
        columns = _columns(node, dq, rounded) if is_op(dq, "DequantizeLinear") else None
        if columns is not None:
            q = input_of(dq, 0)
            weight = _lower(model, node, rounded.inputs[0], q, columns)
            if attribute(node, "alpha", 1.0) == 1.0:  # else it is in the scales
                packed[q] = weight
    return packed


@dataclass(frozen=True)
class _Columns:
    """A weight for the kernel.

    Attributes:
        q: int16, (N, K).
        scales: float32, (N, blocks).
        zeros: int32, (N, blocks), or None where all are 0.
        size: of blocks.
    """

    q: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    size: int


def _columns(node: ir.Node, dq: ir.Node, rounded: ir.Node) -> _Columns | None:
    block, q = array(rounded.inputs[1]), array(dq.inputs[0])
    if block is None or q is None or q.ndim != 2 or attribute(node, "transA", 0):
        return None
    size, k_axis = int(block[-1]), 1 if attribute(node, "transB", 0) else 0
    q = np.asarray(q, np.int16)
    blocks = blocks_of(dq)
    if blocks is None:
        channels = _per_channel(dq, 1 - k_axis, -(-q.shape[k_axis] // size))
        if channels is None:
            return None
        scales, zeros = channels
        if k_axis:
            scales, zeros = scales.T, None if zeros is None else zeros.T
    elif blocks.size == size and blocks.axis == k_axis:
        scales, zeros = blocks.scales, blocks.zeros
    else:
        return None
    if not k_axis:
        q, scales, zeros = q.T, scales.T, None if zeros is None else zeros.T
    return _Columns(q, scales * np.float32(attribute(node, "alpha", 1.0)), zeros, size)


def _per_channel(dq: ir.Node, axis: int, count: int) -> tuple[np.ndarray, np.ndarray | None] | None:
    """The scales and zero points of channels, repeated for each block: (count, N)."""
    scale, zero = array(dq.inputs[1]), array(dq.inputs[2]) if len(dq.inputs) > 2 else None
    if scale is None or scale.ndim != 1 or attribute(dq, "axis", 1) % 2 != axis:
        return None
    scales = np.broadcast_to(scale, (count, scale.size))
    if zero is None or not np.asarray(zero, np.int32).any():
        return scales, None
    return scales, np.broadcast_to(np.asarray(zero, np.int32), scales.shape)


def _lower(
    model: ir.Model, node: ir.Node, x: ir.Value | None, weight: ir.Value, columns: _Columns
) -> PackedWeight:
    packed = _packed(model, weight, columns)
    inputs = [packed.bytes, packed.scales] + ([packed.zeros] if packed.zeros is not None else [])
    n = columns.q.shape[0]
    multiply_in_blocks(
        model, node, [x, *inputs], n=n, k=packed.k, bits=packed.bits, size=packed.size
    )
    return packed


def _packed(model: ir.Model, weight: ir.Value, columns: _Columns) -> PackedWeight:
    (n, k), size = columns.q.shape, columns.size
    bits = fewest_bits(columns.q, columns.zeros, size)
    middle = 1 << (bits - 1)
    signed = int(columns.q.min()) < 0 or columns.zeros is None
    lift = middle if signed else 0
    count = columns.scales.shape[1]
    filled = np.full((n, count * size), 0, np.uint8)
    filled[:, :k] = columns.q + lift
    # Layers may share a weight.
    held = shared_constant(
        model, f"{weight.name}_packed", pack(filled, bits).reshape(n, count, size * bits // 8)
    )
    scales = shared_constant(
        model, f"{weight.name}_scales", np.ascontiguousarray(columns.scales, np.float32)
    )
    zeros = None
    if columns.zeros is not None:
        packed = pack((columns.zeros + lift).astype(np.uint8), bits).reshape(n, -1)
        zeros = shared_constant(model, f"{weight.name}_zeros", packed)
    return PackedWeight(held, scales, zeros, bits, size, k)


def multiply_in_blocks(
    model: ir.Model,
    node: ir.Node,
    inputs: Sequence[ir.Value | None],
    *,
    n: int,
    k: int,
    bits: int,
    size: int,
) -> None:
    """Replace a MatMul or Gemm by MatMulNBits with these inputs, and an Add of its bias."""
    base = node.outputs[0].name
    attributes = {
        "K": k, "N": n, "bits": bits, "block_size": size, "accuracy_level": INT8_COMPUTE,
    }  # fmt: skip
    product = insert(
        model, node, "MatMulNBits", inputs,
        base=f"{base}_MatMulNBits", attributes=attributes, domain=MICROSOFT,
    )  # fmt: skip
    bias = gemm_bias(model, node)
    if bias is not None:
        typed(product, node.outputs[0].dtype, node.outputs[0].shape)
        product = insert(model, node, "Add", [*product.outputs, bias], base=f"{base}_Add")
    replace(node, product.outputs[0])
