"""What of a model torch can run: operators, their attributes, and types of values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container
from functools import cache
from typing import Any

import onnx_ir as ir

from qgraph.torch.ops import OPERATORS
from qgraph.torch.ops.types import torch_dtype

_SPECIAL = ("Constant", "Identity", "If", "Loop", "Scan")
_NOT_TENSORS = (ir.SequenceType, ir.OptionalType)


def uncovered(model: ir.Model, layers: Container[tuple[str, str]] = ()) -> list[str]:
    """What of the model has no counterpart in torch, sorted; functions of the model excluded, and
    operators that `layers` names."""
    problems = set()
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.initializers.values()):
            if problem := _unknown_type(value):
                problems.add(f"{problem} ('{value.name}')")
        for node in graph:
            if operator_key(node) == ("", "Scan") and model.opset_imports.get("", 1) < 9:
                problems.add("Scan of opset 8")
            elif operator_key(node) in layers:
                continue
            elif problem := _unknown(node):
                name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
                problems.add(name + problem if problem != "." else name)
    return sorted(problems)


def _unknown_type(value: ir.Value) -> str:
    if isinstance(value.type, _NOT_TENSORS):
        return "sequences and optional values"
    if value.dtype is None:
        return ""
    try:
        torch_dtype(value.dtype)
    except TypeError:
        return f"{value.dtype.name.lower()} tensors"
    return ""


def _unknown(node: ir.Node) -> str:
    """What torch lacks for `node`: "" if nothing, "." if all of it, else a part of it."""
    key = operator_key(node)
    if key[0] == "" and key[1] in _SPECIAL:
        wrong = next((p for v in node.outputs if (p := _unknown_type(v))), "")
        return f" of {wrong}" if wrong else ""
    if key not in OPERATORS:
        return "."
    known = signature(OPERATORS[key])
    for name, attribute in node.attributes.items():
        if name not in known:
            return f" with attribute {name}"
        if name in ("to", "dtype", "output_dtype") and attribute.type == ir.AttributeType.INT:
            kind = ir.DataType(attribute.as_int())
            try:
                torch_dtype(kind)
            except TypeError:
                return f" to {kind.name.lower()}"
    if "outputs" not in known and any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return f" with {len(node.outputs)} outputs"
    return ""


def operator_key(node: ir.Node) -> tuple[str, str]:
    """Where the operator stands in the table: by domain and name."""
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type


@cache
def signature(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What the function of an operator takes, by name."""
    try:
        return dict(inspect.signature(function).parameters)
    except ValueError:  # functions of torch itself: tensors only
        return {}
