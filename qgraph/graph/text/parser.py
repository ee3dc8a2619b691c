"""Reads the text form of a model, see :mod:`qgraph.graph.text.printer` for the syntax."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qgraph.errors import ModelError, QGraphError
from qgraph.graph.annotation import set_spec, set_use_specs
from qgraph.graph.text.tensors import tensor_from, tensor_from_bytes
from qgraph.graph.text.tokens import Cursor
from qgraph.numerics.spec import QuantSpec

FIELDS = (
    "ir_version",
    "producer_name",
    "producer_version",
    "domain",
    "model_version",
    "doc_string",
)
"""What the text says about a model besides its graphs."""

_LIST_OF = {
    ir.AttributeType[kind]: ir.AttributeType[f"{kind}S"]
    for kind in ("INT", "FLOAT", "STRING", "TENSOR", "GRAPH", "TYPE_PROTO")
}
_LISTS = {kind.name.lower(): kind for kind in _LIST_OF.values()}
Scope = dict[str, ir.Value]


def from_text(text: str) -> ir.Model:
    """The model that `text` describes.

    Raises:
        ModelError: the text is not what :func:`qgraph.to_text` prints, or holds content hashes
            in place of weights; the message gives the line.
    """
    return _Parser(text).model()


class _Parser(Cursor):
    """Recursive descent; `self._scopes` holds the values in sight, innermost last."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._scopes: list[Scope] = []

    def model(self) -> ir.Model:
        fields: dict[str, int | str] = {}
        metadata: dict[str, str] = {}
        graph: ir.Graph | None = None
        functions: list[ir.Function] = []
        while self.kind != "end":
            if self.accept("function"):
                functions.append(self._function())
            elif self.at("graph") and graph is None:
                graph = self._graph()
            elif self.accept("metadata"):
                metadata = self._metadata()
            elif self.at(*FIELDS):
                name = self.next()
                self.expect("=")
                fields[name] = self.integer() if self.kind == "number" else self.take("string")
            else:
                self.fail(
                    f"expected 'graph', 'function' or a field of the model, found '{self.text}'"
                )
        if graph is None:
            self.fail("the text has no graph")
        model = ir.Model(graph, ir_version=10, functions=functions, metadata_props=metadata)
        for name, value in fields.items():
            setattr(model, name, value)
        return model

    def _function(self) -> ir.Function:
        domain, name, overload = self._operator()
        outer, self._scopes = self._scopes, []
        attributes: list[ir.Attr] = []
        graph = self._body(name, attributes)
        self._scopes = outer
        return ir.Function(domain, name, overload, graph=graph, attributes=attributes)

    def _graph(self) -> ir.Graph:
        self.expect("graph")
        return self._body(self.name() if self.kind in ("name", "string") else None)

    def _body(self, name: str | None, attributes: list[ir.Attr] | None = None) -> ir.Graph:
        metadata = self._metadata()
        self.expect("{")
        scope: Scope = {}
        self._scopes.append(scope)
        opsets: dict[str, int] = {}
        inputs: list[ir.Value] = []
        weights: list[ir.Value] = []
        nodes: list[ir.Node] = []
        outputs: list[ir.Value] = []
        while not self.accept("}"):
            if self.accept("opset"):
                domain = "" if self.kind == "number" else self.name()
                opsets[domain] = self.integer()
            elif attributes is not None and self.accept("attribute"):
                attributes.append(self._attribute())
            elif self.accept("input"):
                inputs.append(self._definition())
            elif self.accept("weight"):
                weights.append(self._weight(inputs))
            elif self.accept("output"):
                outputs.append(self._described(self._reference()))
            else:
                nodes.append(self._node())
        self._scopes.pop()
        return ir.Graph(
            inputs,
            outputs,
            nodes=nodes,
            initializers=weights,
            opset_imports=opsets,
            name=name,
            metadata_props=metadata,
        )

    def _definition(self) -> ir.Value:
        """A value that is new in this graph."""
        if self.accept("_"):
            return self._described(ir.Value(name=""))
        return self._described(self._defined(self.take("value")))

    def _defined(self, name: str) -> ir.Value:
        if name in self._scopes[-1]:
            self.refuse(f"'%{name}' is defined twice")
        value = self._scopes[-1][name] = ir.Value(name=name)
        return value

    def _reference(self) -> ir.Value:
        """A value that this graph or one around it has defined above."""
        name = self.take("value")
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        return self.refuse(f"'%{name}' is used but not defined above")

    def _described(self, value: ir.Value) -> ir.Value:
        """Type, spec and metadata behind a value's name."""
        if self.accept(":"):
            value.type, value.shape = self._type()
        if self.kind == "spec":
            set_spec(value, self._spec())
        value.metadata_props.update(self._metadata())
        return value

    def _weight(self, inputs: Sequence[ir.Value]) -> ir.Value:
        name = self.take("value")
        value = next((v for v in inputs if v.name == name and v.const_value is None), None)
        value = self._described(value or self._defined(name))
        self.expect("=")
        kind, shape = self._type()
        value.const_value = self._tensor(kind, shape)
        value.const_value.name = name
        if value not in inputs:
            value.type, value.shape = kind, shape
        return value

    def _node(self) -> ir.Node:
        outputs = self.series("=", self._definition)
        domain, op_type, overload = self._operator()
        self.expect("(")
        operands = self.series(")", self._operand)
        name = self.take("at") if self.kind == "at" else None
        metadata = self._metadata()
        attributes = self.series("}", self._attribute) if self.accept("{") else []
        if name is None:
            name = outputs[0].name if outputs else ""
        node = ir.Node(
            domain,
            op_type,
            [value for value, _ in operands],
            attributes,
            overload=overload,
            outputs=outputs,
            name=name,
            metadata_props=metadata,
        )
        if overrides := {i: spec for i, (_, spec) in enumerate(operands) if spec is not None}:
            set_use_specs(node, overrides)
        return node

    def _operand(self) -> tuple[ir.Value | None, QuantSpec | None]:
        value = None if self.accept("_") else self._reference()
        return value, self._spec() if self.kind == "spec" else None

    def _operator(self) -> tuple[str, str, str]:
        domain, name = "", self.name()
        if self.accept("::"):
            domain, name = name, self.name()
        return domain, name, self.name() if self.accept(":") else ""

    def _spec(self) -> QuantSpec:
        try:
            return QuantSpec.parse(self.take("spec"))
        except ModelError:
            raise
        except QGraphError as error:
            self.refuse(str(error))

    def _metadata(self) -> dict[str, str]:
        if not self.accept("!"):
            return {}
        self.expect("{")
        return dict(self.series("}", self._entry))

    def _entry(self) -> tuple[str, str]:
        key = self.take("string")
        self.expect(":")
        return key, self.take("string")

    def _type(self) -> tuple[ir.TypeProtocol | None, ir.Shape | None]:
        for name, kind in (("seq", ir.SequenceType), ("optional", ir.OptionalType)):
            if self.accept(name):
                self.expect("(")
                inner, shape = self._type()
                self.expect(")")
                return kind(inner), shape  # type: ignore[arg-type]
        if self.accept("sparse"):
            self.expect("(")
            inner, shape = self._type()
            self.expect(")")
            return ir.SparseTensorType(inner.dtype if inner else ir.DataType.UNDEFINED), shape
        element = None if self.accept("?") else ir.TensorType(self._dtype())
        self.expect("[")
        if self.accept("*"):
            self.expect("]")
            return element, None
        return element, ir.Shape(self.series("]", self._dim))

    def _dtype(self) -> ir.DataType:
        name = self.text
        try:
            dtype = ir.DataType.from_short_name(name)
        except TypeError:
            self.fail(f"unknown dtype '{name}'")
        self.next()
        return dtype

    def _dim(self) -> int | str | None:
        if self.accept("?"):
            return None
        return self.integer() if self.kind == "number" else self.name()

    def _attribute(self) -> ir.Attr:
        name = self.name()
        if not self.accept("="):
            return ir.Attr(name, ir.AttributeType.UNDEFINED, None)
        if self.accept("$"):
            source = self.name()
            self.expect(":")
            kind = self.name().upper()
            if kind not in ir.AttributeType.__members__:
                self.refuse(f"'{kind.lower()}' is not a kind of attribute")
            return ir.RefAttr(name, source, ir.AttributeType[kind])
        return ir.Attr(name, *self._attribute_value())

    def _attribute_value(self) -> tuple[ir.AttributeType, object]:
        if not self.accept("["):
            return self._item()
        items = self.series("]", self._item)
        kinds = {kind for kind, _ in items}
        if len(kinds) != 1 or not kinds <= set(_LIST_OF):
            self.refuse(
                "a list needs items of one kind; write an empty one as ints[], floats[], ..."
            )
        return _LIST_OF[kinds.pop()], [value for _, value in items]

    def _item(self) -> tuple[ir.AttributeType, object]:
        if self.kind == "string":
            return ir.AttributeType.STRING, self.take("string")
        if self.kind == "bytes":
            return ir.AttributeType.STRING, self.take("bytes").encode("utf-8", "surrogateescape")
        if self.kind == "number":
            text = self.take("number")
            if re.fullmatch(r"-?\d+", text):
                return ir.AttributeType.INT, int(text)
            with np.errstate(over="ignore"):
                return ir.AttributeType.FLOAT, float(np.float32(text))
        if self.at("graph"):
            return ir.AttributeType.GRAPH, self._graph()
        if self.at(*_LISTS):
            kind = _LISTS[self.next()]
            self.expect("[")
            self.expect("]")
            return kind, ()
        element, shape = self._type()
        if self.at("{"):
            return ir.AttributeType.TENSOR, self._tensor(element, shape)
        return ir.AttributeType.TYPE_PROTO, ir.TypeAndShape(element, shape)

    def _tensor(self, kind: ir.TypeProtocol | None, shape: ir.Shape | None) -> ir.TensorProtocol:
        if kind is None or shape is None or not shape.is_static():
            self.fail("a tensor needs a dtype and a static shape")
        self.expect("{")
        if self.kind == "hash":
            self.fail(f"the data of {self.text} is left out: print the model with weights=True")
        dtype, size = kind.dtype, shape.numpy()
        try:
            if self.accept("base64"):
                data = base64.b64decode(self.take("string"), validate=True)
                self.expect("}")
                return tensor_from_bytes(dtype, size, data)
            if dtype == ir.DataType.STRING:
                texts = self.series("}", lambda: self.take("string"))
                data_ = [text.encode("utf-8", "surrogateescape") for text in texts]
                return ir.StringTensor(data_, shape=ir.Shape(size))
            return tensor_from(dtype, size, self.series("}", lambda: self.take("number", "name")))
        except (ValueError, OverflowError, binascii.Error) as error:
            self.refuse(f"the data does not fit {dtype.short_name()}{list(size)}: {error}")
