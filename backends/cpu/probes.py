"""Tiny models for the measured table, built from the same Q/DQ form and lowerings as real ones."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from qgraph.backends.cpu.case import Case
from qgraph.backends.cpu.tokens import lower_quantizers
from qgraph.backends.lowering.functions import inline_functions
from qgraph.backends.lowering.products import lower_products
from qgraph.graph.editing import add_constant
from qgraph.graph.functions import (
    DEQUANTIZE_PER_TOKEN,
    DOMAIN,
    QUANTIZE_PER_TOKEN,
    declare,
    grid_values,
)
from qgraph.graph.reading import MICROSOFT
from qgraph.numerics.tokens import SYMMETRIC_GRID


class _Probe(Tape):
    def __init__(self, shape: list[int]) -> None:
        self.rng = np.random.default_rng(0)
        self.x = ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        self.graph = ir.Graph([self.x], [], nodes=[], opset_imports={"": 21}, name="probe")
        self.model = ir.Model(self.graph, ir_version=10)
        super().__init__(self.graph)

    def constant(self, data: np.ndarray | np.generic) -> ir.Value:
        return add_constant(self.model, "c", np.asarray(data))

    def weight(self, shape: list[int], axis: int, quantized: bool) -> ir.Value:
        if not quantized:
            return self.constant(self.rng.normal(0, 0.05, shape).astype(np.float32))
        q = self.constant(self.rng.integers(-127, 128, shape).astype(np.int8))
        scale = self.constant(np.full(shape[axis], 1e-3, np.float32))
        zero = self.constant(np.zeros(shape[axis], np.int8))
        return self.op("DequantizeLinear", [q, scale, zero], {"axis": axis})

    def through_integers(self, value: ir.Value, zero_point: int = 128) -> ir.Value:
        scale, zero = self.constant(np.float32(0.03)), self.constant(np.uint8(zero_point))
        q = self.op("QuantizeLinear", [value, scale, zero])
        return self.op("DequantizeLinear", [q, scale, zero])

    def finish(self, y: ir.Value) -> ir.Model:
        y.type = ir.TensorType(ir.DataType.FLOAT)
        self.graph.outputs.append(y)
        return self.model


def build(case: Case, quantized: bool) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """The float or quantized form of one case, and a feed for it."""
    lowering, k, n, m = case.lowering, case.k, case.n, case.m
    if lowering in ("conv", "pointwise", "depthwise"):
        return _convolutions(lowering, k, n, m, quantized, case.chain)
    if lowering in ("norm", "rms-norm"):
        return _norm(lowering, k, m, quantized)
    b = _Probe([m, k])
    feed = {"x": b.rng.normal(size=(m, k)).astype(np.float32)}
    if quantized and lowering == "blocks":
        return b.finish(_in_blocks(b, case)), feed
    x, w = b.x, b.weight([k, n], 1, quantized)
    if quantized and lowering == "per-token":
        declare(b.model, QUANTIZE_PER_TOKEN)
        declare(b.model, DEQUANTIZE_PER_TOKEN)
        step, zero, floor = grid_values(b.model, SYMMETRIC_GRID)
        inputs = [x, step, zero, floor]
        q = b.op_multi_out(QUANTIZE_PER_TOKEN, inputs, domain=DOMAIN, num_outputs=2)
        x = b.op(DEQUANTIZE_PER_TOKEN, [*q, step, zero], domain=DOMAIN)
    elif quantized and lowering == "per-run":
        x = b.op("DequantizeLinear", b.op_multi_out("DynamicQuantizeLinear", [x], num_outputs=3))
    elif quantized:
        x = b.through_integers(x)
    model = b.finish(b.op("MatMul", [x, w]))
    if quantized:
        lower_products(model, "onnxruntime")
        lower_quantizers(model)
        inline_functions(model)
    return model, feed


def _in_blocks(b: _Probe, case: Case) -> ir.Value:
    k, n, bits, size = case.k, case.n, case.bits, case.block
    count = -(-k // size)
    packed = b.rng.integers(0, 256, (n, count, size * bits // 8)).astype(np.uint8)
    scales = b.constant(np.full((n, count), 1e-3, np.float32))
    b.model.opset_imports[MICROSOFT] = 1
    sizes = {"K": k, "N": n, "bits": bits, "block_size": size, "accuracy_level": 4}
    return b.op("MatMulNBits", [b.x, b.constant(packed), scales], sizes, domain=MICROSOFT)


def _convolutions(
    lowering: str, k: int, n: int, m: int, quantized: bool, chain: int
) -> tuple[ir.Model, dict[str, np.ndarray]]:
    side = max(1, round(m**0.5))
    b = _Probe([1, k, side, side])
    value = b.through_integers(b.x) if quantized else b.x
    size = 1 if lowering == "pointwise" else 3
    channels = k
    for index in range(chain):
        wide = k if lowering == "depthwise" else (n if index % 2 == 0 else k)
        group = k if lowering == "depthwise" else 1
        w = b.weight([wide, channels // group, size, size], 0, quantized)
        window: dict[str, int | list[int]] = {
            "group": group, "pads": [size // 2] * 4, "kernel_shape": [size, size],
        }  # fmt: skip
        value = b.op("Relu", [b.op("Conv", [value, w], window)])
        if quantized:
            value = b.through_integers(value, 0)  # Relu's range, so that the clamp is free
        channels = wide
    feed = {"x": b.rng.normal(size=(1, k, side, side)).astype(np.float32)}
    return b.finish(value), feed


def _norm(lowering: str, k: int, m: int, apart: bool) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A residual addition and its norm, in one fused operator or apart."""
    b = _Probe([m, k])
    gamma = b.constant(np.ones(k, np.float32))
    if lowering == "norm":
        total = b.op("Sum" if apart else "Add", [b.x, b.x])
        y = b.op("LayerNormalization", [total, gamma, gamma], {"axis": -1})
    elif apart:
        total = b.op("Sum", [b.x, b.x])
        y = b.op("SimplifiedLayerNormalization", [total, gamma], {"axis": -1})
    else:
        b.model.opset_imports[MICROSOFT] = 1
        op_type = "SkipSimplifiedLayerNormalization"
        y = b.op(op_type, [b.x, b.x, gamma], domain=MICROSOFT)
    return b.finish(y), {"x": b.rng.normal(size=(m, k)).astype(np.float32)}
