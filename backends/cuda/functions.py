"""Products of the target `cuda`: functions of the domain `qgraph` whose bodies are their meaning.

Any runtime can run them; modules run them as operators of torch (`ops`), with the same integers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from qgraph.graph.functions import DOMAIN

INT8_LINEAR = "Int8Linear"
INT8_LINEAR_WITH_BIAS = "Int8LinearWithBias"
"""With one input more: ONNX functions cannot leave out what is missing."""


def int8_linear(version: int) -> ir.Function:
    """(q, largest, weight, scale, zero) -> y = (q - zero) · weightᵀ · scale · largest.

    q uint8 (..., K) and largest float32 (..., 1) as QuantizePerToken makes them, weight int8 (N, K)
    as kernels read it, scale float32 (N,) with the grid's step in it, zero uint8. Products add up
    to an int32, and every float operation is rounded.
    """
    return _int8_linear(INT8_LINEAR, version, bias=False)


def int8_linear_with_bias(version: int) -> ir.Function:
    """The same, and a float32 bias (N,) added."""
    return _int8_linear(INT8_LINEAR_WITH_BIAS, version, bias=True)


def _int8_linear(name: str, version: int, bias: bool) -> ir.Function:
    names = ("q", "largest", "weight", "scale", "zero", *(("bias",) if bias else ()))
    inputs, body = [ir.Value(name=name) for name in names], Tape()
    q, largest, weight, scale, zero = inputs[:5]
    # Signed weights: u8·s8 sums saturate in onnxruntime on CPUs without VNNI, u8·u8 ones nowhere.
    wide = body.op("Cast", [weight], {"to": int(ir.DataType.INT32)})
    wide = body.op("Add", [wide, _constant(body, np.int32(128))])
    unsigned = body.op("Cast", [wide], {"to": int(ir.DataType.UINT8)})
    columns = body.op("Transpose", [unsigned], {"perm": [1, 0]})
    total = body.op("MatMulInteger", [q, columns, zero, _constant(body, np.uint8(128))])
    y = body.op("Mul", [body.op("Cast", [total], {"to": int(ir.DataType.FLOAT)}), scale])
    y = body.op("Mul", [y, largest])
    if bias:
        y = body.op("Add", [y, inputs[5]])
    graph = ir.Graph(inputs, [y], nodes=body.nodes, opset_imports={"": version}, name=name)
    return ir.Function(domain=DOMAIN, name=name, graph=graph, attributes=[])


def _constant(body: Tape, number: np.generic) -> ir.Value:
    return body.op("Constant", [], {"value": ir.Tensor(np.asarray(number))})
