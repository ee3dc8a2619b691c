"""Weights of products that stay float, stored in 16 bits where they are multiplied in 16 bits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.graph.editing import add_constant, insert, shared_constant, typed
from qgraph.graph.reading import (
    constant,
    constant_array,
    dims,
    input_of,
    is_op,
    nodes,
    producer,
    release,
)

LARGE = 2.0**8
"""Weights above this do not stay as they are in float16: their products may leave its range."""


def narrow_products(model: ir.Model, dtype: ir.DataType) -> None:
    """Store the float weights of products in a type of 16 bits.

    ::

        W:f32 ── MatMul        W:f16 ── Cast(f32) ── MatMul

    Weights that something else reads, too, stay as they are. Where some are too large for float16,
    the data takes a power of two from them.
    """
    narrowed: dict[ir.Value, tuple[ir.Value, float]] = {}
    for node in nodes(model):
        if not is_op(node, "MatMul", "Gemm", "Conv", "ConvTranspose"):
            continue
        weight = node.inputs[1]
        if weight is None or constant(weight) is None or weight.dtype != ir.DataType.FLOAT:
            continue
        if len(dims(weight)) < 2 or any(use.idx != 1 for use in weight.uses()):
            continue
        if weight not in narrowed:
            narrowed[weight] = _narrowed(model, weight, dtype)
        small, factor = narrowed[weight]
        to = {"to": int(ir.DataType.FLOAT)}
        cast = insert(model, node, "Cast", [small], base=f"{small.name}_wide", attributes=to)
        node.replace_input_with(1, typed(cast, ir.DataType.FLOAT, weight.shape))
        if factor != 1:
            x = input_of(node, 0)
            gain = shared_constant(model, f"qgraph/gain_{factor:.0f}", np.float32(factor))
            scaled = insert(model, node, "Mul", [x, gain], base=f"{x.name}_gained")
            node.replace_input_with(0, typed(scaled, ir.DataType.FLOAT, x.shape))


def _narrowed(model: ir.Model, weight: ir.Value, dtype: ir.DataType) -> tuple[ir.Value, float]:
    """The weight in that type, divided by a power of two, and this."""
    w = constant_array(weight)
    peak = float(np.abs(w).max(initial=0))
    factor = (
        2.0 ** np.floor(np.log2(peak)) if peak > LARGE and dtype == ir.DataType.FLOAT16 else 1.0
    )
    small = (w / np.float32(factor)).astype(dtype.numpy())
    release(weight)
    return add_constant(model, f"{weight.name}_{dtype.name.lower()}", small), factor


def without_casts(model: ir.Model) -> ir.Model:
    """A copy in which products read such weights as they are stored: autocast takes them so."""
    copy = model.clone()
    for node in nodes(copy):
        cast = producer(node, 1)
        if is_op(node, "MatMul", "Gemm", "Conv", "ConvTranspose") and is_op(cast, "Cast"):
            stored = cast.inputs[0]
            if constant(stored) is not None:
                node.replace_input_with(1, stored)
    return copy
