"""Lowerings of dynamic products and quantized tables, shared by the backends that run ONNX."""

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
    data, weight = (v.producer() if v is not None else None for v in node.inputs[:2])
    if data is None or weight is None or not is_op(weight, "DequantizeLinear"):
        return None
    q = array(weight.inputs[0])
    if q is None or q.dtype != np.int8 or q.ndim != 2 or attribute(node, "transA", 0):
        return None
    if _symmetric_scale(weight, 0 if attribute(node, "transB", 0) else 1) is None:
        return None
    source = data.inputs[0].producer() if data.inputs[0] is not None else None
    per_run = is_op(data, "DequantizeLinear") and is_op(source, "DynamicQuantizeLinear")
    if not (per_run or is_call(data, DEQUANTIZE_PER_TOKEN)):
        return None
    return _Product(node, data, weight)


def _symmetric_scale(dq: ir.Node, axis: int) -> np.ndarray | None:
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

    q, bias = product.data.inputs[0], _bias(model, node, op)
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
        assert q is not None
        value = add_constant(model, f"{value.name}_T", np.ascontiguousarray(q.T))
    alpha, scales = attribute(product.node, "alpha", 1.0), array(scale)
    if alpha != 1.0 and scales is not None:
        scale = add_constant(
            model, f"{scale.name}_alpha", (scales * np.float32(alpha)).astype(np.float32)
        )
    return value, scale


def _bias(model: ir.Model, node: ir.Node, op: object) -> ir.Value | None:
    """Gemm's third input times beta, or None."""
    if not is_op(node, "Gemm") or len(node.inputs) < 3 or node.inputs[2] is None:
        return None
    beta = attribute(node, "beta", 1.0)
    if beta == 1.0:
        return node.inputs[2]
    factor = add_constant(model, f"{node.name}_beta", np.float32(beta))
    made: ir.Value = op("Mul", node.inputs[2], factor)  # type: ignore[operator]
    made.shape = node.inputs[2].shape
    return made


def lower_tables(model: ir.Model) -> bool:
    """Gather of a dequantized table: gather integers and their rows' scales, then multiply.

    ::

        W:int8 ── DQ(axis 0) ── Gather ── y      W:int8 ── Gather ── Cast ── Mul ── y
                          ids ──┘                scale ─── Gather ───────────┘
    """
    changed = False
    for node in nodes(model):
        dq = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if not is_op(node, "Gather") or dq is None or not is_op(dq, "DequantizeLinear"):
            continue
        table, scales = array(dq.inputs[0]), _symmetric_scale(dq, 0)
        if table is None or scales is None or attribute(node, "axis", 0) % table.ndim != 0:
            continue
        if scales.shape != table.shape[:1]:
            continue
        _lower_table(model, node, dq, scales.reshape(-1, *[1] * (table.ndim - 1)))
        changed = True
    return changed


def _lower_table(model: ir.Model, node: ir.Node, dq: ir.Node, scales: np.ndarray) -> None:
    assert dq.inputs[0] is not None
    assert dq.inputs[1] is not None
    base = node.outputs[0].name or "table"
    column = add_constant(model, f"{dq.inputs[1].name}_rows", scales)
    rows = insert(model, node, "Gather", [dq.inputs[0], node.inputs[1]], base=f"{base}_q")
    scale = insert(model, node, "Gather", [column, node.inputs[1]], base=f"{base}_scale")
    wide = insert(
        model,
        node,
        "Cast",
        rows.outputs,
        base=f"{base}_cast",
        attributes={"to": int(ir.DataType.FLOAT)},
    )
    y = insert(model, node, "Mul", [wide.outputs[0], scale.outputs[0]], base=f"{base}_mul")
    rows.outputs[0].type = ir.TensorType(dq.inputs[0].dtype or ir.DataType.INT8)
    for made in (scale, wide, y):
        made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    y.outputs[0].shape = node.outputs[0].shape
    redirect(node.outputs[0], y.outputs[0])
    y.name = node.name
    graph = node.graph
    assert graph is not None
    graph.remove(node, safe=True)


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
        weight = constant(node.inputs[1])
        if weight is None or weight.dtype != ir.DataType.FLOAT:
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
