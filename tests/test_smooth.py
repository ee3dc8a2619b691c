"""Smoothing moves magnitudes from channels into weights: the function stays, the noise falls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qgraph
from benchmarks import zoo
from qgraph.annotation import IN, SPEC, STATS, product_groups
from qgraph.cli import main
from qgraph.context import Context, Feed, Remark
from qgraph.errors import CalibrationError, PipelineError, QGraphError
from qgraph.feeds import first_feed, open_calibration
from qgraph.graph import array
from qgraph.model_io import load, save
from qgraph.numerics import sqnr_db
from qgraph.observers import Stats
from qgraph.pass_manager import PassManager
from qgraph.passes import smooth
from qgraph.passes.annotate import PER_RUN, PER_TOKEN, WEIGHT, Rule, Scheme
from qgraph.passes.smooth import GRID, Smooth, expected_noise, smoothing_factors
from qgraph.passes.split_outliers import SplitOutliers
from qgraph.pipeline import complete
from qgraph.recipes import FLOAT_STAGE
from qgraph.tracing import trace
from qgraph.verify import relative_error
from tests.models import build, feed, ops, outputs, random_graph, transformer_block, weight
from tests.pipelines import COMMIT, ONNX, apply, body, by_channel, golden, node, specs

FLOAT = Rule(("matmul", "gemm"), None, layers="z")
"""The product called z stays float."""


def smoothed(
    model: ir.Model,
    step: Smooth | None = None,
    feeds: Iterable[Feed] | None = None,
    rtol: float = 1e-5,
    **annotation: object,
) -> list[Remark]:
    """Smooth `model`, which must compute the same after it; what the pass said."""
    data = [feed(model, seed) for seed in range(2)] if feeds is None else feeds
    before = [outputs(model, f) for f in data]
    context = apply(model, (*by_channel(**annotation), step or Smooth()), data)  # type: ignore[arg-type]
    for given_, expected in zip(data, before, strict=True):
        for a, b in zip(expected, outputs(model, given_), strict=True):
            assert relative_error(a, b) <= rtol
    return [r for r in context.remarks if r.pass_name == "smooth"]


def tensor(name: str, *rows: list[float] | float) -> ir.TensorProtocol:
    return ir.Tensor(np.array(rows, np.float32), name=name)


def weights(model: ir.Model, name: str) -> np.ndarray:
    found = array(model.graph.initializers[name])
    assert found is not None
    return found


# --- where the factors go -------------------------------------------------------------------------

U8, S8 = "<uint8 per-token sym dynamic>", "<int8 per-axis(1) sym absmax>"


def test_a_constant_before_it() -> None:
    text = """
    g (float[2,4] x) => (float[2,2] y) {
      m = Mul (x, g)
      y = MatMul (m, w)
    }"""
    rows = ([1.0, -1.0], [-1.0, 0.5], [1.0, 0.0], [4.0, -4.0])
    model = build(text, tensor("g", 1, 16, 4, 1), tensor("w", *rows))
    x = np.array([[1, -1, 1, -1], [-0.5, 0.25, -1, 1]], np.float32)
    (remark,) = smoothed(model, feeds=[{"x": x}])
    assert body(model, weights=True) == golden(f"""
        weight %w_scaled = f32[4, 2] {{1.0, -1.0, -4.0, 2.0, 2.0, 0.0, 2.0, -2.0}}
        weight %g_scaled = f32[4] {{1.0, 4.0, 2.0, 2.0}}
        %m: f32[2, 4] = Mul(%x, %g_scaled)  // [-4, 2] n=8
        %y: f32[2, 2] = MatMul(%m {U8}, %w_scaled {S8})
    """)
    assert str(remark) == (
        "[smooth] applied MatMul y: smoothed: factors went into the weight of 'm' "
        "alpha=0.5 noise_ratio=10.86"
    )


def test_a_norm_that_several_products_read() -> None:
    text = """
    g (float[1,6,4] v) => (float[1,6,3] y, float[1,6,2] z) {
      x = LayerNormalization (v, g, b)
      y = MatMul (x, w)
      z = MatMul (x, u)
    }"""
    model = build(
        text, tensor("g", 1, 30, 1, 2), weight("b", 4), weight("w", 4, 3), weight("u", 4, 2)
    )
    old = {name: weights(model, name) for name in "gbwu"}
    remarks = smoothed(model)
    assert body(model) == golden(f"""
        %x: f32[1, 6, 4] = LayerNormalization(%v, %g_scaled, %b_scaled)  // [-6.024, 6.121] n=48
        %y: f32[1, 6, 3] = MatMul(%x {U8}, %w_scaled {S8})
        %z: f32[1, 6, 2] = MatMul(%x {U8}, %u_scaled {S8})
    """)
    assert [r.site for r in remarks] == ["y", "z"]
    assert all("the norm weight of 'x'" in r.message for r in remarks)
    s = old["g"] / weights(model, "g_scaled")
    np.testing.assert_allclose(weights(model, "b_scaled"), old["b"] / s, rtol=1e-6)
    np.testing.assert_allclose(weights(model, "w_scaled"), old["w"] * s[:, None], rtol=1e-6)
    np.testing.assert_allclose(weights(model, "u_scaled"), old["u"] * s[:, None], rtol=1e-6)
    assert s.argmax() == 1


def test_columns_of_the_product_before() -> None:
    text = """
    g (float[1,6,3] v) => (float[1,6,2] y) {
      m = MatMul (v, a)
      h = Add (m, b)
      x = Relu (h)
      y = MatMul (x, w)
    }"""
    model = build(text, weight("a", 3, 4), weight("b", 4), weight("w", 4, 2))
    (_, remark) = smoothed(model, Smooth(0.7, insert=False))
    assert body(model) == golden(f"""
        %m: f32[1, 6, 4] = MatMul(%v {U8}, %a_scaled {S8})
        %h: f32[1, 6, 4] = Add(%m, %b_scaled)
        %x: f32[1, 6, 4] = Relu(%h)  // [0, 0.8884] n=48
        %y: f32[1, 6, 2] = MatMul(%x {U8}, %w_scaled {S8})
    """)
    assert "the weight of 'm'" in remark.message


def test_through_the_gating_of_an_mlp() -> None:
    model = transformer_block()
    remarks = {r.site: r for r in smoothed(model, Smooth(0.6, insert=False))}
    names = {str(v.name) for n in model.graph for v in n.inputs if v is not None}
    assert {"wup_scaled_scaled", "wgate_scaled", "wdown_scaled", "g2_scaled"} <= names
    assert "the weight of 'up'" in remarks["down"].message
    assert "the weight of 'v'" in remarks["o"].message
    assert "the norm weight of" in remarks["q"].message
    assert {r.kind for r in remarks.values()} == {"applied"}


def test_channels_that_meet_in_one_constant_get_one_factor() -> None:
    text = """
    g (float[2,3,2,2] v) => (float[2,3,5] y) {
      n = LayerNormalization (v, g)
      x = Reshape (n, joined)
      y = MatMul (x, w)
    }"""
    joined = ir.Tensor(np.array([2, 3, 4]), name="joined")
    model = build(text, tensor("g", 1, 9), joined, weight("w", 4, 5))
    old = weights(model, "w")
    smoothed(model)
    ratio = weights(model, "w_scaled") / old
    np.testing.assert_allclose(ratio[:2], ratio[2:], rtol=1e-6)
    assert ratio[1, 0] > ratio[0, 0]


READ_TWICE = """
g (float[1,6,4] v) => (float[1,6,3] y, float[1,6,4] z) {
  x = LayerNormalization (v, g)
  y = MatMul (x, w)
  z = Neg (x)
}"""


def test_a_mul_where_others_read_the_data() -> None:
    model = build(READ_TWICE, tensor("g", 1, 100, 1, 2), weight("w", 4, 3))
    (remark,) = smoothed(model)
    assert body(model) == golden(f"""
        %x: f32[1, 6, 4] = LayerNormalization(%v, %g)  // [-136.3, 162.2] n=48
        %x_smooth: f32[1, 6, 4] = Mul(%x, %x_inverse)  // [-8.434, 10.03] n=48
        %y: f32[1, 6, 3] = MatMul(%x_smooth {U8}, %w_scaled {S8})
        %z: f32[1, 6, 4] = Neg(%x)
    """)
    assert "a Mul before it" in remark.message
    assert remark.numbers["noise_ratio"] > smooth.WORTH_A_MUL


def test_no_mul_unless_it_pays_or_where_it_is_forbidden() -> None:
    for norm, step in (((1, 1, 1, 1), Smooth()), ((1, 100, 1, 2), Smooth(insert=False))):
        model = build(READ_TWICE, tensor("g", *norm), weight("w", 4, 3))
        (remark,) = smoothed(model, step)
        assert remark.kind == "declined"
        assert "no constant before it can take the factors" in remark.message
        assert ops(model) == ["LayerNormalization", "MatMul", "Neg"]


# --- every kind of product ------------------------------------------------------------------------

PRODUCTS = {
    "matmul": ("y = MatMul (x, w)", (4, 3)),
    "gemm": ("y = Gemm (x, w)", (4, 3)),
    "gemm with bias": ("y = Gemm (x, w, c)", (4, 3)),
    "gemm, transB": ("y = Gemm <transB = 1> (x, w, c)", (3, 4)),
    "gemm, alpha": ("y = Gemm <alpha = 0.25, beta = 2.0, transB = 1> (x, w, c)", (3, 4)),
}


@pytest.mark.parametrize("text", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("canonical", [True, False])
@pytest.mark.parametrize("source", ["v", "r", "n"])
def test_products(text: tuple[str, tuple[int, int]], canonical: bool, source: str) -> None:
    """Of an input, of what others read too, and of a norm alone."""
    model = build(
        f"""g (float[6,4] v) => (float[6,3] y, float[6,4] z) {{
          n = LayerNormalization (v, g)
          r = Relu (v)
          z = Neg (r)
          {text[0].replace("(x", f"({source}")}
        }}""",
        tensor("g", 1, 30, 1, 2), weight("w", *text[1]), weight("c", 3),
    )  # fmt: skip
    given_ = feed(model)
    given_["v"][:, 2] *= 40
    expected = outputs(model, given_)
    passes = by_channel()[0 if canonical else 1 :]
    context = Context(ONNX, [given_])
    given_stages = frozenset() if canonical else by_channel()[0].provides
    PassManager([*passes, Smooth()], verify=True, given=given_stages).run(model, context)
    (remark,) = (r for r in context.remarks if r.pass_name == "smooth")
    assert remark.kind == "applied"
    assert "Mul" in ops(model) or source == "n"
    for a, b in zip(expected, outputs(model, given_), strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("shape", ["6,4", "1,6,4", "N,4", "2,T,4", "2,3,N,4", "N,K"])
def test_data_of_any_rank(shape: str) -> None:
    model = build(f"g (float[{shape}] x) => (y) {{ y = MatMul (x, w) }}", weight("w", 4, 3))
    sizes = {"N": 5, "T": 5, "K": 4}
    dims = [sizes.get(d) or int(d) for d in shape.split(",")]
    x = np.random.default_rng(0).standard_normal(dims).astype(np.float32)
    x[..., 1] *= 50
    (remark,) = smoothed(model, feeds=[{"x": x}])
    assert remark.kind == "applied"
    assert ops(model) == ["Mul", "MatMul"]


# --- readers that are not quantized, weights that others have -------------------------------------

FLOAT_READER = """
g (float[1,6,4] v) => (float[1,6,3] y, float[1,6,3] z) {
  x = LayerNormalization (v, g)
  y = MatMul (x, w)
  z = MatMul (x, u)
}"""


def test_a_float_reader_makes_up_for_the_factors() -> None:
    big = ir.Tensor(weight("u", 4, 3).numpy() * 1e6, name="u")
    model = build(FLOAT_READER, tensor("g", 1, 30, 1, 2), weight("w", 4, 3), big)
    alone = build(FLOAT_READER, tensor("g", 1, 30, 1, 2), weight("w", 4, 3), weight("u", 4, 3))
    smoothed(model, rules=(FLOAT,))
    smoothed(alone, rules=(FLOAT,))
    assert list(specs(model)) == ["y"]
    # Its own weights, however large, have no say in the factors.
    np.testing.assert_array_equal(weights(model, "g_scaled"), weights(alone, "g_scaled"))
    assert "u_scaled" in model.graph.initializers


def test_a_float_reader_is_left_alone_by_a_mul() -> None:
    text = FLOAT_READER.replace("v)", "x)").replace("x = LayerNormalization (v, g)", "")
    model = build(text.replace("1,6,4] v", "1,6,4] x"), weight("w", 4, 3), weight("u", 4, 3))
    given_ = feed(model)
    given_["x"][..., 2] *= 50
    smoothed(model, feeds=[given_], rules=(FLOAT,))
    assert node(model, "z").inputs[0] is model.graph.inputs[0]
    assert "u" in model.graph.initializers
    assert ops(model) == ["Mul", "MatMul", "MatMul"]


def test_a_float_reader_with_infinities() -> None:
    wild = weight("u", 4, 3).numpy().copy()
    wild[1, 1] = np.inf
    model = build(
        FLOAT_READER, tensor("g", 1, 30, 1, 2), weight("w", 4, 3), ir.Tensor(wild, name="u")
    )
    smoothed(model)
    assert np.isfinite(weights(model, "g_scaled")).all()
    assert list(specs(model)) == ["y"]


def test_readers_in_branches_are_left_alone() -> None:
    text = """
    g (bool flag, float[6,4] v) => (float[6,3] y, float[6,3] z) {
      x = LayerNormalization (v, g)
      y = MatMul (x, w)
      z = If (flag) <
        then_branch = a () => (float[6,3] z1) { z1 = MatMul (x, u) },
        else_branch = b () => (float[6,3] z2) { k = MatMul (x, w) z2 = Neg (k) }
      >
    }"""
    model = build(text, tensor("g", 1, 60, 1, 2), weight("w", 4, 3), weight("u", 4, 3))
    feeds = [feed(model) | {"flag": np.array(flag)} for flag in (True, False)]
    remarks = smoothed(model, feeds=feeds)
    assert [(r.site, r.kind) for r in remarks] == [("y", "declined")]
    assert "serves other data" in remarks[0].message  # the weight of a branch


def test_a_weight_that_serves_other_data_is_not_stored_twice() -> None:
    text = """
    g (float[6,4] v) => (float[6,4] y) {
      a = LayerNormalization (v, g)
      b = MatMul (a, w)
      c = Tanh (b)
      y = MatMul (c, w)
    }"""
    model = build(text, tensor("g", 1, 60, 1, 2), weight("w", 4, 4))
    remarks = smoothed(model)
    assert {r.kind for r in remarks} == {"declined"}
    assert all("would have to be stored once for each" in r.message for r in remarks)
    assert "w" in model.graph.initializers


def test_a_weight_tied_to_a_table() -> None:
    text = """
    g (int64[1,5] ids) => (float[1,5,3000] y) {
      e = Gather (t, ids)
      x = LayerNormalization (e, g)
      y = MatMul (x, w)
    }"""
    table = weight("t", 3000, 8, spread=10)
    tied = ir.Tensor(np.ascontiguousarray(table.numpy().T), name="w")
    model = build(text, table, tied, weight("g", 8))
    feeds = [{"ids": np.arange(5)[None] * 7}]
    (remark,) = smoothed(model, feeds=feeds)
    assert remark.kind == "applied"
    context = apply(model, COMMIT[:0] + (qgraph.passes.balance_tables.BalanceTables(),), feeds)
    assert "reads the weight of 'y'" in context.remarks[0].message


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_is_declined(kind: str) -> None:
    dtype = ir.DataType[kind.upper()]
    half = ir.Tensor(weight("w", 4, 3).numpy().astype(dtype.numpy()), dtype=dtype, name="w")
    model = build(f"g ({kind}[6,4] x) => ({kind}[6,3] y) {{ y = MatMul (x, w) }}", half)
    context = Context(ONNX, [{"x": np.ones((6, 4), dtype.numpy())}])
    if kind == "bfloat16":  # which onnxruntime cannot multiply on this CPU
        PassManager(by_channel()[:3]).run(model, context)
        (x,) = product_groups(model)
        x.meta[STATS] = Stats(1, 0, 1, channel_low=np.zeros(4), channel_high=np.ones(4))
        Smooth().run(model, context)
    else:
        PassManager([*by_channel(), Smooth()], verify=True).run(model, context)
    assert context.remarks[-1].message == "not smoothed: its weight is not float32"


# --- awkward data ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0, "search"])
@pytest.mark.parametrize("zeros", ["a channel", "all data", "a row", "all weights"])
def test_zeros(zeros: str, alpha: float) -> None:
    w = weight("w", 4, 3).numpy().copy()
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    {"a channel": x[:, 1:2], "all data": x, "a row": w[1:2], "all weights": w}[zeros][:] = 0
    text = "g (float[6,4] x) => (float[6,3] y) { m = Mul (x, g) y = MatMul (m, w) }"
    model = build(text, tensor("g", 1, 50, 1, 2), ir.Tensor(w, name="w"))
    smoothed(model, Smooth(alpha), [{"x": x}])
    for value in model.graph.initializers.values():
        assert np.isfinite(weights(model, str(value.name))).all()


def test_not_a_number_is_refused_by_calibration() -> None:
    model = build("g (float[6,4] x) => (float[6,3] y) { y = MatMul (x, w) }", weight("w", 4, 3))
    x = np.full((6, 4), np.nan, np.float32)
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        PassManager([*by_channel(), Smooth()]).run(model, Context(ONNX, [{"x": x}]))


def test_what_was_not_calibrated_by_channel_is_declined() -> None:
    model = build("g (float[6,4] x) => (float[6,3] y) { y = MatMul (x, w) }", weight("w", 4, 3))
    passes = list(by_channel())
    passes[2] = type(passes[2])()
    context = Context(ONNX, [feed(model)])
    PassManager([*passes, Smooth()], given=frozenset()).run(model, context)
    assert context.remarks[-1].message == (
        "not smoothed: its channels were not calibrated: "
        "set channel_ranges=true in insert-observers"
    )


def test_no_products() -> None:
    model = build("g (float[6,4] x) => (float[6,4] y) { y = Neg (x) }")
    assert smoothed(model) == []
    assert smoothed(model, Smooth("search")) == []


def test_alpha_0_does_nothing() -> None:
    model = transformer_block(outlier=50)
    before = body(model, weights=True)
    assert smoothed(model, Smooth(0)) == []
    assert "scaled" not in body(model, weights=True)
    assert len(before) > 0


# --- statistics -----------------------------------------------------------------------------------


def test_statistics_follow() -> None:
    text = """
    g (float[6,4] v) => (float[6,3] y) {
      x = LayerNormalization (v, g)
      y = MatMul (x, w)
    }"""
    model = build(text, tensor("g", 1, 30, 1, 2), weight("w", 4, 3))
    feeds = [feed(model, seed) for seed in range(3)]
    apply(model, by_channel(), feeds)
    (x,) = product_groups(model)
    old: Stats = x.meta[STATS]
    apply(model, [Smooth(0.8)], feeds)
    new: Stats = x.meta[STATS]
    factors = np.array([1, 30, 1, 2]) / weights(model, "g_scaled")
    assert old.channel_low is not None
    np.testing.assert_allclose(new.channel_low, old.channel_low / factors, rtol=1e-5)
    again = build(text, tensor("g", *weights(model, "g_scaled")), weight("w", 4, 3))
    apply(again, by_channel(), feeds)
    (fresh,) = product_groups(again)
    np.testing.assert_allclose(fresh.meta[STATS].channel_high, new.channel_high, rtol=1e-5)
    assert (fresh.meta[STATS].low, fresh.meta[STATS].high) == pytest.approx((new.low, new.high))


def test_what_is_known_of_values_on_the_way_is_forgotten() -> None:
    text = """
    g (float[6,4] v) => (float[6,3] y) {
      n = LayerNormalization (v, g)
      x = Relu (n)
      y = MatMul (x, w)
    }"""
    model = build(text, tensor("g", 1, 30, 1, 2), weight("w", 4, 3))
    feeds = [feed(model)]
    apply(model, by_channel(), feeds)
    between = node(model, "n").outputs[0]
    between.meta[STATS] = Stats(1, -1, 1)
    between.meta[SPEC] = PER_RUN
    apply(model, [Smooth()], feeds)
    assert STATS not in between.meta
    assert between.meta[SPEC] is PER_RUN


def test_a_split_afterwards_sees_smoothed_data() -> None:
    """Alpha 1 takes all magnitude away: every channel reaches 1."""
    plain, model = transformer_block(outlier=50), transformer_block(outlier=50)
    assert any(r.kind == "applied" for r in apply(plain, (*by_channel(), SPLIT)).remarks)
    remarks = apply(model, (*by_channel(), Smooth(1.0), SPLIT)).remarks
    splits = [r for r in remarks if r.pass_name == "split-outliers"]
    assert {r.kind for r in splits} == {"declined"}
    assert max(r.numbers["largest"] for r in splits) < 1.001


SPLIT = SplitOutliers(6.0, most=0.5)


def test_static_data_with_an_own_range() -> None:
    """A static site reads what calibration found, divided."""
    model = transformer_block(outlier=50)
    feeds = [feed(model, seed) for seed in range(4)]
    wanted = outputs(model, feeds[0])[0]
    smoothed(model, Smooth(), feeds, scheme="static")
    apply(model, COMMIT, feeds)
    assert sqnr_db(wanted, outputs(model, feeds[0])[0]) > 25


# --- what it is good for --------------------------------------------------------------------------


def planted(seed: int = 0) -> tuple[ir.Model, list[Feed]]:
    """A block with three large channels in a norm, as in language models."""
    model = transformer_block(width=32, seed=seed)
    norm = np.ones(32, np.float32)
    norm[[3, 8, 20]] = 60, 25, 40
    model.graph.initializers["g1"].const_value = ir.Tensor(norm, name="g1")
    model.graph.initializers["g2"].const_value = ir.Tensor(norm[::-1].copy(), name="g2")
    return model, [feed(model, seed) for seed in range(4)]


def quantized_db(*passes: Smooth | SplitOutliers, scheme: Scheme = "dynamic") -> float:
    """SQNR of the quantized block on data that calibration did not see."""
    model, feeds = planted()
    fresh = feed(model, 99)
    wanted = outputs(model, fresh)[0]
    apply(model, (*by_channel(scheme), *passes, *COMMIT), feeds)
    return sqnr_db(wanted, outputs(model, fresh)[0])


@pytest.mark.parametrize("alpha", [0.5, 0.7, "search"])
@pytest.mark.parametrize("scheme", ["dynamic", "static"])
def test_noise_falls(scheme: Scheme, alpha: float) -> None:
    assert quantized_db(Smooth(alpha), scheme=scheme) > quantized_db(scheme=scheme) + 6


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    random_graph(),
    st.sampled_from([0.1, 0.5, 0.75, 1.0]),
    st.integers(0, 99),
    st.floats(0, 8),
)
def test_any_graph_and_any_statistics(
    model: ir.Model, alpha: float, seed: int, decades: float
) -> None:
    given_ = feed(model)
    expected = outputs(model, given_)
    apply(model, by_channel(), [given_], verify=False)
    rng = np.random.default_rng(seed)
    for x in product_groups(model):
        stats: Stats = x.meta[STATS]
        if stats.channel_high is None:
            continue
        low, high = -(10 ** (decades * rng.uniform(-1, 1, (2, stats.channel_high.size))))
        x.meta[STATS] = Stats(1, low.min(), -high.min(), channel_low=low, channel_high=-high)
    apply(model, [Smooth(alpha)], [given_], verify=False)
    for a, b in zip(expected, outputs(model, given_), strict=True):
        assert relative_error(a, b) < 1e-5


# --- search ---------------------------------------------------------------------------------------


def searched(**annotation: object) -> dict[str, Remark]:
    model, feeds = planted()
    return {r.site: r for r in smoothed(model, Smooth("search"), feeds, 2e-5, **annotation)}


def test_the_search_tells_what_it_found() -> None:
    remarks = searched()
    applied = [r for r in remarks.values() if r.kind == "applied"]
    assert {"q", "k", "v", "gate", "up"} <= {r.site for r in applied}
    for remark in applied:
        assert remark.numbers["alpha"] in GRID
        assert remark.numbers["noise_ratio"] > 1
        assert 0 < remark.numbers["noise"] < 0.01
    assert {str(r) for r in searched().values()} == {str(r) for r in remarks.values()}


def test_the_search_takes_the_smallest_that_is_nearly_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[str, dict[float, float]] = {}
    original = smooth._measured_noise

    def listening(x: ir.Value, *rest: object) -> dict[float, float]:
        noise = original(x, *rest)  # type: ignore[arg-type]
        for use in x.uses():
            found[str(use.node.name)] = noise
        return noise

    monkeypatch.setattr(smooth, "_measured_noise", listening)
    for name, remark in searched().items():
        noise = found[name]
        alpha = remark.numbers["alpha"]
        limit = min(noise.values()) * 10**0.05
        assert noise[alpha] <= limit
        assert all(noise[a] > limit for a in noise if a < alpha)


def test_the_measured_noise_is_that_of_the_committed_product() -> None:
    text = "g (float[6,8] x) => (float[6,5] y) { m = Mul (x, g) y = MatMul (m, w) }"
    model = build(text, tensor("g", *np.geomspace(1, 40, 8)), weight("w", 8, 5))
    given_ = {"x": np.random.default_rng(1).standard_normal((6, 8)).astype(np.float32)}
    wanted = outputs(model, given_)[0]
    (remark,) = smoothed(model, Smooth("search"), [given_])
    apply(model, COMMIT, [given_])
    noise = np.square(outputs(model, given_)[0] - wanted, dtype=np.float64).sum(-1)
    signal = np.square(wanted, dtype=np.float64).sum(-1)
    measured = np.sqrt(noise.sum() / signal.sum() * (noise / signal).mean())
    assert remark.numbers["noise"] == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    "annotation",
    [
        {"scheme": "static"},
        {"rules": (Rule(("matmul",), WEIGHT, (PER_RUN,)),)},
        {"rules": (Rule(("matmul",), WEIGHT.with_(bits=4), (PER_TOKEN,)),)},
        {"rules": (Rule(("matmul",), WEIGHT.with_(symmetric=False), (PER_TOKEN,)),)},
    ],
    ids=["static", "per run", "4 bits", "asymmetric weights"],
)
def test_the_search_quantizes_as_the_site_will_be(annotation: dict[str, object]) -> None:
    remarks = searched(**annotation)
    assert remarks["q"].kind == "applied"
    assert remarks["q"].numbers["noise"] != searched()["q"].numbers["noise"]


def test_the_search_leaves_even_channels_alone() -> None:
    text = "g (float[64,8] x) => (float[64,8] y) { m = Mul (x, g) y = MatMul (m, w) }"
    signs = np.sign(np.random.default_rng(0).standard_normal((8, 8))).astype(np.float32)
    model = build(text, tensor("g", *[1.0] * 8), ir.Tensor(signs, name="w"))
    (remark,) = smoothed(model, Smooth("search"))
    assert remark.kind == "declined"
    assert "no alpha lowers the noise" in remark.message
    assert remark.numbers["alpha"] == 0


def test_wide_products_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = searched()
    monkeypatch.setattr(smooth, "COLUMNS", 8)
    sample = searched()
    assert sample["q"].numbers["noise"] == pytest.approx(whole["q"].numbers["noise"], rel=0.5)
    assert sample["q"].numbers["noise"] != whole["q"].numbers["noise"]


def test_the_search_needs_data_that_can_be_read_again() -> None:
    model, feeds = planted()
    context = Context(ONNX, open_calibration(iter(feeds), model))
    with pytest.raises(CalibrationError, match="a generator that one pass has used up"):
        PassManager([*by_channel(), Smooth("search")]).run(model, context)


def test_progress_is_shown() -> None:
    titles: list[tuple[str, int | None]] = []

    def display(items: Iterable[object], title: str, total: int | None = None) -> Iterable[object]:
        titles.append((title, total))
        return iter(items)

    for alpha in (0.5, "search"):
        model, feeds = planted()
        context = Context(ONNX, feeds, progress=display)  # type: ignore[arg-type]
        PassManager([*by_channel(), Smooth(alpha)]).run(model, context)  # type: ignore[arg-type]
    assert titles.count(("smoothing", 4)) == 2


# --- the mathematics ------------------------------------------------------------------------------

peaks = st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=9)


@given(peaks, peaks, st.floats(0.01, 1))
def test_factors_against_float64(x: list[float], w: list[float], alpha: float) -> None:
    size = min(len(x), len(w))
    activations, large = np.array(x[:size], np.float32), np.array(w[:size], np.float32)
    factors = smoothing_factors(activations, large, alpha)
    assert factors.dtype == np.float32
    assert np.isfinite(factors).all()
    assert (factors > 0).all()
    assert np.isfinite(1 / factors).all()
    if activations.any() and large.any():
        floor = 0.01 * np.median(activations[activations > 0])
        for j in np.flatnonzero((activations >= floor) & (large > 0)):
            exact = float(activations[j]) ** alpha / float(large[j]) ** (1 - alpha)
            assert factors[j] == pytest.approx(np.clip(exact, 2.0**-40, 2.0**40), rel=1e-6)
    else:
        assert (factors == 1).all()


def test_factors_of_the_paper() -> None:
    """Figure 5 of Xiao et al.: alpha = 0.5, X = (.., 16, ..), s = (1, 2, 1, 1.4)..."""
    factors = smoothing_factors(np.array([2, 16, 1, 9]), np.array([2, 1, 2, 1]), 0.5)
    np.testing.assert_allclose(factors, [1, 4, 0.70710678, 3], rtol=1e-6)


def test_silent_channels_are_not_amplified_without_bound() -> None:
    x = np.array([1.0, 1.0, 1.0, 0.0, 1e-9])
    factors = smoothing_factors(x, np.ones(5), 0.5)
    np.testing.assert_allclose(factors, [1, 1, 1, 0.1, 0.1], rtol=1e-6)


def test_channels_without_weights_are_silenced() -> None:
    factors = smoothing_factors(np.array([1.0, 1e4]), np.array([1.0, 0.0]), 0.5)
    assert factors[1] == 2.0**40


@given(peaks, st.integers(0, 9), st.floats(0.01, 1))
def test_expected_noise_against_float64(x: list[float], seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    w, s = rng.uniform(0.1, 1, (2, len(x)))
    found = expected_noise(np.array(x), w, s)
    exact = max(a / b for a, b in zip(x, s, strict=True)) ** 2 * sum((s * w) ** 2)
    assert found == pytest.approx(exact, rel=1e-9)


# --- alone, and by the command line ---------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with `model.onnx` and `data.npz`."""
    monkeypatch.chdir(tmp_path)
    model, feeds = planted()
    save(model, tmp_path / "model.onnx")
    np.savez("data.npz", x=np.concatenate([f["x"] for f in feeds]))
    return tmp_path


@pytest.mark.parametrize("pipeline", ["smooth{alpha=0.7}", "smooth{alpha=search,insert=false}"])
def test_alone_it_gives_a_float_model(
    here: Path, pipeline: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["opt", "model.onnx", "-p", pipeline, "-c", "data.npz", "-o", "out.onnx", "--verify"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "insert-observers{channel_ranges=true},calibrate,smooth{alpha=" in printed
    assert "canonicalize,annotate,insert-observers" in printed
    assert "smooth: applied " in printed
    assert "no site was quantized" in printed
    model = load(here / "out.onnx")
    assert not model.functions
    assert set(model.opset_imports) == {""}
    assert {v.dtype for v in model.graph.initializers.values()} <= {
        ir.DataType.FLOAT,
        ir.DataType.INT64,
    }
    given_ = feed(model, 5)
    wanted = outputs(load(here / "model.onnx"), given_)[0]
    assert relative_error(wanted, outputs(model, given_)[0]) < 1e-5


def test_it_goes_on_to_per_token_scales(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["opt", "model.onnx", "-p", "smooth,insert-qdq", "-c", "data.npz", "-o", "out.onnx"]
    assert main([*command, "-t", "onnx", "--verify"]) == 0
    assert "activations dynamic uint8 per-token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["-p", "smooth{alpha=1.5}"], "alpha=1.5 is out of range: use 0 to 1, or search"),
        (["-p", "smooth{alpha=-0.1}"], "alpha=-0.1 is out of range"),
        (["-p", "smooth{alpha=nan}"], "alpha=nan is out of range"),
        (["-p", "smooth{alpha=high}"], "'alpha' must be a number or one of search, not 'high'"),
        (["-p", "smooth{insert=maybe}"], "'insert' must be true or false"),
        (["-p", "smooth{beta=1}"], "has no parameter 'beta': it has alpha, insert"),
        (["-p", "smooth"], "needs calibration data: give some typical inputs"),
    ],
)
def test_mistakes_end_in_one_line(
    here: Path, arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["opt", "model.onnx", *arguments, "-o", "out.onnx"]) == 2
    printed = capsys.readouterr().err
    assert why in printed
    assert printed.count("\n") == 1
    assert not (here / "out.onnx").exists()


@pytest.mark.parametrize("alpha", [2, -1, float("nan"), "much", None, "0.5"])
def test_values_that_alpha_does_not_take(alpha: object) -> None:
    with pytest.raises(QGraphError, match=f"alpha={alpha} is out of range: use 0 to 1, or search"):
        Smooth(alpha)  # type: ignore[arg-type]


def test_it_needs_calibration() -> None:
    with pytest.raises(PipelineError, match="'smooth' needs a model that is annotated, calibrated"):
        PassManager([Smooth()])


# --- real models ----------------------------------------------------------------------------------


def minilm() -> tuple[ir.Model, list[Feed]]:
    model = load(zoo.minilm_onnx())
    rng = np.random.default_rng(0)
    ids = [rng.integers(1000, 20000, (2, 12)) for _ in range(2)]
    return model, [{"input_ids": i, "attention_mask": np.ones_like(i)} for i in ids]


def tiny_llama() -> tuple[ir.Model, list[Feed]]:
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    ids = torch.randint(0, 64, (2, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = transformers.LlamaForCausalLM(config).eval()
        model = trace(module, {"input_ids": ids}, {"input_ids": {0: "batch", 1: "sequence"}})
    return model, [{"input_ids": ids.numpy()}, {"input_ids": ids.flip(1).numpy()}]


@pytest.mark.slow
@pytest.mark.parametrize("make", [minilm, tiny_llama])
@pytest.mark.parametrize(
    "steps",
    [
        (Smooth(0.5),),
        (Smooth(0.8),),
        (Smooth("search"),),
        (SplitOutliers(),),
        (SplitOutliers(0.0, 0.1, 0.5),),
        (Smooth(0.6), SplitOutliers(0.0, 0.05)),
    ],
    ids=str,
)
def test_real_models_stay_what_they_are(
    make: Callable[[], tuple[ir.Model, list[Feed]]], steps: tuple[Smooth | SplitOutliers, ...]
) -> None:
    model, feeds = make()
    given_ = first_feed(model, feeds, 0)
    wanted = outputs(model, given_)
    context = Context(ONNX, feeds)
    PassManager(complete([*FLOAT_STAGE, *steps], calibrated=True), verify=True).run(model, context)
    for a, b in zip(wanted, outputs(model, given_), strict=True):
        assert relative_error(a, b) < 2e-5
    done = {r.pass_name for r in context.remarks if r.kind == "applied"}
    assert done >= {"smooth"} or not isinstance(steps[0], Smooth)
    assert not any(IN in n.meta and len(n.meta[IN]) == 0 for n in model.graph)
