"""Types that onnx-ir has no word for: maps, and sequences of them, as ZipMap gives them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

_TYPE = "qgraph.type"
"""Where a value remembers such a type, an `onnx.TypeProto`, in its `meta`."""


def hide_maps(proto: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """Take the types that hold maps out of `proto`. Returns them by the name of the value."""
    hidden: dict[str, onnx.TypeProto] = {}
    for info in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        if _holds_map(info.type):
            hidden[info.name] = onnx.TypeProto()
            hidden[info.name].CopyFrom(info.type)
            info.ClearField("type")
    return hidden


def remember_maps(model: ir.Model, hidden: dict[str, onnx.TypeProto]) -> None:
    """Note at the values of `model` what :func:`hide_maps` took."""
    for value in _values(model):
        if (known := hidden.get(str(value.name))) is not None:
            value.meta[_TYPE] = known


def show_maps(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Put the types that the inputs and outputs of `model` remember into `proto`."""
    pairs = zip(
        (*model.graph.inputs, *model.graph.outputs),
        (*proto.graph.input, *proto.graph.output),
        strict=True,
    )
    for value, info in pairs:
        if (known := value.meta.get(_TYPE)) is not None:
            info.type.CopyFrom(known)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def _holds_map(kind: onnx.TypeProto) -> bool:
    which: str | None = kind.WhichOneof("value")
    if which in ("sequence_type", "optional_type"):
        return _holds_map(getattr(kind, str(which)).elem_type)
    return which == "map_type"
