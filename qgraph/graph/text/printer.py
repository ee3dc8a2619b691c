"""A model as text: deterministic, one node per line, made for reading, diffing and golden tests.

    ir_version = 10

    graph mlp {
      opset 21
      input %x: f32[batch, 16]  // [-3.1, 2.9]
      weight %w = f32[16, 32] {#5f0c3a1e}
      weight %b <int32 per-axis(0) sym minmax> = f32[2] {0.1, -1.5}
      %m: f32[batch, 32] <uint8 per-tensor asym minmax> = MatMul(%x, %w) @/fc1/MatMul
      %y: f32[batch, 32] = com.microsoft::Gelu(%m) {alpha = 1.0}  // encoder.layer.0
      output %y: f32[batch, 32]
    }

Values begin with `%`, `_` is an omitted input or output, `@` gives a node's name where it is not
that of its first output. `<...>` is a `QuantSpec`: behind a value its own, behind an operand that
of this use, see :mod:`qgraph.graph.annotation`. Types are `f32[2, batch, ?]`, `f32[*]` (rank
unknown), `seq(...)`, `optional(...)`, `sparse(...)`. A tensor is its type and its elements in
`{...}`: the elements themselves up to eight, above that a content hash, or base64 in the complete
form. Names with unusual characters are quoted: `%"two words"`. Comments run from `//` to the end of
the line; statistics are only that. Documentation strings of graphs, nodes and values are left out,
as are denotations.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from qgraph.errors import ModelError
from qgraph.graph.annotation import spec_of, stats_of, use_specs
from qgraph.graph.provenance import layer
from qgraph.graph.text.tensors import content_hash, digest, elements_of, strings_of, tensor_from

INLINE = 8
"""Tensors of up to this many elements show them."""
_FIELDS = (
    "ir_version",
    "producer_name",
    "producer_version",
    "domain",
    "model_version",
    "doc_string",
)
"""What the text says about a model besides its graphs."""
_NAME = r"(?!(?:inf|nan)\b)[^\W\d][\w.-]*"
_VALUE_NAME = r"[\w./$;@+~|-]+(?::+[\w./$;@+~|-]+)*"
"""Names without quotes: what could be read as a number or a mark has them."""
_INDENT = "  "


def to_text(model: ir.Model, *, weights: bool = False) -> str:
    """The text of `model`.

    Args:
        weights: the complete form, with all tensor data (base64) and all `metadata_props`. Without
            it, large tensors are content hashes, and of the metadata only the layer that a node
            was traced from is shown, as a comment.
    """
    return _Printer(weights).model(model)


def fingerprint(model: ir.Model) -> str:
    """The short text with 16 bytes of hash for every tensor: no other model has the same."""
    return _Printer(hash_bytes=16).model(model)


class _Printer:
    def __init__(self, complete: bool = False, hash_bytes: int | None = None) -> None:
        self._complete = complete
        self._hash_bytes = hash_bytes

    def model(self, model: ir.Model) -> str:
        lines = [
            f"{name} = {json.dumps(value)}"
            for name in _FIELDS
            if (value := getattr(model, name)) not in (None, "")
        ]
        if self._complete and model.metadata_props:
            lines.append(f"metadata{self._metadata(model.metadata_props)}")
        lines += ["", *self._block("graph", _name(model.graph.name or ""), model.graph)]
        for function in model.functions.values():
            title = _operator(function.domain, function.name, function.overload)
            lines += ["", *self._block("function", title, function)]
        return "\n".join(lines) + "\n"

    def _block(self, kind: str, title: str, graph: ir.Graph | ir.Function) -> list[str]:
        opening = f"{kind} {title}".rstrip() + self._metadata(graph.metadata_props) + " {"
        return [opening, *(_INDENT + line for line in self._body(graph)), "}"]

    def _body(self, graph: ir.Graph | ir.Function) -> Iterator[str]:
        for domain, version in graph.opset_imports.items():
            yield f"opset {_name(domain)} {version}" if domain else f"opset {version}"
        if isinstance(graph, ir.Function):
            for attribute in graph.attributes.values():
                yield from _lines("attribute ", self._attribute(attribute))
        for value in graph.inputs:
            yield _commented(f"input {self._typed(value)}", _stats(value))
        if isinstance(graph, ir.Graph):
            for value in graph.initializers.values():
                if value.const_value is None:
                    raise ModelError(
                        f"initializer '{value.name}' has no data: it cannot be printed"
                    )
                data = f"{self._marked(value)} = {self._tensor(value.const_value)}"
                yield _commented(f"weight {data}", _stats(value))
        for node in graph:
            yield from self._node(node)
        for value in graph.outputs:
            yield f"output {self._typed(value)}"

    def _node(self, node: ir.Node) -> Iterator[str]:
        overrides = use_specs(node)
        operands = [_reference(v) + _spec(overrides.get(i)) for i, v in enumerate(node.inputs)]
        head = ", ".join(self._typed(value) for value in node.outputs)
        head += f" = {_operator(node.domain, node.op_type, node.overload)}({', '.join(operands)})"
        if node.name and (not node.outputs or node.name != node.outputs[0].name):
            head += f" @{_name(node.name, _VALUE_NAME)}"
        head += self._metadata(node.metadata_props)
        remark = " ".join(filter(None, [*map(_stats, node.outputs), self._provenance(node)]))
        attributes = [self._attribute(a) for _, a in sorted(node.attributes.items())]
        if all(len(lines) == 1 for lines in attributes):
            shown = ", ".join(lines[0] for lines in attributes)
            yield _commented(f"{head} {{{shown}}}" if shown else head, remark)
            return
        yield _commented(f"{head} {{", remark)
        for lines in attributes:
            yield from (_INDENT + line for line in _lines("", lines, ","))
        yield "}"

    def _attribute(self, attribute: ir.Attr) -> list[str]:
        name = _name(attribute.name)
        if attribute.is_ref():
            return [
                f"{name} = ${_name(attribute.ref_attr_name or '')}: {attribute.type.name.lower()}"
            ]
        if attribute.type == ir.AttributeType.UNDEFINED:
            return [name]
        if attribute.type.name.endswith("S"):
            return self._attributes(name, attribute)
        return _lines(f"{name} = ", self._item(attribute.type.name, attribute.value))

    def _attributes(self, name: str, attribute: ir.Attr) -> list[str]:
        kind, values = attribute.type.name, tuple(attribute.value)
        if not values:
            return [f"{name} = {kind.lower()}[]"]
        items = [self._item(kind[:-1], value) for value in values]
        if all(len(lines) == 1 for lines in items):
            return [f"{name} = [{', '.join(lines[0] for lines in items)}]"]
        inside = [_INDENT + line for lines in items for line in _lines("", lines, ",")]
        return [f"{name} = [", *inside, "]"]

    def _item(self, kind: str, value: object) -> list[str]:
        if isinstance(value, ir.Graph):
            return self._block("graph", _name(value.name or ""), value)
        if isinstance(value, ir.TypeAndShape):
            return [_type(value.type, value.shape)]
        if isinstance(value, ir.TensorProtocol):
            return [self._tensor(value)]
        if isinstance(value, bytes):
            return [f"b{_quoted(value.decode('utf-8', 'surrogateescape'))}"]
        if isinstance(value, str):
            return [_quoted(value)]
        if isinstance(value, int):
            return [str(value)]
        if isinstance(value, float):
            return [_float(value)]
        raise ModelError(f"attributes of kind {kind} cannot be printed")

    def _tensor(self, tensor: ir.TensorProtocol) -> str:
        kind = _type(ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy()))
        if self._hash_bytes is not None:
            return f"{kind} {{#{digest(tensor, self._hash_bytes)}}}"
        if tensor.size > INLINE and not self._complete:
            return f"{kind} {{#{content_hash(tensor)}}}"
        if tensor.dtype == ir.DataType.STRING:
            texts = [s.decode("utf-8", "surrogateescape") for s in strings_of(tensor)]
            return f"{kind} {{{', '.join(map(_quoted, texts))}}}"
        data = tensor.tobytes()
        if tensor.size <= INLINE:
            numbers = elements_of(tensor)
            if tensor_from(tensor.dtype, tensor.shape.numpy(), numbers).tobytes() == data:
                return f"{kind} {{{', '.join(numbers)}}}"
        return f'{kind} {{base64 "{base64.b64encode(data).decode()}"}}'

    def _typed(self, value: ir.Value) -> str:
        kind = _type(value.type, value.shape)
        marks = _spec(spec_of(value)) + self._metadata(value.metadata_props)
        return _reference(value) + (f": {kind}" if kind else "") + marks

    def _marked(self, value: ir.Value) -> str:
        marks = _spec(spec_of(value)) + self._metadata(value.metadata_props)
        return _reference(value) + marks

    def _metadata(self, props: Mapping[str, str]) -> str:
        if not (self._complete and props):
            return ""
        entries = [f"{_quoted(key)}: {_quoted(value)}" for key, value in sorted(props.items())]
        return f" !{{{', '.join(entries)}}}"

    def _provenance(self, node: ir.Node) -> str:
        return "" if self._complete else layer(node)


def _float(value: float) -> str:
    """The shortest text that gives `value` back as float32, which is what ONNX stores."""
    with np.errstate(over="ignore"):
        return str(np.float32(value))


def _type(kind: ir.TypeProtocol | None, shape: ir.ShapeProtocol | None) -> str:
    if isinstance(kind, ir.SequenceType):
        return f"seq({_type(kind.elem_type, shape)})"
    if isinstance(kind, ir.OptionalType):
        return f"optional({_type(kind.elem_type, shape)})"
    if kind is None and shape is None:
        return ""
    element = "?" if kind is None else kind.dtype.short_name()
    text = f"{element}[{'*' if shape is None else ', '.join(map(_dim, shape))}]"
    return f"sparse({text})" if isinstance(kind, ir.SparseTensorType) else text


def _dim(dim: int | ir.SymbolicDimProtocol) -> str:
    if isinstance(dim, int):
        return str(dim)
    return "?" if dim.value is None else _name(str(dim.value))


def _reference(value: ir.Value | None) -> str:
    return f"%{_name(value.name, _VALUE_NAME)}" if value is not None and value.name else "_"


def _operator(domain: str, name: str, overload: str) -> str:
    text = f"{_name(domain)}::{_name(name)}" if domain else _name(name)
    return f"{text}:{_name(overload)}" if overload else text


def _name(name: str, syntax: str = _NAME) -> str:
    return name if not name or re.fullmatch(syntax, name) else _quoted(name)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _spec(spec: object) -> str:
    if spec is None:
        return ""
    text = str(spec)
    return f" <{text}>" if re.fullmatch(r'[^<>"\n]*', text) else f" <{_quoted(text)}>"


def _stats(value: ir.Value) -> str:
    stats = stats_of(value)
    return "" if stats is None else " ".join(str(stats).split())


def _commented(line: str, comment: str) -> str:
    return f"{line}  // {comment}" if comment else line


def _lines(prefix: str, lines: list[str], suffix: str = "") -> list[str]:
    first, *rest = lines
    whole = [prefix + first, *rest]
    return [*whole[:-1], whole[-1] + suffix]
