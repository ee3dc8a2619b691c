"""Where a graph is cut into blocks that are learned one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.analysis import analyze_implicit_usage

from qgraph.graph.ops import ACTIVATIONS
from qgraph.graph.reading import is_op
from qgraph.graph.sites import Site, bias_use, only_user

LARGEST = 12
"""More sites than this are in a block only if the graph has no place to cut it smaller."""
WIDEST = 4
"""At most so many values leave a block, in graphs that have no narrower place."""
_FOLLOWING = ACTIVATIONS - {
    "Celu", "Erf", "Mish", "PRelu", "Selu", "Softplus", "Softsign", "Swish", "ThresholdedRelu",
}  # fmt: skip
"""Functions that may follow a site in its block. Erf is but a part of one, PRelu reads a second
value; before the others, which are rare, a block ends."""


def around_sites(model: ir.Model, sites: Sequence[Site]) -> list[ir.Value]:
    """Cuts before and behind each site, so that it is a block with its bias and activation."""
    ends = [value for site in sites for value in (site.x, _end(site))]
    place = {value: i for i, node in enumerate(model.graph) for value in node.outputs}
    return sorted({value for value in ends if value in place}, key=place.__getitem__)


def _end(site: Site) -> ir.Value:
    value = site.node.outputs[0]
    added = bias_use(site)
    if added is not None:
        value = added[0].outputs[0]
    user = only_user(value)
    if is_op(user, *_FOLLOWING) and user.inputs[0] is value:
        return user.outputs[0]
    return value


def narrow_points(model: ir.Model, sites: Sequence[Site]) -> list[ir.Value]:
    """Cuts where all that sites have computed flows through one value, or as few as there are.

    ::

        x ─┬─ q, k, v ── attention ── o ── Add ── cut ─┬─ up ── Gelu ── down ── Add ── cut
           └────────────────────────────────┘          └────────────────────────┘

    Between two cuts there is always a site. Only values that sites compute or read count: masks do
    not. Where two values run through the whole graph, no place has only one, and the graph is cut
    where there are two.
    """
    points: list[ir.Value] = []
    for width in range(1, WIDEST + 1):
        points = _rest(model, sites, _narrow(model, sites, width))
        nodes = {site.node for site in sites}
        if max(len(nodes & piece.nodes) for piece in cut(model, points)) <= LARGEST:
            break
    return points


def _narrow(model: ir.Model, sites: Sequence[Site], width: int) -> list[ir.Value]:
    captured = analyze_implicit_usage(model.graph)
    reads = [inputs_of(node, captured) for node in model.graph]
    last = {value: index for index, values in enumerate(reads) for value in values}
    chosen = {site.node for site in sites}
    reached = {site.x for site in sites}
    live = [value for value in model.graph.inputs if value in reached]
    points: list[ir.Value] = []
    fresh = False
    for index, node in enumerate(model.graph):
        fresh |= node in chosen
        if not reached.isdisjoint((*reads[index], *node.outputs)):
            reached.update(node.outputs)
            live += node.outputs
        live = [value for value in live if last.get(value, -1) > index]
        if fresh and live and live[-1] in node.outputs and len(live) <= width:
            points.append(live[-1])
            fresh = False
    return points


def _rest(model: ir.Model, sites: Sequence[Site], cuts: list[ir.Value]) -> list[ir.Value]:
    """The cuts, and the outputs of the model that sites behind them lead to."""
    points, nodes = list(cuts), {site.node for site in sites}
    for output in model.graph.outputs:
        if output not in points and nodes & cut(model, [*points, output])[-1].nodes:
            points.append(output)
    return points


Captured = Mapping[ir.Graph, set[ir.Value]]


@dataclass(frozen=True)
class Piece:
    """A part of a graph, bounded by values.

    Attributes:
        stop: the value it is run for.
        inputs: values it reads that are computed before it, or fed.
        outputs: values it computes that later pieces read, and `stop` if that is one of them.
        spent: values that no later piece reads.
        nodes: what it runs, in no order.
    """

    stop: ir.Value
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    spent: tuple[ir.Value, ...]
    nodes: frozenset[ir.Node] = frozenset()


def cut(model: ir.Model, stops: Sequence[ir.Value]) -> list[Piece]:
    """Cut the main graph into pieces, each of which computes what the next stop needs.

    ::

        x ── A ── stop 0 ── B ─┬─ C ── stop 1 ── D ─┬─ stop 2      pieces: A | B, C | E, D
                               └──── E ─────────────┘              carried past stop 1: B's result

    Any graph can be cut, and each node runs once. Where the graph is narrow, few values are carried
    from piece to piece. What follows from constants alone is computed by each piece that reads it.

    Args:
        stops: values of the main graph; none of them needs a later one.
    """
    captured = analyze_implicit_usage(model.graph)
    changing = _changing(model.graph, captured)
    owner: dict[ir.Node, int] = {}
    owned: list[set[ir.Node]] = [set() for _ in stops]
    reads: list[dict[ir.Value, None]] = []
    last: dict[ir.Value, int] = {}
    for index, stop in enumerate(stops):
        read, stack = {stop: None}, [stop]
        while stack:
            node = stack.pop().producer()
            if node is None or node in owner:
                continue
            owner[node] = index
            owned[index].add(node)
            needed = [v for v in inputs_of(node, captured) if v in changing]
            read |= dict.fromkeys(needed)
            stack += needed
        reads.append(read)
        last |= dict.fromkeys(read, index)

    def origin(value: ir.Value) -> int:
        node = value.producer()
        return -1 if node is None else owner[node]

    pieces = []
    for index, (stop, read) in enumerate(zip(stops, reads, strict=True)):
        outputs = [v for v in last if origin(v) == index and (last[v] > index or v is stop)]
        spent = [v for v in last if last[v] == index and (origin(v) < index or v is stop)]
        inputs = [v for v in read if origin(v) < index]
        bounds = tuple(inputs), tuple(outputs), tuple(spent)
        pieces.append(Piece(stop, *bounds, frozenset(owned[index])))
    return pieces


def inputs_of(node: ir.Node, captured: Captured) -> list[ir.Value]:
    """What a node reads, the bodies of control flow in it included."""
    values = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            values += captured.get(attribute.as_graph(), ())
        elif attribute.type == ir.AttributeType.GRAPHS:
            values += [v for graph in attribute.as_graphs() for v in captured.get(graph, ())]
    return values


def _changing(graph: ir.Graph, captured: Captured) -> set[ir.Value]:
    """The values that depend on what is fed."""
    changing = {value for value in graph.inputs if not value.is_initializer()}
    for node in graph:
        if any(value in changing for value in inputs_of(node, captured)):
            changing.update(node.outputs)
    return changing
