"""Products of weights whose codes are places in a table, on the kernel for int8 in blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph.backends.lowering.block_products import multiply_in_blocks
from qgraph.graph.builder import Builder
from qgraph.graph.editing import shared_constant
from qgraph.graph.functions import ROUND_IN_BLOCKS, is_call
from qgraph.graph.reading import array, attribute, dims, is_op, nodes, producer
from qgraph.numerics.codebooks import STEPS
from qgraph.weights.formats.codebook import codebook_call

TOGETHER = 4
"""Codes that are looked up together: indices take four bytes, whatever they stand for."""
MANY = 1 << 20
"""Weights from which on a table of 256 kB, for four codes, is little beside them."""


def lower_codebook_products(model: ir.Model) -> bool:
    """Products of activations in blocks and levels of int8 become MatMulNBits of 8 bits.

    ::

        x ───────────────────── RoundInBlocks ── MatMul ── y
        codes ── DequantizeCodebook ── Reshape ... ──┘

        x ────────────────────────────────── MatMulNBits(bits=8, accuracy_level=4) ── y
        codes:uint16 ── Cast ── Gather(levels) ── Reshape ──┘

    The levels are 127ths, so the kernel's integers are they, times 127. Codes stay 4 bits each on
    disk; onnxruntime looks them up once, when it loads the model (ConstantFolding), and its kernel
    packs the result like any other weight. Four codes at a time, in a table of 65,536 times four
    levels, because Gather wants indices of 32 bits: so they take a byte a weight, not four, and the
    loading of a weight peaks at 4.5 bytes for each (float: 8) and takes a third of the time. In a
    small model, where that table would be most of it, two codes at a time.
    Without optimizations it is all computed anew for each run, from activations that are not
    rounded: slow, and as near to float.
    """
    matches = [(node, product) for node in nodes(model) if (product := _match(node)) is not None]
    total = sum(product.codes.size for _, product in matches)
    together = TOGETHER if total >= MANY else 2
    for node, product in matches:
        _lower(model, node, product, together)
    return bool(matches)


@dataclass(frozen=True)
class _CodebookProduct:
    """A MatMul or Gemm that the kernel can compute.

    Attributes:
        x: the data before it is rounded.
        call: the DequantizeCodebook of the weight.
        codes: uint8 (N, blocks, size).
        levels: uint8 (16,), as the kernel has them: 128 is zero.
        k: input channels.
    """

    x: ir.Value | None
    call: ir.Node
    codes: np.ndarray
    levels: np.ndarray
    k: int


def _match(node: ir.Node) -> _CodebookProduct | None:
    if not is_op(node, "MatMul", "Gemm") or attribute(node, "transA", 0):
        return None
    rounded = producer(node, 0)
    trans_b = bool(attribute(node, "transB", 0))
    call = codebook_call(node.inputs[1], turned=not trans_b)
    if rounded is None or call is None or not is_call(rounded, ROUND_IN_BLOCKS):
        return None
    block, codes, table = array(rounded.inputs[1]), array(call.inputs[0]), array(call.inputs[1])
    k = dims(node.inputs[1])[1 if trans_b else 0]
    if block is None or codes is None or table is None or k is None:
        return None
    levels = np.rint(table * STEPS)
    if codes.shape[-1] != block[-1] or (levels / STEPS != table).any():
        return None
    codes = np.asarray(codes, np.uint8)
    return _CodebookProduct(rounded.inputs[0], call, codes, (levels + 128).astype(np.uint8), k)


def _lower(model: ir.Model, node: ir.Node, product: _CodebookProduct, together: int) -> None:
    (n, count, size), base = product.codes.shape, product.call.outputs[0].name

    graph = Builder(model, product.call, f"{base}_")
    name = product.call.inputs[0].name if product.call.inputs[0] else base
    words = shared_constant(model, f"{name}_words", _words(product.codes, together))
    table = looked_up_together(product.levels, together)
    levels = shared_constant(model, "qgraph/levels_int8", table)
    index = graph.op("Cast", words, to=int(ir.DataType.INT32), dtype=ir.DataType.INT32)
    shape = shared_constant(
        model, f"qgraph/shape_{n}_{count}_{size}", np.array([n, count, size], np.int64)
    )
    looked_up = graph.op("Gather", levels, index, dtype=ir.DataType.UINT8)
    weight = graph.op("Reshape", looked_up, shape, dtype=ir.DataType.UINT8, shape=(n, count, size))
    factor = np.float32(attribute(node, "alpha", 1.0)) / STEPS
    scale, scales = product.call.inputs[2], array(product.call.inputs[2])
    if scales is not None:
        kernel_scale = shared_constant(model, f"{base}_int8_scale", scales * factor)
    else:
        per_step = shared_constant(model, "qgraph/per_step", factor)
        kernel_scale = graph.op("Mul", scale, per_step, shape=(n, count))
    inputs = [product.x, weight, kernel_scale]
    multiply_in_blocks(model, node, inputs, n=n, k=product.k, bits=8, size=size)


def _words(codes: np.ndarray, together: int) -> np.ndarray:
    """Codes, so many to an integer, the first in the lowest bits: (N, blocks, size / together)."""
    parts = codes.astype(np.uint16)
    shifted = [parts[..., place::together] << (4 * place) for place in range(together)]
    words = np.asarray(np.bitwise_or.reduce(shifted))
    return words if together == TOGETHER else words.astype(np.uint8)


def looked_up_together(levels: np.ndarray, together: int = 4) -> np.ndarray:
    """The levels of the codes in each word: (65536, 4) for four of them."""
    words = np.arange(1 << (4 * together))
    return np.stack([levels[words >> (4 * place) & 15] for place in range(together)], axis=1)
