"""Per-token quantization spelled out in the operators that onnxruntime runs fastest on CPU."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from qgraph.functions import QUANTIZE_PER_TOKEN, is_call
from qgraph.graph import array, dims, insert, nodes, opset, redirect, shared_constant
from qgraph.numerics import SMALLEST_SCALE

BLOCKED = 21
"""From this opset on, QuantizeLinear takes a scale for each block."""


def lower_quantizers(model: ir.Model) -> bool:
    """QuantizePerToken as a few standard operators, the token being one block of QuantizeLinear.

    ::

        x ── Abs ── ReduceMax ── largest ── Mul(step) ── QuantizeLinear(x, axis=-1, block_size=K)

    That saves the pass over all of x that dividing it would take; models of older opsets divide.
    There is no guard against tokens of zeros: 0/0 rounds to some integer, and what it becomes is
    multiplied by the token's magnitude 0.
    """
    found = [node for node in nodes(model) if is_call(node, QUANTIZE_PER_TOKEN)]
    for node in found:
        _lower(model, node)
    return bool(found)


def _lower(model: ir.Model, node: ir.Node) -> None:
    x, step, zero, floor = node.inputs
    assert x is not None
    add = partial(insert, model, node)
    base = node.outputs[0].name or "q"
    magnitude = add("Abs", [x], base=f"{base}_abs")
    if opset(model) >= 18:
        axes = shared_constant(model, "qgraph/last_axis", np.array([-1], np.int64))
        largest = add("ReduceMax", [magnitude.outputs[0], axes], base=f"{base}_max")
    else:
        reduced = {"axes": [-1]}
        largest = add("ReduceMax", magnitude.outputs, base=f"{base}_max", attributes=reduced)  # type: ignore[arg-type]
    lowest = array(floor)
    if lowest is None or lowest > SMALLEST_SCALE:
        largest = add("Max", [largest.outputs[0], floor], base=f"{base}_floored")
    width = dims(x)[-1] if len(dims(x)) > 1 else None  # blocks need a second axis
    if opset(model) >= BLOCKED and width is not None:
        scale = add("Mul", [largest.outputs[0], step], base=f"{base}_scale")
        shape = add("Shape", largest.outputs, base=f"{base}_tokens")
        zeros = add("Expand", [zero, shape.outputs[0]], base=f"{base}_zero")
        q = add(
            "QuantizeLinear", [x, scale.outputs[0], zeros.outputs[0]],
            base=f"{base}_rounded", attributes={"axis": -1, "block_size": width},
        )  # fmt: skip
        scale.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        shape.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        zeros.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    else:
        scaled = add("Div", [x, largest.outputs[0]], base=f"{base}_scaled")
        scaled.outputs[0].type, scaled.outputs[0].shape = x.type, x.shape
        q = add("QuantizeLinear", [scaled.outputs[0], step, zero], base=f"{base}_rounded")
    magnitude.outputs[0].type, magnitude.outputs[0].shape = x.type, x.shape
    largest.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    q.outputs[0].type, q.outputs[0].shape = ir.TensorType(ir.DataType.UINT8), x.shape
    redirect(node.outputs[0], q.outputs[0])
    redirect(node.outputs[1], largest.outputs[0])
    graph = node.graph
    assert graph is not None
    graph.remove(node, safe=True)
