"""Small helpers on onnx-ir that every pass needs. No state, no wrapper classes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TypeGuard

import numpy as np
import onnx_ir as ir

from qgraph.errors import ModelError


def initializers(model: ir.Model) -> Iterator[ir.Value]:
    """The initializers of the main graph and of every graph nested in it."""
    for graph in model.graphs():
        yield from graph.initializers.values()


MAIN_DOMAINS = ("", "ai.onnx")
MICROSOFT = "com.microsoft"
"""The domain of onnxruntime's own operators."""


def graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """The main graph, the bodies of functions (not qgraph's own), and all graphs in them."""
    roots: list[ir.Graph | ir.Function] = [model.graph]
    roots += [f for f in model.functions.values() if f.domain != "qgraph"]
    for root in roots:
        yield root
        for node in root.all_nodes():
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH:
                    yield attribute.as_graph()
                elif attribute.type == ir.AttributeType.GRAPHS:
                    yield from attribute.as_graphs()


def nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of :func:`graphs`. Safe while nodes are inserted or removed."""
    for graph in graphs(model):
        yield from graph


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> TypeGuard[ir.Node]:
    """Whether `node` is one of these operators of `domain`."""
    if node is None or node.op_type not in op_types:
        return False
    return node.domain == domain or (domain == "" and node.domain in MAIN_DOMAINS)


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind an initializer or a Constant node, or None if the value is computed.

    An initializer that is also a graph input can be overridden by the caller: not a constant.
    """
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None and value.is_initializer():
        return value.const_value
    node = source_of(value)
    if is_op(node, "Constant"):
        return ir.convenience.get_const_tensor(value)
    return None


def input_of(node: ir.Node, index: int) -> ir.Value:
    """An input that is known to be there.

    Raises:
        ValueError: it was left out.
    """
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"input {index} of '{node_name(node)}' was left out")
    return value


def source_of(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value, or None: absent, or not computed."""
    return None if value is None else value.producer()


def producer(node: ir.Node, index: int) -> ir.Node | None:
    """:func:`source_of` an input."""
    return source_of(node.inputs[index]) if index < len(node.inputs) else None


def computing(node: ir.Node, index: int) -> ir.Node:
    """The node that computes an input, where it is known that one does.

    Raises:
        ValueError: none does.
    """
    found = producer(node, index)
    if found is None:
        raise ValueError(f"input {index} of '{node_name(node)}' is not computed")
    return found


def array(value: ir.Value | None) -> np.ndarray | None:
    """The array behind a constant value, or None. Reads the weight: see :func:`release`."""
    tensor = constant(value)
    return None if tensor is None else tensor.numpy()


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol:
    """The tensor behind a value that is known to be constant.

    Raises:
        ValueError: it is computed.
    """
    tensor = constant(value)
    if tensor is None:
        raise ValueError(f"'{value and value.name}' is no constant")
    return tensor


def constant_array(value: ir.Value | None) -> np.ndarray:
    """:func:`array` of a value that is known to be constant.

    Raises:
        ValueError: it is computed.
    """
    return constant_tensor(value).numpy()


def release(value: ir.Value | None) -> None:
    """Give back the pages of a memory-mapped weight that has been read."""
    unmap(constant(value))


def unmap(tensor: ir.TensorProtocol | None) -> None:
    """:func:`release` for the tensor itself."""
    if isinstance(tensor, ir.ExternalTensor):
        try:
            tensor.release()
        except BufferError:  # an array still looks at the pages: they go when it goes
            tensor.raw = None


def view(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same data in an object of its own, to be renamed or unmapped without the other."""
    if not isinstance(tensor, ir.ExternalTensor):
        return copy.copy(tensor)
    return ir.ExternalTensor(
        tensor.location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props) or None,
        base_dir=tensor.base_dir,
    )


def scope(node: ir.Node) -> ir.Graph:
    """The graph that holds `node`, for inserting beside it."""
    graph = node.graph
    if graph is None:
        raise ModelError(f"node '{node.name}' belongs to no graph")
    return graph


def node_name(node: ir.Node) -> str:
    """What remarks call a node. Unique after canonicalization; traced nodes are named by layer."""
    return node.name or (node.outputs[0].name if node.outputs else "") or node.op_type


def opset(model: ir.Model) -> int:
    """Version of the standard operators that the model imports."""
    return int(model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1)))


def dims(value: ir.Value | None) -> list[int | None]:
    """Static dimensions, None for each unknown one; an unknown rank gives []."""
    if value is None or value.shape is None:
        return []
    return [d if isinstance(d, int) else None for d in value.shape]


def attribute(node: ir.Node, name: str, default: int | float) -> int | float:
    """A number attribute, or `default` where it is absent."""
    entry = node.attributes.get(name)
    return default if entry is None else entry.value


INLINE_BYTES = 1024
"""Initializers up to this size travel inside the serialised graph; shape inference reads them."""
