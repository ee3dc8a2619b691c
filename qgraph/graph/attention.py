"""Attention that keeps its past as integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.graph.builder import Builder
from qgraph.graph.editing import insert, redirect, shared_constant, typed
from qgraph.graph.reading import MICROSOFT, attribute, input_of, is_op
from qgraph.numerics.packing import byte_table

ATTENTION = "GroupQueryAttention"
PAST, PRESENT, SCALES = 3, 1, 12
"""Where the key of each stands among the operator's inputs and outputs; the value follows it."""
SETTINGS = "k_quant_type", "v_quant_type", "kv_cache_bit_width"


def keeps_integers(node: ir.Node) -> bool:
    """Whether `node` is attention whose past and present are integers."""
    return is_op(node, ATTENTION, domain=MICROSOFT) and "kv_cache_bit_width" in node.attributes


def attend_in_float(model: ir.Model, node: ir.Node) -> None:
    """Convert the past before attention, and the present behind it, instead of within.

    ::

        past:s8 ── GroupQueryAttention ── present:s8
        past:s8 ── Cast ── Mul ── GroupQueryAttention ── Div ── Round ── Clip ── Cast ── present:s8

    For many tokens at once that is faster: the operator reads integers token by token.
    """
    bits = int(attribute(node, "kv_cache_bit_width", 8))
    for place in range(2):
        scale = input_of(node, SCALES + place)
        past, present = input_of(node, PAST + place), node.outputs[PRESENT + place]
        node.replace_input_with(PAST + place, _as_floats(model, node, past, scale, bits))
        _keep_as_integers(model, node, present, scale, bits)
    for place in range(2):
        node.replace_input_with(SCALES + place, None)
    for setting in SETTINGS:
        del node.attributes[setting]


def _as_floats(
    model: ir.Model, node: ir.Node, past: ir.Value, scale: ir.Value, bits: int
) -> ir.Value:
    graph = Builder(model, node, f"{past.name}_")
    if bits == 8:
        values = graph.op("Cast", past, to=int(ir.DataType.FLOAT))
    else:
        table = shared_constant(model, "qgraph/bytes_4_8", byte_table(4, 8))
        index = graph.op("Cast", past, to=int(ir.DataType.INT32), dtype=ir.DataType.INT32)
        # Gather makes pairs of a byte: (batch, heads, positions, size / 2, 2).
        pairs = graph.op("Gather", table, index)
        values = graph.op("Reshape", pairs, _sizes(graph, past, scale))
    return graph.op("Mul", values, scale)


def _sizes(graph: Builder, past: ir.Value, scale: ir.Value) -> ir.Value:
    """The shape of a cache of floats; an empty one does not tell the size of what -1 stands for."""
    first = graph.op("Shape", past, dtype=ir.DataType.INT64, start=0, end=3)
    last = graph.op("Shape", scale, dtype=ir.DataType.INT64, start=3, end=4)
    return graph.op("Concat", first, last, dtype=ir.DataType.INT64, axis=0)


def _keep_as_integers(
    model: ir.Model, node: ir.Node, present: ir.Value, scale: ir.Value, bits: int
) -> None:
    limit, dtype = 1 << (bits - 1), present.dtype
    low, high = (
        shared_constant(model, f"qgraph/number_{number}_f32", np.float32(number))
        for number in (-limit, limit - 1)
    )
    steps = [("Div", [scale]), ("Round", []), ("Clip", [low, high])]
    value, anchor = present, node
    for op_type, others in steps:
        anchor = insert(
            model, anchor, op_type, [value, *others], base=f"{present.name}_{op_type}", after=True
        )
        value = typed(anchor, ir.DataType.FLOAT, None)
    first = next(use.node for use in present.uses())
    if bits == 4:
        value, anchor = _in_pairs(model, anchor, value, present)
    to = {"to": int(dtype or ir.DataType.INT8)}
    cast = insert(
        model, anchor, "Cast", [value], base=f"{present.name}_q", attributes=to, after=True
    )
    q = typed(cast, dtype, present.shape)
    present.type, present.shape = ir.TensorType(ir.DataType.FLOAT), None
    redirect(present, q, keep=[first])


def _in_pairs(
    model: ir.Model, anchor: ir.Node, value: ir.Value, present: ir.Value
) -> tuple[ir.Value, ir.Node]:
    """Two integers of 4 bits as one of 8, the first in the low bits."""
    middle = shared_constant(model, "qgraph/number_8_f32", np.float32(8))
    weights = shared_constant(model, "qgraph/nibbles", np.array([[1], [16]], np.float32))
    pairs = shared_constant(model, "qgraph/pairs", np.array([0, 0, 0, -1, 2], np.int64))
    whole = shared_constant(model, "qgraph/last_axis", np.array([-1], np.int64))
    for op_type, other in (
        ("Add", middle),
        ("Reshape", pairs),
        ("MatMul", weights),
        ("Squeeze", whole),
    ):
        anchor = insert(
            model, anchor, op_type, [value, other], base=f"{present.name}_{op_type}", after=True
        )
        value = typed(anchor, ir.DataType.FLOAT, None)
    return value, anchor
