"""Lowerings of dynamic products, shared by the backends that run ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qgraph.annotation import MOVES
from qgraph.functions import (
    DEQUANTIZE_PER_TOKEN,
    DOMAIN,
    is_call,
    undeclare_unused,
)
from qgraph.graph import (
    add_constant,
    array,
    attribute,
    constant,
    dims,
    insert,
    is_op,
    nodes,
    redirect,
    remove_dead,
)

MICROSOFT = "com.microsoft"
Dialect = Literal["onnxruntime", "standard"]


@dataclass(frozen=True)
class _Product:
    """A MatMul or Gemm of dynamically quantized data and a constant integer weight.

    Attributes:
        node: the float operator over two dequantized inputs.
        data: the node that dequantizes the data.
        weight: the DequantizeLinear of the weight.
    """

    node: ir.Node
    data: ir.Node
    weight: ir.Node


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


def _match(node: ir.Node) -> _Product | None:
    if not is_op(node, "MatMul", "Gemm") or len(node.inputs) < 2:
        return None
    data = dynamic_data(node)
    weight = node.inputs[1].producer() if node.inputs[1] is not None else None
    if data is None or weight is None or not is_op(weight, "DequantizeLinear"):
        return None
    trans_b, q = attribute(node, "transB", 0), weight.inputs[0]
    if q is None or q.dtype != ir.DataType.INT8 or len(dims(q)) != 2 or not _folds(q):
        return None
    if attribute(node, "transA", 0):
        return None
    if symmetric_scale(weight, 0 if trans_b else 1) is None:
        return None
    return _Product(node, data, weight)


def dynamic_data(node: ir.Node) -> ir.Node | None:
    """The node that dequantizes the data of a product, if its scales are found at run time."""
    data = node.inputs[0].producer() if node.inputs[0] is not None else None
    if data is None or is_call(data, DEQUANTIZE_PER_TOKEN):
        return data
    source = data.inputs[0].producer() if data.inputs and data.inputs[0] is not None else None
    per_run = is_op(data, "DequantizeLinear") and is_op(source, "DynamicQuantizeLinear")
    return data if per_run else None


def _folds(value: ir.Value | None) -> bool:
    """Whether `value` is a constant, or made of constants alone: runtimes fold it on loading."""
    node = value.producer() if value is not None else None
    if node is not None and is_op(node, "Cast", "Gather", "Mul", "Round", "Sub", "Transpose"):
        return all(map(_folds, node.inputs))
    return constant(value) is not None


def stored(value: ir.Value | None) -> ir.Value | None:
    """The matrix that `value` is, or is the transpose of: what the model holds."""
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, "Transpose") or len(dims(value)) != 2:
        return value
    perm = node.attributes.get("perm")
    return node.inputs[0] if perm is None or list(perm.as_ints()) == [1, 0] else value


def symmetric_scale(dq: ir.Node, axis: int) -> np.ndarray | None:
    """The float32 scale of a DequantizeLinear without zero point, one or for each index of `axis`.

    Integer kernels know nothing else; a model can bring other quantization along.
    """
    scale, rank = array(dq.inputs[1]), len(dims(dq.inputs[0]))
    if scale is None or scale.dtype != np.float32:
        return None
    if len(dq.inputs) > 2 and dq.inputs[2] is not None:
        zero = array(dq.inputs[2])
        if zero is None or zero.any():
            return None
    if scale.size == 1 and scale.ndim < 2:
        return scale
    return scale if scale.ndim == 1 and attribute(dq, "axis", 1) % rank == axis else None


def _lower_product(model: ir.Model, product: _Product, dialect: Dialect) -> None:
    node, per_token = product.node, is_call(product.data, DEQUANTIZE_PER_TOKEN)
    weight, scale = _weight(model, product)
    base = node.outputs[0].name or node.name or "product"

    def op(op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: int) -> ir.Value:
        made = insert(
            model,
            node,
            op_type,
            inputs,
            base=f"{base}_{op_type}",
            attributes=dict(attributes),
            domain=domain,
        )
        made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        made.outputs[0].shape = node.outputs[0].shape
        return made.outputs[0]

    q, bias = product.data.inputs[0], gemm_bias(model, node)
    if per_token:
        a_scale, a_zero = product.data.inputs[2:4]
    if dialect == "onnxruntime" and per_token:
        y = op("MatMulIntegerToFloat", q, weight, a_scale, scale, a_zero, domain=MICROSOFT)
    elif dialect == "onnxruntime":
        assert q is not None
        x = q.producer().inputs[0]  # type: ignore[union-attr]
        fused = bias if dims(bias) == dims(weight)[1:] else None
        y = op("DynamicQuantizeMatMul", x, weight, scale, None, fused, domain=MICROSOFT)
        bias = None if fused is not None else bias
    else:
        x_scale, x_zero = (a_scale, a_zero) if per_token else product.data.inputs[1:3]
        total = op("Cast", op("MatMulInteger", q, weight, x_zero), to=int(ir.DataType.FLOAT))
        total.producer().inputs[0].type = ir.TensorType(ir.DataType.INT32)  # type: ignore[union-attr]
        y = op("Mul", total, op("Mul", x_scale, scale))
        y.producer().inputs[1].shape = None  # type: ignore[union-attr]
    if per_token:
        y = op("Mul", y, product.data.inputs[1])
    if bias is not None:
        y = op("Add", y, bias)
    redirect(node.outputs[0], y)
    y.producer().name = node.name  # type: ignore[union-attr]
    graph = node.graph
    assert graph is not None
    graph.remove(node, safe=True)


def _weight(model: ir.Model, product: _Product) -> tuple[ir.Value, ir.Value]:
    """The integer weight as (K, N) and its scale, Gemm's transB and alpha folded in."""
    value, scale = product.weight.inputs[0], product.weight.inputs[1]
    assert value is not None
    assert scale is not None
    if not is_op(product.node, "Gemm"):
        return value, scale
    if attribute(product.node, "transB", 0):
        q = array(value)
        if q is not None:
            value = add_constant(model, f"{value.name}_T", np.ascontiguousarray(q.T))
        else:
            turn = insert(model, product.node, "Transpose", [value], base=f"{value.name}_T")
            turn.outputs[0].type, value = value.type, turn.outputs[0]
    alpha, scales = attribute(product.node, "alpha", 1.0), array(scale)
    if alpha != 1.0 and scales is not None:
        scale = add_constant(
            model, f"{scale.name}_alpha", (scales * np.float32(alpha)).astype(np.float32)
        )
    return value, scale


def gemm_bias(model: ir.Model, node: ir.Node) -> ir.Value | None:
    """Gemm's third input times beta, or None."""
    if not is_op(node, "Gemm") or len(node.inputs) < 3 or node.inputs[2] is None:
        return None
    bias, beta = node.inputs[2], attribute(node, "beta", 1.0)
    if beta == 1.0:
        return bias
    factor = add_constant(model, f"{node.name}_beta", np.float32(beta))
    made = insert(model, node, "Mul", [bias, factor], base=f"{node.name}_bias").outputs[0]
    made.type, made.shape = bias.type, bias.shape
    return made


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
        found = [array(v) for v in dq.inputs[1:] if v is not None]
        if any(p is None or p.size != 1 for p in found):
            continue
        value, (index, size) = dq.outputs[0], axis
        parameters = [
            add_constant(model, f"{value.name}_channels", np.full(size, p.reshape(()), p.dtype))
            for p in found
            if p is not None
        ]
        shielded = insert(
            model, reader, "DequantizeLinear", [dq.inputs[0], *parameters],
            base=f"{value.name}_float", attributes={"axis": index},
        )  # fmt: skip
        shielded.outputs[0].type, shielded.outputs[0].shape = value.type, value.shape
        reader.replace_input_with(0, shielded.outputs[0])
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
    return node.inputs[0].producer() if node.inputs[0] is not None else None


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


def inline_functions(model: ir.Model) -> bool:
    """Replace what calls of qgraph functions are left by their bodies."""
    remove_dead(model)
    changed = bool(common.InlinePass(lambda function: function.domain == DOMAIN)(model).modified)
    if changed:
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.DeduplicateInitializersPass()(model)
        model.meta.pop("qgraph.names", None)  # there are names now that it does not know
    undeclare_unused(model)
    return changed
