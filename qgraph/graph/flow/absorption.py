"""Where a factor for each channel of a value can be absorbed upstream, by dataflow alone.

Smoothing, outlier splitting and activation-aware scaling rest on one identity: x · W is
(x / s) · (s · W). The readers of x take s into their weights. That x itself becomes x / s must cost
nothing either, so constants that it is made of are divided::

    γ ─ RMSNorm ─ x                                             the norm's weight γ / s
    silu(gate), v · W ─ Mul ─ x                                 the columns of W / s, gate stays
    v · W ─ Reshape ─ Transpose ─ MatMul(p, ·) ─ ... ─ x        the columns of W / s

They are found by walking back from x with an array that says, for every element of the value at
hand, which channel of x it ends up in (`channels`, `channel_flow`). Where a value head serves
several query heads, channels of x meet in one element: they must have the same factor, are tied.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import networkx as nx
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.graph.annotation import forget_stats
from qgraph.graph.editing import add_constant, derived
from qgraph.graph.flow.channels import Channels, Part
from qgraph.graph.flow.steps import ways
from qgraph.graph.reading import constant, constant_tensor, dims, input_of, is_op, node_name
from qgraph.numerics.reference import Number


@dataclass(frozen=True, eq=False)
class Edit:
    """A constant to be divided where one node reads it.

    Attributes:
        node: the reader.
        index: which of its inputs.
        channels: broadcasts against the constant (numpy's rules): for each element the channel of
            x whose factor divides it, -1 for none. Where it is the larger one, the constant grows.
    """

    node: ir.Node
    index: int
    channels: Channels


@dataclass(frozen=True, eq=False)
class Absorption:
    """How a graph can be made to compute x / s in place of x.

    Attributes:
        edits: the constants to divide.
        ties: (K,), the smallest channel of those that must have the same factor; `arange(K)` where
            all are free. Value heads shared by several query heads tie.
        where: "norm weight of 'name'" or "weight of 'name'", for remarks.
    """

    edits: tuple[Edit, ...]
    ties: Channels
    values: tuple[ir.Value, ...]
    where: str


def absorption(x: ir.Value, readers: Collection[ir.Node]) -> Absorption | None:
    """Where the channels of `x` (its last axis) can be divided by factors > 0; None if nowhere.

    Every value on the way from the divided constants to `x` changes with it, so none of them may
    be read elsewhere or leave the graph.

    Args:
        x: data of one or several linear sites; not in a function, which sees no initializers.
        readers: the nodes that will make up for the factors. Others must not read `x`.
    """
    count = dims(x)[-1] if dims(x) else None
    if not count or not all(n in readers and n.graph is x.graph for n in _readers(x)):
        return None
    route = _route(x, np.arange(count))
    if route is None:
        return None
    # Shifts are divided along with what they shift; that is what carries the name.
    shifts = ("Add", "Sub")
    node = next((e.node for e in route.edits if not is_op(e.node, *shifts)), route.edits[0].node)
    kind = "norm weight" if node.op_type.endswith("Normalization") else "weight"
    where = f"{kind} of '{node_name(node)}'"
    return Absorption(route.edits, _components(count, route.ties), route.values, where)


def divide(model: ir.Model, route: Absorption, factors: NDArray[np.float32]) -> None:
    """Divide what `route` names, so that its x becomes x / `factors`. Exact for powers of two.

    Each constant is replaced where the node reads it, and stays as it is for all others. Nothing
    is computed before the new constant is read, and nothing is held after that. What calibration
    found of x and of the values on the way no longer holds and is forgotten.

    Args:
        factors: float32 (K,), finite and > 0, the same for channels that are tied.
    """
    for divided in route.values:
        forget_stats(divided)
    for edit in route.edits:
        value = input_of(edit.node, edit.index)
        tensor = constant_tensor(value)
        divisor = np.where(edit.channels < 0, 1, factors[edit.channels]).astype(np.float32)
        shape = np.broadcast_shapes(tuple(tensor.shape.numpy()), divisor.shape)
        quotient = derived(tensor, partial(_quotient, divisor), shape)
        scaled = add_constant(model, f"{value.name}_scaled", quotient)
        edit.node.replace_input_with(edit.index, scaled)


def _quotient(divisor: NDArray[np.float32], w: np.ndarray) -> np.ndarray:
    return np.asarray(w / divisor)


def merge(ties: Channels, values: NDArray[Number], how: np.ufunc = np.maximum) -> NDArray[Number]:
    """`values` with one value for channels that are tied.

    Args:
        ties: (K,), as in :class:`Absorption`.
        values: (K, ...).
        how: makes one value of two.
    """
    order = np.argsort(ties, kind="stable")
    _, starts, group = np.unique(ties[order], return_index=True, return_inverse=True)
    merged = np.empty_like(values)
    merged[order] = how.reduceat(values[order], starts, axis=0)[group]
    return merged


# ----------------------------------------------------------------------------------- the walk


@dataclass(frozen=True, eq=False)
class _Route:
    edits: tuple[Edit, ...]
    ties: tuple[Channels, ...]
    values: tuple[ir.Value, ...] = ()


def _route(value: ir.Value, channels: Channels) -> _Route | None:
    """The constants to divide for the computed `value` to be divided."""
    node = value.producer()
    if node is None or value.is_graph_output():
        return None
    for parts in ways(value, channels):
        routes = [route for part in parts if (route := _through(node, part)) is not None]
        if len(routes) == len(parts):
            return _Route(
                tuple(edit for route in routes for edit in route.edits),
                tuple(pairs for route in routes for pairs in route.ties),
                (value, *(passed for route in routes for passed in route.values)),
            )
    return None


def _through(node: ir.Node, part: Part) -> _Route | None:
    """The route through an input of `node`, which ends there if that is a constant."""
    value = node.inputs[part.index]
    tensor = constant(value)
    if value is None or (tensor is not None and tensor.dtype != ir.DataType.FLOAT):
        return None
    if tensor is not None:
        return _Route((Edit(node, part.index, part.channels),), (part.ties,))
    if _readers(value) != [node] or value.graph is not node.graph:
        return None
    route = _route(value, part.channels)
    return None if route is None else replace(route, ties=(part.ties, *route.ties))


def _readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read `value`, once for each use; its shape is anyone's to read."""
    return [use.node for use in value.uses() if not is_op(use.node, "Shape", "Size")]


def _components(count: int, pairs: Sequence[Channels]) -> Channels:
    """For each channel the smallest one that chains of pairs lead to."""
    result = np.arange(count)
    tied: nx.Graph = nx.Graph()
    tied.add_edges_from(np.concatenate(pairs).tolist())
    for group in nx.connected_components(tied):
        result[list(group)] = min(group)
    return result
