"""Per-token quantization spelled out in the operators that onnxruntime runs fastest on CPU."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from qgraph.graph.editing import insert, redirect, replace, shared_constant, typed
from qgraph.graph.flow.tokens import same_tokens
from qgraph.graph.functions import QUANTIZE_PER_TOKEN, is_call
from qgraph.graph.reading import MICROSOFT, array, dims, input_of, is_op, nodes, opset, producer
from qgraph.graph.sites import only_user
from qgraph.numerics.tokens import SMALLEST_TOKEN

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
    quantizers = [node for node in nodes(model) if is_call(node, QUANTIZE_PER_TOKEN)]
    tokens = same_tokens(model, [input_of(node, 0) for node in quantizers])
    known: dict[tuple[object, ...], ir.Value] = {}
    for node, alike in zip(quantizers, tokens, strict=True):
        _lower(model, node, alike, known)
    return bool(quantizers)


def defer_scales(model: ir.Model) -> bool:
    """Let a token's magnitude pass by a gating product instead of through it.

    Where the result of one integer product is multiplied elementwise and quantized per token again,
    as `up` is in a gated MLP, its own token magnitude need not be multiplied into all of its
    channels: quantization relative to the largest one does not see it::

        acc ── Mul(largest) ── Mul(gate) ── QuantizePerToken ── q, largest'
        acc ────────────────── Mul(gate) ── QuantizePerToken ── q, largest' · largest
    """
    changed = False
    for quantizer in [node for node in nodes(model) if is_call(node, QUANTIZE_PER_TOKEN)]:
        gating, floor = producer(quantizer, 0), array(quantizer.inputs[3])
        if not is_op(gating, "Mul") or only_user(gating.outputs[0]) is None:
            continue
        if floor is None or floor > SMALLEST_TOKEN:
            continue  # the floor bounds magnitudes that include the one to be deferred
        for index in range(len(gating.inputs)):
            scaling = producer(gating, index)
            if scaling is None or not _scales_tokens(scaling):
                continue
            largest = quantizer.outputs[1]
            total = insert(
                model, quantizer, "Mul", [largest, scaling.inputs[1]],
                base=f"{largest.name}_total", after=True,
            )  # fmt: skip
            redirect(largest, typed(total, ir.DataType.FLOAT, None), keep=[total])
            gating.replace_input_with(index, scaling.inputs[0])
            changed = True
            break
    return changed


def _scales_tokens(node: ir.Node) -> bool:
    """Whether `node` multiplies an integer product by its tokens' magnitudes, for one user."""
    if not is_op(node, "Mul") or only_user(node.outputs[0]) is None:
        return False
    product, largest = producer(node, 0), producer(node, 1)
    return is_op(product, "MatMulIntegerToFloat", domain=MICROSOFT) and is_call(
        largest, QUANTIZE_PER_TOKEN
    )


def _lower(
    model: ir.Model, node: ir.Node, alike: object, known: dict[tuple[object, ...], ir.Value]
) -> None:
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
        largest = add("ReduceMax", magnitude.outputs, base=f"{base}_max", attributes=reduced)
    lowest = array(floor)
    if lowest is None or lowest > SMALLEST_TOKEN:
        largest = add("Max", [largest.outputs[0], floor], base=f"{base}_floored")
    width = dims(x)[-1] if len(dims(x)) > 1 else None  # blocks need a second axis
    if opset(model) >= BLOCKED and width is not None:
        scale = add("Mul", [largest.outputs[0], step], base=f"{base}_scale")
        zeros = _zero_points(model, node, largest.outputs[0], alike, known)
        q = add(
            "QuantizeLinear", [x, typed(scale, ir.DataType.FLOAT, None), zeros],
            base=f"{base}_rounded", attributes={"axis": -1, "block_size": width},
        )  # fmt: skip
    else:
        scaled = add("Div", [x, largest.outputs[0]], base=f"{base}_scaled")
        inputs = [typed(scaled, x.dtype, x.shape), step, zero]
        q = add("QuantizeLinear", inputs, base=f"{base}_rounded")
    typed(magnitude, x.dtype, x.shape)
    replace(node, q.outputs[0], largest.outputs[0], takes_name=False)


def _zero_points(
    model: ir.Model,
    node: ir.Node,
    largest: ir.Value,
    alike: object,
    known: dict[tuple[object, ...], ir.Value],
) -> ir.Value:
    """The zero point once for each token, made once for all that have the same tokens."""
    zero = node.inputs[2]
    key = (id(node.graph), zero, alike)
    if key not in known:
        base = f"{largest.name}_tokens"
        shape = insert(model, node, "Shape", [largest], base=base)
        inputs = [zero, typed(shape, ir.DataType.INT64, None)]
        zeros = insert(model, node, "Expand", inputs, base=f"{base}_zero")
        known[key] = typed(zeros, ir.DataType.UINT8, None)
    return known[key]
