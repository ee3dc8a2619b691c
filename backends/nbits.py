"""Products whose weights are in blocks, on onnxruntime's kernel for them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.backends.blocks import Blocks, blocks_of
from qgraph.backends.lowering import MICROSOFT, gemm_bias
from qgraph.functions import ROUND_IN_BLOCKS, is_call
from qgraph.graph import array, attribute, insert, is_op, nodes, redirect, shared_constant

INT8_COMPUTE = 4
"""The accuracy level at which MatMulNBits rounds activations to int8, block by block."""
INT8_BLOCKS = (16, 32, 64, 128, 256)
"""Sizes of blocks for which it does so; the kernel for others multiplies floats."""


def lower_block_products(model: ir.Model) -> bool:
    """Products of activations and weights that are both in blocks become MatMulNBits.

    ::

        x ── RoundInBlocks ── MatMul ── y          x ── MatMulNBits(accuracy_level=4) ── y
        W:int8 ── DQ <block_size> ──┘              W:uint8 (N, blocks, size) ──┘

    The kernel finds the scales of activations itself and multiplies in integers. Its weights are
    unsigned, 128 being zero.
    """
    changed = False
    for node in nodes(model):
        if not is_op(node, "MatMul", "Gemm") or node.inputs[0] is None or node.inputs[1] is None:
            continue
        rounded, dq = node.inputs[0].producer(), node.inputs[1].producer()
        if rounded is None or dq is None or not is_call(rounded, ROUND_IN_BLOCKS):
            continue
        blocks = blocks_of(dq) if is_op(dq, "DequantizeLinear") else None
        if blocks is not None:
            _lower(model, node, rounded.inputs[0], dq, blocks)
            changed = True
    return changed


def _lower(model: ir.Model, node: ir.Node, x: ir.Value | None, dq: ir.Node, blocks: Blocks) -> None:
    q, weight, base = array(dq.inputs[0]), dq.inputs[0], node.outputs[0].name
    assert q is not None
    assert weight is not None
    scales = blocks.multipliers * blocks.scale * np.float32(attribute(node, "alpha", 1.0))
    columns, scales = (q, scales) if blocks.axis else (q.T, scales.T)
    n, k = columns.shape
    packed = np.ascontiguousarray(columns).view(np.uint8) ^ 0x80
    inputs = [
        x,
        # Layers may share a weight.
        shared_constant(model, f"{weight.name}_packed", packed.reshape(n, -1, blocks.size)),
        shared_constant(model, f"{weight.name}_scales", np.ascontiguousarray(scales, np.float32)),
    ]
    attributes = {
        "K": k, "N": n, "bits": 8, "block_size": blocks.size, "accuracy_level": INT8_COMPUTE,
    }  # fmt: skip
    made = insert(
        model, node, "MatMulNBits", inputs,
        base=f"{base}_MatMulNBits", attributes=attributes, domain=MICROSOFT,
    )  # fmt: skip
    bias = gemm_bias(model, node)
    if bias is not None:
        _typed(made, node)
        made = insert(model, node, "Add", [*made.outputs, bias], base=f"{base}_Add")
    redirect(node.outputs[0], _typed(made, node))
    made.name = node.name
    graph = node.graph
    assert graph is not None
    graph.remove(node, safe=True)


def _typed(node: ir.Node, like: ir.Node) -> ir.Value:
    """The result of `node` with the type and shape of that of `like`."""
    result, other = node.outputs[0], like.outputs[0]
    result.type, result.shape = other.type, other.shape
    return result
