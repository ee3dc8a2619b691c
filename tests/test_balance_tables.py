"""Columns of embedding tables are evened out, and what is looked up stays the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qgraph.annotation import IN
from qgraph.context import Context
from qgraph.errors import PipelineError
from qgraph.graph import array
from qgraph.model_io import load, save
from qgraph.numerics import sqnr_db
from qgraph.pass_manager import PassManager, Stage
from qgraph.passes import balance_tables
from qgraph.passes.annotate import WEIGHT, Annotate
from qgraph.passes.balance_tables import BalanceTables, column_factors
from qgraph.passes.canonicalize import Canonicalize
from qgraph.text import to_text
from tests.models import build, ops, outputs, weight
from tests.pipelines import COMMIT, ONNX, apply, body, golden, specs

WIDE = (3000, 8)
"""Large enough for `annotate` to take the table."""
LOOKUP = """
g (int64[2,5] ids) => (float[2,5,D] y) { y = Gather (w, ids) }"""


def table(*shape: int, outlier: float = 40.0) -> ir.TensorProtocol:
    """A Gaussian table with one large column."""
    data = weight("w", *shape).numpy().copy()
    data[:, 3] *= outlier
    return ir.Tensor(data, name="w")


def ids(rows: int = WIDE[0]) -> dict[str, np.ndarray]:
    return {"ids": np.random.default_rng(0).integers(0, rows, (2, 5))}


BALANCE = (Canonicalize(), Annotate(), BalanceTables())


# --- what it does ---------------------------------------------------------------------------------


def test_before_and_after() -> None:
    text = """
    g (int64[2] ids) => (float[2,3] y) {
      e = Gather (w, ids)
      y = Relu (e)
    }"""
    data = np.array([[1, -8, 0], [-2, 4, 0]], np.float32)
    model = build(text, ir.Tensor(data, name="w"))
    apply(model, [Canonicalize()])
    model.graph[0].meta[IN] = {0: WEIGHT}  # far too small for `annotate`
    manager = PassManager([BalanceTables()], verify=True, given=frozenset({Stage.ANNOTATED}))
    manager.run(model, Context(ONNX))
    assert body(model, weights=True) == golden("""
        weight %w_balanced = f32[2, 3] {0.5, -1.0, 0.0, -1.0, 0.5, 0.0}
        weight %w_columns = f32[3] {2.0, 8.0, 1.0}
        %e: f32[2, 3] = Gather(%w_balanced <int8 per-axis(0) sym absmax>, %ids)
        %e_columns: f32[2, 3] = Mul(%e, %w_columns)
        %y: f32[2, 3] = Relu(%e_columns)
    """)


def test_rows_keep_more_of_their_signal() -> None:
    wanted = outputs(build(LOOKUP, table(*WIDE)), ids())[0]
    found = []
    for passes in ((Canonicalize(), Annotate()), BALANCE):
        model = build(LOOKUP, table(*WIDE))
        apply(model, (*passes, *COMMIT), [ids()])
        result = outputs(model, ids())[0]
        others = np.arange(WIDE[1]) != 3
        found.append(sqnr_db(wanted[..., others], result[..., others]))
    before, after = found
    assert after > before + 20  # an outlier 40 times as large as the rest hid them almost entirely
    assert after > 40


def test_lookups_that_share_a_table_each_get_their_product() -> None:
    text = """
    g (int64[2,5] ids, int64[3] more) => (float[2,5,8] y, float[3,8] z) {
      y = Gather (w, ids)
      z = Gather (w, more)
    }"""
    model = build(text, table(*WIDE))
    given_ = ids() | {"more": np.array([7, 0, 2999])}
    wanted = outputs(model, given_)
    apply(model, BALANCE, [given_])
    assert ops(model) == ["Gather", "Mul", "Gather", "Mul"]
    assert [v.name for v in model.graph.outputs] == ["y", "z"]
    for a, b in zip(wanted, outputs(model, given_), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_table_that_a_product_shares_keeps_its_own_values_there() -> None:
    text = """
    g (int64[2,5] ids) => (float[10,3000] y) {
      e = Gather (w, ids)
      x = Reshape (e, shape)
      y = Gemm <transB = 1> (x, w)
    }"""
    shape = ir.Tensor(np.array([10, 8], np.int64), name="shape")
    model = build(text, table(*WIDE), shape)
    wanted = outputs(model, ids())[0]
    apply(model, BALANCE, [ids()])
    assert "w" in model.graph.initializers
    np.testing.assert_allclose(outputs(model, ids())[0], wanted, rtol=1e-4, atol=1e-4)


def test_tables_in_branches() -> None:
    text = """
    g (bool flag, int64[2,5] ids) => (float[2,5,8] y) {
      y = If (flag) <
        then_branch = a () => (float[2,5,8] y1) { y1 = Gather (w, ids) },
        else_branch = b () => (float[2,5,8] y2) { k = Gather (w, ids) y2 = Neg (k) }
      >
    }"""
    model = build(text, table(*WIDE))
    feeds = [ids() | {"flag": np.array(flag)} for flag in (True, False)]
    wanted = [outputs(model, f)[0] for f in feeds]
    apply(model, BALANCE, feeds[:1])
    assert [n.op_type for n in model.graph.all_nodes()].count("Mul") == 2
    for given_, reference in zip(feeds, wanted, strict=True):
        np.testing.assert_allclose(outputs(model, given_)[0], reference, rtol=1e-6)


def test_annotations_of_the_result_move_behind_the_product() -> None:
    text = """
    g (int64[2,5] ids) => (float[2,5,4] y) {
      e = Gather (w, ids)
      y = MatMul (e, v)
    }"""
    model = build(text, table(*WIDE), weight("v", 8, 4))
    apply(model, BALANCE, [ids()])
    assert set(specs(model)["y"]) == {0, 1}
    product = model.graph[2].inputs[0]
    assert product is not None
    assert product.producer() is model.graph[1]
    apply(model, COMMIT, [ids()])
    assert np.isfinite(outputs(model, ids())[0]).all()


def test_a_mapped_table_is_not_held_in_memory(tmp_path: Path) -> None:
    save(build(LOOKUP, table(60000, 16)), tmp_path / "model.onnx")
    model = load(tmp_path / "model.onnx")
    wanted = outputs(model, ids(60000))[0]
    apply(model, BALANCE, [ids(60000)], verify=False)
    tensor = model.graph.initializers["w_balanced"].const_value
    assert isinstance(tensor, ir.LazyTensor)
    assert not tensor.cache
    np.testing.assert_allclose(outputs(model, ids(60000))[0], wanted, rtol=1e-6)


# --- what it leaves alone -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 4), (3000,), (300, 8, 8)], ids=str)
def test_tables_that_are_small_or_of_another_rank(shape: tuple[int, ...]) -> None:
    rest = ",".join(map(str, shape[1:]))
    text = f"g (int64[2] ids) => (float[2{',' if rest else ''}{rest}] y) {{ y = Gather (w, ids) }}"
    model = build(text, weight("w", *shape))
    apply(model, BALANCE, [{"ids": np.array([0, 1])}])
    assert ops(model) == ["Gather"]
    assert list(model.graph.initializers) == ["w"]


def test_tables_of_half_precision() -> None:
    half = ir.Tensor(table(30000, 8).numpy().astype(np.float16), name="w")
    model = build(LOOKUP.replace("float[", "float16["), half)
    apply(model, BALANCE, [ids()])
    assert ops(model) == ["Gather"]


def test_it_needs_annotation() -> None:
    with pytest.raises(PipelineError, match="annotated"):
        PassManager([BalanceTables()])


def test_nothing_is_done_twice_to_a_model_without_annotations() -> None:
    model = build(LOOKUP, table(*WIDE))
    before = to_text(model)
    assert not BalanceTables().run(model, Context(ONNX))
    assert to_text(model) == before


# --- the mathematics ------------------------------------------------------------------------------


@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(-(2.0**99), 2.0**99, width=32),
    ),
    st.integers(1, 4),
)
def test_factors_are_the_largest_magnitudes(w: np.ndarray, rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance_tables, "ROWS", rows)
        factors = column_factors(w)
    assert factors.dtype == np.float32
    largest = np.abs(w).max(axis=0)
    assert np.array_equal(factors, np.where(largest > 0, largest, 1))
    assert (np.abs(w / factors) <= 1).all()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.floats(1e-3, 1e3), st.integers(1, 6))
def test_any_table_gives_the_same_rows(seed: int, spread: float, count: int) -> None:
    columns = 3
    data = np.random.default_rng(seed).standard_normal((6000, columns)).astype(np.float32)
    data *= np.geomspace(1, spread, columns).astype(np.float32)
    data[:, seed % columns] *= seed % 2
    text = f"g (int64[{count}] ids) => (float[{count},{columns}] y) {{ y = Gather (w, ids) }}"
    model = build(text, ir.Tensor(data, name="w"))
    given_ = {"ids": np.random.default_rng(seed).integers(-6000, 6000, count)}
    apply(model, BALANCE, [given_])
    assert "w_balanced" in model.graph.initializers
    assert array(model.graph.initializers["w_columns"]) is not None
    np.testing.assert_allclose(outputs(model, given_)[0], data[given_["ids"]], rtol=1e-6)
