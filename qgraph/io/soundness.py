"""Whether an ONNX file says what it means: checked once when it is read, so that nobody else need.

What onnx.checker asks for, without copies of all the weights and quarrels with operators that
onnxruntime has put into the standard domain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import onnx
import onnx_ir as ir
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto
from onnx.defs import OpSchema

from qgraph.graph.reading import MAIN_DOMAINS

_FIELDS = {
    ir.DataType.FLOAT: ("float_data", 1),
    ir.DataType.COMPLEX64: ("float_data", 2),
    ir.DataType.DOUBLE: ("double_data", 1),
    ir.DataType.COMPLEX128: ("double_data", 2),
    ir.DataType.INT64: ("int64_data", 1),
    ir.DataType.UINT32: ("uint64_data", 1),
    ir.DataType.UINT64: ("uint64_data", 1),
    ir.DataType.STRING: ("string_data", 1),
}
"""Where elements lie that are not raw, and how many numbers each takes; others: `int32_data`."""
_DTYPES = {dtype.value for dtype in ir.DataType} - {ir.DataType.UNDEFINED.value}
Scopes = tuple[set[str], ...]


def problems(model: onnx.ModelProto) -> Iterator[str]:
    """What is wrong with a model, one line each; nodes that are out of order are not wrong."""
    for imported in model.opset_import:
        if not 0 < imported.version < 1 << 31:
            yield f"it imports version {imported.version} of the domain '{imported.domain}'"
    for value in model.graph.input:
        if value.type.HasField("tensor_type") and not value.type.tensor_type.elem_type:
            yield f"input '{value.name}' has no element type"
    yield from _graph(model.graph, (), _versions(model.opset_import))
    for function in model.functions:
        known = set(function.input)
        yield from _nodes(function.node, known, (), _versions(function.opset_import))
        yield from _unknown(function.output, (known,), "output")


def is_sorted(graph: GraphProto) -> bool:
    """Whether every node stands behind those that it reads from."""
    computed = {name for node in graph.node for name in node.output}
    for node in graph.node:
        if any(name in computed for name in _read(node)):
            return False
        computed.difference_update(node.output)
    return True


def _read(node: NodeProto) -> Iterator[str]:
    """The names that a node reads, in its bodies too."""
    yield from node.input
    for body in _bodies(node):
        for inner in body.node:
            yield from _read(inner)


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _graph(graph: GraphProto, outer: Scopes, versions: Mapping[str, int]) -> Iterator[str]:
    for tensor in graph.initializer:
        yield from _tensor(tensor, f"initializer '{tensor.name}'")
    given = [value.name for value in graph.input]
    if (twice := _twice(given)) is not None:
        yield f"two inputs are called '{twice}'"
    known = {*given, *(tensor.name for tensor in graph.initializer)}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    yield from _nodes(graph.node, known, outer, versions)
    yield from _unknown([value.name for value in graph.output], (*outer, known), "output")


def _nodes(
    nodes: Sequence[NodeProto], known: set[str], outer: Scopes, versions: Mapping[str, int]
) -> Iterator[str]:
    """What is wrong with nodes; what they compute is added to the known names first."""
    for node in nodes:
        for name in filter(None, node.output):
            if name in known:
                yield f"{_title(node)}: there is another '{name}', its output, in the same graph"
            known.add(name)
    for node in nodes:
        scopes = (*outer, known)
        for name in _unknown(filter(None, node.input), scopes, "its input"):
            yield f"{_title(node)}: {name}"
        for problem in _misuse(node, versions):
            yield f"{_title(node)}: {problem}"
        for attribute in node.attribute:
            own = [attribute.t] if attribute.HasField("t") else []
            for tensor in (*own, *attribute.tensors):
                yield from _tensor(tensor, f"{_title(node)}: attribute '{attribute.name}'")
        for body in _bodies(node):
            yield from _graph(body, scopes, versions)


def _unknown(names: Sequence[str] | Iterator[str], scopes: Scopes, what: str) -> Iterator[str]:
    for name in names:
        if not any(name in scope for scope in reversed(scopes)):
            yield f"{what} '{name}' comes from nowhere"


def _twice(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def _title(node: NodeProto) -> str:
    name = node.name or next(iter(node.output), "")
    return f"{node.op_type} '{name}'"


# --- schemas --------------------------------------------------------------------------------------


def _versions(imports: Sequence[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {"" if i.domain in MAIN_DOMAINS else i.domain: i.version for i in imports}


def _schema(node: NodeProto, versions: Mapping[str, int]) -> OpSchema | None:
    """What onnx knows of an operator; None of those of others, and of versions to come."""
    domain = "" if node.domain in MAIN_DOMAINS else node.domain
    try:
        return onnx.defs.get_schema(node.op_type, versions[domain], domain)
    except (onnx.defs.SchemaError, KeyError, TypeError, OverflowError):
        return None


def _misuse(node: NodeProto, versions: Mapping[str, int]) -> Iterator[str]:
    """Inputs, outputs and attributes that its operator does not have, or needs."""
    schema = _schema(node, versions)
    if schema is None:
        return
    parts = (
        ("input", node.input, schema.inputs, schema.max_input),
        ("output", node.output, schema.outputs, schema.max_output),
    )
    for kind, names, formal, most in parts:
        if len(names) > most:
            yield f"{len(names)} {kind}s, the operator has at most {most}"
        for index, parameter in enumerate(formal):
            needed = parameter.option == OpSchema.FormalParameterOption.Single
            if parameter.option == OpSchema.FormalParameterOption.Variadic:
                needed = parameter.min_arity > 0
            if needed and not (index < len(names) and names[index]):
                yield f"its {kind} {index} ('{parameter.name}') is missing"
    given = {attribute.name: attribute for attribute in node.attribute}
    for name, known in schema.attributes.items():
        attribute = given.get(name)
        if attribute is None:
            if known.required:
                yield f"its attribute '{name}' is missing"
        elif attribute.type != (wanted := int(known.type)):  # type: ignore[call-overload]
            kinds = _kind(attribute.type), _kind(wanted)
            yield f"its attribute '{name}' is {kinds[0]}, not {kinds[1]}"


def _kind(number: int) -> str:
    known = AttributeProto.AttributeType.values()
    return AttributeProto.AttributeType.Name(number).lower() if number in known else "of no type"


# --- data -----------------------------------------------------------------------------------------


def _tensor(tensor: TensorProto, where: str) -> Iterator[str]:
    if tensor.data_type not in _DTYPES:
        yield f"{where} has no element type that is known ({tensor.data_type})"
        return
    if min(tensor.dims, default=0) < 0:
        yield f"{where} has a negative size: {list(tensor.dims)}"
        return
    if tensor.data_location == TensorProto.EXTERNAL:
        if not any(entry.key == "location" and entry.value for entry in tensor.external_data):
            yield f"{where} says that its data is in a file, but not in which"
        return
    found, wanted = _lengths(tensor)
    if found != wanted:
        yield f"{where} holds {found}, its shape {list(tensor.dims)} needs {wanted}"


def _lengths(tensor: TensorProto) -> tuple[str, str]:
    """How much data there is, and how much there must be."""
    dtype, count = ir.DataType(tensor.data_type), prod(tensor.dims)
    bits = 0 if dtype == ir.DataType.STRING else dtype.bitwidth
    if tensor.HasField("raw_data"):
        size = -(-count * bits // 8)
        return f"{len(tensor.raw_data)} bytes", f"{size} bytes"
    field, each = _FIELDS.get(dtype, ("int32_data", 1))
    per_number = 8 // bits if bits in (2, 4) else 1
    return f"{len(getattr(tensor, field))} numbers", f"{-(-count * each // per_number)} numbers"
