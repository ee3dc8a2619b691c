"""Weights in blocks and weights of 4 bits, for kernels that know int8 columns alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qgraph.backends.lowering.match import Blocks, blocks_of, dynamic_data
from qgraph.graph.builder import Builder
from qgraph.graph.editing import add_constant, insert, shared_constant, typed
from qgraph.graph.reading import (
    array,
    attribute,
    constant,
    constant_array,
    dims,
    is_op,
    nodes,
    producer,
)
from qgraph.numerics.reference import SMALLEST_SCALE


def unpack_weights(model: ir.Model, limit: int = 127) -> bool:
    """Make int8 columns of the weights of products that are stored smaller.

    ::

        W:int4 ── DQ <block_size> ── y

        W:int4 ── Cast ── Sub(zero) ── Mul(scale / column scale) ── Round ── Cast(int8) ── DQ ── y

    On disk there are 4 bits a weight; onnxruntime computes the int8 columns once, when it loads the
    model (ConstantFolding), and its kernels pack them like any other. The rounding adds the noise
    of 8 bits to that of the few that blocks have. Columns of 4 bits stay exactly what they are.

    Args:
        limit: largest integer of a column.
    """
    changed = False
    for node, dq in _weights(model):
        q, blocks = dq.inputs[0], blocks_of(dq)
        if dynamic_data(node) is None or q is None:
            continue
        if blocks is not None:
            _unpack(model, node, q, blocks, limit)
            changed = True
        elif q.dtype == ir.DataType.INT4 and not attribute(dq, "block_size", 0):
            changed |= _widen(model, node, dq, q)
    return changed


def _weights(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Node]]:
    """The products of the model, each with the DequantizeLinear of its constant weight."""
    for node in nodes(model):
        if not is_op(node, "MatMul", "Gemm"):
            continue
        dq = producer(node, 1)
        if is_op(dq, "DequantizeLinear") and constant(dq.inputs[0]) is not None:
            yield node, dq


def _widen(model: ir.Model, node: ir.Node, dq: ir.Node, q: ir.Value) -> bool:
    """The int4 columns that `dq` reads as int8, if their zero points are 0."""
    zero = array(dq.inputs[2]) if len(dq.inputs) > 2 else None
    if zero is not None and np.asarray(zero, np.int32).any():
        return False
    dq.replace_input_with(0, _int8(model, node, q))
    dq.resize_inputs(2)
    return True


def _int8(model: ir.Model, anchor: ir.Node, value: ir.Value) -> ir.Value:
    if value.dtype == ir.DataType.INT8:
        return value
    to = {"to": int(ir.DataType.INT8)}
    cast = insert(model, anchor, "Cast", [value], base=f"{value.name}_int8", attributes=to)
    return typed(cast, ir.DataType.INT8, value.shape)


def _unpack(model: ir.Model, node: ir.Node, q: ir.Value, blocks: Blocks, limit: int) -> None:
    base = q.name
    columns, column = _rounded_columns(model, node, q, blocks, limit)
    scale = add_constant(model, f"{base}_column_scale", column.reshape(-1))
    dq = insert(
        model, node, "DequantizeLinear", [columns, scale],
        base=f"{base}_columns_dq", attributes={"axis": 1 - blocks.axis},
    )  # fmt: skip
    node.replace_input_with(1, typed(dq, ir.DataType.FLOAT, q.shape))


def _spread(
    model: ir.Model, node: ir.Node, q: ir.Value, values: ir.Value, blocks: Blocks
) -> ir.Value:
    """Values of blocks, repeated for each element."""
    k = dims(q)[blocks.axis] or 0
    owner = shared_constant(
        model, f"qgraph/blocks_{k}_{blocks.size}", np.arange(k, dtype=np.int64) // blocks.size
    )
    base, attributes = f"{q.name}_spread", {"axis": blocks.axis}
    return insert(model, node, "Gather", [values, owner], base=base, attributes=attributes).outputs[
        0
    ]


def _rounded_columns(
    model: ir.Model, node: ir.Node, q: ir.Value, blocks: Blocks, limit: int
) -> tuple[ir.Value, np.ndarray]:
    """int8 columns as near to blocks with scales of their own as can be, and their scale."""
    integers = constant_array(q)
    peaks = _block_peaks(np.asarray(integers, np.int8), blocks)
    column = np.maximum(peaks.max(axis=blocks.axis, keepdims=True), SMALLEST_SCALE) / limit
    ratio = add_constant(model, f"{q.name}_ratio", (blocks.scales / column).astype(np.float32))

    graph = Builder(model, node, f"{q.name}_")
    value = graph.op("Cast", q, to=int(ir.DataType.FLOAT), shape=q.shape)
    if blocks.zeros is not None:
        zeros = add_constant(model, f"{q.name}_zeros", blocks.zeros.astype(np.float32))
        spread = _spread(model, node, q, zeros, blocks)
        value = graph.op("Sub", value, spread, shape=q.shape)
    value = graph.op("Mul", value, _spread(model, node, q, ratio, blocks), shape=q.shape)
    rounded = graph.op("Round", value, shape=q.shape)
    return _int8(model, node, rounded), column.astype(np.float32)


def _block_peaks(q: np.ndarray, blocks: Blocks) -> np.ndarray:
    """The largest magnitude of each block, dequantized."""
    starts = np.arange(0, q.shape[blocks.axis], blocks.size)
    zeros = 0 if blocks.zeros is None else blocks.zeros
    low = np.minimum.reduceat(q, starts, axis=blocks.axis) - zeros
    high = np.maximum.reduceat(q, starts, axis=blocks.axis) - zeros
    peaks: np.ndarray = np.maximum(np.abs(low), np.abs(high)) * np.abs(blocks.scales)
    return peaks
