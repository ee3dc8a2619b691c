"""Write products of NF4 and FP4 weights as the operator that other tools have for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qgraph.graph.annotation import Stage
from qgraph.graph.editing import insert, remove_dead, replace, shared_constant, typed
from qgraph.graph.functions import undeclare_unused
from qgraph.graph.reading import (
    MICROSOFT,
    array,
    attribute,
    constant_array,
    dims,
    input_of,
    is_op,
    node_name,
    nodes,
)
from qgraph.numerics.codebooks import LEVELS
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass
from qgraph.weights.formats.codebook import codebook_call

_TYPES = {"fp4": 0, "nf4": 1}
_SLOW = "MatMulBnb4: for exchange with other tools, on CPUs five times slower than float"


@dataclass(frozen=True)
class UseBnb4(Pass):
    """Make MatMulBnb4 of products with NF4 or FP4 weights, onnxruntime's form of bitsandbytes'.

    The problem: other tools and other execution providers know bitsandbytes' weights by this
    operator alone::

        x ────────────────────────────────────────────── MatMul ── y
        codes:uint4 ── DequantizeCodebook ── Reshape ... ──┘

        x ── MatMulBnb4(quant_type, block_size) ── y
        codes:uint8 (N · K / 2,), scale (N · blocks,)

    Codes stay what they are, the first of two in the upper half of a byte. The operator counts its
    blocks through the rows, so rows must be made of whole blocks; and it has one scale for each,
    which those in eight bits become when the model is loaded.

    On CPUs it runs at a fifth of the speed of float.
    """

    name: ClassVar[str] = "use-bnb4"
    contract: ClassVar[Contract] = Contract.EXACT
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.COMMITTED})

    def run(self, model: ir.Model, context: Context) -> bool:
        changed = False
        for node in list(nodes(model)):
            if not is_op(node, "MatMul", "Gemm") or len(node.inputs) < 2:
                continue
            call = codebook_call(node.inputs[1], turned=not attribute(node, "transB", 0))
            if call is None:
                continue
            if why := _unfit(node, call):
                message = f"not MatMulBnb4: {why}"
                context.remark("declined", self.name, node_name(node), node.op_type, message)
                continue
            context.remark("applied", self.name, node_name(node), node.op_type, _SLOW)
            _replace(model, node, call)
            changed = True
        if changed:
            remove_dead(model)
            undeclare_unused(model)
        return changed


def _unfit(node: ir.Node, call: ir.Node) -> str | None:
    codes, table = array(call.inputs[0]), array(call.inputs[1])
    if codes is None or table is None or _quant_type(table) is None:
        return "its table is none of bitsandbytes'"
    if (dims(node.inputs[1])[0 if _turned(node) else 1] or 0) % codes.shape[-1]:
        return "its rows are not made of whole blocks"
    if is_op(node, "Gemm"):
        factors = [attribute(node, name, 1.0) for name in ("alpha", "beta")]
        if factors != [1.0, 1.0] or attribute(node, "transA", 0):
            return "its Gemm has factors, or a transposed input"
    return None


def _turned(node: ir.Node) -> bool:
    """Whether the weight is (K, N)."""
    return not attribute(node, "transB", 0)


def _quant_type(table: np.ndarray) -> int | None:
    same = (name for name, levels in LEVELS.items() if np.array_equal(levels, table))
    return next((_TYPES[name] for name in same), None)


def _replace(model: ir.Model, node: ir.Node, call: ir.Node) -> None:
    codes, table = constant_array(call.inputs[0]), constant_array(call.inputs[1])
    n, count, size = codes.shape
    pairs = np.asarray(codes, np.uint8).reshape(-1, 2)
    packed = pairs[:, 0] << 4 | pairs[:, 1]
    base, y = call.inputs[0].name if call.inputs[0] else "codes", node.outputs[0]
    inputs = [node.inputs[0], shared_constant(model, f"{base}_bnb4", packed), _flat(model, call)]
    attributes = {
        "K": count * size, "N": n, "block_size": size, "quant_type": _quant_type(table) or 0,
    }  # fmt: skip
    product = insert(
        model, node, "MatMulBnb4", inputs,
        base=f"{y.name}_MatMulBnb4", attributes=attributes, domain=MICROSOFT,
    )  # fmt: skip
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        terms = [typed(product, y.dtype, y.shape), node.inputs[2]]
        product = insert(model, node, "Add", terms, base=f"{y.name}_Add")
    replace(node, product.outputs[0])


def _flat(model: ir.Model, call: ir.Node) -> ir.Value:
    """The scales one after the other."""
    scale, scales = input_of(call, 2), array(call.inputs[2])
    if scales is not None:
        return shared_constant(model, f"{scale.name}_bnb4", scales.reshape(-1))
    shape = shared_constant(model, "qgraph/shape_-1", np.array([-1], np.int64))
    flat = insert(model, call, "Reshape", [scale, shape], base=f"{scale.name}_flat")
    return typed(flat, ir.DataType.FLOAT, None)
