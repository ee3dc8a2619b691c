"""Names that nothing in a model has yet."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from qgraph.graph.reading import graphs, node_name

_NAMES = "qgraph.names"
"""Where a model remembers the names that its values have, in `model.meta`."""


def fresh_name(model: ir.Model, base: str) -> str:
    """A value name that no value of the main graph or its subgraphs has."""
    taken: set[str] | None = model.meta.get(_NAMES)
    if taken is None:
        taken = {v.name for v in model.graph.inputs if v.name}
        taken |= set(model.graph.initializers)
        for graph in graphs(model):
            taken |= {v.name for v in graph.inputs if v.name}
            if isinstance(graph, ir.Graph):
                taken |= set(graph.initializers)
            taken |= {v.name for n in graph for v in n.outputs if v.name}
        model.meta[_NAMES] = taken
    return numbered(base, taken)


def forget_names(model: ir.Model) -> None:
    """Let :func:`fresh_name` look again: there are names that it does not know."""
    model.meta.pop(_NAMES, None)


def numbered(name: str, taken: set[str]) -> str:
    """`name`, with a number behind it if it is among `taken`; then it is among them."""
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def unique_names(model: ir.Model) -> bool:
    """Give every node and every value a name of its own, bodies of control flow included.

    The model's inputs and outputs keep theirs, an optional output that is absent stays absent.
    Returns whether anything was renamed. (onnx-ir's NameFixPass names absent outputs, which makes
    them present, and lets nodes of two bodies share a name, which remarks could not tell apart.)
    """
    forget_names(model)
    signature = {*model.graph.inputs, *model.graph.outputs}
    value_names = _Names(v.name for v in signature)
    node_names = _Names(())
    changed = False
    for graph in graphs(model):
        initializers = graph.initializers.values() if isinstance(graph, ir.Graph) else ()
        outputs = [output for node in graph for output in node.outputs if output.name != ""]
        for value in dict.fromkeys([*graph.inputs, *initializers, *outputs]):
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
