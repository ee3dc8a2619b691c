"""Compute once, now, what does not depend on the model's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qgraph.graph.editing import (
    LAZY_BYTES,
    add_constant,
    lift_constant,
    redirect,
    replace_by_constants,
    typed,
)
from qgraph.graph.names import fresh_name, unique_names
from qgraph.graph.ops import QUANTIZERS, RANDOM
from qgraph.graph.reading import attribute, constant, is_op
from qgraph.graph.types import infer_types
from qgraph.io.session import open_session, run
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass

KEPT = QUANTIZERS | RANDOM
"""Quantization that a model brings along is information, random numbers are not constants."""


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace what depends on constants only by its value.

    The problem: a weight behind a Transpose, Cast or Reshape is not seen as a weight, shapes behind
    arithmetic are not seen as shapes, and If nodes whose condition is known hide their bodies from
    calibration.

    ::

        w (64, 32) -> Transpose -> MatMul             w' (32, 64) -> MatMul
        x (2, n) -> Shape -> Size -> Equal 2 -> If    the nodes of then_branch

    Constant nodes become initializers; in the body of an If, Loop or Scan the large ones move to
    the main graph, where sessions borrow them, and small ones (shapes, axes) stay, where shape
    inference sees them. Foreign domains and :data:`KEPT` are left alone, and so is whatever would
    make the model larger by more than `growth` (Expand, ConstantOfShape, outer products): sizes are
    inferred before anything is computed.

    onnxruntime computes the values, one node at a time, so that the result is what every opset and
    dtype means to it. (onnxscript's folder computes with ONNX's reference operators, some of which
    know the newest version only, notes each fold in the model's metadata and folds no node with two
    outputs.) Where the inputs are larger than `lazy` nothing is read: the value is computed when it
    is asked for. A tied language-model head (one matrix, transposed for the embedding or for the
    head) thus becomes two weights, of which the second takes memory only while it is read; where
    both are quantized, `balance-tables` makes one of them again; if both stay float, the saved
    model holds both, which the pass remarks.

    Parameters:
        growth: bytes by which a value may be larger than what it is computed from.
        lazy: bytes of inputs from which on a value is computed on demand.
    """

    name: ClassVar[str] = "fold-constants"
    contract: ClassVar[Contract] = Contract.EQUIVALENT

    growth: int = 4096
    lazy: int = LAZY_BYTES

    def run(self, model: ir.Model, context: Context) -> bool:
        unique_names(model)
        lifted = sum(lift_constant(model, node) for node in model.graph.all_nodes())
        folded = inlined = 0
        while True:
            infer_types(model)
            before = folded + inlined
            for node in model.graph.all_nodes():
                tensors = _shape(node) or self._fold(model, node, context)
                if tensors is not None:
                    replace_by_constants(model, node, tensors)
                    folded += 1
            inlined += sum(_inline_if(model, node) for node in _ifs(model))
            if folded + inlined == before:
                break
        _scalar_bounds(model)
        if folded or lifted or inlined:
            context.remark(
                "applied",
                self.name,
                "",
                "",
                "computed what does not depend on the inputs",
                folded=folded,
                lifted=lifted,
                inlined_branches=inlined,
            )
        return bool(folded or lifted or inlined)

    def _fold(
        self, model: ir.Model, node: ir.Node, context: Context
    ) -> list[ir.TensorProtocol] | None:
        if node.domain not in ("", "ai.onnx") or is_op(node, "Constant", *KEPT) or not node.outputs:
            return None
        if any(a.type in _GRAPHS or a.is_ref() for a in node.attributes.values()):
            return None
        if any(value.is_graph_output() for value in node.outputs):
            return None
        inputs = {value: constant(value) for value in node.inputs if value is not None}
        if not all(tensor is not None and tensor.dtype in _SIZED for tensor in inputs.values()):
            return None
        tensors = [tensor for tensor in inputs.values() if tensor is not None]
        given = sum(tensor.nbytes for tensor in tensors)
        needed = sum(_nbytes(value) for value in node.outputs if value.name)
        if needed > given + self.growth:
            return None
        if given <= self.lazy:
            return _evaluate(node, tensors, model.opset_imports)
        if len(node.outputs) > 1:
            return None
        site = node.name or ""
        context.remark(
            "note", self.name, site, node.op_type, "computed on demand, stored beside its source"
        )
        return [_on_demand(node, tensors, dict(model.opset_imports))]


def _scalar_bounds(model: ir.Model) -> None:
    """Make the constant bounds of a Range scalars: its kernel takes one element of any rank, but
    onnxruntime's checks, which see constants alone, do not."""
    for node in model.graph.all_nodes():
        for index, value in enumerate(node.inputs if is_op(node, "Range") else ()):
            tensor = constant(value)
            if tensor is None or value is None or tensor.size != 1 or not len(tensor.shape):
                continue
            scalar = add_constant(model, f"{value.name}_scalar", tensor.numpy().reshape(()))
            node.replace_input_with(index, scalar)


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_SIZED = {
    dtype for dtype in ir.DataType if dtype not in (ir.DataType.UNDEFINED, ir.DataType.STRING)
}


def _nbytes(value: ir.Value) -> float:
    """Size of a value as inferred, infinite where it is not known."""
    if not isinstance(value.type, ir.TensorType) or value.dtype not in _SIZED:
        return float("inf")
    if value.shape is None or not value.shape.is_static():
        return float("inf")
    return prod(value.shape.numpy()) * value.type.dtype.bitwidth / 8


def _shape(node: ir.Node) -> list[ir.TensorProtocol] | None:
    """What Shape or Size returns where the input's shape is known."""
    if not is_op(node, "Shape", "Size") or node.outputs[0].is_graph_output():
        return None
    value = node.inputs[0]
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    if is_op(node, "Size"):
        return [ir.tensor(np.array(prod(value.shape.numpy()), np.int64))]
    shape, end = value.shape.numpy(), node.attributes.get("end")
    window = slice(int(attribute(node, "start", 0)), None if end is None else end.as_int())
    return [ir.tensor(np.array(shape[window], np.int64))]


def _evaluate(
    node: ir.Node, tensors: Sequence[ir.TensorProtocol], opset_imports: dict[str, int]
) -> list[ir.TensorProtocol] | None:
    """What one node makes of its distinct inputs `tensors`; None if onnxruntime cannot run it."""
    try:
        session = open_session(_alone(node, tensors, opset_imports), optimized=False, threads=1)
        arrays = iter(run(session, {}))
        return [
            ir.Tensor(next(arrays), dtype=value.dtype) if value.name else ir.tensor(0.0)
            for value in node.outputs
        ]
    except Exception:
        # A node that onnxruntime cannot run may sit in a branch that is never taken: leave it.
        return None


def _alone(
    node: ir.Node, tensors: Sequence[ir.TensorProtocol], opset_imports: dict[str, int]
) -> ir.Model:
    """A model of a copy of `node` alone, its inputs initializers."""
    originals = dict.fromkeys(value for value in node.inputs if value is not None)
    values = {
        original: ir.Value(
            name=f"in_{i}",
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        for i, (original, tensor) in enumerate(zip(originals, tensors, strict=True))
    }
    outputs = [
        ir.Value(name=v.name and f"out_{i}", type=v.type) for i, v in enumerate(node.outputs)
    ]
    copy = ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else values[value] for value in node.inputs],
        node.attributes.values(),
        outputs=outputs,
    )
    graph = ir.Graph(
        [],
        [value for value in outputs if value.name],
        nodes=[copy],
        initializers=list(values.values()),
        opset_imports=opset_imports,
        name="constant",
    )
    return ir.Model(graph, ir_version=10)


def _on_demand(
    node: ir.Node, tensors: Sequence[ir.TensorProtocol], opset_imports: dict[str, int]
) -> ir.TensorProtocol:
    """The single output of `node` as a tensor that is computed when it is read, and not kept."""
    output = node.outputs[0]
    assert output.shape is not None
    assert output.dtype is not None
    model = _alone(node, tensors, opset_imports)

    def compute() -> ir.TensorProtocol:
        array = run(open_session(model, optimized=False), {})[0]
        return ir.Tensor(np.asarray(array), dtype=output.dtype)

    shape = ir.Shape(output.shape.numpy())
    return ir.LazyTensor(compute, dtype=output.dtype, shape=shape, name=output.name)


def _ifs(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if is_op(node, "If")]


def _inline_if(model: ir.Model, node: ir.Node) -> bool:
    """Put the branch that is always taken in the place of an If."""
    condition = constant(node.inputs[0])
    graph = node.graph
    if condition is None or not isinstance(graph, ir.Graph):
        return False
    taken = bool(condition.numpy().item())
    branch = node.attributes["then_branch" if taken else "else_branch"].as_graph()
    results = list(branch.outputs)
    branch.outputs.clear()
    for initializer in list(branch.initializers.values()):
        branch.initializers.pop(str(initializer.name))
        graph.register_initializer(initializer)
    body = list(branch)
    branch.remove(body)
    graph.insert_before(node, body)
    for old, new in zip(node.outputs, results, strict=True):
        # A name for the result that nothing else has: canonicalization removes what is not needed.
        copy = ir.node("Identity", [new], name=fresh_name(model, f"{old.name}_taken"))
        copy.outputs[0].name = fresh_name(model, f"{old.name}_taken")
        graph.insert_before(node, copy)
        # Not `replace`: the branch knows its types, the If what both branches have in common.
        redirect(old, typed(copy, new.dtype, new.shape))
    graph.remove(node, safe=True)
    return True
