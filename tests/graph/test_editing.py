"""Changes of a graph: what takes the place of what."""

from __future__ import annotations

import pytest

from qgraph.graph.editing import insert, replace
from qgraph.graph.reading import dims
from tests.models import build, ops

TEXT = """
chain (float[2,3] x) => (float[3,2] y) {
  a = Abs (x)
  y = Transpose <perm = [1,0]> (a)
}"""


@pytest.mark.parametrize("takes_name", [True, False])
def test_a_chain_of_nodes_is_replaced_by_what_computes_its_last_result(takes_name: bool) -> None:
    model = build(TEXT)
    absolute, turn = model.graph
    absolute.name, turn.name = "first", "last"
    new = insert(model, absolute, "Transpose", [model.graph.inputs[0]], base="new")
    replace([absolute, turn], new.outputs[0], takes_name=takes_name)
    assert ops(model) == ["Transpose"]
    assert model.graph.outputs[0] is new.outputs[0]
    assert (new.outputs[0].name, dims(new.outputs[0])) == ("y", [3, 2])
    assert new.name == ("first" if takes_name else "new")


def test_every_result_has_one_in_its_place() -> None:
    model = build(
        "parts (float[4] x) => (float[2] a, float[2] b) { a, b = Split <num_outputs = 2> (x) }"
    )
    split = model.graph[0]
    new = insert(model, split, "Split", split.inputs, base="new", outputs=2)
    replace(split, *new.outputs)
    assert [v.name for v in model.graph.outputs] == ["a", "b"]
    assert list(model.graph.outputs) == list(new.outputs)
