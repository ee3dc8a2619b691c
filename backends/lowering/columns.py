"""Weights in blocks and weights of 4 bits, for kernels that know int8 columns alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from qgraph.backends.lowering.block_products import UNPACKED, PackedWeight
from qgraph.backends.lowering.match import Blocks, blocks_of, dynamic_data, leading
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
from qgraph.numerics.packing import byte_table
from qgraph.numerics.reference import SMALLEST_SCALE


def unpack_weights(
    model: ir.Model, limit: int = 127, packed: Mapping[ir.Value, PackedWeight] = UNPACKED
) -> bool:
    """Make int8 columns of the weights of products that are stored smaller.

    ::

        W:int4 ── DQ <block_size> ── y

        W:int4 ── Cast ── Sub(zero) ── Mul(scale / column scale) ── Round ── Cast(int8) ── DQ ── y

    On disk there are 4 bits a weight; onnxruntime computes the int8 columns once, when it loads the
    model (ConstantFolding), and its kernels pack them like any other. The rounding adds the noise
    of 8 bits to that of the few that blocks have. Columns of 4 bits stay exactly what they are.

    A weight that another body of the model has packed for its own kernel is read from there, so
    that the model stores it once::

        W:uint8 (N, blocks, size / 2) ── Gather(of 256 bytes, the integers) ── Mul ── ... ── DQ ── y

    Args:
        limit: largest integer of a column.
        packed: the weights that were packed, by their integers.
    """
    changed = False
    for node, dq in _weights(model):
        q, blocks = dq.inputs[0], blocks_of(dq)
        if dynamic_data(node) is None or q is None:
            continue
        if blocks is not None:
            _unpack(model, node, q, blocks, limit, packed.get(q))
            changed = True
        elif q in packed and packed[q].zeros is None:
            dq.replace_input_with(0, _unpacked_columns(model, node, q, packed[q], dq))
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


def _unpack(
    model: ir.Model,
    node: ir.Node,
    q: ir.Value,
    blocks: Blocks,
    limit: int,
    packed: PackedWeight | None,
) -> None:
    base = q.name
    peaks = _block_peaks(np.asarray(constant_array(q), np.int8), blocks)
    largest = np.maximum(peaks.max(axis=blocks.axis, keepdims=True), SMALLEST_SCALE)
    column = (largest / limit).astype(np.float32)
    scale = shared_constant(model, f"{base}_column_scale", column.reshape(-1))
    if packed is None:
        columns = _rounded_columns(model, node, q, blocks, column)
    else:
        columns = _rounded_packed(model, node, q, packed, blocks.axis, scale)
    made = insert(
        model, node, "DequantizeLinear", [columns, scale],
        base=f"{base}_columns_dq", attributes={"axis": 1 - blocks.axis},
    )  # fmt: skip
    node.replace_input_with(1, typed(made, ir.DataType.FLOAT, q.shape))


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
    model: ir.Model, node: ir.Node, q: ir.Value, blocks: Blocks, column: np.ndarray
) -> ir.Value:
    """int8 columns of these scales, as near to blocks with scales of their own as can be."""
    ratio = add_constant(model, f"{q.name}_ratio", (blocks.scales / column).astype(np.float32))
    graph = Builder(model, node, f"{q.name}_")
    value = graph.op("Cast", q, to=int(ir.DataType.FLOAT), shape=q.shape)
    if blocks.zeros is not None:
        zeros = add_constant(model, f"{q.name}_zeros", blocks.zeros.astype(np.float32))
        spread = _spread(model, node, q, zeros, blocks)
        value = graph.op("Sub", value, spread, shape=q.shape)
    value = graph.op("Mul", value, _spread(model, node, q, ratio, blocks), shape=q.shape)
    rounded = graph.op("Round", value, shape=q.shape)
    return _int8(model, node, rounded)


def _rounded_packed(
    model: ir.Model, node: ir.Node, q: ir.Value, packed: PackedWeight, k_axis: int, scale: ir.Value
) -> ir.Value:
    """:func:`_rounded_columns` from bytes that hold the blocks."""
    graph = Builder(model, node, f"{q.name}_")
    last = shared_constant(model, "qgraph/last_axis", np.array([-1], np.int64))
    both = shared_constant(model, "qgraph/last_axes", np.array([1, 2], np.int64))
    scales = graph.op("Unsqueeze", packed.scales, last)
    ratio = graph.op("Div", scales, graph.op("Unsqueeze", scale, both))
    values = graph.op("Mul", _integers(model, graph, packed), ratio)
    return _as_columns(model, graph, graph.op("Round", values), packed, k_axis, q)


def _block_peaks(q: np.ndarray, blocks: Blocks) -> np.ndarray:
    """The largest magnitude of each block, dequantized."""
    starts = np.arange(0, q.shape[blocks.axis], blocks.size)
    zeros = 0 if blocks.zeros is None else blocks.zeros
    low = np.minimum.reduceat(q, starts, axis=blocks.axis) - zeros
    high = np.maximum.reduceat(q, starts, axis=blocks.axis) - zeros
    peaks: np.ndarray = np.maximum(np.abs(low), np.abs(high)) * np.abs(blocks.scales)
    return peaks


def _unpacked_columns(
    model: ir.Model, node: ir.Node, q: ir.Value, packed: PackedWeight, dq: ir.Node
) -> ir.Value:
    """int8 columns from bytes that hold the same integers."""
    graph = Builder(model, node, f"{q.name}_")
    k_axis = 1 - int(attribute(dq, "axis", 1)) % 2
    return _as_columns(model, graph, _integers(model, graph, packed), packed, k_axis, q)


def _integers(model: ir.Model, graph: Builder, packed: PackedWeight) -> ir.Value:
    """The integers in a packed weight without their zero points, as floats (N, blocks, size)."""
    n, count, _ = (int(d or 0) for d in dims(packed.bytes))
    bits, middle = packed.bits, 1 << (packed.bits - 1)
    if packed.zeros is None:
        return _codes(model, graph, packed.bytes, bits, middle, [n, count, packed.size])
    values = _codes(model, graph, packed.bytes, bits, 0, [n, count, packed.size])
    zeros = _codes(model, graph, packed.zeros, bits, 0, [n, -1, 1])
    if dims(packed.zeros)[1] != count * bits / 8:
        zeros = leading(graph, zeros, count, 1, ir.DataType.FLOAT)
    return graph.op("Sub", values, zeros)


def _codes(
    model: ir.Model, graph: Builder, held: ir.Value, bits: int, zero: int, shape: list[int]
) -> ir.Value:
    """Integers of few bits, less `zero`, as floats: a table says what each byte holds."""
    table = shared_constant(model, f"qgraph/bytes_{bits}_{zero}", byte_table(bits, zero))
    wanted = np.array(shape, np.int64)
    name = "qgraph/shape_" + "_".join(map(str, shape))
    index = graph.op("Cast", held, to=int(ir.DataType.INT32), dtype=ir.DataType.INT32)
    codes = graph.op("Gather", table, index)
    return graph.op("Reshape", codes, shared_constant(model, name, wanted))


def _as_columns(
    model: ir.Model,
    graph: Builder,
    values: ir.Value,
    packed: PackedWeight,
    k_axis: int,
    q: ir.Value,
) -> ir.Value:
    """Values (N, blocks, size) as int8 of the shape of `q`, without what fills the last block."""
    int8 = ir.DataType.INT8
    shape = shared_constant(model, "qgraph/matrix", np.array([0, -1], np.int64))
    columns = graph.op("Cast", values, to=int(int8), dtype=int8)
    columns = graph.op("Reshape", columns, shape, dtype=int8)
    if packed.filled:
        columns = leading(graph, columns, packed.k, 1, int8)
    if k_axis == 0:
        columns = graph.op("Transpose", columns, perm=[1, 0], dtype=int8)
    producer = columns.producer()
    assert producer is not None
    return typed(producer, ir.DataType.INT8, q.shape)
