"""Float weights that onnxruntime would round by itself, hidden from it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.graph.editing import add_constant, insert, typed
from qgraph.graph.ops import MOVES
from qgraph.graph.reading import array, attribute, constant, dims, is_op, nodes, producer


def shield_float(model: ir.Model) -> bool:
    """Keep onnxruntime from quantizing what was left float on purpose.

    Where a Conv, ConvTranspose or Gemm with a float weight reads a DequantizeLinear of one scale,
    or what only moves its data, onnxruntime rounds the weight to int8 per tensor on loading (its
    WeightBiasQuantization), without asking: EfficientNet-lite0 falls from 23 to 8 dB. A
    dequantization with the same scale written out for each channel means the same and is left
    alone::

        q ── DQ(s) ── Conv(W:f32)          q ── DQ([s, s, ... s], axis=1) ── Conv(W:f32)
    """
    changed = False
    for node in nodes(model):
        if not is_op(node, "Conv", "ConvTranspose", "Gemm"):
            continue
        weight = node.inputs[1]
        if weight is None or weight.dtype != ir.DataType.FLOAT or not _computed_once(weight):
            continue
        reader = node
        while (before := _source(reader)) is not None and is_op(before, *MOVES):
            reader = before
        dq, axis = _source(reader), _long_axis(reader)
        if dq is None or not is_op(dq, "DequantizeLinear") or axis is None:
            continue
        constants = [array(v) for v in dq.inputs[1:] if v is not None]
        if any(p is None or p.size != 1 for p in constants):
            continue
        value, (index, size) = dq.outputs[0], axis
        parameters = [
            add_constant(model, f"{value.name}_channels", np.full(size, p.reshape(()), p.dtype))
            for p in constants
            if p is not None
        ]
        shielded = insert(
            model, reader, "DequantizeLinear", [dq.inputs[0], *parameters],
            base=f"{value.name}_float", attributes={"axis": index},
        )  # fmt: skip
        reader.replace_input_with(0, typed(shielded, value.dtype, value.shape))
        changed = True
    return changed


def _computed_once(value: ir.Value) -> bool:
    """Whether runtimes make a constant of it when they load the model; of no DequantizeLinear."""
    node = value.producer()
    if node is None or constant(value) is not None:
        return constant(value) is not None
    if is_op(node, "DequantizeLinear"):
        return False
    return all(v is None or _computed_once(v) for v in node.inputs)


def _source(node: ir.Node) -> ir.Node | None:
    """The node that computes the data of `node`."""
    return producer(node, 0)


def _long_axis(node: ir.Node) -> tuple[int, int] | None:
    """An axis of the data of `node` whose length is known and above 1, and that length."""
    sizes = list(enumerate(dims(node.inputs[0])))
    if is_op(node, "Conv", "ConvTranspose"):
        shape, group = dims(node.inputs[1]), int(attribute(node, "group", 1))
        channels = shape[0] if node.op_type == "ConvTranspose" else (shape[1] or 0) * group
        sizes = [(1, channels), *sizes]
    elif len(sizes) > 1:
        sizes = [sizes[1], *sizes]
    return next(((axis, size) for axis, size in sizes if size and size > 1), None)
