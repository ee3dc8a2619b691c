"""Changes of a graph: constants, nodes, and who reads what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qgraph.graph.annotation import copy_annotations
from qgraph.graph.names import fresh_name
from qgraph.graph.reading import INLINE_BYTES, constant_tensor, is_op, scope, unmap

Attribute = ir.Attr | int | float | str | list[int]
"""What an attribute of a new node may be."""


def add_constant(
    model: ir.Model,
    base: str,
    data: np.ndarray | np.generic | ir.TensorProtocol,
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """Register an initializer in the main graph and return its value.

    Args:
        base: wished name; made unique.
        data: the array (kept, not copied) or tensor.
        dtype: for arrays whose numpy dtype does not say it (int4 held in int8, bfloat16).
    """
    name = fresh_name(model, base)
    if isinstance(data, np.ndarray | np.generic):
        tensor: ir.TensorProtocol = ir.Tensor(np.asarray(data), dtype=dtype, name=name)
    else:
        tensor = data
        tensor.name = name
    value = ir.Value(
        name=name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    model.graph.register_initializer(value)
    return value


def computed(
    compute: Callable[[], np.ndarray],
    dtype: ir.DataType,
    shape: Sequence[int],
    *,
    cache: bool = False,
) -> ir.LazyTensor:
    """A tensor whose values are computed whenever they are read.

    Args:
        compute: makes the values, which are converted to `dtype`.
        cache: keep them from the first time on.
    """

    def read() -> ir.TensorProtocol:
        return ir.Tensor(compute().astype(dtype.numpy(), copy=False), dtype=dtype)

    return ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), cache=cache)


def derived(
    tensor: ir.TensorProtocol,
    change: Callable[[np.ndarray], np.ndarray],
    shape: Sequence[int] | None = None,
    *,
    cache: bool = False,
) -> ir.LazyTensor:
    """:func:`computed` from another tensor, of its dtype and, unless given, its shape."""

    def compute() -> np.ndarray:
        result = change(tensor.numpy())
        unmap(tensor)
        return result

    shape = tensor.shape.numpy() if shape is None else shape
    return computed(compute, tensor.dtype, shape, cache=cache)


LAZY_BYTES = 1 << 26
"""A constant that is made of a larger one is computed whenever it is read, and not kept."""


def derived_constant(
    model: ir.Model,
    value: ir.Value,
    suffix: str,
    change: Callable[[np.ndarray], np.ndarray],
    shape: Sequence[int] | None = None,
) -> ir.Value:
    """A new initializer :func:`derived` from a constant value, whose name it continues."""
    tensor = constant_tensor(value)
    lazy = derived(tensor, change, shape, cache=tensor.nbytes <= LAZY_BYTES)
    return add_constant(model, f"{value.name}_{suffix}", lazy)


def shared_constant(model: ir.Model, name: str, data: np.ndarray | np.generic) -> ir.Value:
    """The initializer with exactly this dtype and content, made on first use."""
    array_, count = np.asarray(data), 0
    wished = name
    while (known := model.graph.initializers.get(wished)) is not None:
        tensor = known.const_value
        if tensor is not None and np.array_equal(tensor.numpy(), array_):
            return known
        count += 1
        wished = f"{name}_{count}"
    return add_constant(model, wished, array_)


def insert(
    model: ir.Model,
    anchor: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    base: str,
    attributes: Mapping[str, Attribute] | None = None,
    domain: str = "",
    outputs: int = 1,
    after: bool = False,
) -> ir.Node:
    """Insert a node before (or after) `anchor` in its graph.

    Args:
        base: name of the node and of its first output, made unique.

    Returns:
        the node; its outputs are named and have neither shape nor type yet.
    """
    names = [fresh_name(model, base if i == 0 else f"{base}_{i}") for i in range(outputs)]
    node = ir.node(
        op_type,
        inputs=list(inputs),
        attributes=attributes,
        domain=domain,
        outputs=[ir.Value(name=name) for name in names],
        name=names[0],
    )
    graph = scope(anchor)
    if after:
        graph.insert_after(anchor, node)
    else:
        graph.insert_before(anchor, node)
    if domain and domain not in model.opset_imports:
        model.opset_imports[domain] = 1
    return node


def typed(
    node: ir.Node, dtype: ir.DataType | None, shape: ir.Shape | Sequence[int] | None
) -> ir.Value:
    """The first result of `node`, of this dtype and shape from now on (None: unknown)."""
    result = node.outputs[0]
    result.type = None if dtype is None else ir.TensorType(dtype)
    result.shape = shape if shape is None or isinstance(shape, ir.Shape) else ir.Shape(shape)
    return result


def redirect(old: ir.Value, new: ir.Value, *, keep: Sequence[ir.Node] = ()) -> None:
    """Make every user of `old`, graph outputs included, use `new`; nodes in `keep` stay on `old`.

    Where `old` is a graph output, `new` takes its name, so that the model's outputs keep theirs.
    """
    for node, index in list(old.uses()):
        if node not in keep:
            node.replace_input_with(index, new)
    graph = old.graph
    if old.is_graph_output() and graph is not None:
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = new
        old.name, new.name = new.name, old.name
        if new.shape is None:
            new.shape = old.shape
        if new.type is None:
            new.type = old.type


def replace(old: ir.Node | Sequence[ir.Node], *results: ir.Value, takes_name: bool = True) -> None:
    """Put what computes `results` in the place of a node, or of a chain of nodes.

    Args:
        old: the node, or the chain, whose last node has the results that are replaced.
        results: one for each of those; it takes the type, the shape and the readers.
        takes_name: whether the node that computes the first takes the name of the first of `old`.
    """
    chain = [old] if isinstance(old, ir.Node) else list(old)
    for before, result in zip(chain[-1].outputs, results, strict=False):
        result.type, result.shape = before.type, before.shape
        redirect(before, result)
    node = results[0].producer()
    if takes_name and node is not None:
        node.name = chain[0].name
    scope(chain[-1]).remove(chain, safe=True)


def remove_dead(model: ir.Model) -> bool:
    """Remove nodes and initializers that nothing uses, in bodies, too. Returns whether anything was
    removed."""
    from onnx_ir.passes import common

    changed = bool(common.RemoveUnusedNodesPass()(model).modified)
    for graph in model.graphs():
        if graph is model.graph:
            continue
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]
                changed = True
    return changed


def lift_constant(model: ir.Model, node: ir.Node) -> bool:
    """Turn a Constant node into an initializer. False for other nodes, sparse ones and strings."""
    if not is_op(node, "Constant") or node.outputs[0].is_graph_output():
        return False
    if node.attributes.keys() & {"sparse_value", "value_string", "value_strings"}:
        return False
    tensor = constant_tensor(node.outputs[0])
    replace_by_constants(model, node, [tensor])
    return True


def replace_by_constants(
    model: ir.Model, node: ir.Node, tensors: Sequence[ir.TensorProtocol]
) -> None:
    """Put initializers in the place of `node`'s outputs."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    pairs = [(v, t) for v, t in zip(node.outputs, tensors, strict=True) if v.name and v.uses()]
    for old, tensor in pairs:
        new = ir.Value(
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
            metadata_props=dict(old.metadata_props),
        )
        copy_annotations(old, new)
        old.replace_all_uses_with(new)
        new.name, old.name = old.name, None
        home = graph if tensor.nbytes <= INLINE_BYTES else model.graph
        home.register_initializer(new)
    graph.remove(node, safe=True)
