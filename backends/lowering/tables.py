"""Lowering of lookups in quantized tables, shared by the backends that run ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

import numpy as np
import onnx_ir as ir

from qgraph.backends.lowering.block_products import UNPACKED, PackedWeight
from qgraph.backends.lowering.match import leading, stored, symmetric_scale
from qgraph.graph.builder import Builder
from qgraph.graph.editing import add_constant, insert, redirect, replace, shared_constant, typed
from qgraph.graph.reading import array, attribute, dims, input_of, is_op, nodes, producer
from qgraph.graph.sites import only_user


def lower_tables(model: ir.Model, packed: Mapping[ir.Value, PackedWeight] = UNPACKED) -> bool:
    """Gather of a dequantized table: gather integers and their rows' scales, then multiply.

    ::

        W:int8 ── DQ(axis 0) ── Gather ── y      W:int8 ── Gather ── Cast ── Mul ── y
                          ids ──┘                scale ─── Gather ───────────┘

    Where the rows are columns of a product's weight, they are what is stored; runtimes turn them
    back for the product when they load the model::

        W ── DQ(axis 1) ── Gather(axis 1) ── Transpose ── y      Wᵀ ── Gather ── Cast ── Mul ── y
        └─── DQ(axis 1) ── MatMul                                └─── Transpose ── DQ ── MatMul

    Where another kernel has the integers packed, rows are gathered from its bytes, so that the
    model stores them once::

        bytes (N, blocks, size) ── Gather ── Reshape ── Cast ── Sub(128) ── Mul ── y

    Args:
        packed: the weights that were packed, by their integers.
    """
    changed = False
    for node in nodes(model):
        dq = producer(node, 0)
        if not is_op(node, "Gather") or dq is None or not is_op(dq, "DequantizeLinear"):
            continue
        turn = turn_of(node)
        axis = 0 if turn is None else 1
        table, scales = array(stored(dq.inputs[0])), symmetric_scale(dq, axis)
        if table is None or scales is None or attribute(node, "axis", 0) % table.ndim != axis:
            continue
        if scales.shape != tuple(dims(dq.inputs[0])[axis : axis + 1]):
            continue
        column = scales.reshape(-1, *[1] * (table.ndim - 1))
        held = packed.get(input_of(dq, 0))
        _lower_table(model, node, turn, dq, column, held if _has_rows(held, node) else None)
        changed = True
    return changed


def turn_of(node: ir.Node) -> ir.Node | None:
    """The Transpose that makes rows of the columns that `node` gathers from a matrix, or None."""
    user = only_user(node.outputs[0])
    if user is None or not is_op(user, "Transpose") or attribute(node, "axis", 0) != 1:
        return None
    perm = user.attributes.get("perm")
    if perm is None or len(dims(node.inputs[0])) != 2:
        return None
    order = list(perm.as_ints())
    return user if order == [*range(1, len(order)), 0] else None


def _as_rows(model: ir.Model, matrix: ir.Value) -> ir.Value:
    """The transpose of a constant matrix as what is stored; other users of it turn it back."""
    held, q = stored(matrix), array(matrix)
    if q is None:
        assert held is not None
        return held
    rows = add_constant(model, f"{matrix.name}_T", np.ascontiguousarray(q.T))
    order = {"perm": [1, 0]}
    back = insert(
        model, model.graph[0], "Transpose", [rows], base=f"{matrix.name}_turned", attributes=order
    )
    redirect(matrix, typed(back, matrix.dtype, matrix.shape))
    return rows


def _lower_table(
    model: ir.Model,
    node: ir.Node,
    turn: ir.Node | None,
    dq: ir.Node,
    scales: np.ndarray,
    packed: PackedWeight | None,
) -> None:
    table, base = input_of(dq, 0), (turn or node).outputs[0].name or "table"
    if turn is not None and packed is None:
        table = _as_rows(model, table)
    column = add_constant(model, f"{input_of(dq, 1).name}_rows", scales)
    if packed is not None:
        wide = _packed_rows(model, node, packed, f"{base}_q")
    else:
        wide = insert(model, node, "Gather", [table, node.inputs[1]], base=f"{base}_q")
    scale = insert(model, node, "Gather", [column, node.inputs[1]], base=f"{base}_scale")
    if packed is None:
        integers, to = typed(wide, table.dtype, None), {"to": int(ir.DataType.FLOAT)}
        wide = insert(model, node, "Cast", [integers], base=f"{base}_cast", attributes=to)
    factors = [typed(factor, ir.DataType.FLOAT, None) for factor in (wide, scale)]
    y = insert(model, node, "Mul", factors, base=f"{base}_mul")
    replace([node] if turn is None else [node, turn], y.outputs[0])


def _has_rows(packed: PackedWeight | None, node: ir.Node) -> TypeGuard[PackedWeight]:
    """Whether rows can be gathered from these bytes, each of which is one integer."""
    whole = packed is not None and packed.bits == 8 and packed.zeros is None
    return whole and input_of(node, 1).shape is not None


def _packed_rows(model: ir.Model, node: ir.Node, packed: PackedWeight, base: str) -> ir.Node:
    """Rows of integers as floats, gathered from the bytes of a product's weight."""
    graph, uint8 = Builder(model, node, f"{base}_"), ir.DataType.UINT8
    ids = input_of(node, 1)
    axes = [0] * len(dims(ids))
    name = f"qgraph/rows_{len(axes)}"
    shape = shared_constant(model, name, np.array([*axes, -1], np.int64))
    rows = graph.op("Gather", packed.bytes, ids, dtype=uint8)
    rows = graph.op("Reshape", rows, shape, dtype=uint8)
    if packed.filled:
        rows = leading(graph, rows, packed.k, -1, uint8)
    middle = shared_constant(model, "qgraph/middle_8", np.float32(128))
    wide = graph.op("Cast", rows, to=int(ir.DataType.FLOAT))
    return insert(model, node, "Sub", [wide, middle], base=f"{base}_sub")
