"""Two bodies, chosen by the number of rows of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qgraph
from qgraph.errors import PipelineError
from qgraph.graph.reading import initializers, is_op
from qgraph.io.kv_cache import Completer
from qgraph.io.session import open_session, run
from qgraph.passes.branch_on_rows import BranchOnRows
from qgraph.pipeline.target import BlockProduct, Purpose, Target
from tests.models import build, feed, random_graph, weight
from tests.pipelines import Shipped, both

ROWS = 16
"""Rows from which columns are faster, as assumed for CPUs that are not this one."""
BYTES = 5000
"""What says which integers a byte holds, and a few shapes, once for the model."""


@dataclass(frozen=True)
class Crossing(Shipped):
    """A CPU on which int8 columns beat blocks from so many rows on, whatever the product."""

    rows: int | None = ROWS
    optimize_for: Purpose = "both"

    def crossover(self, products: Sequence[BlockProduct]) -> int | None:
        return self.rows if products and self.optimize_for == "both" else None


CROSSING = Crossing()


def two_layers(k: int = 256, n: int = 512, lead: str = "batch,length") -> ir.Model:
    text = f"""
    g (float[{lead},{k}] x) => (float[{lead},{k}] y) {{
      a = MatMul (x, w)
      b = Relu (a)
      c = MatMul (b, v)
      y = Add (c, x)
    }}"""
    return build(text, weight("w", k, n, spread=0.05), weight("v", n, k, seed=1, spread=0.05))


def bodies(model: ir.Model) -> list[list[str]]:
    """The operators of each body, or of the graph where there is no If."""
    last = model.graph[-1]
    graphs = [a.as_graph() for a in last.attributes.values()] if is_op(last, "If") else []
    return [[n.op_type for n in graph] for graph in graphs or [model.graph]]


def stored(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in initializers(model) if v.const_value is not None)


def compiled(
    model: ir.Model, recipe: str = "rtn", *, target: str | Target = CROSSING, **given_: Any
) -> qgraph.CompiledModel:
    return qgraph.compile(model, recipe, target=target, **given_)


WEIGHTS: tuple[dict[str, Any], ...] = (
    {},
    {"bits": 2},
    {"symmetric": False},
    {"group_size": 0},
    {"group_size": 128},
)


@pytest.mark.parametrize("parameters", WEIGHTS, ids=str)
@pytest.mark.parametrize("k", [200, 256])
def test_each_body_is_the_model_for_its_runs(parameters: dict[str, Any], k: int) -> None:
    model = two_layers(k)
    one = compiled(model, verify=True, **parameters)
    prompt, decode = (
        compiled(model, target=Crossing(optimize_for=purpose), **parameters)
        for purpose in ("prompt", "decode")
    )
    few, many = bodies(one.model)
    assert few.count("MatMulNBits") == 2
    assert many.count("MatMulIntegerToFloat") == 2
    columns = 4 * (k + 512)  # a scale each
    assert stored(one.model) <= stored(decode.model) + columns + BYTES
    for batch, length in ((1, 1), (3, 5), (1, ROWS), (4, 4), (3, 20)):
        x = np.random.default_rng(length).normal(size=(batch, length, k)).astype(np.float32)
        alone = decode if batch * length < ROWS else prompt
        (y,) = both(one.model, {"x": x})
        np.testing.assert_array_equal(y, run(open_session(alone.model, threads=1), {"x": x})[0])
    applied = [r for r in one.remarks if r.pass_name == "branch-on-rows"]
    assert [(r.kind, r.numbers["rows"]) for r in applied] == [("applied", ROWS)]


@pytest.mark.parametrize("recipe", ["dynamic", "zeroquant"])
def test_tokens_of_8_bits_run_in_blocks(recipe: str) -> None:
    given_: dict[str, Any] = {"alpha": 0} if recipe == "zeroquant" else {}
    model = two_layers()
    one, plain = compiled(model, recipe, **given_), compiled(model, recipe, bodies=1, **given_)
    few, many = bodies(one.model)
    assert few.count("MatMulNBits") == many.count("MatMulIntegerToFloat") == 2
    assert stored(one.model) <= 1.03 * stored(plain.model)
    for rows in (1, ROWS):
        x = np.random.default_rng(rows).normal(size=(1, rows, 256)).astype(np.float32)
        (y,) = both(one.model, {"x": x})
        if rows == ROWS:
            np.testing.assert_array_equal(y, plain(x))
        (exact,) = run(open_session(model), {"x": x})
        assert np.linalg.norm(y - exact) < 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize("recipe", ["dynamic", "rtn"])
def test_a_tied_table_is_stored_once(recipe: str) -> None:
    text = """
    g (int64[batch,length] ids) => (float[batch,length,512] y) {
      x = Gather (table, ids)
      a = MatMul (x, w)
      h = Add (x, a)
      turned = Transpose <perm = [1, 0]> (table)
      y = MatMul (h, turned)
    }"""
    model = build(text, weight("table", 512, 256), weight("w", 256, 256, seed=1, spread=0.05))
    one, plain = compiled(model, recipe), compiled(model, recipe, bodies=1)
    assert len(bodies(one.model)) == 2
    assert stored(one.model) <= 1.05 * stored(plain.model)
    for length in (1, ROWS):
        ids = np.arange(length)[np.newaxis] * 31 % 512
        (y,) = both(one.model, {"ids": ids})
        (exact,) = run(open_session(model), {"ids": ids})
        assert np.linalg.norm(y - exact) < 0.15 * np.linalg.norm(exact)


def test_a_past_is_still_found() -> None:
    text = """
    g (float[batch,length,64] x, float[batch,past,64] past) =>
      (float[batch,length,64] y, float[batch,total,64] present) {
      k = MatMul (x, w)
      present = Concat <axis = 1> (past, k)
      turned = Transpose <perm = [0, 2, 1]> (present)
      scores = MatMul (x, turned)
      p = Softmax (scores)
      y = MatMul (p, present)
    }"""
    model = build(text, weight("w", 64, 64, spread=0.1))
    one = compiled(model, target=Crossing(rows=2))
    assert len(bodies(one.model)) == 2  # single tokens come, if a past does
    x = np.ones((1, 3, 64), np.float32)
    assert Completer(one.model)({"x": x})["past"].shape == (1, 0, 64)


def test_a_model_without_a_past_has_no_single_tokens() -> None:
    model = two_layers()
    one = compiled(model, target=Crossing(rows=4))
    assert [body.count("MatMulIntegerToFloat") for body in bodies(one.model)] == [2]
    remarks = [r for r in one.remarks if r.pass_name == "branch-on-rows"]
    assert "faster from 4 rows on" in remarks[0].message


@pytest.mark.parametrize(
    ("lead", "target", "parameters"),
    [
        ("1,4", Crossing(), {}),
        ("batch,length", Crossing(), {"bodies": 1}),
        ("batch,length", Crossing(rows=None), {}),
        ("batch,length", Crossing(optimize_for="decode"), {}),
        ("batch,length", "onnx", {}),
    ],
)
def test_one_body(lead: str, target: str | Target, parameters: dict[str, Any]) -> None:
    one = compiled(two_layers(lead=lead), target=target, **parameters)
    assert len(bodies(one.model)) == 1
    assert not any(r.kind == "applied" for r in one.remarks if r.pass_name == "branch-on-rows")


def test_what_stays_slow_for_prompts_is_said() -> None:
    one = compiled(two_layers(), bodies=1)
    warnings = [r.message for r in one.remarks if r.kind == "warning"]
    assert any("2 products are slower than float for prompts" in w for w in warnings)
    two = compiled(two_layers())
    assert not any("slower than float for prompts" in r.message for r in two.remarks)


def test_more_bodies() -> None:
    with pytest.raises(PipelineError, match="bodies=3 is out of range: use 1 or 2"):
        BranchOnRows(bodies=3)


@given(random_graph(), st.sampled_from(["rtn", "dynamic"]))
@settings(max_examples=10, deadline=None)
def test_any_graph(model: ir.Model, recipe: str) -> None:
    both(compiled(model, recipe, verify=True).model, feed(model))
