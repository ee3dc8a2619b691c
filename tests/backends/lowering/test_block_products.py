"""Activations and weights in blocks: their numerics, how they are written, the kernel they get."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qgraph.backends import cpu
from qgraph.backends.lowering.block_products import lower_block_products
from qgraph.backends.lowering.match import INT8_BLOCKS
from qgraph.errors import QGraphError
from qgraph.graph.editing import shared_constant
from qgraph.graph.functions import ROUND_IN_BLOCKS, declare
from qgraph.io.models import load, save
from qgraph.io.session import open_session, run
from qgraph.numerics.blocks import blockwise, group_qmin, quantize_groups
from qgraph.numerics.noise import sqnr_db
from qgraph.numerics.reference import SMALLEST_SCALE
from qgraph.numerics.spec import PER_TOKEN, WEIGHT, Granularity, PerAxis, PerBlock, QuantSpec
from qgraph.numerics.tokens import round_in_blocks, rounded_data
from qgraph.passes.annotate import Annotate, Rule
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.convert_opset import ConvertOpset
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.passes.lower import Lower
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Pass
from qgraph.recipes import get_recipe
from qgraph.recipes.transformers import w8a8
from qgraph.recipes.weight_only import rtn
from qgraph.weights.formats import rounded_weight
from tests.models import build, feed, if_model, mlp, ops, outputs, weight
from tests.pipelines import (
    COMMIT,
    CPU,
    ONNX,
    Shipped,
    apply,
    body,
    both,
    golden,
    initializer,
    specs,
)

VNNI = Shipped("cpu:avx512-vnni", "avx512-vnni")
SHIPPED = cpu.SHIPPED["blocks-8"]


def assert_close(found: np.ndarray, committed: np.ndarray) -> None:
    """The kernel and the function it stands for: both add the same products in float32."""
    np.testing.assert_allclose(found, committed, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", autouse=True)
def _fast() -> Iterator[None]:
    """A machine on which blocks are fast for prompts too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cpu.SHIPPED, "blocks-8", {1: 2.9, 128: 1.5})
        yield


def data_in(size: int) -> QuantSpec:
    return QuantSpec(ir.DataType.INT8, PerBlock(-1, size), observer="dynamic")


def in_blocks(size: int = 16, weights: QuantSpec = WEIGHT) -> tuple[Pass, ...]:
    """The passes up to annotation."""
    own = weights.with_(granularity=PerBlock(0, size))
    rule = Rule(("matmul", "gemm"), own, (data_in(size), PER_TOKEN))
    return Canonicalize(), Annotate("dynamic", rules=(rule,))


def product(k: int = 32, n: int = 6, *, lead: str = "batch") -> ir.Model:
    """x (lead, k) times a weight."""
    text = f"g (float[{lead},{k}] x) => (float[{lead},{n}] y) {{ y = MatMul (x, w) }}"
    return build(text, weight("w", k, n, spread=3.0))


def remarks(context: Context) -> list[str]:
    return [str(r) for r in context.remarks if r.kind == "declined"]


# --- the mathematics ------------------------------------------------------------------------------


def rounding(size: int, shape: str, version: int = 21) -> ir.Model:
    model = build(f"g (float[{shape}] x) => (float[{shape}] y) {{ y = Identity (x) }}")
    model.graph.opset_imports[""] = version
    declare(model, ROUND_IN_BLOCKS)
    call = model.graph[0]
    call.domain, call.op_type = "qgraph", ROUND_IN_BLOCKS
    call.resize_inputs(4)
    for index, (name, array) in enumerate(
        {
            "block": np.array([-1, size], np.int64),
            "step": np.array(1 / 127, np.float32),
            "floor": np.array(SMALLEST_SCALE),
        }.items(),
        1,
    ):
        call.replace_input_with(index, shared_constant(model, name, np.asarray(array)))
    return model


def test_a_worked_example() -> None:
    x = np.array([[127, 63.4, -2.5, 0, 0.127, -0.0634, 0, 0]], np.float32)
    wanted = [[127, 63, -2, 0, 0.127, -0.063, 0, 0]]  # -2.5 rounds to even
    np.testing.assert_allclose(round_in_blocks(x, 4), wanted, rtol=1e-6)


@pytest.mark.parametrize("version", [13, 17, 18, 21])
@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("shape", [(40, 32), (3, 5, 32)], ids=["rank 2", "rank 3"])
def test_the_body_is_the_reference(shape: tuple[int, ...], optimized: bool, version: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape) * rng.choice([1e-3, 1, 50], (*shape[:-1], 1))
    x[0] = 0
    model = rounding(16, ",".join("NMK"[: len(shape)]), version)
    given_ = {"x": x.astype(np.float32)}
    (y,) = run(open_session(model, optimized=optimized), given_)
    np.testing.assert_array_equal(y, round_in_blocks(given_["x"], 16))
    assert not y[0].any()


@settings(deadline=None, max_examples=50)
@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(1, 4), st.just(12)),
        elements=st.floats(-(2.0**60), 2.0**60, width=32),
    ),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
)  # fmt: skip
def test_nothing_moves_by_more_than_half_a_step(x: np.ndarray, size: int) -> None:
    y = round_in_blocks(x, size)
    assert y.shape == x.shape
    assert y.dtype == np.float32
    largest = np.repeat(np.abs(x.reshape(-1, size)).max(axis=1), size).reshape(x.shape)
    step = np.maximum(largest, SMALLEST_SCALE).astype(np.float64) / 127
    assert (np.abs(y - x.astype(np.float64)) <= step * 0.501).all()
    np.testing.assert_allclose(np.abs(y[largest == np.abs(x)]), largest[largest == np.abs(x)],
                               rtol=1e-6, atol=float(SMALLEST_SCALE))  # fmt: skip


def test_simulation_is_the_reference() -> None:
    x = feed(product())["x"]
    np.testing.assert_array_equal(rounded_data(x, data_in(16)), round_in_blocks(x, 16))
    model, w = product(), weight("w", 32, 6, spread=3.0).numpy()
    spec = WEIGHT.with_(granularity=PerBlock(0, 16))
    apply(model, (*in_blocks(), InsertQDQ()), target=VNNI)
    committed = round_in_blocks(x, 16) @ rounded_weight(w, spec)
    assert_close(outputs(model, {"x": x})[0], committed)


def test_the_spec_is_its_text() -> None:
    text = "int8 per-block(-1, 128) sym dynamic"
    assert str(data_in(128)) == text
    assert QuantSpec.parse(text) == data_in(128)


# --- before and after -----------------------------------------------------------------------------


def test_before_and_after() -> None:
    model = product()
    context = apply(model, in_blocks(), target=VNNI)
    assert specs(model)["y"] == {
        0: "int8 per-block(-1, 16) sym dynamic", 1: "int8 per-block(0, 16) sym absmax"
    }  # fmt: skip
    assert not remarks(context)
    assert context.remarks.verdicts()["y"].message == (
        "weights int8 in blocks of 16, activations dynamic int8 in blocks of 16"
    )
    apply(model, [InsertQDQ()], target=VNNI)
    assert body(model) == golden("""
        %w_dq: f32[32, 6] = DequantizeLinear(%w_q, %w_scale) {axis = 0, block_size = 16}
        %x_rounded: f32[batch, 32] = qgraph::RoundInBlocks(%x, %qgraph/block_16, %qgraph/token_step_128, %qgraph/token_floor_128)
        %y: f32[batch, 6] = MatMul(%x_rounded, %w_dq)
    """)  # noqa: E501
    q = initializer(model, "w_q").astype(np.int16)
    apply(model, [Lower()], target=VNNI)
    assert body(model) == golden("""
        %y: f32[batch, 6] = com.microsoft::MatMulNBits(%x, %w_q_packed, %w_q_scales) {K = 32, N = 6, accuracy_level = 4, bits = 8, block_size = 16}
    """)  # noqa: E501
    assert initializer(model, "w_q_packed").dtype == np.uint8
    np.testing.assert_array_equal(
        initializer(model, "w_q_packed").astype(np.int16) - 128, q.T.reshape(6, 2, 16)
    )
    assert sorted(model.graph.initializers) == ["w_q_packed", "w_q_scales"]
    assert not model.functions
    assert not lower_block_products(model)


# --- the kernel agrees with the function ----------------------------------------------------------


def lowered_and_committed(
    model: ir.Model, given_: dict[str, np.ndarray], *before: Pass
) -> tuple[np.ndarray, np.ndarray]:
    """The kernel's result, at both optimization levels the same, and what it stands for."""
    apply(model, (*before, InsertQDQ()), [given_], VNNI)
    committed = outputs(model, given_)[0]
    apply(model, [Lower()], [given_], VNNI)
    plain, optimized = (
        run(open_session(model, optimized=level, threads=1), given_)[0] for level in (False, True)
    )
    # Optimized, the kernel adds a bias itself.
    np.testing.assert_allclose(
        plain, optimized, rtol=1e-5, atol=1e-6 * np.abs(plain).max(initial=0)
    )
    return plain, committed


@pytest.mark.parametrize("size", INT8_BLOCKS[8])
@pytest.mark.parametrize("lead", ["1", "70", "2,5", "batch,time"])
def test_the_kernel_computes_what_is_committed(size: int, lead: str) -> None:
    model = product(512, 24, lead=lead)
    given_ = feed(model)
    wanted = outputs(model, given_)[0]
    found, committed = lowered_and_committed(model, given_, *in_blocks(size))
    assert ops(model) == ["MatMulNBits"]
    assert_close(found, committed)
    assert sqnr_db(wanted, found) > 33


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", ["", "b", "c", "z"], ids=["none", "row", "scalar", "computed"])
@pytest.mark.parametrize("factors", ["", "alpha = 2.0, beta = 0.5,"])
def test_gemm(trans_b: int, bias: str, factors: str) -> None:
    shape = (6, 32) if trans_b else (32, 6)
    text = f"""
    g (float[batch,32] x, float[6] z) => (float[batch,6] y, float[6] t) {{
      t = Neg (z)
      y = Gemm <{factors} transB = {trans_b}> (x, w{"," if bias else ""} {bias})
    }}"""
    constants = {"b": weight("b", 6), "c": ir.Tensor(np.ones(1, np.float32), name="c")}
    model = build(text, weight("w", *shape), *([constants[bias]] if bias in constants else []))
    given_ = feed(model)
    wanted = outputs(model, given_)[0]
    found, committed = lowered_and_committed(model, given_, *in_blocks())
    assert "MatMulNBits" in ops(model)
    assert ("Add" in ops(model)) is bool(bias)
    assert_close(found, committed)
    assert sqnr_db(wanted, found) > 33


def test_alpha_of_half_precision() -> None:
    """Canonicalize leaves it: the weight might overflow."""
    text = """
    g (float16[batch,32] x) => (float16[batch,6] y) {
      y = Gemm <alpha = 2.0, beta = 0.5> (x, w, b)
    }"""
    half = [
        ir.Tensor(weight(name, *shape).numpy().astype(np.float16), name=name)
        for name, shape in {"w": (32, 6), "b": (6,)}.items()
    ]
    model = build(text, *half)
    given_ = feed(model)
    wanted = outputs(model, given_)[0]
    found, committed = lowered_and_committed(model, given_, *in_blocks())
    assert "MatMulNBits" in ops(model)
    np.testing.assert_allclose(found, committed, rtol=2e-3, atol=2e-3)
    assert sqnr_db(wanted.astype(np.float32), found.astype(np.float32)) > 33


def test_products_that_share_data_and_weights() -> None:
    text = """
    g (float[batch,32] x) => (a, b, c) {
      a = MatMul (x, w)
      b = MatMul (x, v)
      h = Neg (x)
      c = MatMul (h, w)
    }"""
    model = build(text, weight("w", 32, 6), weight("v", 32, 4))
    given_ = feed(model)
    wanted = outputs(model, given_)
    apply(model, (*in_blocks(), InsertQDQ()), [given_], VNNI)
    assert ops(model).count("RoundInBlocks") == 2
    apply(model, [Lower()], [given_], VNNI)
    assert sorted(ops(model)) == ["MatMulNBits"] * 3 + ["Neg"]
    for a, b in zip(wanted, both(model, given_), strict=True):
        assert sqnr_db(a, b) > 33
    packed = [name for name in model.graph.initializers if name.endswith("_packed")]
    assert len(packed) == 2  # one weight is stored once


def test_data_that_others_read_too() -> None:
    text = """
    g (float[batch,32] x) => (y, z) {
      y = MatMul (x, w)
      z = Relu (x)
    }"""
    model = build(text, weight("w", 32, 6))
    given_ = feed(model)
    wanted = outputs(model, given_)
    apply(model, (*in_blocks(), *COMMIT), [given_], VNNI)
    found = both(model, given_)
    np.testing.assert_array_equal(found[1], wanted[1])
    assert sqnr_db(wanted[0], found[0]) > 33


def test_products_in_branches() -> None:
    text = """
    choice (bool flag, float[batch,32] x) => (float[batch,4] y) {
      y = If (flag) <
        then_branch = yes () => (float[batch,4] y1) { y1 = MatMul (x, wa) },
        else_branch = no () => (float[batch,4] y2) { y2 = Gemm <transB = 1> (x, wb) }
      >
    }"""
    model = build(text, weight("wa", 32, 4), weight("wb", 4, 32))
    feeds = [feed(model) | {"flag": np.array(flag)} for flag in (True, False)]
    wanted = [outputs(model, given_)[0] for given_ in feeds]
    apply(model, (*in_blocks(), *COMMIT), feeds, VNNI)
    assert [n.op_type for n in model.graph.all_nodes()].count("MatMulNBits") == 2
    for given_, reference in zip(feeds, wanted, strict=True):
        assert sqnr_db(reference, both(model, given_)[0]) > 33


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_zeros_one_token_and_none(tokens: int) -> None:
    model = product()
    given_ = {"x": np.zeros((tokens, 32), np.float32)}
    found, committed = lowered_and_committed(model, given_, *in_blocks())
    assert found.shape == committed.shape == (tokens, 6)
    assert not found.any()
    assert not committed.any()


def test_a_token_of_zeros_and_a_block_of_zeros_among_others() -> None:
    model = product()
    x = feed(model)["x"]
    x[0], x[1, :16] = 0, 0
    found, committed = lowered_and_committed(model, {"x": x}, *in_blocks())
    assert_close(found, committed)
    assert not found[0].any()


def test_a_wild_channel_spoils_its_own_block_alone() -> None:
    model, plain = product(512, 24), product(512, 24)
    given_ = feed(model)
    given_["x"][:, 7] *= 1000
    wanted = outputs(model, given_)[0]
    w = weight("w", 512, 24, spread=3.0).numpy()
    rest = wanted - given_["x"][:, 7:8] * w[7:8]
    apply(model, (*in_blocks(128), *COMMIT), [given_], VNNI)
    apply(plain, (Canonicalize(), Annotate("dynamic"), *COMMIT), [given_], VNNI)
    noise = [np.square(both(m, given_)[0] - wanted).mean() for m in (model, plain)]
    assert noise[0] < 0.5 * noise[1]
    assert np.isfinite(rest).all()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5), st.sampled_from(INT8_BLOCKS[8]), st.integers(1, 40), st.integers(1, 9),
    st.booleans(), st.integers(0, 2**16), st.floats(1e-3, 1e3),
)  # fmt: skip
def test_any_product(
    blocks: int, size: int, n: int, m: int, trans_b: bool, seed: int, spread: float
) -> None:
    k = blocks * size
    op = "Gemm <transB = 1> (x, w, b)" if trans_b else "MatMul (x, w)"
    w = weight("w", k, n, seed=seed, spread=spread).numpy()
    held = ir.Tensor(np.ascontiguousarray(w.T) if trans_b else w, name="w")
    text = f"g (float[{m},{k}] x) => (float[{m},{n}] y) {{ y = {op} }}"
    model = build(text, held, *([weight("b", n, seed=seed)] if trans_b else []))
    found, committed = lowered_and_committed(model, feed(model, seed), *in_blocks(size))
    assert "MatMulNBits" in ops(model)
    atol = 1e-5 * max(float(np.abs(committed).max()), 1.0)
    np.testing.assert_allclose(found, committed, rtol=1e-4, atol=atol)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = product()
    given_ = feed(model)
    apply(model, (*in_blocks(), *COMMIT), [given_], VNNI)
    found = both(model, given_)[0]
    save(model, tmp_path / "model.onnx")
    np.testing.assert_array_equal(both(load(tmp_path / "model.onnx"), given_)[0], found)


# --- where the target has no such kernel ----------------------------------------------------------

TOKEN_WISE = {0: "uint8 per-token sym dynamic", 1: "int8 per-axis(1) sym absmax"}
DECLINED = "[annotate] declined MatMul y: weights are not int8 in blocks of "


@pytest.mark.parametrize(
    ("k", "size", "why"),
    [
        (32, 8, "blocks of 8 have no kernel: only those of 16, 32, 64, 128, 256"),
        (48, 48, "blocks of 48 have no kernel: only those of 16, 32, 64, 128, 256"),
        (512, 512, "blocks of 512 have no kernel: only those of 16, 32, 64, 128, 256"),
    ],
)
def test_blocks_that_do_not_fit(k: int, size: int, why: str) -> None:
    model = product(k)
    given_ = feed(model)
    wanted = outputs(model, given_)[0]
    context = apply(model, in_blocks(size), target=VNNI)
    assert specs(model)["y"] == TOKEN_WISE
    assert remarks(context) == [f"{DECLINED}{size}: {why}"]
    apply(model, COMMIT, [given_], VNNI)
    assert "MatMulIntegerToFloat" in ops(model)
    assert sqnr_db(wanted, both(model, given_)[0]) > 33


def test_blocks_that_are_slow_for_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu.SHIPPED, "blocks-8", SHIPPED)
    model = product()
    context = apply(model, in_blocks(), target=CPU)
    assert specs(model)["y"] == TOKEN_WISE
    (said,) = remarks(context)
    assert said == f"{DECLINED}16: int8 blocks of 16 are 0.65x float on avx2 (shipped figures)"


def test_every_number_of_rows_that_counts_must_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu.SHIPPED, "blocks-8", SHIPPED)
    for rows, taken in (("decode", True), ("prompt", False), ("both", False)):
        model = product()
        context = Context(replace(VNNI, optimize_for=rows))  # type: ignore[arg-type]
        for step in in_blocks():
            step.run(model, context)
        assert ("per-block" in specs(model)["y"][0]) is taken
        numbers = context.remarks.verdicts()["y"].numbers
        assert numbers["speedup"] == (SHIPPED[1] if taken else numbers["speedup"])
    monkeypatch.setitem(cpu.SHIPPED, "blocks-8", {1: 2.0, 128: 8.0})
    model = product()
    context = apply(model, in_blocks(), target=VNNI)
    assert context.remarks.verdicts()["y"].numbers["speedup"] == pytest.approx(4)


def test_standard_onnx_has_no_such_product() -> None:
    model = product()
    context = apply(model, in_blocks(), target=ONNX)
    assert specs(model)["y"][0] == TOKEN_WISE[0]
    apply(model, COMMIT, target=ONNX)
    assert {n.domain for n in model.graph} == {""}
    assert context.remarks.verdicts()["y"].kind == "quantized"


def test_an_old_opset_knows_no_blocks() -> None:
    model = product()
    model.opset_imports[""] = 17
    context = apply(model, in_blocks(), target=VNNI, verify=False)
    assert specs(model)["y"] == TOKEN_WISE
    assert "opset 17 knows no blocks" in remarks(context)[0]
    apply(model, (ConvertOpset(21), *in_blocks()), target=VNNI)
    assert "per-block" in specs(model)["y"][0]


# --- the recipe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [17, 21])
def test_w8a8_puts_the_end_of_an_mlp_in_blocks(version: int) -> None:
    model = mlp((32, 64, 16))
    model.opset_imports[""] = version
    feeds = [feed(model, seed) for seed in range(2)]
    wanted = outputs(model, feeds[0])[0]
    apply(model, w8a8(group_size=16, share=0.0).passes, feeds, VNNI)
    kinds = [op for op in ops(model) if op.startswith("MatMul")]
    assert kinds == ["MatMulIntegerToFloat", "MatMulNBits"]
    assert sqnr_db(wanted, both(model, feeds[0])[0]) > 30


def test_w8a8_without_groups() -> None:
    model = mlp((32, 64, 16))
    apply(model, w8a8(group_size=0, share=0.0).passes, target=VNNI)
    assert [op for op in ops(model) if op.startswith("MatMul")] == ["MatMulIntegerToFloat"] * 2


def test_w8a8_of_a_model_with_branches() -> None:
    model = if_model()
    apply(model, w8a8().passes, [feed(model)], VNNI)
    both(model, feed(model))


# --- weights of few bits --------------------------------------------------------------------------

INT4, UINT4 = ir.DataType.INT4, ir.DataType.UINT4


def rounded_to(spec: QuantSpec) -> tuple[Pass, ...]:
    rule = Rule(("matmul", "gemm"), spec, (data_in(16),))
    return Canonicalize(), Annotate("dynamic", rules=(rule,))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [INT4, UINT4], ids=str)
@pytest.mark.parametrize("granularity", [PerBlock(0, 16), PerAxis(0)], ids=str)
@pytest.mark.parametrize("k", [32, 40])
def test_few_bits(dtype: ir.DataType, bits: int, granularity: Granularity, k: int) -> None:
    model = product(k)
    given_ = feed(model)
    spec = QuantSpec(dtype, granularity, dtype == INT4, "absmax", 0 if bits == 4 else bits)
    apply(model, (*rounded_to(spec), InsertQDQ()), target=VNNI)
    committed = outputs(model, given_)[0]
    apply(model, [Lower()], target=VNNI)
    (node,) = model.graph
    assert node.op_type == "MatMulNBits"
    assert node.attributes["bits"].as_int() == 4  # of 2 bits, blocks of 16 have no kernel
    assert_close(both(model, given_)[0], committed)


def test_two_bits_where_there_is_a_kernel() -> None:
    model = product(64)
    given_ = feed(model)
    spec = QuantSpec(INT4, PerBlock(0, 32), bits=2, observer="absmax")
    rule = Rule(("matmul", "gemm"), spec, (data_in(32),))
    steps = Canonicalize(), Annotate("dynamic", rules=(rule,)), InsertQDQ()
    apply(model, steps, target=VNNI)
    committed = outputs(model, given_)[0]
    apply(model, [Lower()], target=VNNI)
    assert model.graph[0].attributes["bits"].as_int() == 2
    assert initializer(model, "w_q_packed").shape == (6, 2, 8)
    assert_close(both(model, given_)[0], committed)


@given(st.data())
def test_blocks_with_scales_of_their_own(drawn: st.DataObject) -> None:
    """No weight is farther from its integer than a step; clipping only makes squares smaller."""
    k, n, size = (drawn.draw(st.integers(1, most)) for most in (40, 4, 16))
    bits, symmetric = drawn.draw(st.integers(2, 8)), drawn.draw(st.booleans())
    w = weight("w", k, n, seed=drawn.draw(st.integers(0, 99))).numpy()
    dtype = ir.DataType.INT8 if symmetric else ir.DataType.UINT8
    spec = QuantSpec(dtype, PerBlock(0, size), symmetric, "absmax", bits)
    errors = []
    for observer in ("absmax", "mse"):
        q, scale, zero = quantize_groups(w, size, spec.with_(observer=observer))
        assert group_qmin(spec) <= q.min()
        assert q.max() <= spec.qmax
        wide = blockwise(scale, size, k)
        errors.append((q - blockwise(zero, size, k)) * wide - w)
        assert observer == "mse" or (np.abs(errors[0]) <= np.abs(wide) * 1.001).all()
    assert np.square(errors[1]).sum() <= np.square(errors[0]).sum() * (1 + 1e-6)


def test_the_largest_weight_of_a_symmetric_block_is_exact() -> None:
    w = np.array([[1.0], [8.0], [-7.0], [2.0], [-4.0], [1.0]], np.float32)
    spec = QuantSpec(INT4, PerBlock(0, 3))
    q, scale, _ = quantize_groups(w, 3, spec)
    np.testing.assert_array_equal(q[:, 0], [-1, -8, 7, 4, -8, 2])
    np.testing.assert_array_equal(scale, [[-1], [0.5]])


@pytest.mark.parametrize("symmetric", [True, False])
def test_rtn_from_end_to_end(symmetric: bool) -> None:
    model = mlp((32, 64, 16))
    wanted = outputs(model, feed(model))[0]
    for target, op in (("cpu", "MatMulNBits"), ("onnx", "MatMul")):
        recipe = rtn(group_size=16, symmetric=symmetric, bodies=1)
        made = model.clone()
        apply(made, recipe.passes, target=VNNI if target == "cpu" else ONNX)
        assert ops(made).count(op) == 2
        assert sqnr_db(wanted, both(made, feed(model))[0]) > 12


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"bits": 9}, "bits=9 is out of range: use 2 to 8"),
        ({"group_size": 8}, "group_size=8 is out of range: use 0 .per channel., or 16"),
        (
            {"observer": "minmax"},
            "observer 'minmax' is unknown for weights: use one of mse, absmax",
        ),
    ],
)
def test_what_rtn_refuses(parameters: dict[str, object], why: str) -> None:
    with pytest.raises(QGraphError, match=why):
        get_recipe("rtn", parameters)
