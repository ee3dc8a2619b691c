"""One graph as two bodies under an If."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.graph.branch import branch
from qgraph.graph.names import unique_names
from qgraph.graph.reading import nodes
from qgraph.io.session import open_session, run
from tests.models import build, feed, if_model, outputs, random_graph, weight


def branched(model: ir.Model, bound: int) -> tuple[ir.Graph, ir.Graph]:
    """Two bodies: for fewer elements of the first input than `bound`, and for others."""
    unique_names(model)
    size = ir.node("Size", [model.graph.inputs[0]], name="size")
    limit = ir.node("Constant", [], attributes={"value": ir.tensor(np.int64(bound))}, name="limit")
    less = ir.node("Less", [size.outputs[0], limit.outputs[0]], name="less")
    size.outputs[0].name, limit.outputs[0].name, less.outputs[0].name = "size", "limit", "less"
    model.graph.extend([size, limit, less])
    return branch(model, less.outputs[0])


def test_two_bodies() -> None:
    text = "g (float[n,4] x) => (float[n,4] y) { a = MatMul (x, w)  y = Add (a, x) }"
    model = build(text, weight("w", 4, 4))
    few, _many = branched(model, 9)
    assert [n.op_type for n in model.graph] == ["Size", "Constant", "Less", "If"]
    assert [v.name for v in model.graph.outputs] == ["y"]
    names = [v.name for n in nodes(model) for v in n.outputs]
    assert len(set(names)) == len(names)
    few[0].replace_input_with(0, few[1].inputs[1])  # each has nodes of its own
    few.remove(few[1], safe=False)


def test_an_output_that_nothing_computes() -> None:
    model = build("g (float[n,4] x) => (float[n,4] x, float[n,4] y) { y = Relu (x) }")
    model.graph.outputs[0] = model.graph.inputs[0]
    given_ = {"x": np.array([[1, -1, 2, -2]], np.float32)}
    branched(model, 9)
    first, second = run(open_session(model), given_)
    np.testing.assert_array_equal(first, given_["x"])
    np.testing.assert_array_equal(second, np.maximum(given_["x"], 0))


@pytest.mark.parametrize("bound", [0, 1000])
def test_bodies_within_bodies(bound: int) -> None:
    model = if_model()
    given_ = feed(model)
    before = outputs(model, given_)
    branched(model, bound)
    for level in (False, True):
        for a, b in zip(before, run(open_session(model, optimized=level), given_), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@given(random_graph(), st.booleans())
@settings(max_examples=15, deadline=None)
def test_any_graph(model: ir.Model, first: bool) -> None:
    given_ = feed(model)
    before = outputs(model, given_)
    branched(model, 10**6 if first else 0)
    for a, b in zip(before, outputs(model, given_), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(a).max(initial=0)))
