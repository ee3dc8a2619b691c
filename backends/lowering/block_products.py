"""Products with activations in blocks, on onnxruntime's kernel for weights of few bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph.backends.lowering.match import INT8_COMPUTE, blocks_of, fewest_bits, gemm_bias
from qgraph.graph.editing import insert, replace, shared_constant, typed
from qgraph.graph.functions import ROUND_IN_BLOCKS, is_call
from qgraph.graph.reading import MICROSOFT, array, attribute, is_op, nodes, producer
from qgraph.numerics.packing import pack


def lower_block_products(model: ir.Model) -> bool:
    """Products of activations in blocks and weights of few bits become MatMulNBits.

    ::

        x ── RoundInBlocks ── MatMul ── y          x ── MatMulNBits(accuracy_level=4) ── y
        W:int4 ── DQ <block_size> ──┘              W:uint8 (N, blocks, size / 2) ──┘

    The kernel finds the scales of activations itself and multiplies in integers. Its weights are
    unsigned, the middle of their range being zero, and take 2, 4 or 8 bits, as few as they need.
    Weights with a scale for each channel have it in each block.
    """
    changed = False
    for node in nodes(model):
        if not is_op(node, "MatMul", "Gemm"):
            continue
        rounded, dq = producer(node, 0), producer(node, 1)
        if rounded is None or dq is None or not is_call(rounded, ROUND_IN_BLOCKS):
            continue
        columns = _columns(node, dq, rounded) if is_op(dq, "DequantizeLinear") else None
        if columns is not None:
            _lower(model, node, rounded.inputs[0], dq.inputs[0], columns)
            changed = True
    return changed


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
    model: ir.Model, node: ir.Node, x: ir.Value | None, weight: ir.Value | None, columns: _Columns
) -> None:
    assert weight is not None
    (n, k), size = columns.q.shape, columns.size
    bits = fewest_bits(columns.q, columns.zeros, size)
    middle = 1 << (bits - 1)
    signed = int(columns.q.min()) < 0 or columns.zeros is None
    lift = middle if signed else 0
    count = columns.scales.shape[1]
    filled = np.full((n, count * size), 0, np.uint8)
    filled[:, :k] = columns.q + lift
    inputs = [
        # Layers may share a weight.
        shared_constant(
            model, f"{weight.name}_packed", pack(filled, bits).reshape(n, count, size * bits // 8)
        ),
        shared_constant(
            model, f"{weight.name}_scales", np.ascontiguousarray(columns.scales, np.float32)
        ),
    ]
    if columns.zeros is not None:
        zeros = pack((columns.zeros + lift).astype(np.uint8), bits)
        inputs.append(shared_constant(model, f"{weight.name}_zeros", zeros.reshape(n, -1)))
    multiply_in_blocks(model, node, [x, *inputs], n=n, k=k, bits=bits, size=size)


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
