"""Small helpers on onnx-ir that every pass needs. No state, no wrapper classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from qgraph.errors import ModelError

MAIN_DOMAINS = ("", "ai.onnx")


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


def is_op(node: ir.Node | None, *op_types: str, domain: str = "") -> bool:
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
    node = value.producer()
    if node is not None and is_op(node, "Constant"):
        return ir.convenience.get_const_tensor(value)
    return None


def array(value: ir.Value | None) -> np.ndarray | None:
    """The array behind a constant value, or None. Reads the weight: see :func:`release`."""
    tensor = constant(value)
    return None if tensor is None else tensor.numpy()


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


def scope(node: ir.Node) -> ir.Graph:
    """The graph that holds `node`, for inserting beside it."""
    graph = node.graph
    if graph is None:
        raise ModelError(f"node '{node.name}' belongs to no graph")
    return graph


def fresh_name(model: ir.Model, base: str) -> str:
    """A value name that no value of the main graph or its subgraphs has."""
    taken: set[str] | None = model.meta.get("qgraph.names")
    if taken is None:
        taken = {v.name for v in model.graph.inputs if v.name}
        taken |= set(model.graph.initializers)
        for graph in graphs(model):
            taken |= {v.name for v in graph.inputs if v.name}
            if isinstance(graph, ir.Graph):
                taken |= set(graph.initializers)
            taken |= {v.name for n in graph for v in n.outputs if v.name}
        model.meta["qgraph.names"] = taken
    return numbered(base, taken)


def numbered(name: str, taken: set[str]) -> str:
    """`name`, with a number behind it if it is among `taken`; then it is among them."""
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


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


def shared_constant(model: ir.Model, name: str, data: np.ndarray | np.generic) -> ir.Value:
    """The initializer with exactly this dtype and content, made on first use."""
    array_, count = np.asarray(data), 0
    wished = name
    while (found := model.graph.initializers.get(wished)) is not None:
        tensor = found.const_value
        if tensor is not None and np.array_equal(tensor.numpy(), array_):
            return found
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
    attributes: Mapping[str, ir.Attr | int | float | str | list[int]] | None = None,
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


def remove_dead(model: ir.Model) -> bool:
    """Remove nodes and initializers that nothing uses. Returns whether anything was removed."""
    from onnx_ir.passes import common

    return bool(common.RemoveUnusedNodesPass()(model).modified)


def node_name(node: ir.Node) -> str:
    """How remarks call a node. Unique after canonicalization; traced nodes bear their layer."""
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
    found = node.attributes.get(name)
    return default if found is None else found.value


def infer_types(model: ir.Model) -> None:
    """Fill in the types and shapes that ONNX can tell; where it cannot, the model stays as it is.

    Weights stay where they are. What a node of a foreign domain returns is known only where the
    file says so.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.type = ir.TensorType(value.const_value.dtype)
                value.shape = ir.Shape(value.const_value.shape.numpy())
    # onnx_ir's own pass takes every result for a tensor, sequences too, and writes to the log.
    try:
        proto = onnx.shape_inference.infer_shapes(_skeleton(model), data_prop=True)
    except onnx.shape_inference.InferenceError:
        return
    twins = ir.from_proto(proto).graphs()
    for graph, twin in zip(model.graphs(), twins, strict=True):
        found = {str(value.name): value for node in twin for value in node.outputs if value.name}
        for value in (value for node in graph for value in node.outputs):
            same = found.get(str(value.name))
            if same is not None and same.type is not None:
                value.type, value.shape = same.type, same.shape


def _skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model without its large weights, whose types and shapes stay."""
    kept: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > 1024:
            kept.append((value, tensor))
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor(
                "elsewhere", 0, tensor.nbytes, tensor.dtype, name=name, shape=shape
            )
    try:
        return ir.to_proto(model)
    finally:
        for value, tensor in kept:
            value.const_value = tensor


def unique_names(model: ir.Model) -> bool:
    """Give every node and every value a name of its own, bodies of control flow included.

    The model's inputs and outputs keep theirs, an optional output that is absent stays absent.
    Returns whether anything was renamed.
    """
    model.meta.pop("qgraph.names", None)
    signature = {*model.graph.inputs, *model.graph.outputs}
    value_names = _Names(v.name for v in signature)
    node_names = _Names(())
    changed = False
    for graph in graphs(model):
        initializers = graph.initializers.values() if isinstance(graph, ir.Graph) else ()
        made = [output for node in graph for output in node.outputs if output.name != ""]
        for value in dict.fromkeys([*graph.inputs, *initializers, *made]):
            if value in signature:
                continue
            producer = value.producer()
            wished = value.name or (producer.op_type if producer else "value")
            name = value_names.claim(wished)
            changed |= name != value.name
            value.name = name
        for node in graph:
            name = node_names.claim(node_name(node))
            changed |= name != node.name
            node.name = name
    return changed


class _Names:
    """Hands out each name once."""

    def __init__(self, taken: Iterable[str | None]) -> None:
        self._taken = set(taken)
        self._count: dict[str, int] = {}

    def claim(self, wished: str) -> str:
        name = wished
        while name in self._taken:
            self._count[wished] = self._count.get(wished, 0) + 1
            name = f"{wished}_{self._count[wished]}"
        self._taken.add(name)
        return name
