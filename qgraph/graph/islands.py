"""Which convolutions to keep in integers, conversions at the borders of each island counted in.

A quantized convolution is worth it among its kind; alone it pays for a conversion on either side,
and a float one amid integers costs the same two conversions. So the choice is made together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qgraph.graph.ops import CLAMPS
from qgraph.graph.reading import dims, is_op
from qgraph.graph.sites import Site, output_value

Glue = Callable[[ir.Node], bool]


@dataclass(frozen=True)
class Cost:
    """What a convolution costs in integers, in units of its own float time.

    Attributes:
        integer: time of its integer kernel.
        conversions: time of converting its input and its output.
        size: weight of this site among the others, its multiplications as far as known.
    """

    integer: float
    conversions: float
    size: float


def gain(cost: Cost, sides: float) -> float:
    """Float time saved by keeping the site in integers, in units of its float time.

    Args:
        sides: how many of its two sides meet integers, 0 to 2.
    """
    return 1 + sides / 2 * cost.conversions - _integer_time(cost, sides)


def _integer_time(cost: Cost, sides: float) -> float:
    return cost.integer + (2 - sides) / 2 * cost.conversions


def settle(sites: Sequence[Site], costs: Mapping[ir.Node, Cost], glue: Glue) -> set[ir.Node]:
    """The convolutions to keep in integers: the worst is dropped, one by one, and the fastest
    choice on the way, from all of them to none, is taken.

    Args:
        sites: static convolutions.
        costs: of each site's node.
        glue: whether an operator passes integers through.
    """
    quantized = {site.node for site in sites}
    best, least = set[ir.Node](), sum(costs[node].size for node in quantized)
    float_time = 0.0
    while quantized:
        sides = {s.node: _sides(s, quantized, glue) for s in sites if s.node in quantized}
        time = float_time + sum(costs[n].size * _integer_time(costs[n], sides[n]) for n in sides)
        if time < least:
            best, least = set(quantized), time
        worst = min(sides, key=lambda n: gain(costs[n], sides[n]) * costs[n].size)
        quantized.remove(worst)
        float_time += costs[worst].size
    return best


def gains(
    sites: Sequence[Site], costs: Mapping[ir.Node, Cost], quantized: set[ir.Node], glue: Glue
) -> dict[ir.Node, float]:
    """What each site gains in integers, the others as they are in `quantized`; see :func:`gain`."""
    return {s.node: gain(costs[s.node], _sides(s, quantized, glue)) for s in sites}


def size(site: Site) -> float:
    """Multiplications of a convolution, output pixels counted where their number is known."""
    k, n = site.kn
    pixels = math.prod(d or 1 for d in dims(site.node.outputs[0])[2:])
    return float(k * n * pixels)


def _sides(site: Site, quantized: set[ir.Node], glue: Glue) -> float:
    before = _from_integers(site.x, quantized, glue)
    users = [use.node for use in output_value(site.node).uses()]
    after = [_takes_integers(user, quantized, glue) for user in users]
    return float(before) + (sum(after) / len(after) if after else 0.0)


def _from_integers(value: ir.Value, quantized: set[ir.Node], glue: Glue, depth: int = 8) -> bool:
    node = value.producer()
    if node is None or not depth:
        return False
    if node in quantized:
        return True
    if not (is_op(node, *CLAMPS) or glue(node)):
        return False
    data = [v for v in node.inputs if v is not None and not v.is_initializer()]
    return bool(data) and all(_from_integers(v, quantized, glue, depth - 1) for v in data)


def _takes_integers(node: ir.Node, quantized: set[ir.Node], glue: Glue) -> bool:
    if node in quantized or is_op(node, "MatMul", "Gemm"):
        return True
    return glue(node) and all(
        _from_integers(v, quantized, glue)
        for v in node.inputs
        if v is not None and not v.is_initializer()
    )
