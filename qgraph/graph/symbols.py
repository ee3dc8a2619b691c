"""Symbolic sizes that inputs share by name alone."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.graph.names import numbered
from qgraph.graph.reading import dims, is_op


def untie_symbols(model: ir.Model) -> int:
    """Give symbolic sizes names of their own where only their names are the same.

    Two encoders in one model, for texts and for images, each call their batch `batch`, and people
    feed them 2 and 3 of these. onnxruntime lets values of equal symbolic shape share a buffer, and
    fails then, unless by luck none does. So inputs that meet in products of matrices alone, or
    never, are told apart::

        a [batch, 64], b [batch, 64]           a [batch, 64], b [batch_1, 64]

    Returns how many names were given.
    """
    groups = {value: {value} for value in model.graph.inputs}
    reached = {value: groups[value] for value in model.graph.inputs}
    for node in model.graph:
        met = [reached[v] for v in _reads(node) if v in reached]
        if not met:
            continue
        together = set().union(*met)
        if not _contracts(node):
            for value in set().union(*(groups[v] for v in together)):
                together |= groups[value]
            for value in together:
                groups[value] = together
        reached.update(dict.fromkeys(node.outputs, together))
    return _rename(model, groups, reached)


def _rename(
    model: ir.Model,
    groups: dict[ir.Value, set[ir.Value]],
    reached: dict[ir.Value, set[ir.Value]],
) -> int:
    owners: dict[str, set[ir.Value]] = {}
    taken = {
        name for value in (*model.graph.inputs, *model.graph.outputs) for name in _names(value)
    }
    given: dict[tuple[str, int], str] = {}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value not in reached or value.shape is None:
            continue
        home = groups[next(iter(reached[value]))]
        if not reached[value] <= home:
            continue
        sizes: list[int | ir.SymbolicDim | str] = list(value.shape)
        for axis, size in enumerate(value.shape):
            name = size.value if isinstance(size, ir.SymbolicDim) else None
            if name is None or owners.setdefault(name, home) is home:
                continue
            key = (name, id(home))
            if key not in given:
                given[key] = numbered(name, taken)
            sizes[axis] = given[key]
        value.shape = ir.Shape(sizes)
    return len(given)


def _names(value: ir.Value) -> list[str]:
    return [d.value for d in value.shape or () if isinstance(d, ir.SymbolicDim) and d.value]


def _contracts(node: ir.Node) -> bool:
    """Whether `node` multiplies matrices: only the lengths of its dot products must agree."""
    plain = is_op(node, "MatMul", "Gemm") and len(node.inputs) == 2
    return plain and all(len(dims(value)) == 2 for value in node.inputs)


def _reads(node: ir.Node) -> list[ir.Value]:
    """What `node` reads, its bodies included."""
    values = list(node.inputs)
    for attribute in node.attributes.values():
        bodies = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else []
        values += [v for body in bodies for inner in body.all_nodes() for v in inner.inputs]
    return [value for value in values if value is not None]
