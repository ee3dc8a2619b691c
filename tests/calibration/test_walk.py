"""Calibration data that goes through a model piece by piece."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.calibration.walk import Walk
from qgraph.errors import CalibrationError
from qgraph.graph.cuts import Piece, cut
from qgraph.io.session import open_session, run
from tests.models import build, feed, if_model, mlp, random_graph, transformer_block, weight
from tests.pipelines import golden


def computed(model: ir.Model) -> list[ir.Value]:
    """What the main graph computes, in its order."""
    return [v for node in model.graph for v in node.outputs if v.name]


def directly(model: ir.Model, names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The values of one run of the whole model."""
    copy = model.clone()
    made = ir.convenience.create_value_mapping(copy.graph, include_subgraphs=False)
    copy.graph.outputs[:] = [made[name] for name in names]
    return run(open_session(copy, optimized=False), inputs)


def text(pieces: list[Piece]) -> str:
    lines = []
    for piece in pieces:
        parts = ([str(v.name) for v in part] for part in (piece.inputs, piece.outputs, piece.spent))
        read, made, spent = (" ".join(sorted(part)) for part in parts)
        lines.append(f"{piece.stop.name}: {read} -> {made} | {spent}")
    return "\n".join(lines)


def test_a_graph_is_cut_where_values_are_wanted() -> None:
    model = build(
        """
        g (float[n,4] x) => (float[n,4] y) {
          a = Relu (x)
          b = Neg (a)
          c = Abs (b)
          e = Exp (b)
          d = MatMul (c, w)
          s = Add (d, e)
          y = Sqrt (s)
        }""",
        weight("w", 4, 4),
    )
    made = {v.name: v for v in computed(model)}
    assert text(cut(model, [made["a"], made["c"], made["s"]])) == golden("""
        a: x -> a | x
        c: a -> b c | a
        s: b c -> s | b c s
    """)  # y is not computed at all


def test_a_stop_can_be_fed_or_known_already_or_come_twice() -> None:
    model = mlp((4, 4, 4))
    values = ["x", "m0", "m0", "h0", "a0"]
    data = [feed(model, seed) for seed in range(2)]
    walk = Walk(model, values, data)
    assert not walk.pieces[0].outputs
    for name in values:
        found = walk.advance()
        for given_, array in zip(data, found, strict=True):
            if name == "x":
                assert array is given_["x"]
            else:
                np.testing.assert_array_equal(array, directly(model, [name], given_)[0])
    assert walk.carried == [{}, {}]


@settings(deadline=None, max_examples=25)
@given(random_graph(), st.integers(0, 2**16))
def test_any_graph_gives_what_it_gives_whole(model: ir.Model, seed: int) -> None:
    names = [str(v.name) for v in computed(model)]
    data = [feed(model, seed + i) for i in range(2)]
    walk = Walk(model, names, data)
    wanted = [directly(model, names, given_) for given_ in data]
    for index in range(len(names)):
        for arrays, found in zip(wanted, walk.advance(), strict=True):
            np.testing.assert_allclose(found, arrays[index], rtol=1e-5, atol=1e-6)
    assert walk.carried == [{}, {}]


def test_bodies_of_control_flow_see_what_they_capture() -> None:
    inner = if_model()
    x = inner.graph.inputs[1]
    moved = ir.node("Neg", [x])
    moved.outputs[0].name, moved.outputs[0].dtype = "moved", ir.DataType.FLOAT
    moved.outputs[0].shape = x.shape
    inner.graph.insert_before(inner.graph[0], moved)
    for node in inner.graph.all_nodes():
        for index, value in enumerate(node.inputs):
            if value is x and node is not moved:
                node.replace_input_with(index, moved.outputs[0])
    data = [{**feed(inner), "flag": np.array(flag)} for flag in (True, False)]
    walk = Walk(inner, ["moved", "y"], data)
    assert text(walk.pieces) == "moved: x -> moved | x\ny: flag moved -> y | flag moved y"
    walk.advance()
    for given_, found in zip(data, walk.advance(), strict=True):
        np.testing.assert_allclose(found, directly(inner, ["y"], given_)[0], rtol=1e-6)


def test_what_follows_from_constants_is_not_carried() -> None:
    model = build(
        """
        g (float[n,4] x) => (float[n,4] y) {
          t = Transpose (w)
          a = MatMul (x, t)
          y = MatMul (a, t)
        }""",
        weight("w", 4, 4),
    )
    assert (
        text(cut(model, [computed(model)[1], computed(model)[2]]))
        == "a: x -> a | x\ny: a -> y | a y"
    )


def test_the_model_may_be_rewritten_on_the_way() -> None:
    model = mlp((4, 4, 4))
    data = [feed(model)]
    walk = Walk(model, ["h0", "y"], data)
    before = walk.advance()[0]
    w1 = model.graph.initializers["w1"]
    assert w1.const_value is not None
    w1.const_value = ir.Tensor(2 * w1.const_value.numpy(), name="w1")
    np.testing.assert_allclose(walk.advance()[0], directly(model, ["y"], data[0])[0], rtol=1e-6)
    assert before.shape == (3, 4)


def test_a_walk_goes_on_from_its_state() -> None:
    model = transformer_block()
    names = [str(v.name) for v in computed(model)]
    data = [feed(model, seed) for seed in range(2)]
    first = Walk(model, names, data)
    for _ in range(5):
        first.advance()
    state = {key: value.copy() for key, value in first.state().items()}
    second = Walk(model, names, data)
    second.resume(first.at, state)
    for _ in names[5:]:
        for a, b in zip(first.advance(), second.advance(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_feeds_that_do_not_fit() -> None:
    model = mlp((4, 4, 4))
    walk = Walk(
        model, ["y"], [{"x": np.zeros((2, 4), np.float32)}, {"x": np.zeros((2, 5), np.float32)}]
    )
    with pytest.raises(CalibrationError, match="does not run on calibration feed 1: "):
        walk.advance()
    assert Walk(model, ["y"], []).advance() == []
