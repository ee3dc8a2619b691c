"""Quantized products as calls of the functions that kernels stand for."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qgraph.backends.cuda.functions import (
    INT8_LINEAR,
    INT8_LINEAR_WITH_BIAS,
    int8_linear,
    int8_linear_with_bias,
)
from qgraph.backends.lowering.functions import inline_functions
from qgraph.backends.lowering.match import gemm_bias, symmetric_scale
from qgraph.errors import QGraphError
from qgraph.graph.editing import add_constant, insert, replace
from qgraph.graph.functions import (
    DEQUANTIZE_PER_TOKEN,
    DOMAIN,
    QUANTIZE_PER_TOKEN,
    declare,
    is_call,
)
from qgraph.graph.reading import array, attribute, constant, dims, input_of, is_op, nodes, producer
from qgraph.graph.sites import only_user

KEPT = frozenset({QUANTIZE_PER_TOKEN, INT8_LINEAR, INT8_LINEAR_WITH_BIAS})
"""Functions that stay calls: modules run them as operators."""


def lower_to_functions(model: ir.Model) -> bool:
    """Products of dequantized data and weights as one function each.

    ::

        q, largest ── DequantizePerToken ── MatMul ── Add(bias) ── y
                          W:int8 (K, N) ── DQ ──┘

        q, largest ── Int8LinearWithBias(Wᵀ:int8 (N, K), scale · step, zero, bias) ── y

    Raises:
        QGraphError: there is nothing to lower.
    """
    weights = _Weights(model)
    found = [node for node in nodes(model) if _is_product(node)]
    if not found:
        raise QGraphError(
            "nothing of this model is quantized as the target cuda runs it: use recipe w8a8, "
            "smoothquant, llm-int8, zeroquant or dynamic, with 8 bits"
        )
    for node in found:
        _lower(model, node, weights)
    inline_functions(model, keep=KEPT)
    return True


def _is_product(node: ir.Node) -> bool:
    """Whether it multiplies tokens in uint8 with a constant weight in int8."""
    if not is_op(node, "MatMul", "Gemm") or attribute(node, "transA", 0):
        return False
    data, weight = producer(node, 0), producer(node, 1)
    if not is_call(data, DEQUANTIZE_PER_TOKEN) or not is_op(weight, "DequantizeLinear"):
        return False
    q = weight.inputs[0]
    if constant(q) is None or q is None or q.dtype != ir.DataType.INT8 or len(dims(q)) != 2:
        return False
    return symmetric_scale(weight, 0 if attribute(node, "transB", 0) else 1) is not None


@dataclass
class _Weights:
    """Weights as kernels read them, each once for all its products."""

    model: ir.Model
    turned: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def rows(self, weight: ir.Value, transposed: bool) -> ir.Value:
        """int8 (N, K).

        Args:
            transposed: it is so already.
        """
        if transposed:
            return weight
        if weight not in self.turned:
            q = array(weight)
            assert q is not None
            rows = np.ascontiguousarray(q.T)
            self.turned[weight] = add_constant(self.model, f"{weight.name}_rows", rows)
        return self.turned[weight]


def _lower(model: ir.Model, node: ir.Node, weights: _Weights) -> None:
    data, weight = producer(node, 0), producer(node, 1)
    assert data is not None
    assert weight is not None
    transposed = bool(attribute(node, "transB", 0))
    rows = weights.rows(input_of(weight, 0), transposed)
    q, largest, step, zero = data.inputs
    scale, steps = symmetric_scale(weight, 0 if transposed else 1), array(step)
    assert scale is not None
    assert steps is not None
    scale = scale.reshape(-1) * np.float32(attribute(node, "alpha", 1.0)) * steps
    channels = np.broadcast_to(scale, (dims(rows)[0] or 0,)).astype(np.float32)
    last, bias = _bias(model, node, int(channels.size))
    name, make = (
        (INT8_LINEAR, int8_linear)
        if bias is None
        else (INT8_LINEAR_WITH_BIAS, int8_linear_with_bias)
    )
    declare(model, name, make)
    inputs = [q, largest, rows, add_constant(model, f"{rows.name}_scale", channels), zero]
    call = insert(
        model, last, name, [*inputs, *([] if bias is None else [bias])],
        base=f"{node.name}_int8", domain=DOMAIN,
    )  # fmt: skip
    call.metadata_props.update(node.metadata_props)
    replace(last, call.outputs[0])
    call.name = node.name


def _bias(model: ir.Model, node: ir.Node, channels: int) -> tuple[ir.Node, ir.Value | None]:
    """The node whose result has the bias in it, and the bias: of a Gemm, or of an Add behind."""
    if is_op(node, "Gemm"):
        return node, gemm_bias(model, node)
    user = only_user(node.outputs[0])
    if is_op(user, "Add"):
        other = user.inputs[1 if user.inputs[0] is node.outputs[0] else 0]
        if constant(other) is not None and dims(other) == [channels]:
            return user, other
    return node, None
