"""Floats of 8 bits."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.graph.editing import add_constant
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.reference import along
from qgraph.weights.formats.codebook import _Nodes


def write_float8(model: ir.Model, base: str, weight: Quantized) -> ir.Value:
    """The float weight behind a float8 one.

    ::

        W:float8e4m3fn ── Cast(float) ── Mul(scale) ── W

    No DequantizeLinear: onnxruntime would neither compute it once, when it loads the model, nor
    leave a product of two of them to float in every version.

    Returns:
        float32 with the weight's shape, computed first of all in the main graph.
    """
    graph, shape = _Nodes(model, base), weight.q.shape
    scale = weight.scale if weight.axis is None else along(weight.scale, weight.axis, len(shape))
    q = add_constant(model, f"{base}_q", weight.q)
    wide = graph.op("Cast", q, to=int(ir.DataType.FLOAT), shape=shape)
    return graph.op("Mul", wide, add_constant(model, f"{base}_scale", scale), shape=shape)
