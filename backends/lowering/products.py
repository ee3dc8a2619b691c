"""Lowerings of dynamic products, shared by the backends that run ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from qgraph.backends.lowering.match import dynamic_data, gemm_bias, symmetric_scale
from qgraph.graph.builder import Builder
from qgraph.graph.editing import add_constant, insert, replace, typed
from qgraph.graph.functions import DEQUANTIZE_PER_TOKEN, is_call
from qgraph.graph.reading import (
    MICROSOFT,
    array,
    attribute,
    constant,
    dims,
    input_of,
    is_op,
    nodes,
    producer,
    source_of,
)

Dialect = Literal["onnxruntime", "standard"]


@dataclass(frozen=True)
class _DynamicProduct:
    """A MatMul or Gemm of dynamically quantized data and a constant integer weight.

    Attributes:
        node: the float operator over two dequantized inputs.
        data: the node that dequantizes the data.
        weight: the DequantizeLinear of the weight.
    """

    node: ir.Node
    data: ir.Node
    weight: ir.Node


_WEIGHT_OPERATORS = (
    "Cast", "Div", "Gather", "Mul", "Reshape", "Round", "Slice", "Sub", "Transpose", "Unsqueeze",
)  # fmt: skip
"""What this package writes weights with."""


def lower_products(model: ir.Model, dialect: Dialect) -> bool:
    """Replace dynamically quantized MatMul and Gemm by integer products.

    `onnxruntime`: MatMulIntegerToFloat, and DynamicQuantizeMatMul where one scale serves the run.
    `standard`: MatMulInteger, Cast and Mul, which onnxruntime fuses to the same kernels itself.
    """
    changed = False
    for node in nodes(model):
        if (product := _match(node)) is not None:
            _lower_product(model, product, dialect)
            changed = True
    return changed


def _match(node: ir.Node) -> _DynamicProduct | None:
    if not is_op(node, "MatMul", "Gemm") or len(node.inputs) < 2:
        return None
    data = dynamic_data(node)
    weight = producer(node, 1)
    if data is None or weight is None or not is_op(weight, "DequantizeLinear"):
        return None
    trans_b, q = attribute(node, "transB", 0), weight.inputs[0]
    if q is None or q.dtype != ir.DataType.INT8 or len(dims(q)) != 2 or not _folds(q):
        return None
    if attribute(node, "transA", 0):
        return None
    if symmetric_scale(weight, 0 if trans_b else 1) is None:
        return None
    return _DynamicProduct(node, data, weight)


def _folds(value: ir.Value | None) -> bool:
    """Whether `value` is a constant, or made of constants alone: runtimes fold it on loading."""
    node = source_of(value)
    if is_op(node, *_WEIGHT_OPERATORS):
        return all(map(_folds, node.inputs))
    return constant(value) is not None


def _lower_product(model: ir.Model, product: _DynamicProduct, dialect: Dialect) -> None:
    node, per_token = product.node, is_call(product.data, DEQUANTIZE_PER_TOKEN)
    weight, scale = _weight(model, product)
    base = node.outputs[0].name or node.name or "product"

    graph, shape = Builder(model, node, f"{base}_"), node.outputs[0].shape
    q, bias = product.data.inputs[0], gemm_bias(model, node)
    if per_token:
        a_scale, a_zero = product.data.inputs[2:4]
    if dialect == "onnxruntime" and per_token:
        inputs = [q, weight, a_scale, scale, a_zero]
        y = graph.op("MatMulIntegerToFloat", *inputs, shape=shape, domain=MICROSOFT)
    elif dialect == "onnxruntime":
        quantizer = producer(product.data, 0)
        assert quantizer is not None
        x = quantizer.inputs[0]
        fused = bias if dims(bias) == dims(weight)[1:] else None
        inputs = [x, weight, scale, None, fused]
        y = graph.op("DynamicQuantizeMatMul", *inputs, shape=shape, domain=MICROSOFT)
        bias = None if fused is not None else bias
    else:
        x_scale, x_zero = (a_scale, a_zero) if per_token else product.data.inputs[1:3]
        inputs = [q, weight, x_zero]
        total = graph.op("MatMulInteger", *inputs, dtype=ir.DataType.INT32, shape=shape)
        total = graph.op("Cast", total, to=int(ir.DataType.FLOAT), shape=shape)
        y = graph.op("Mul", total, graph.op("Mul", x_scale, scale), shape=shape)
    if per_token:
        y = graph.op("Mul", y, product.data.inputs[1], shape=shape)
    if bias is not None:
        y = graph.op("Add", y, bias, shape=shape)
    replace(node, y)


def _weight(model: ir.Model, product: _DynamicProduct) -> tuple[ir.Value, ir.Value]:
    """The integer weight as (K, N) and its scale, Gemm's transB and alpha folded in."""
    value, scale = input_of(product.weight, 0), input_of(product.weight, 1)
    if not is_op(product.node, "Gemm"):
        return value, scale
    if attribute(product.node, "transB", 0):
        q = array(value)
        if q is not None:
            value = add_constant(model, f"{value.name}_T", np.ascontiguousarray(q.T))
        else:
            turn = insert(model, product.node, "Transpose", [value], base=f"{value.name}_T")
            value = typed(turn, value.dtype, None)
    alpha, scales = attribute(product.node, "alpha", 1.0), array(scale)
    if alpha != 1.0 and scales is not None:
        scale = add_constant(
            model, f"{scale.name}_alpha", (scales * np.float32(alpha)).astype(np.float32)
        )
    return value, scale
