"""Raise the version of the standard operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from qgraph.graph.annotation import copied
from qgraph.graph.editing import add_constant, lift_constant
from qgraph.graph.names import forget_names, fresh_name
from qgraph.graph.reading import (
    INLINE_BYTES,
    constant,
    is_op,
    node_name,
    nodes,
    opset,
    source_of,
)
from qgraph.graph.types import infer_types
from qgraph.graph.upgrades import is_own, keep_coordinates, upgrade
from qgraph.io.random_feed import first_feed
from qgraph.io.session import run
from qgraph.numerics.noise import relative_error
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass
from qgraph.pipeline.verify import EQUIVALENT_TOLERANCE


@dataclass(frozen=True)
class ConvertOpset(Pass):
    """Make the model import at least `version` of the standard operators.

    The problem: per-axis QuantizeLinear came with opset 13, blocked int4 with opset 21; older
    models cannot hold them. Between versions operators changed: an attribute became an input, a
    default moved.

    ::

        opset 11                              opset 13
        Squeeze <axes = [1]> (x)              Squeeze (x, [1])
        Softmax <axis = 1> (x), flattening    Flatten, Softmax <axis = -1>, Reshape

    The conversions are those of onnx.version_converter. It drops metadata, cannot hold 2 GB, and
    skips control-flow bodies, so it never sees the model: it gets the nodes whose operator changed,
    all at once, side by side in one flat graph whose inputs are their inputs (small constants with
    their values). Only nodes that come back different are replaced; they keep name and metadata.
    Foreign domains and weights stay where they are.

    What the converter is known to get wrong is done here, see :mod:`qgraph.graph.upgrades`, and the
    models before and after run on a feed: the first of the calibration data, or a random one.

    Where that does not work (model-local functions left, an operator that has no conversion, other
    results), the model stays as it was, with a remark.

    Parameters:
        version: opset that is needed; a model that has it or a newer one is left alone.
    """

    name: ClassVar[str] = "convert-opset"
    contract: ClassVar[Contract] = Contract.EQUIVALENT

    version: int = 13

    def run(self, model: ir.Model, context: Context) -> bool:
        current = opset(model)
        if current >= self.version:
            return False
        before = copied(model)
        try:
            replaced = _convert(model, current, self.version)
            if reason := _difference(before, model, context):
                raise _ImpossibleError(reason)
        except _ImpossibleError as error:
            model.graph, model.ir_version = before.graph, before.ir_version
            forget_names(model)
            reason = f"opset {current} cannot become {self.version}: {error}"
            context.remark("declined", self.name, "", "", reason)
            return False
        message = f"opset {current} became {self.version}"
        context.remark("applied", self.name, "", "", message, replaced_nodes=replaced)
        return True


class _ImpossibleError(Exception):
    """Why a model cannot be converted."""


def _convert(model: ir.Model, current: int, version: int) -> int:
    """Replace the nodes that say something else in `version`. Returns how many."""
    if model.functions:
        name = next(iter(model.functions.values())).name
        raise _ImpossibleError(f"function '{name}' has an opset of its own, inline it first")
    affected = [node for node in nodes(model) if _changes(node, current, version)]
    own = [node for node in affected if is_own(node, current, version)]
    affected = [node for node in affected if node not in own]
    try:
        converted = _converted(affected, current, version)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise _ImpossibleError(lines[-1] if lines else type(error).__name__) from error
    parts = _parts(len(affected), converted.graph)
    results: list[list[ir.Value]] = [[] for _ in affected]
    for output in list(converted.graph.outputs):
        results[_owner(output)].append(output)
    converted.graph.outputs.clear()
    replaced = 0
    for node, part, outputs in zip(affected, parts, results, strict=True):
        keep_coordinates(node, current, part)
        if not _same(node, part):
            converted.graph.remove(part)
            _replace(model, node, part, outputs)
            replaced += 1
    for node in own:
        upgrade(model, node)
    model.opset_imports.pop("ai.onnx", None)
    model.opset_imports[""] = version
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", version)])
    model.ir_version = max(model.ir_version or 0, needed)
    if replaced or own:
        infer_types(model)
    return replaced + len(own)


def _difference(before: ir.Model, after: ir.Model, context: Context) -> str | None:
    """What running both on a feed shows to be different; None if nothing is, or cannot run."""
    try:
        feed = first_feed(before, context.calibration, context.seed)
        ideal = run(_plain(before, context), feed)
    except Exception:  # a random feed may not fit the model, or an operator be unknown
        return None
    try:
        outputs = run(_plain(after, context), feed)
    except Exception as error:
        return f"the result does not run: {str(error).splitlines()[0]}"
    for value, old, new in zip(before.graph.outputs, ideal, outputs, strict=True):
        if isinstance(old, np.ndarray) and relative_error(old, new) > EQUIVALENT_TOLERANCE:
            return f"output '{value.name}' would be another one"
    return None


def _plain(model: ir.Model, context: Context) -> Any:
    return context.target.open_session(model, optimized=False, prepack=False, arena=False)


def _changes(node: ir.Node, current: int, version: int) -> bool:
    """Whether the operator of `node` has another definition in `version`."""
    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type):
        return False
    if is_op(node, "Scan") and current < 9 <= version:
        raise _ImpossibleError(f"Scan '{node_name(node)}' had a batch axis before opset 9")
    if any(
        a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for a in node.attributes.values()
    ):
        # If, Loop and Scan only came to accept more types; the nodes in their bodies are visited.
        return False
    try:
        old = onnx.defs.get_schema(node.op_type, current)
        new = onnx.defs.get_schema(node.op_type, version)
    except onnx.defs.SchemaError:
        return False
    return bool(old.since_version != new.since_version)


def _converted(affected: list[ir.Node], current: int, version: int) -> ir.Model:
    """The nodes side by side, converted; `in.i.j` is input j of node i, `out.i.j` output j."""
    inputs: list[ir.Value] = []
    initializers: list[ir.Value] = []
    copies: list[ir.Node] = []
    for i, node in enumerate(affected):
        mine: list[ir.Value | None] = []
        for j, value in enumerate(node.inputs):
            if value is None:
                mine.append(None)
                continue
            copy = ir.Value(name=f"in.{i}.{j}", type=value.type, shape=value.shape)
            tensor = constant(value)
            if tensor is not None and tensor.nbytes <= INLINE_BYTES:
                # A tensor carries its name into the file: this one must not rename the original.
                copy.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=copy.name)
                initializers.append(copy)
            inputs.append(copy)
            mine.append(copy)
        outputs = [
            ir.Value(name=v.name and f"out.{i}.{j}", type=v.type, shape=v.shape)
            for j, v in enumerate(node.outputs)
        ]
        attributes = list(node.attributes.values())
        copies.append(ir.Node("", node.op_type, mine, attributes, outputs=outputs))
    graph = ir.Graph(
        inputs,
        [v for copy in copies for v in copy.outputs if v.name],
        nodes=copies,
        initializers=initializers,
        opset_imports={"": current},
        name="side_by_side",
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=8))
    return ir.from_proto(onnx.version_converter.convert_version(proto, version))


def _owner(output: ir.Value) -> int:
    return int(str(output.name).split(".")[1])


def _parts(count: int, converted: ir.Graph) -> list[list[ir.Node]]:
    """The converted nodes that belong to each of `count` originals, in order."""
    owner: dict[ir.Node, int] = {}
    for output in converted.outputs:
        stack = [output.producer()]
        while stack:
            node = stack.pop()
            if node is not None and node not in owner:
                owner[node] = _owner(output)
                stack += map(source_of, node.inputs)
    parts: list[list[ir.Node]] = [[] for _ in range(count)]
    for node in converted:
        if node in owner:
            parts[owner[node]].append(node)
    return parts


def _same(node: ir.Node, part: list[ir.Node]) -> bool:
    """Whether the conversion left a node as it is."""
    if len(part) != 1 or part[0].op_type != node.op_type:
        return False
    old, new = node.attributes, part[0].attributes
    if old.keys() != new.keys() or not all(_equal(old[key], new[key]) for key in old):
        return False
    return len([v for v in node.inputs if v]) == len([v for v in part[0].inputs if v])


def _equal(a: ir.Attr, b: ir.Attr) -> bool:
    if a.type == b.type == ir.AttributeType.TENSOR:
        return bool(np.array_equal(a.as_tensor().numpy(), b.as_tensor().numpy()))
    return bool(a.type == b.type and a.value == b.value)


def _replace(model: ir.Model, node: ir.Node, part: list[ir.Node], results: list[ir.Value]) -> None:
    """Put converted nodes in the place of `node`, and `results` in that of its outputs."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    name = node_name(node)
    constants: dict[ir.Value, ir.Value] = {}
    for new in part:
        new.metadata_props.update(node.metadata_props)
        for index, value in enumerate(new.inputs):
            if value is None or value.producer() is not None:
                continue
            where = str(value.name).split(".")
            if where[0] == "in":
                new.replace_input_with(index, node.inputs[int(where[2])])
                continue
            if value not in constants:
                assert value.const_value is not None
                constants[value] = add_constant(model, f"{name}_constant", value.const_value)
            new.replace_input_with(index, constants[value])
        for value in new.outputs:
            if value.name:
                value.name = fresh_name(model, f"{name}_{new.op_type}")
        new.name = name if new is part[-1] else new.outputs[0].name
    olds = [value for value in node.outputs if value.name]
    for old, result in zip(olds, results, strict=True):
        result.type, result.shape = old.type, old.shape
        result.metadata_props.update(old.metadata_props)
    # The values are the same ones, said in another opset: they keep their names, too.
    ir.convenience.replace_nodes_and_values(graph, node, [node], part, olds, results)
    for new in part:
        lift_constant(model, new)
