"""Where a graph is cut into blocks that are learned one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.analysis import analyze_implicit_usage

from qgraph.analysis import Site, bias_use, only_user
from qgraph.graph import is_op
from qgraph.pieces import cut, inputs_of

LARGEST = 12
"""Sites of a block, where the graph is narrow enough for smaller ones."""
WIDEST = 4
"""So many values may leave a block, where a graph is never narrower."""
ACTIVATIONS = (
    "Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Gelu", "Tanh", "Elu",
)  # fmt: skip
"""Functions of one value that may follow a site in its block."""


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
    if user is not None and is_op(user, *ACTIVATIONS) and user.inputs[0] is value:
        return user.outputs[0]
    return value


def narrow_points(model: ir.Model, sites: Sequence[Site]) -> list[ir.Value]:
    """Cuts where all that sites have computed flows through one value, or as few as there are.

    ::

        x ─┬─ q, k, v ── attention ── o ── Add ── cut ─┬─ up ── Gelu ── down ── Add ── cut
           └────────────────────────────────┘          └────────────────────────┘

    No two cuts have no site between them. What neither comes from sites nor is their data, like
    masks, does not count. A graph that is never narrow, as two values run through
    all of it, is cut where there are two.
    """
    found: list[ir.Value] = []
    for width in range(1, WIDEST + 1):
        found = _rest(model, sites, _narrow(model, sites, width))
        nodes = {site.node for site in sites}
        if max(len(nodes & piece.nodes) for piece in cut(model, found)) <= LARGEST:
            break
    return found


def _narrow(model: ir.Model, sites: Sequence[Site], width: int) -> list[ir.Value]:
    captured = analyze_implicit_usage(model.graph)
    reads = [inputs_of(node, captured) for node in model.graph]
    last = {value: index for index, values in enumerate(reads) for value in values}
    chosen = {site.node for site in sites}
    reached = {site.x for site in sites}
    live = [value for value in model.graph.inputs if value in reached]
    found: list[ir.Value] = []
    fresh = False
    for index, node in enumerate(model.graph):
        fresh |= node in chosen
        if not reached.isdisjoint((*reads[index], *node.outputs)):
            reached.update(node.outputs)
            live += node.outputs
        live = [value for value in live if last.get(value, -1) > index]
        if fresh and live and live[-1] in node.outputs and len(live) <= width:
            found.append(live[-1])
            fresh = False
    return found


def _rest(model: ir.Model, sites: Sequence[Site], cuts: list[ir.Value]) -> list[ir.Value]:
    """The cuts, and the outputs of the model that sites behind them lead to."""
    found, nodes = list(cuts), {site.node for site in sites}
    for output in model.graph.outputs:
        if output not in found and nodes & cut(model, [*found, output])[-1].nodes:
            found.append(output)
    return found
