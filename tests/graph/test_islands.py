"""Which convolutions stay in integers, decided on chains whose costs are made up."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.graph.islands import Cost, gain, settle, size
from qgraph.graph.reading import is_op
from qgraph.graph.sites import sites
from tests.models import build, weight

FAST = Cost(0.5, 0.6, 1.0)
"""Pays among its kind; on its own, 0.5 + 0.6 is more than float's 1."""
SLOW = Cost(1.2, 0.6, 1.0)
"""Slower than float, by less than the conversions that a float one between integers would cost."""
HOPELESS = Cost(1.8, 0.6, 1.0)
WORTH_IT = Cost(0.3, 0.6, 1.0)
"""So fast that it pays for its conversions alone."""


def glue(node: ir.Node) -> bool:
    return is_op(node, "Add", "MaxPool")


def chain(*between: str) -> ir.Model:
    """c0 -> c1 -> ..., all 1x1 with two channels, behind each an operator of `between`."""
    value, lines, weights = "x", [], []
    for i, op in enumerate((*between, "")):
        weights.append(weight(f"w{i}", 2, 2, 1, 1))
        lines.append(f"c{i} = Conv ({value}, w{i})")
        value = f"c{i}"
        if op:
            attributes = "<kernel_shape = [1,1]> " if op == "MaxPool" else ""
            lines.append(f"o{i} = {op} {attributes}({value})")
            value = f"o{i}"
    text = f"g (float[1,2,4,4] x) => (float[1,2,4,4] {value}) {{ {' '.join(lines)} }}"
    return build(text, *weights)


def kept(model: ir.Model, costs: Sequence[Cost]) -> list[int]:
    """Which convolutions, by position, stay in integers."""
    found = list(sites(model))
    chosen = settle(found, {s.node: c for s, c in zip(found, costs, strict=True)}, glue)
    return [i for i, s in enumerate(found) if s.node in chosen]


def straight(costs: Sequence[Cost]) -> list[int]:
    return kept(chain(*[""] * (len(costs) - 1)), costs)


# --- one site -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sides", "saved"),
    [
        (0, 1 - (0.5 + 0.6)),  # converts in and out
        (1, (1 + 0.3) - (0.5 + 0.3)),  # one conversion either way
        (2, (1 + 0.6) - 0.5),  # float would be the one that converts
    ],
)
def test_the_gain_counts_the_conversions_at_both_sides(sides: float, saved: float) -> None:
    assert gain(FAST, sides) == pytest.approx(saved)


@given(st.floats(0.05, 4), st.floats(0, 4), st.floats(0, 2), st.floats(0, 2))
def test_neighbours_in_integers_never_hurt(
    integer: float, conversions: float, few: float, many: float
) -> None:
    cost = Cost(integer, conversions, 1.0)
    low, high = sorted((few, many))
    assert gain(cost, low) <= gain(cost, high) + 1e-9


def test_size_counts_output_pixels_where_they_are_known() -> None:
    text = """
    g (float[1,6,8,8] x, float[1,6,N,M] z) => (y, u) {
      y = Conv <strides = [2,2]> (x, w)
      u = Conv (z, w)
    }"""
    first, second = sites(build(text, weight("w", 4, 6, 2, 2)))
    assert size(first) == 4 * 6 * 2 * 2 * 4 * 4
    assert size(second) == 4 * 6 * 2 * 2


# --- chains ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        pytest.param([FAST] * 4, [0, 1, 2, 3], id="all fast"),
        pytest.param([SLOW] * 4, [], id="all slow"),
        pytest.param([FAST], [], id="alone"),
        pytest.param([WORTH_IT], [0], id="alone but worth it"),
        pytest.param([FAST, SLOW, FAST], [0, 1, 2], id="slow amid fast"),
        pytest.param([FAST, FAST, HOPELESS, FAST, FAST], [0, 1, 3, 4], id="hopeless amid fast"),
        pytest.param([FAST, HOPELESS, FAST], [], id="hopeless leaves two alone"),
        pytest.param([SLOW, FAST, FAST, FAST], [1, 2, 3], id="slow at the end"),
        pytest.param([HOPELESS, WORTH_IT, HOPELESS], [1], id="worth it amid hopeless"),
    ],
)
def test_chains(costs: list[Cost], expected: list[int]) -> None:
    assert straight(costs) == expected


def test_no_convolutions_at_all() -> None:
    assert settle([], {}, glue) == set()


def test_each_can_gain_where_all_lose() -> None:
    pair = Cost(0.98, 0.1, 1.0)  # next to the other: 1.03 in integers, 1.05 in float
    assert gain(pair, 1) > 0
    assert straight([pair] * 2) == []


def test_one_that_pays_is_not_lost_with_a_neighbour_that_does_not() -> None:
    pays, even = Cost(0.5, 0.0, 1.0), Cost(1.0, 1.0, 1.0)  # together as slow as float
    assert straight([even, pays]) == [1]
    assert straight([pays, even]) == [0]


# --- what passes integers on ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "expected"),
    [("Relu", [0, 1]), ("MaxPool", [0, 1]), ("Softmax", []), ("Exp", [])],
)
def test_operators_between(between: str, expected: list[int]) -> None:
    assert kept(chain(between), [FAST] * 2) == expected


def test_a_residual_addition_passes_integers_if_both_sides_are() -> None:
    text = """
    g (float[1,2,4,4] x) => (float[1,2,4,4] y) {
      a = Conv (x, w1)
      b = Conv (a, w2)
      s = Add (OTHER, b)
      y = Conv (s, w3)
    }"""
    weights = [weight(f"w{i}", 2, 2, 1, 1) for i in (1, 2, 3)]
    assert kept(build(text.replace("OTHER", "a"), *weights), [FAST] * 3) == [0, 1, 2]
    # x is float: the addition is too, and leaves the last convolution alone
    assert kept(build(text.replace("OTHER", "x"), *weights), [FAST] * 3) == [0, 1]


def test_a_product_that_reads_the_convolution_takes_integers() -> None:
    text = """
    g (float[1,2,4,4] x) => (float[1,2,4,4] y) {
      a = Conv (x, w1)
      y = MatMul (a, w2)
    }"""
    model = build(text, weight("w1", 2, 2, 1, 1), weight("w2", 4, 4))
    convolution, _ = sites(model)
    assert settle([convolution], {convolution.node: FAST}, glue) == {convolution.node}


def test_users_count_by_their_share() -> None:
    text = """
    g (float[1,2,4,4] x) => (float[1,2,4,4] y, float[1,2,4,4] z, float[1,2,4,4] u) {
      a = Conv (x, w1)
      y = Conv (a, w2)
      z = Exp (a)
      u = Neg (a)
    }"""
    model = build(text, weight("w1", 2, 2, 1, 1), weight("w2", 2, 2, 1, 1))
    # a third of c1's output side meets integers: 0.81 + 0.6 · 5/6 > 1 + 0.6 / 6
    assert kept(model, [Cost(0.81, 0.6, 1.0), Cost(0.2, 0.6, 1.0)]) == [1]
    assert kept(model, [Cost(0.55, 0.6, 1.0), Cost(0.2, 0.6, 1.0)]) == [0, 1]


def test_deep_chains_of_glue_end_somewhere() -> None:
    lines = [f"o{i + 1} = MaxPool <kernel_shape = [1,1]> (o{i})" for i in range(40)]
    text = f"""
    g (float[1,2,4,4] x) => (float[1,2,4,4] y) {{
      o0 = Conv (x, w1)
      {" ".join(lines)}
      y = Conv (o40, w2)
    }}"""
    model = build(text, weight("w1", 2, 2, 1, 1), weight("w2", 2, 2, 1, 1))
    assert kept(model, [WORTH_IT] * 2) == [0, 1]


# --- properties -----------------------------------------------------------------------------------


def total(chosen: Sequence[Cost], kept: set[int]) -> float:
    """Time of a straight chain in which `kept` are integers."""
    time = 0.0
    for i, cost in enumerate(chosen):
        sides = (i - 1 in kept) + (i + 1 in kept)
        integer = cost.integer + (2 - sides) / 2 * cost.conversions
        time += cost.size * (integer if i in kept else 1.0)
    return time


costs = st.builds(Cost, st.floats(0.1, 2), st.floats(0, 1), st.floats(0.1, 10))


@settings(deadline=None, max_examples=100)
@given(st.lists(costs, min_size=1, max_size=7))
def test_the_choice_is_never_worse_than_all_or_none(chosen: list[Cost]) -> None:
    found = total(chosen, set(straight(chosen)))
    assert found <= total(chosen, set(range(len(chosen)))) + 1e-9
    assert found <= total(chosen, set()) + 1e-9
