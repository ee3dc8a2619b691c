"""What is true of operators, whatever runs them: a table for each fact.

The names are of ONNX's own domain, unless a table says otherwise. What a target or a pass chooses
stands in its own module, made of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.graph.reading import array, is_op, source_of

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
"""The types of numbers that weights and data have before they are quantized."""

# ------------------------------------------------------------------------------- moving elements

RESHAPES = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})
"""The elements stay, in the same order."""

KEEPS = RESHAPES | {"Dropout", "Identity", "Transpose"}
"""The elements stay, all of them and no others (of a Dropout, when it does not train)."""

COPIES = KEEPS | {"Expand", "Slice", "Split"}
"""Every element comes from the first input: some may be left out, or stand there twice."""

MOVES = RESHAPES | {"MaxPool", "Transpose"}
"""Input and output share a scale, since no value is new; runtimes have them for integers, too."""

# ------------------------------------------------------------------------------------- functions

ACTIVATIONS = frozenset({
    "Celu", "Clip", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu",
    "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh", "ThresholdedRelu",
})  # fmt: skip
"""Activation functions of one value; Erf is what is left of a Gelu that is written out."""

FUSED_ACTIVATIONS = frozenset({"BiasGelu", "BiasSplitGelu", "FastGelu", "Gelu", "QuickGelu"})
"""Those of the domain com.microsoft, some with a bias."""

CLAMPS = frozenset({"Clip", "Relu"})
"""Values beyond a bound become that bound, which rounding to a fixed scale does as well."""

HOMOGENEOUS = frozenset({"LeakyRelu", "PRelu", "Relu"})
"""Activation functions for which f(s·x) = s·f(x), s > 0: a factor passes through."""

POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
"""Pixels of a channel are pooled with each other alone; a factor passes through these, too."""


def dilated_average(node: ir.Node) -> bool:
    """Whether it averages pixels that are apart, which no integer kernel does."""
    dilations = node.attributes.get("dilations")
    return is_op(node, "AveragePool") and dilations is not None and set(dilations.as_ints()) != {1}


ARITHMETIC = frozenset({"Abs", "Add", "Div", "Max", "Min", "Mul", "Neg", "Pow", "Sqrt", "Sub"})
"""Element by element: what activation functions and their gates are written out with."""

LOWEST: Mapping[str, float] = {
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
"""A bound below which no result is."""

# ---------------------------------------------------------------------------------------- layers

LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Linear in the data and in the weight."""

RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
"""One step after the other, with weights for the data and for the state."""

NORMS: Mapping[str, tuple[int, ...]] = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
}
"""Normalizations, the fused ones in the domain com.microsoft: which inputs scale and shift."""

# ------------------------------------------------------------------------ rounding and chance

QUANTIZERS = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"})
"""Between numbers and integers."""

RANDOM = frozenset({
    "Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike",
})  # fmt: skip
"""Another result each time (of a Dropout, when it trains)."""


def lowest_value(value: ir.Value | None) -> float | None:
    """A bound below which `value` never is, where an activation function gives one; else None.

    It survives what moves values, and masks. Factors that differ keep only a bound of 0: the least
    value of the largest factor is far below those of most channels, and a grid of tokens that has
    to reach it is coarser than one without a bound.
    """
    node = source_of(value)
    if node is None:
        return None
    if is_op(node, *LOWEST):
        return LOWEST[node.op_type]
    if is_op(node, *KEEPS, "Cast"):
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
