"""What is true of operators, whatever runs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.graph.reading import array, is_op

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)

_LOWEST = {
    "Relu": 0.0,
    "Abs": 0.0,
    "Exp": 0.0,
    "Softplus": 0.0,
    "Sigmoid": 0.0,
    "HardSigmoid": 0.0,
    "Softmax": 0.0,
    "Gelu": -0.17,
    "HardSwish": -0.375,
}
_KEEPS = ("Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Dropout", "Cast")


def lowest_value(value: ir.Value | None) -> float | None:
    """A bound below which `value` never is, where an activation function gives one; else None.

    It survives what moves values, and masks. Factors that differ keep only a bound of 0: the least
    value of the largest factor is far below those of most channels, and a grid of tokens that has
    to reach it is coarser than one without a bound.
    """
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if is_op(node, *_LOWEST):
        return _LOWEST[node.op_type]
    if is_op(node, *_KEEPS):
        return lowest_value(node.inputs[0])
    if is_op(node, "Mul"):
        for factors, other in (node.inputs, node.inputs[::-1]):
            f = array(factors)
            if f is not None and f.size and (f >= 0).all() and np.isfinite(f).all():
                return _masked_bound(lowest_value(other), f)
    return None


def _masked_bound(bound: float | None, factors: NDArray[np.floating[Any]]) -> float | None:
    largest = float(factors.max())
    if not bound or ((factors == 0) | (factors == largest)).all():
        return None if bound is None else bound * largest
    return None


MOVES = ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")
"""Operators that move values without computing new ones: input and output share a scale."""
