"""What lowerings look for: quantized data and weights in front of a product."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph.graph.builder import Builder
from qgraph.graph.editing import add_constant, insert, shared_constant, typed
from qgraph.graph.functions import DEQUANTIZE_PER_TOKEN, is_call
from qgraph.graph.reading import array, attribute, dims, is_op, producer, source_of


@dataclass(frozen=True)
class Blocks:
    """What insert-qdq wrote for a weight in blocks, arrays with blocks along K as they are stored.

    Attributes:
        scales: float32, one for each block.
        zeros: int32, one for each block, or None where all are 0.
        axis, size: of the blocks.
    """

    scales: np.ndarray
    zeros: np.ndarray | None
    axis: int
    size: int


def blocks_of(dq: ir.Node) -> Blocks | None:
    """The blocks that a DequantizeLinear with `block_size` reads; None if it is another one."""
    size, axis = int(attribute(dq, "block_size", 0)), int(attribute(dq, "axis", 1)) % 2
    if not size or len(dims(dq.inputs[0])) != 2:
        return None
    zeros = array(dq.inputs[2]) if len(dq.inputs) > 2 else None
    if zeros is not None:
        zeros = np.asarray(zeros, np.int32)
    scales = array(dq.inputs[1])
    return None if scales is None else Blocks(scales, zeros, axis, size)


def dynamic_data(node: ir.Node) -> ir.Node | None:
    """The node that dequantizes the data of a product, if its scales are found at run time."""
    data = producer(node, 0)
    if data is None or is_call(data, DEQUANTIZE_PER_TOKEN):
        return data
    source = producer(data, 0)
    per_run = is_op(data, "DequantizeLinear") and is_op(source, "DynamicQuantizeLinear")
    return data if per_run else None


def stored(value: ir.Value | None) -> ir.Value | None:
    """The matrix that `value` is, or is the transpose of: what the model holds."""
    node = source_of(value)
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


def gemm_bias(model: ir.Model, node: ir.Node) -> ir.Value | None:
    """Gemm's third input times beta, or None."""
    if not is_op(node, "Gemm") or len(node.inputs) < 3 or node.inputs[2] is None:
        return None
    bias, beta = node.inputs[2], attribute(node, "beta", 1.0)
    if beta == 1.0:
        return bias
    factor = add_constant(model, f"{node.name}_beta", np.float32(beta))
    scaled = insert(model, node, "Mul", [bias, factor], base=f"{node.name}_bias")
    return typed(scaled, bias.dtype, bias.shape)


INT8_COMPUTE = 4
"""The accuracy level at which MatMulNBits rounds activations to int8, block by block."""
INT8_BLOCKS = {2: (32, 64, 128), 4: (16, 32, 64, 128, 256), 8: (16, 32, 64, 128, 256)}
"""Sizes of blocks for which it does so, by bits of the weights; for others it multiplies floats."""


def fewest_bits(q: np.ndarray, zeros: np.ndarray | None, size: int) -> int:
    """2, 4 or 8: as many as hold these integers, signed ones if there are no zero points, and as
    the kernel takes in blocks of this size."""
    values = q if zeros is None else np.concatenate([q.reshape(-1), zeros.reshape(-1)])
    low, high = int(values.min()), int(values.max())
    for bits in (b for b in (2, 4) if size in INT8_BLOCKS[b]):
        half = 1 << (bits - 1)
        if (-half <= low and high < half) or (zeros is not None and low >= 0 and high < 2 * half):
            return bits
    return 8


def leading(graph: Builder, value: ir.Value, size: int, axis: int, dtype: ir.DataType) -> ir.Value:
    """The first `size` places of `value` on an axis, as where the last block is filled up."""
    first, last, along = (
        shared_constant(graph.model, f"qgraph/number_{i}", np.array([i], np.int64))
        for i in (0, size, axis)
    )
    return graph.op("Slice", value, first, last, along, dtype=dtype)
