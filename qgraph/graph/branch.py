"""One graph as two bodies under an If."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.graph.editing import typed
from qgraph.graph.names import forget_names, unique_names


def branch(model: ir.Model, condition: ir.Value) -> tuple[ir.Graph, ir.Graph]:
    """Put two copies of the main graph under an If: what runs where `condition` holds, and else.

    ::

        x ── MatMul ── Add ── y        x ── Size ── Less ── If ── y
                                                            ├ then: MatMul ── Add
                                                            └ else: MatMul ── Add

    Inputs and initializers stay where they are and serve both bodies, and so does what `condition`
    is computed from.

    Args:
        condition: a bool, computed from the model's inputs by nodes that nothing else reads.
    """
    graph = model.graph
    _pass_through(model)
    own = _computing(condition)
    bodies = _copy(graph, own, "then"), _copy(graph, own, "else")
    results = list(graph.outputs)
    node = ir.node(
        "If",
        [condition],
        attributes={"then_branch": bodies[0], "else_branch": bodies[1]},
        outputs=[ir.Value(name=v.name, type=v.type, shape=v.shape) for v in results],
        name="branch",
    )
    graph.outputs[:] = node.outputs
    graph.remove([n for n in reversed(graph) if n not in own], safe=True)
    graph.append(node)
    unique_names(model)
    forget_names(model)
    return bodies


def _pass_through(model: ir.Model) -> None:
    """Let every output be computed by a node: a body cannot return what is not its own."""
    graph = model.graph
    for index, output in enumerate(graph.outputs):
        if output.producer() is not None:
            continue
        node = ir.node("Identity", [output], outputs=[ir.Value(name=f"{output.name}_out")])
        graph.append(node)
        graph.outputs[index] = typed(node, output.dtype, output.shape)


def _computing(value: ir.Value) -> set[ir.Node]:
    """The nodes behind a value."""
    found: set[ir.Node] = set()
    waiting = [value.producer()]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [v.producer() for v in node.inputs if v is not None]
    return found


def _copy(graph: ir.Graph, without: set[ir.Node], name: str) -> ir.Graph:
    """The nodes of a graph as a body that reads its inputs and initializers from outside."""
    body = graph.clone()
    skipped = [copy for node, copy in zip(graph, body, strict=True) if node in without]
    body.remove(list(reversed(skipped)), safe=True)
    outside = [*zip(graph.inputs, body.inputs, strict=True)]
    outside += [(v, body.initializers[k]) for k, v in graph.initializers.items()]
    for value, copy in outside:
        copy.replace_all_uses_with(value)
    body.inputs.clear()
    body.initializers.clear()
    body.name = name
    return body
