"""Columns of embedding tables are evened out, and what is looked up stays the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qgraph.errors import PipelineError
from qgraph.graph.annotation import IN, Stage
from qgraph.graph.reading import array
from qgraph.graph.text.printer import to_text
from qgraph.io.models import load, save
from qgraph.numerics.noise import sqnr_db
from qgraph.numerics.spec import PER_RUN, PER_TOKEN, WEIGHT
from qgraph.passes import balance_tables
from qgraph.passes.annotate import Annotate, Rule
from qgraph.passes.balance_tables import BalanceTables, column_factors, column_ratio
from qgraph.passes.canonicalize import Canonicalize
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import PassManager
from qgraph.pipeline.target import Target
from qgraph.weights import unfit
from tests.models import build, ops, outputs, weight
from tests.pipelines import (
    COMMIT,
    ONNX,
    TARGETS,
    annotate,
    apply,
    body,
    both,
    golden,
    initializer,
    specs,
)

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


# --- tables tied to a product ---------------------------------------------------------------------

PLAIN = "g (int64[B,S] ids) => (float[B,S,7] y)"
TIED = {
    "transposed for the lookup": "t = Transpose (v) e = Gather (t, ids) y = MatMul (e, v)",
    "transposed for the product": "t = Transpose (w) e = Gather (w, ids) y = MatMul (e, t)",
    "two copies": "e = Gather (w, ids) y = MatMul (e, v)",
    "a Gemm": "e = Gather (w, ids) x = Reshape (e, flat) h = Gemm <transB = 1> (x, w) "
    "y = Reshape (h, shape)",
}
"""A table w of 7 rows and 5 columns, v its transpose."""
SCALED = """
g (int64[B,S] ids) => (float[B,S,7] y) {
  e = Gather (w, ids)
  x = Mul (e, inverse)
  y = MatMul (x, v)
}"""
RUN = (Rule(("matmul", "gemm"), WEIGHT, (PER_RUN,)),)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of any size are annotated."""
    monkeypatch.setattr(unfit, "SMALL_TABLE", 0)


def tied(statements: str, signature: str = PLAIN) -> ir.Model:
    """A model with the table w (7, 5), its transpose v, and shapes, where they are used."""
    w = weight("w", 7, 5).numpy()
    constants = {
        "w": w,
        "v": np.ascontiguousarray(w.T),
        "flat": np.array([-1, 5], np.int64),
        "shape": np.array([2, -1, 7], np.int64),
    }
    used = [name for name in constants if re.search(rf"\b{name}\b", statements)]
    text = f"{signature} {{ {statements} }}"
    return build(text, *(ir.Tensor(constants[name], name=name) for name in used))


def scaled(factors: np.ndarray) -> ir.Model:
    """A tied model as smoothing leaves it: the product's data divided, its weight multiplied."""
    w = weight("w", 7, 5).numpy()
    constants = {"w": w, "v": (w * factors).T.copy(), "inverse": 1 / factors}
    return build(SCALED, *(ir.Tensor(a, name=n) for n, a in constants.items()))


def some_ids() -> dict[str, np.ndarray]:
    return {"ids": np.array([[3, 0, -1], [6, 6, 2]])}


def matrices(model: ir.Model) -> list[tuple[ir.DataType | None, tuple[int, ...]]]:
    """Dtype and shape of every constant with two axes."""
    found = (v.const_value for v in model.graph.initializers.values())
    return [(t.dtype, tuple(t.shape.numpy())) for t in found if t is not None and len(t.shape) == 2]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("form", list(TIED)[:3])
def test_tied_before_and_after(form: str) -> None:
    model = tied(TIED[form])
    context = apply(model, BALANCE, [some_ids()])
    found = re.sub(r" <.*?>", "", body(model))
    assert re.sub(r"%(w|v|t)\b", "%v", found) == golden("""
        %e: f32[5, B, S] = Gather(%v, %ids) {axis = 1}
        %e_rows: f32[B, S, 5] = Transpose(%e) {perm = [1, 2, 0]}
        %y: f32[B, S, 7] = MatMul(%e_rows, %v)
        """)
    assert matrices(model) == [(ir.DataType.FLOAT, (5, 7))]
    (said,) = (r for r in context.remarks if r.pass_name == "balance-tables")
    assert str(said) == "[balance-tables] applied Gather e: reads the weight of 'y': stored once"


@pytest.mark.usefixtures("small")
def test_a_scaled_weight_is_scaled_back_behind_the_lookup() -> None:
    model = scaled(np.array([1, 2, 4, 0.5, 1], np.float32))
    apply(model, BALANCE, [some_ids()])
    assert re.sub(r" <.*?>", "", body(model)) == golden("""
        %e: f32[5, B, S] = Gather(%v, %ids) {axis = 1}
        %e_rows: f32[B, S, 5] = Transpose(%e) {perm = [1, 2, 0]}
        %e_rows_columns: f32[B, S, 5] = Mul(%e_rows, %w_columns)
        %x: f32[B, S, 5] = Mul(%e_rows_columns, %inverse)
        %y: f32[B, S, 7] = MatMul(%x, %v)
        """)
    factors = initializer(model, "w_columns")
    np.testing.assert_allclose(factors, np.array([1, 0.5, 0.25, 2, 1]), rtol=1e-6)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("scheme", ["token", "run", "static"])
@pytest.mark.parametrize("form", TIED)
def test_one_tensor_of_integers_serves_lookup_and_product(
    form: str, scheme: str, target: Target
) -> None:
    before = annotate("static") if scheme == "static" else annotate(rules=RUN[: scheme == "run"])
    apart, model = tied(TIED[form]), tied(TIED[form])
    wanted = outputs(model, some_ids())[0]
    apply(apart, (*before, *COMMIT), [some_ids()], target)
    apply(model, (*before, BalanceTables(), *COMMIT), [some_ids()], target)
    integers = [shape for dtype, shape in matrices(model) if dtype == ir.DataType.INT8]
    assert integers == [(7, 5)]
    assert not any(dtype == ir.DataType.FLOAT and min(s) > 1 for dtype, s in matrices(model))
    found = both(model, some_ids())[0]
    assert sqnr_db(wanted, found) > 25
    np.testing.assert_allclose(found, outputs(apart, some_ids())[0], rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_lookups_that_share_a_tied_table_share_its_integers(target: Target) -> None:
    text = "e = Gather (w, ids) f = Gather (w, ids) a = Add (e, f) y = MatMul (a, v)"
    model = tied(text)
    wanted = outputs(model, some_ids())[0]
    apply(model, (*BALANCE, *COMMIT), [some_ids()], target)
    assert [s for dtype, s in matrices(model) if dtype == ir.DataType.INT8] == [(7, 5)]
    assert sqnr_db(wanted, both(model, some_ids())[0]) > 25


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("rank", range(4))
def test_indices_of_any_rank(rank: int) -> None:
    shape = [2, 3, 4][:rank]
    signature = f"g (int64[{','.join(map(str, shape))}] ids, float[2,5] x) => (e, y)"
    model = tied("e = Gather (w, ids) y = MatMul (x, v)", signature=signature.replace("[]", ""))
    given_: dict[str, np.ndarray] = {
        "ids": np.random.default_rng(0).integers(-7, 7, shape, np.int64),
        "x": np.ones((2, 5), np.float32),
    }
    wanted = outputs(model, given_)
    apply(model, (*BALANCE, *COMMIT), [given_])
    assert [v.name for v in model.graph.outputs] == ["e", "y"]
    assert len(matrices(model)) == 2  # the integers, and their scales as a column
    for a, b in zip(wanted, both(model, given_), strict=True):
        assert a.shape == b.shape
        assert sqnr_db(a, b) > 30


@pytest.mark.usefixtures("small")
def test_a_lookup_in_a_branch_reads_the_weight_of_the_main_graph() -> None:
    statements = """
      e = If (flag) <
        then_branch = a () => (float[B,S,5] e1) { e1 = Gather (w, ids) },
        else_branch = b () => (float[B,S,5] e2) { k = Gather (w, ids) e2 = Neg (k) }
      >
      y = MatMul (e, v)"""
    model = tied(statements, signature="g (bool flag, int64[B,S] ids) => (float[B,S,7] y)")
    feeds = [some_ids() | {"flag": np.array(flag)} for flag in (True, False)]
    wanted = [outputs(model, f)[0] for f in feeds]
    apply(model, (*BALANCE, *COMMIT), feeds[:1])
    assert [s for dtype, s in matrices(model) if dtype == ir.DataType.INT8] == [(7, 5)]
    for given_, reference in zip(feeds, wanted, strict=True):
        assert sqnr_db(reference, both(model, given_)[0]) > 25


def zeroed(v: np.ndarray) -> None:
    v[1] = 0


def row_changed(v: np.ndarray) -> None:
    v[:, 6] *= 1 + 1e-5


def negated(v: np.ndarray) -> None:
    v[2] *= -1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("change", [zeroed, row_changed, negated])
def test_weights_that_hold_other_numbers_are_stored_apart(
    change: Callable[[np.ndarray], None],
) -> None:
    model = tied(TIED["two copies"])
    v = weight("w", 7, 5).numpy().T.copy()
    change(v)
    model.graph.initializers["v"].const_value = ir.Tensor(v, name="v")
    context = apply(model, BALANCE, [some_ids()])
    assert ops(model) == ["Gather", "Mul", "MatMul"]
    (said,) = (r for r in context.remarks if r.pass_name == "balance-tables")
    assert said.kind == "declined"
    assert "'y', whose weight holds other numbers" in said.message


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "rule",
    [Rule(("matmul",), None), Rule(("matmul",), WEIGHT.with_(bits=4), (PER_TOKEN,))],
    ids=["float", "4 bits"],
)
def test_products_that_are_quantized_otherwise_keep_their_own(rule: Rule) -> None:
    model = tied(TIED["two copies"])
    apply(model, (Canonicalize(), Annotate(rules=(rule,)), BalanceTables()), [some_ids()])
    assert ops(model) == ["Gather", "Mul", "MatMul"]


@pytest.mark.usefixtures("small")
def test_a_weight_out_of_sight_is_not_read() -> None:
    statements = """
      e = Gather (w, ids)
      y = If (flag) <
        then_branch = a () => (float[B,S,7] y1) { y1 = MatMul (e, v) },
        else_branch = b () => (float[B,S,7] y2) { k = MatMul (e, v) y2 = Neg (k) }
      >"""
    model = tied(statements, signature="g (bool flag, int64[B,S] ids) => (float[B,S,7] y)")
    bodies = [model.graph[1].attributes[n].as_graph() for n in ("then_branch", "else_branch")]
    v = model.graph.initializers["v"]
    for body_, name in zip(bodies, ("v1", "v2"), strict=True):
        inner = ir.Value(name=name, type=v.type, shape=v.shape, const_value=v.const_value)
        body_.register_initializer(inner)
        body_[0].replace_input_with(1, inner)
    given_ = some_ids() | {"flag": np.array(True)}
    wanted = outputs(model, given_)[0]
    apply(model, BALANCE, [given_])
    assert "w_balanced" in model.graph.initializers
    np.testing.assert_allclose(outputs(model, given_)[0], wanted, rtol=1e-4, atol=1e-5)


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


MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.just(0.0)
    | st.floats(2.0**-40, 2.0**40, width=32)
    | st.floats(-(2.0**40), -(2.0**-40), width=32),
)


@settings(deadline=None)
@given(MATRICES, st.integers(0, 99), st.integers(1, 4))
def test_the_ratio_of_tied_columns_is_found(w: np.ndarray, seed: int, rows: int) -> None:
    drawn = np.random.default_rng(seed).uniform(1e-3, 1e3, (w.shape[1],))
    factors = drawn.astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance_tables, "ROWS", rows)
        found = column_ratio(w * factors, w)
    assert found is not None
    alive = w.any(axis=0)
    np.testing.assert_allclose(found[alive], factors[alive], rtol=1e-6)
    assert np.array_equal(column_ratio(w, w), np.ones(w.shape[1]))  # type: ignore[arg-type]


@settings(deadline=None)
@given(MATRICES, st.integers(0, 99))
def test_one_number_that_does_not_fit_is_seen(w: np.ndarray, seed: int) -> None:
    row, column = np.unravel_index(seed % w.size, w.shape)
    changed = w.copy()
    changed[row, column] = changed[row, column] * 2 or 1
    if (
        w[row, column] == 0 or np.delete(w[:, column], row).any()
    ):  # else the number alone sets the factor
        assert column_ratio(changed, w) is None


def test_numbers_beyond_float32_explain_nothing() -> None:
    huge, tiny = np.full((3, 2), 3e38, np.float32), np.full((3, 2), 1e-38, np.float32)
    assert column_ratio(huge, tiny) is None


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.floats(0, 3), st.sampled_from(TARGETS))
def test_any_scaling_is_undone_and_stored_once(seed: int, spread: float, target: Target) -> None:
    factors = np.exp(np.random.default_rng(seed).normal(0, spread, 5)).astype(np.float32)
    model = scaled(factors)
    wanted = outputs(model, some_ids())[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unfit, "SMALL_TABLE", 0)
        apply(model, BALANCE, [some_ids()], target)
    np.testing.assert_allclose(outputs(model, some_ids())[0], wanted, rtol=1e-4, atol=1e-4)
    apply(model, COMMIT, [some_ids()], target)
    assert [s for dtype, s in matrices(model) if dtype == ir.DataType.INT8] == [(7, 5)]
    both(model, some_ids())
