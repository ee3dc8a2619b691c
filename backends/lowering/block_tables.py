"""Lookups in tables of 4 bits and fewer, on onnxruntime's kernel for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph.backends.lowering.match import blocks_of, fewest_bits
from qgraph.backends.lowering.tables import turn_of
from qgraph.graph.editing import add_constant, insert, replace, shared_constant, typed
from qgraph.graph.reading import (
    MICROSOFT,
    array,
    attribute,
    constant,
    is_op,
    nodes,
    producer,
)
from qgraph.numerics.packing import pack


def lower_block_tables(model: ir.Model) -> bool:
    """Gather of a table in blocks becomes GatherBlockQuantized.

    ::

        W:int4 ── DQ <block_size> ── Gather ── y
        W:uint8 (rows, K / 2) ── GatherBlockQuantized ── y

    A table that is the weight of a product, too, is stored once; onnxruntime gives the lookup its
    own shape of it when it loads the model. Runs after the products were lowered::

        Wᵀ ── DQ ── Gather(axis 1) ── Transpose         W ─┬─ Reshape ── GatherBlockQuantized
        W ── MatMulNBits                                   └─ MatMulNBits
    """
    changed = False
    for node in nodes(model):
        if (table := _table(node)) is not None:
            _lower(model, node, table)
            changed = True
    return changed


@dataclass(frozen=True)
class _Table:
    """A table for the kernel.

    Attributes:
        name: of what holds the integers.
        q: int16, (rows, K).
        scales: float32, (rows, blocks).
        zeros: int32, (rows, blocks), or None where all are 0.
        size: of blocks.
        done: the lookup, and what turns its result back into rows if need be.
    """

    name: str
    q: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    size: int
    done: list[ir.Node]


def _table(node: ir.Node) -> _Table | None:
    dq = producer(node, 0)
    if not is_op(node, "Gather") or dq is None or not is_op(dq, "DequantizeLinear"):
        return None
    blocks, q = blocks_of(dq), array(dq.inputs[0])
    if blocks is None or q is None:
        return None
    turn, axis = turn_of(node), attribute(node, "axis", 0) % 2
    if axis == blocks.axis or (axis == 1 and turn is None):
        return None
    rows, scales, zeros = np.asarray(q, np.int16), blocks.scales, blocks.zeros
    if axis == 1:
        rows, scales, zeros = rows.T, scales.T, None if zeros is None else zeros.T
    done = [node] if turn is None or axis == 0 else [node, turn]
    name = dq.inputs[0].name if dq.inputs[0] is not None else None
    return _Table(name or "table", rows, scales, zeros, blocks.size, done)


def _lower(model: ir.Model, node: ir.Node, table: _Table) -> None:
    bits = fewest_bits(table.q, table.zeros, table.size)
    lift = 1 << (bits - 1) if table.zeros is None or table.q.min() < 0 else 0
    packed = pack((table.q + lift).astype(np.uint8), bits)
    scales = np.ascontiguousarray(table.scales, np.float32)
    inputs = [
        _bytes(model, node, f"{table.name}_packed", packed),
        node.inputs[1],
        shared_constant(model, f"{table.name}_scales", scales),
    ]
    if table.zeros is not None:
        zeros = pack((table.zeros + lift).astype(np.uint8), bits)
        inputs.append(shared_constant(model, f"{table.name}_zeros", zeros))
    attributes = {"bits": bits, "block_size": table.size, "gather_axis": 0, "quantize_axis": 1}
    lookup = insert(
        model, node, "GatherBlockQuantized", inputs,
        base=f"{table.done[-1].outputs[0].name}_rows", attributes=attributes, domain=MICROSOFT,
    )  # fmt: skip
    replace(table.done, lookup.outputs[0])


def _bytes(model: ir.Model, node: ir.Node, name: str, packed: np.ndarray) -> ir.Value:
    """The bytes of the table (rows, bytes of a row); of those of a product, if it has the same."""
    known = model.graph.initializers.get(name)
    held = constant(known)
    if known is None or held is None or held.dtype != ir.DataType.UINT8:
        return add_constant(model, name, packed)
    rows, width = packed.shape
    wide = held.numpy().reshape(rows, -1)
    if not np.array_equal(wide[:, :width], packed):
        return add_constant(model, name, packed)
    shape = shared_constant(model, f"{name}_shape", np.array([rows, -1], np.int64))
    view = insert(model, node, "Reshape", [known, shape], base=f"{name}_rows")
    if wide.shape[1] > width:  # the product's last block is padded
        edges = [
            shared_constant(model, f"qgraph/number_{edge}", np.array([edge], np.int64))
            for edge in (0, width, 1)
        ]
        typed(view, ir.DataType.UINT8, wide.shape)
        view = insert(model, node, "Slice", [*view.outputs, *edges], base=f"{name}_unpadded")
    return typed(view, ir.DataType.UINT8, packed.shape)
