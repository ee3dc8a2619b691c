"""Weights in blocks and weights of 4 bits, for kernels that know int8 columns alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph.backends.lowering import dynamic_data
from qgraph.graph import (
    add_constant,
    array,
    attribute,
    constant,
    dims,
    insert,
    is_op,
    nodes,
    shared_constant,
)


def unpack_weights(model: ir.Model) -> bool:
    """Make int8 columns of the weights of products that are stored smaller.

    ::

        m:int8 ── Cast ── Mul(scale) ──┐            m:int8 ── Gather(k // size) ──┐
        W:int4 ──── DQ <block_size> ── y            W:int4 ── Cast(int8) ── Mul ── DQ(scale) ── y

    On disk there are 4 bits a weight; onnxruntime computes the int8 columns once, when it loads the
    model (ConstantFolding), and its kernels pack them like any other. The integers are exact:
    W · m · scale, whichever is multiplied first.
    """
    changed = False
    for node, dq in _weights(model):
        q, blocks = dq.inputs[0], blocks_of(dq)
        if dynamic_data(node) is None or q is None:
            continue
        if blocks is not None:
            if blocks.multiplier is not None:
                _unpack(model, node, q, blocks)
                changed = True
        elif q.dtype == ir.DataType.INT4 and not attribute(dq, "block_size", 0):
            changed |= _widen(model, node, dq, q)
    return changed


def fold_block_scales(model: ir.Model) -> bool:
    """Multiply the scales of blocks out, for runtimes that know blocked DequantizeLinear."""
    changed = False
    for _, dq in _weights(model):
        blocks, q = blocks_of(dq), dq.inputs[0]
        if blocks is None or blocks.multiplier is None or q is None:
            continue
        dq.replace_input_with(1, add_constant(model, f"{q.name}_scale", blocks.scales))
        changed = True
    return changed


@dataclass(frozen=True)
class Blocks:
    """What insert-qdq wrote for a weight in blocks, arrays with blocks along K as they are stored.

    Attributes:
        scales: float32, one for each block.
        zeros: int32, one for each block, or None where all are 0.
        axis, size: of the blocks.
        multiplier: int8 or int32, what `scales` are multiples by of `column`; None: of nothing.
        column: float32, the scale of each column, or None.
    """

    scales: np.ndarray
    zeros: np.ndarray | None
    axis: int
    size: int
    multiplier: ir.Value | None = None
    column: np.ndarray | None = None


def _weights(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Node]]:
    """The products of the model, each with the DequantizeLinear of its constant weight."""
    for node in nodes(model):
        if not is_op(node, "MatMul", "Gemm") or node.inputs[1] is None:
            continue
        dq = node.inputs[1].producer()
        if dq is not None and is_op(dq, "DequantizeLinear") and constant(dq.inputs[0]) is not None:
            yield node, dq


def blocks_of(dq: ir.Node) -> Blocks | None:
    """The blocks that a DequantizeLinear with `block_size` reads; None if it is another one."""
    size, axis = int(attribute(dq, "block_size", 0)), int(attribute(dq, "axis", 1)) % 2
    if not size or len(dims(dq.inputs[0])) != 2:
        return None
    zeros = array(dq.inputs[2]) if len(dq.inputs) > 2 else None
    if zeros is not None:
        zeros = np.asarray(zeros, np.int32)
    scales = array(dq.inputs[1])
    if scales is not None:
        return Blocks(scales, zeros, axis, size)
    product = dq.inputs[1].producer() if dq.inputs[1] is not None else None
    if not is_op(product, "Mul") or product is None:
        return None
    cast = product.inputs[0].producer() if product.inputs[0] is not None else None
    if not is_op(cast, "Cast") or cast is None or cast.inputs[0] is None:
        return None
    multipliers, column = array(cast.inputs[0]), array(product.inputs[1])
    if multipliers is None or column is None or multipliers.ndim != 2:
        return None
    scales = (multipliers * column).astype(np.float32)
    return Blocks(scales, zeros, axis, size, cast.inputs[0], column)


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
    return _typed(cast, value)


def _unpack(model: ir.Model, node: ir.Node, q: ir.Value, blocks: Blocks) -> None:
    k, base = dims(q)[blocks.axis] or 0, q.name
    assert blocks.multiplier is not None
    assert blocks.column is not None
    owner = shared_constant(
        model, f"qgraph/blocks_{k}_{blocks.size}", np.arange(k, dtype=np.int64) // blocks.size
    )
    spread = insert(
        model, node, "Gather", [_int8(model, node, blocks.multiplier), owner],
        base=f"{base}_multipliers", attributes={"axis": blocks.axis},
    )  # fmt: skip
    factors = [_int8(model, node, q), _typed(spread, q)]
    columns = _typed(insert(model, node, "Mul", factors, base=f"{base}_columns"), q)
    scale = add_constant(model, f"{base}_column_scale", blocks.column.reshape(-1))
    made = insert(
        model, node, "DequantizeLinear", [columns, scale],
        base=f"{base}_columns_dq", attributes={"axis": 1 - blocks.axis},
    )  # fmt: skip
    made.outputs[0].type, made.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), q.shape
    node.replace_input_with(1, made.outputs[0])


def _typed(node: ir.Node, like: ir.Value) -> ir.Value:
    output = node.outputs[0]
    output.type, output.shape = ir.TensorType(ir.DataType.INT8), like.shape
    return output
