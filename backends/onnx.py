"""Target `onnx`: standard operators only, for any runtime that reads ONNX."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qgraph.backends import unknown
from qgraph.backends.lowering.functions import inline_functions
from qgraph.backends.lowering.products import lower_products
from qgraph.backends.lowering.shield import shield_float
from qgraph.backends.lowering.tables import lower_tables
from qgraph.graph.ops import MOVES, dilated_average
from qgraph.graph.reading import is_op
from qgraph.graph.sites import Site
from qgraph.io.session import open_session
from qgraph.numerics.spec import PerBlock, PerTensor, QuantSpec
from qgraph.pipeline.target import Purpose, Verdict

TARGETS = (("onnx", "standard operators only, for any runtime that reads ONNX"),)

GLUE = MOVES | {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool"}


@dataclass(frozen=True)
class OnnxTarget:
    """Standard Q/DQ and integer operators; nothing is measured, as any machine may run the result.

    Static quantization stays in Q/DQ form, which every integer runtime recognises. Dynamic products
    become MatMulInteger: exact everywhere, and fused by onnxruntime to its fast kernels. Weights in
    blocks stay behind a DequantizeLinear with `block_size`; when onnxruntime optimizes, it runs
    those of 4 bits as MatMulNBits, which rounds its data to 8 bits once more, block by block.
    """

    name: str = "onnx"
    saturates: bool = True
    """The result may meet an x86 CPU whose u8·s8 products saturate."""
    measured: bool = False

    open_session = staticmethod(open_session)

    def supports(self, site: Site, activation: QuantSpec | None, weight: QuantSpec) -> Verdict:
        dynamic = activation is not None and activation.dynamic
        if isinstance(weight.granularity, PerBlock) and weight.width > 4 and dynamic:
            return Verdict(False, "no runtime multiplies 8-bit blocks by rounded data as integers")
        per_run = activation is not None and isinstance(activation.granularity, PerTensor)
        if dynamic and site.is_convolution:
            return Verdict(False, "standard ONNX has no dynamic convolution with signed weights")
        if activation is not None and isinstance(activation.granularity, PerBlock):
            return Verdict(False, "no standard operator multiplies activations in blocks")
        if per_run and isinstance(weight.granularity, PerBlock):
            return Verdict(False, "onnxruntime takes scales of blocks for those of columns here")
        if site.kind in ("rnn", "activations"):
            return Verdict(False, f"standard ONNX has no quantized {site.node.op_type}")
        return Verdict(True, "standard operators express it")

    def supports_glue(self, node: ir.Node) -> bool:
        return is_op(node, *GLUE) and not dilated_average(node)

    def legalize(self, model: ir.Model) -> bool:
        changed = lower_tables(model)
        changed |= lower_products(model, "standard")
        changed |= shield_float(model)
        return inline_functions(model) or changed


def make(name: str, optimize_for: Purpose = "both") -> OnnxTarget:
    """The target called `onnx`, which is the same whatever the model is optimized for.

    Raises:
        QGraphError: it has another name.
    """
    if name != "onnx":
        raise unknown(name)
    return OnnxTarget()


def describe() -> str:
    """Nothing: what the result will run on is not known."""
    return ""
