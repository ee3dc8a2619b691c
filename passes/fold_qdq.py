"""Remove the conversions that cancel, so that integers flow from kernel to kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qgraph.graph.annotation import Stage
from qgraph.graph.editing import redirect, remove_dead
from qgraph.graph.ops import CLAMPS, MOVES
from qgraph.graph.reading import array, graphs, input_of, is_op, producer, scope
from qgraph.numerics.reference import quantize
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass

_RANGES = {
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT16: (-32768, 32767),
}


@dataclass(frozen=True)
class FoldQDQ(Pass):
    """Remove conversions between float and integers that cancel.

    Three rewrites, each keeping every integer::

        q ── DQ ── Q ── DQ ── y          q ── DQ ── y          (same scale and zero point)
        q ── DQ ── Reshape ── Q ── y     q ── Reshape ── y     (any operator that only moves data)
        x ── Relu ── Q ── y              x ── Q ── y           (Q clamps where Relu or Clip would)

    onnxruntime would do most of this when it loads the model; doing it here gives the same integers
    at every optimization level and in every runtime.

    Source: Jacob et al. 2018, section 2.4 (activation functions fold into the clamp).
    """

    name: ClassVar[str] = "fold-qdq"
    contract: ClassVar[Contract] = Contract.EXACT
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.COMMITTED})

    def run(self, model: ir.Model, context: Context) -> bool:
        changed = False
        for graph in graphs(model):
            for node in graph:
                while is_op(node, "QuantizeLinear") and not _idle(node):
                    if not (_cancel(node) or _move(node) or _absorb_clamp(node)):
                        break
                    changed = True
        if changed:
            remove_dead(model)
        return changed


def _idle(q: ir.Node) -> bool:
    return not q.outputs[0].uses() and not q.outputs[0].is_graph_output()


def _cancel(q: ir.Node) -> bool:
    """DQ -> Q with the same parameters: use the integers behind the DQ."""
    dq = producer(q, 0)
    if not is_op(dq, "DequantizeLinear") or not same_parameters(dq, q):
        return False
    source = input_of(dq, 0)
    if q.outputs[0].is_graph_output():
        return False
    redirect(q.outputs[0], source)
    return True


def _move(q: ir.Node) -> bool:
    """DQ -> move -> Q with the same parameters: move the integers."""
    move = producer(q, 0)
    if not is_op(move, *MOVES) or len(list(move.outputs[0].uses())) != 1:
        return False
    dq = producer(move, 0)
    if not is_op(dq, "DequantizeLinear") or not same_parameters(dq, q):
        return False
    scale = array(q.inputs[1])
    if move.outputs[0].is_graph_output() or scale is None or scale.ndim:
        return False
    source, result = dq.inputs[0], q.outputs[0]
    if result.is_graph_output() or source is None:
        return False
    if is_op(move, "MaxPool") and source.dtype not in (ir.DataType.UINT8, ir.DataType.INT8):
        return False
    move.replace_input_with(0, source)
    move.outputs[0].type = ir.TensorType(source.dtype or ir.DataType.UINT8)
    redirect(result, move.outputs[0])
    return True


def _absorb_clamp(q: ir.Node) -> bool:
    """Relu or Clip -> Q: drop the clamp if quantizing its bounds gives the integer limits."""
    clamp = producer(q, 0)
    if not is_op(clamp, *CLAMPS) or len(list(clamp.outputs[0].uses())) != 1:
        return False
    scale, zero = array(q.inputs[1]), array(q.inputs[2]) if len(q.inputs) > 2 else None
    if clamp.outputs[0].is_graph_output() or scale is None or zero is None or scale.ndim:
        return False
    dtype = ir.DataType.from_numpy(zero.dtype)
    low, high = clamp_bounds(clamp)
    if dtype not in _RANGES or low is None or high is None:
        return False
    qmin, qmax = _RANGES[dtype]
    at_low, at_high = (
        int(quantize(np.float32(bound), scale, zero.astype(np.int32), qmin, qmax))
        for bound in (low, high)
    )
    if (at_low, at_high) != (qmin, qmax):
        return False
    q.replace_input_with(0, clamp.inputs[0])
    scope(clamp).remove(clamp, safe=True)
    return True


def clamp_bounds(node: ir.Node) -> tuple[float | None, float | None]:
    """Lower and upper bound of Relu or Clip (attributes before opset 11), None where computed."""
    big = float(np.finfo(np.float32).max)
    if is_op(node, "Relu"):
        return 0.0, big
    bounds: list[float | None] = []
    for index, name, default in ((1, "min", -big), (2, "max", big)):
        value = node.inputs[index] if index < len(node.inputs) else None
        if name in node.attributes:
            bounds.append(float(node.attributes[name].as_float()))
        elif value is None:
            bounds.append(default)
        else:
            bound = array(value)
            bounds.append(None if bound is None or bound.size != 1 else float(bound.reshape(())))
    return bounds[0], bounds[1]


def same_parameters(a: ir.Node, b: ir.Node) -> bool:
    """Whether two Q/DQ nodes have equal constant scales and zero points, and one scale each."""
    for index in (1, 2):
        left, right = (n.inputs[index] if index < len(n.inputs) else None for n in (a, b))
        if (
            left is None or right is None
        ):  # without a zero point, Q writes uint8, whatever type DQ read
            return False
        if left is right:
            continue
        x, y = array(left), array(right)
        if x is None or y is None or x.dtype != y.dtype or not np.array_equal(x, y):
            return False
    scale = array(a.inputs[1])
    return scale is not None and scale.size == 1
