"""Say chains of elementwise operators in one operator each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qgraph.graph.annotation import Stage
from qgraph.graph.editing import Attribute, add_constant, insert, remove_dead, replace
from qgraph.graph.reading import array, dims, is_op, node_name, producer, source_of
from qgraph.graph.types import infer_types
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass


@dataclass(frozen=True)
class Fuse(Pass):
    """Fuse the elementwise chains between convolutions that onnxruntime does not fuse itself.

    The problem: between two convolutions, mobile networks of the PaddlePaddle family run a
    hard-swish written as four operators and a learned scale and shift as two. Each is a pass over
    memory, and none of them keeps the blocked layout of onnxruntime's float convolutions, so that
    every one of those is wrapped in two reorders.

    ::

        x -> Add 3 -> Clip 0, 6 -> Mul x -> Div 6         x -> HardSigmoid -> Mul x
        x -> Mul a -> Add b -> Conv                       x -> BatchNormalization -> Conv

    clip(x + c, 0, m) / m is HardSigmoid with alpha = 1 / m and beta = c / m. a·x + b is a
    BatchNormalization with scale a, shift b, mean 0 and variance 1, where a and b are constants of
    one value or one for each channel, x has rank 4, and a Conv reads the result. Behind a Conv the
    scale and shift go into its weights, which is better: run `fold-batch-norm` first.

    PP-OCRv4 detection and recognition run 1.3 times as fast in float for it (AVX2, one thread).
    What onnxruntime fuses by itself, it still fuses in quantized models, as long as nothing is
    quantized inside of the chain, and needs no help: LayerNormalization, SkipLayerNormalization,
    Gelu, QuickGelu (found in its optimized graphs of a traced MiniLM and of PP-OCRv4, float and
    dynamically quantized). A bias that BiasGelu would take, the quantized product takes.

    Parameters: none. float32 only: onnxruntime has no HardSigmoid in half precision on CPU.
    """

    name: ClassVar[str] = "fuse"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.CANONICAL})

    def run(self, model: ir.Model, context: Context) -> bool:
        changed = False
        for node in model.graph.all_nodes():
            changed |= self._hard_sigmoid(model, node, context)
            changed |= self._affine(model, node, context)
        if changed:
            remove_dead(model)
            infer_types(model)
        return changed

    def _hard_sigmoid(self, model: ir.Model, last: ir.Node, context: Context) -> bool:
        top = _divided(last)
        if top is None or last.outputs[0].dtype != ir.DataType.FLOAT:
            return False
        value, most = top
        gate: ir.Value | None = None
        clipped = _clipped(value, most)
        product = value.producer()
        if clipped is None and is_op(product, "Mul"):
            left, right = product.inputs
            clipped, gate = _clipped(right, most), left
            if clipped is None:
                clipped, gate = _clipped(left, most), right
        if clipped is None:
            return False
        x, offset = clipped
        attributes: dict[str, Attribute] = {"alpha": 1 / most, "beta": offset / most}
        base = f"{node_name(last)}_HardSigmoid"
        new = insert(model, last, "HardSigmoid", [x], base=base, attributes=attributes)
        if gate is not None:
            new = insert(model, last, "Mul", [gate, new.outputs[0]], base=f"{node_name(last)}_Mul")
        self._replace(last, new, context, "is a hard sigmoid")
        return True

    def _affine(self, model: ir.Model, add: ir.Node, context: Context) -> bool:
        if not is_op(add, "Add") or add.outputs[0].dtype != ir.DataType.FLOAT:
            return False
        if not any(is_op(use.node, "Conv") for use in add.outputs[0].uses()):
            return False
        shifted = _with_constant(add)
        scaled = _with_constant(shifted[0].producer()) if shifted else None
        if shifted is None or scaled is None or not is_op(shifted[0].producer(), "Mul"):
            return False
        (product, shift), (x, scale) = shifted, scaled
        shape = dims(x)
        if len(product.uses()) != 1 or product.is_graph_output() or len(shape) != 4 or not shape[1]:
            return False
        channels = shape[1]
        if not all(c.size == 1 or c.shape[-3:] == (channels, 1, 1) for c in (scale, shift)):
            return False
        if max(scale.ndim, shift.ndim) > 4 or max(scale.size, shift.size) > channels:
            return False
        name = node_name(add)
        parameters = [
            add_constant(model, f"{name}_{key}", np.broadcast_to(c.reshape(-1), channels).copy())
            for key, c in (
                ("scale", scale),
                ("shift", shift),
                ("mean", np.zeros(1, np.float32)),
                ("variance", np.ones(1, np.float32)),
            )
        ]
        inputs = [x, *parameters]
        attributes: dict[str, Attribute] = {"epsilon": 0.0}
        new = insert(model, add, "BatchNormalization", inputs, base=name, attributes=attributes)
        self._replace(add, new, context, "and the Mul before it are one scale and shift")
        return True

    def _replace(self, last: ir.Node, new: ir.Node, context: Context, message: str) -> None:
        new.metadata_props.update(last.metadata_props)
        context.remark("applied", self.name, node_name(last), last.op_type, message)
        replace(last, new.outputs[0], takes_name=False)


def _with_constant(node: ir.Node | None) -> tuple[ir.Value, np.ndarray] | None:
    """The computed and the constant operand of a binary operator with one of each."""
    if node is None or len(node.inputs) != 2:
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        number = array(other)
        if value is None or number is None or array(value) is not None:
            continue
        return (value, number) if number.ndim <= len(dims(value)) else None
    return None


def _divided(node: ir.Node) -> tuple[ir.Value, float] | None:
    """x and m of x / m, also where it is written as a product with 1 / m."""
    if not is_op(node, "Div", "Mul"):
        return None
    operands = _with_constant(node)
    if operands is None or operands[1].size != 1 or not operands[1].item() > 0:
        return None
    value, number = operands[0], operands[1].item()
    if is_op(node, "Mul"):
        return value, float(np.float32(1 / number))
    return (value, number) if value is node.inputs[0] else None


def _clipped(value: ir.Value | None, most: float) -> tuple[ir.Value, float] | None:
    """x and c where `value` is clip(x + c, 0, most)."""
    node = source_of(value)
    if node is None or not is_op(node, "Clip") or len(node.inputs) != 3:
        return None
    low, high, add = array(node.inputs[1]), array(node.inputs[2]), producer(node, 0)
    if low is None or high is None or low.item() != 0 or not np.isclose(high.item(), most, 1e-6):
        return None
    operands = _with_constant(add) if is_op(add, "Add") else None
    if operands is None or operands[1].size != 1:
        return None
    return operands[0], operands[1].item()
