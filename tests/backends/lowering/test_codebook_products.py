"""NF4 and FP4: tables, codes and scales of bitsandbytes, how they are written, what runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qgraph.backends.lowering.codebook_products import looked_up_together
from qgraph.errors import QGraphError
from qgraph.graph.reading import nodes
from qgraph.io.models import load, save
from qgraph.io.session import open_session, run
from qgraph.numerics.codebooks import (
    FACTORS,
    LEVELS,
    codes_at,
    dynamic_map,
    integer_levels,
    nest_scales,
    quantize_to_levels,
)
from qgraph.numerics.noise import sqnr_db
from qgraph.numerics.spec import Codebook, PerBlock, QuantSpec
from qgraph.passes.lower import Lower
from qgraph.pipeline.pass_manager import Pass
from qgraph.recipes import get_recipe
from qgraph.recipes.weight_only import rtn
from qgraph.recipes.weight_types import fp4, nf4
from qgraph.weights.formats import rounded_weight
from tests.models import build, feed, if_model, mlp, ops, outputs, weight
from tests.pipelines import CPU, ONNX, apply, body, both, golden, initializer

NF4, FP4 = LEVELS["nf4"], LEVELS["fp4"]
SPEC = QuantSpec(ir.DataType.UINT4, PerBlock(0, 64), observer="absmax", codebook="nf4")


def product(k: int = 128, n: int = 6) -> ir.Model:
    text = f"g (float[batch,{k}] x) => (float[batch,{n}] y) {{ y = MatMul (x, w) }}"
    return build(text, weight("w", k, n, spread=3.0))


def committed(recipe_passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    return tuple(step for step in recipe_passes if not isinstance(step, Lower))


# --- the mathematics ------------------------------------------------------------------------------


def test_the_published_levels() -> None:
    assert NF4[7] == 0
    assert NF4[0] == -1
    assert NF4[15] == 1
    np.testing.assert_allclose(NF4[[1, 8, 14]], [-0.69619280, 0.07958030, 0.72295684], rtol=1e-6)
    wanted = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
    np.testing.assert_allclose(FP4[:8], wanted, rtol=1e-6)
    np.testing.assert_array_equal(FP4[8:], -FP4[:8])


def test_the_dynamic_map_is_that_of_torch_bit_for_bit() -> None:
    torch = pytest.importorskip("torch")
    levels = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = 10 ** (i - 6) * ((bounds[:-1] + bounds[1:]) / 2.0)
        levels += middles.tolist() + (-middles).tolist()
    np.testing.assert_array_equal(dynamic_map(), np.sort(np.array(levels, np.float32)))
    assert dynamic_map().size == 256


def test_a_worked_example() -> None:
    w = np.array([[0.5, -2, 0, 1.0, 0.16, 3e-9]], np.float32)
    codes, scales = quantize_to_levels(w, 4, NF4)
    np.testing.assert_allclose(scales, [[2, 0.16]], rtol=1e-6)
    # 0.25, -1, 0, 0.5 in units of 2: nearest 0.246, -1, 0, 0.44; then 1 and almost 0
    np.testing.assert_array_equal(codes, [[10, 0, 7, 12, 15, 7]])


@pytest.mark.parametrize("name", LEVELS)
def test_codes_are_the_nearest_levels(name: Codebook) -> None:
    w = np.random.default_rng(0).standard_normal((20, 130)).astype(np.float32)
    codes, scales = quantize_to_levels(w, 64, LEVELS[name])
    largest = np.repeat(scales, 64, axis=1)[:, :130]
    ratio = w / largest
    np.testing.assert_allclose(scales[:, 2], np.abs(w[:, 128:]).max(axis=1))
    error = np.abs(ratio - LEVELS[name][codes])
    every = np.abs(ratio[..., np.newaxis] - LEVELS[name]).min(axis=-1)
    np.testing.assert_allclose(error, every, atol=1e-6)
    if name == "fp4":
        assert not (codes == 8).any()


@pytest.mark.parametrize("name", LEVELS)
def test_levels_of_the_integer_kernel_are_near(name: Codebook) -> None:
    levels = integer_levels(LEVELS[name])
    assert np.abs(levels - LEVELS[name]).max() <= 0.004
    np.testing.assert_array_equal(integer_levels(levels), levels)


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)),
               elements=st.floats(-(2.0**90), 2.0**90, width=32)),
    st.sampled_from([16, 32]),
    st.sampled_from(sorted(LEVELS)),
)  # fmt: skip
def test_no_weight_moves_further_than_its_neighbours_apart(
    w: np.ndarray, size: int, name: Codebook
) -> None:
    levels = LEVELS[name]
    codes, scales = quantize_to_levels(w, size, levels)
    assert codes.shape == w.shape
    wide = np.repeat(scales, size, axis=1)[:, : w.shape[1]]
    gap = np.diff(np.unique(levels)).max() / 2
    assert (np.abs(levels[codes] * wide - w) <= gap * wide * 1.0001 + 1e-37).all()
    small = (w / 1e15).astype(np.float32)
    sought = quantize_to_levels(small, size, levels, FACTORS)
    plain = quantize_to_levels(small, size, levels)
    top = np.repeat(np.abs(plain[1]), size, axis=1)[:, : w.shape[1]]
    matters = np.divide(np.abs(small), top, where=top > 0, out=np.zeros(w.shape))
    errors = [
        np.square((levels[c].astype(np.float64) * np.repeat(s, size, axis=1)[:, : w.shape[1]]
                   - w / 1e15) * matters).sum() for c, s in (plain, sought)
    ]  # fmt: skip
    assert errors[1] <= errors[0] * 1.001


def test_blocks_of_zeros_stay_zero() -> None:
    w = np.zeros((3, 64), np.float32)
    w[0, 0] = 1e-45
    for levels in LEVELS.values():
        codes, scales = quantize_to_levels(w, 32, levels)
        np.testing.assert_allclose(levels[codes] * np.repeat(scales, 32, axis=1), w, atol=1e-44)


def test_nested_scales() -> None:
    scales = np.random.default_rng(0).gamma(9.0, size=(50, 9)).astype(np.float32)
    nested = nest_scales(scales)
    assert nested.codes.shape == (450,)
    assert nested.scale.shape == (2,)
    assert nested.offset == pytest.approx(scales.mean())
    back = nested.float().reshape(scales.shape)
    np.testing.assert_allclose(back, scales, atol=0.008 * np.abs(scales - nested.offset).max())
    # bitsandbytes: code[q] · absmax[block] + offset, each rounded to float32
    first = dynamic_map()[nested.codes[:256]] * nested.scale[0] + nested.offset
    np.testing.assert_array_equal(back.reshape(-1)[:256], first.astype(np.float32))


def test_codes_for_nested_scales_lose_little() -> None:
    w = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    plain, double = (rounded_weight(w, SPEC.with_(double=d)) for d in (False, True))
    assert sqnr_db(w, double) > sqnr_db(w, plain) - 0.02
    sought, nested = (
        rounded_weight(w, SPEC.with_(observer="mse", double=d)) for d in (False, True)
    )
    assert sqnr_db(w, sought) > sqnr_db(w, plain) + 0.5
    assert sqnr_db(w, nested) > sqnr_db(w, sought) - 0.02  # each block picks one of three codes


def test_nf4_is_better_than_integers_for_normal_weights() -> None:
    w = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)
    int4 = QuantSpec(ir.DataType.INT4, PerBlock(0, 64), observer="absmax")
    fp = SPEC.with_(codebook="fp4")
    levels = {name: sqnr_db(w, rounded_weight(w, spec))
              for name, spec in (("int4", int4), ("nf4", SPEC), ("fp4", fp))}  # fmt: skip
    assert levels["nf4"] > levels["int4"] > levels["fp4"]


# --- the spec -------------------------------------------------------------------------------------


def test_the_spec_is_its_text() -> None:
    spec = SPEC.with_(double=True, group="a b")
    text = "uint4 per-block(0, 64) sym absmax codebook=nf4 double group=a b"
    assert str(spec) == text
    assert QuantSpec.parse(text) == spec
    assert QuantSpec.parse(str(SPEC)) == SPEC


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"codebook": "nf5"}, "codebook 'nf5' is unknown: use one of nf4, fp4"),
        ({"dtype": ir.DataType.INT4}, "codes of nf4 are uint4 in blocks"),
        ({"codebook": None, "double": True}, "only scales of a codebook's blocks"),
    ],
)
def test_what_a_spec_refuses(changes: dict[str, object], why: str) -> None:
    with pytest.raises(QGraphError, match=why):
        SPEC.with_(**changes)


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"group_size": 0}, "group_size=0 is not for nf4"),
        ({"group_size": 8}, "group_size=8 is out of range"),
        ({"kernel": "fast"}, "'fast' is unknown for nf4: use one of int8, bnb4"),
        ({"observer": "minmax"}, "'minmax' is unknown for nf4: use one of mse, absmax"),
        ({"double_quant": 2}, "double_quant=2 is no bool"),
    ],
)
def test_what_nf4_refuses(parameters: dict[str, object], why: str) -> None:
    with pytest.raises(QGraphError, match=why):
        get_recipe("nf4", parameters)


# --- before and after -----------------------------------------------------------------------------


def test_before_and_after() -> None:
    model = product()
    passes = nf4(double_quant=False).passes
    context = apply(model, committed(passes), target=CPU)
    assert body(model) == golden("""
        %w_DequantizeCodebook: f32[6, 2, 64] = qgraph::DequantizeCodebook(%w_codes, %qgraph/levels, %w_scale)
        %w_Reshape: f32[6, 128] = Reshape(%w_DequantizeCodebook, %qgraph/shape_6_-1)
        %w_Transpose: f32[128, 6] = Transpose(%w_Reshape) {perm = [1, 0]}
        %x_rounded: f32[batch, 128] = qgraph::RoundInBlocks(%x, %qgraph/block_64, %qgraph/token_step_128, %qgraph/token_floor_128)
        %y: f32[batch, 6] = MatMul(%x_rounded, %w_Transpose)
    """)  # noqa: E501
    assert context.remarks.verdicts()["y"].message == (
        "weights nf4 in blocks of 64, activations dynamic int8 in blocks of 64"
    )
    assert any("levels are rounded to 127ths" in r.message for r in context.remarks)
    assert model.graph.initializers["w_codes"].dtype == ir.DataType.UINT4
    np.testing.assert_array_equal(initializer(model, "qgraph/levels"), integer_levels(NF4))
    apply(model, [Lower()], target=CPU, verify=False)  # see lower_codebook_products
    assert body(model) == golden("""
        %w_DequantizeCodebook_Cast: i32[*] = Cast(%w_codes_words) {to = 6}
        %w_DequantizeCodebook_Gather: u8[*] = Gather(%qgraph/levels_int8, %w_DequantizeCodebook_Cast)
        %w_DequantizeCodebook_Reshape: u8[6, 2, 64] = Reshape(%w_DequantizeCodebook_Gather, %qgraph/shape_6_2_64)
        %y: f32[batch, 6] = com.microsoft::MatMulNBits(%x, %w_DequantizeCodebook_Reshape, %w_DequantizeCodebook_int8_scale) {K = 128, N = 6, accuracy_level = 4, bits = 8, block_size = 64}
    """)  # noqa: E501
    assert initializer(model, "w_codes_words").shape == (6, 2, 32)
    assert not model.functions


def test_double_quantization_is_written() -> None:
    model = product()
    apply(model, committed(nf4().passes), target=CPU)
    first = golden("""
        %w_DequantizeCodebook: f32[1, 256] = qgraph::DequantizeCodebook(%w_scale_codes, %qgraph/scale_levels, %w_scale_scale)
        %w_Add: f32[1, 256] = Add(%w_DequantizeCodebook, %w_scale_offset)
        %w_Reshape: f32[256] = Reshape(%w_Add, %qgraph/shape_-1)
        %w_Slice: f32[12] = Slice(%w_Reshape, %qgraph/shape_0, %qgraph/shape_12, %qgraph/shape_0)
        %w_Reshape_1: f32[6, 2] = Reshape(%w_Slice, %qgraph/shape_6_2)
    """)  # noqa: E501
    assert body(model).startswith(first)
    assert initializer(model, "w_scale_codes").dtype == np.uint8


def test_bnb4_before_and_after() -> None:
    model = product()
    recipe = nf4(kernel="bnb4", double_quant=False, observer="absmax")
    context = apply(model, recipe.passes, target=CPU)
    assert body(model) == golden("""
        %y: f32[batch, 6] = com.microsoft::MatMulBnb4(%x, %w_codes_bnb4, %w_scale_bnb4) {K = 128, N = 6, block_size = 64, quant_type = 1}
    """)  # noqa: E501
    assert any("five times slower than float" in r.message for r in context.remarks)
    codes, scales = quantize_to_levels(weight("w", 128, 6, spread=3.0).numpy().T, 64, NF4)
    packed = codes.reshape(-1, 2)
    np.testing.assert_array_equal(
        initializer(model, "w_codes_bnb4"), packed[:, 0] << 4 | packed[:, 1]
    )
    np.testing.assert_array_equal(initializer(model, "w_scale_bnb4"), scales.reshape(-1))


# --- what runs it agrees --------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("k", [128, 100, 40])
@pytest.mark.parametrize("gemm", ["", "transB = 0", "transB = 1", "transB = 1, alpha = 2.0"])
def test_every_target_agrees_with_the_reference(
    name: Codebook, double: bool, k: int, gemm: str
) -> None:
    trans = "transB = 1" in gemm
    product = f"Gemm <{gemm}> (x, w, b)" if gemm else "MatMul (x, w)"
    text = f"g (float[batch,{k}] x) => (float[batch,6] y) {{ y = {product} }}"
    w = weight("w", *((6, k) if trans else (k, 6)))
    model = build(text, w, *([weight("b", 6)] if gemm else []))
    given_ = feed(model)
    passes = get_recipe(name, {"double_quant": double}).passes
    blocks = PerBlock(int(trans), 64)
    spec = SPEC.with_(codebook=name, double=double, granularity=blocks, observer="mse")
    float_w = rounded_weight(w.numpy(), spec)
    factor = 2 if "alpha" in gemm else 1
    y = factor * given_["x"] @ (float_w.T if trans else float_w)
    if gemm:
        y = y + weight("b", 6).numpy()
    for target, step in ((ONNX, 1e-5), (CPU, 2e-2)):
        made = model.clone()
        apply(made, committed(passes), target=target)
        reference = outputs(made, given_)[0]
        np.testing.assert_allclose(reference, y, atol=step * np.abs(y).max())
        apply(made, [Lower()], target=target, verify=False)
        fast = run(open_session(made, optimized=True, threads=1), given_)[0]
        np.testing.assert_allclose(fast, reference, rtol=1e-4, atol=1e-5)
        both(made, given_)
        assert ("MatMulNBits" in ops(made)) is (target is CPU)
        if target is ONNX:
            assert all(node.domain == "" for node in nodes(made))


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("bias", [False, True])
def test_bnb4_is_exact(name: Codebook, bias: bool) -> None:
    product = "Gemm <transB = 1> (x, w, b)" if bias else "MatMul (x, w)"
    text = f"g (float[batch,128] x) => (float[batch,6] y) {{ y = {product} }}"
    model = build(
        text, weight("w", *((6, 128) if bias else (128, 6))), *([weight("b", 6)] if bias else [])
    )
    given_ = feed(model)
    passes = get_recipe(name, {"kernel": "bnb4"}).passes
    other = model.clone()
    apply(other, get_recipe(name, {}).passes, target=ONNX)
    apply(model, passes, target=CPU)
    assert "MatMulBnb4" in ops(model)
    np.testing.assert_allclose(both(model, given_)[0], outputs(other, given_)[0], atol=1e-5)


def test_what_bnb4_cannot_say_stays_in_float() -> None:
    model, why = product(100), "rows are not made of whole blocks"
    wanted = outputs(model, feed(model))[0]
    context = apply(model, nf4(kernel="bnb4").passes, target=CPU)
    assert any(why in r.message for r in context.remarks if r.kind == "declined")
    assert "MatMulBnb4" not in ops(model)
    assert sqnr_db(wanted, both(model, feed(model))[0]) > 15


def test_blocks_without_a_kernel_are_computed_in_float() -> None:
    model = product(1024)
    wanted = outputs(model, feed(model))[0]
    context = apply(model, nf4(group_size=512).passes, target=CPU)
    assert "MatMulNBits" not in ops(model)
    assert context.remarks.verdicts()["y"].message == (
        "weights nf4 in blocks of 512, float activations"
    )
    assert sqnr_db(wanted, both(model, feed(model))[0]) > 15


def test_a_weight_that_two_products_share_is_stored_once() -> None:
    text = """
    g (float[batch,128] x, float[batch,128] z) => (float[batch,6] y, float[batch,6] t) {
      y = MatMul (x, w)
      t = MatMul (z, w)
    }"""
    for target in (CPU, ONNX):
        model = build(text, weight("w", 128, 6))
        apply(model, nf4().passes, target=target)
        big = [v for v in model.graph.initializers.values() if "codes" in str(v.name)]
        assert len(big) == 2  # of weights, of scales
        both(model, feed(model))


def test_bodies_of_control_flow() -> None:
    model = if_model()
    wanted = outputs(model, feed(model))
    apply(model, nf4(group_size=16).passes, target=CPU)
    for a, b in zip(wanted, both(model, feed(model)), strict=True):
        assert sqnr_db(a, b) > 12


@settings(deadline=None, max_examples=8)
@given(
    st.lists(st.integers(1, 90), min_size=2, max_size=4),
    st.sampled_from([16, 32, 64]),
    st.booleans(),
    st.booleans(),
)
def test_random_networks(widths: list[int], size: int, double: bool, normal: bool) -> None:
    model = mlp(tuple(widths))
    wanted = outputs(model, feed(model))[0]
    make = nf4 if normal else fp4
    for target in (CPU, ONNX):
        made = model.clone()
        apply(made, make(group_size=size, double_quant=double).passes, target=target)
        found = both(made, feed(model))[0]
        assert np.abs(found - wanted).max() <= 0.6 * np.abs(wanted).max() + 1e-3


@pytest.mark.parametrize("parameters", [{}, {"kernel": "bnb4"}, {"observer": "absmax"}])
@pytest.mark.parametrize("target", [CPU, ONNX], ids=["cpu", "onnx"])
def test_saved_models_are_the_same_bit_for_bit(
    parameters: dict[str, str], target: object, tmp_path: Path
) -> None:
    model = product(256, 40)
    apply(model, get_recipe("nf4", dict(parameters)).passes, target=target)  # type: ignore[arg-type]
    save(model, tmp_path / "out.onnx")
    again = load(tmp_path / "out.onnx")
    given_ = feed(model)
    for optimized in (False, True):
        a, b = (run(open_session(m, optimized=optimized, threads=1), given_)[0]
                for m in (model, again))  # fmt: skip
        np.testing.assert_array_equal(a, b)


def test_four_codes_are_looked_up_together() -> None:
    levels = np.arange(16, dtype=np.uint8) * 3
    table = looked_up_together(levels)
    assert table.shape == (65536, 4)
    np.testing.assert_array_equal(table[0x4321], levels[[1, 2, 3, 4]])


def test_codes_at_scales_of_either_sign() -> None:
    w = np.array([[1, -0.5, 0.25, 0]], np.float32)
    scale = np.array([[-1]], np.float32)
    codes = codes_at(w, scale, 4, NF4)
    np.testing.assert_allclose(NF4[codes] * -1, [[1, -0.44070983, 0.28444138, 0]])


# --- real models ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_sentences_are_nearer_than_with_integers(tmp_path: Path) -> None:
    import qgraph
    from benchmarks import tasks, zoo

    source = zoo.minilm_onnx()
    run_float = tasks.session(source)
    lost = {}
    for name, recipe in (("nf4", nf4()), ("plain", nf4(double_quant=False)), ("rtn", rtn())):
        path = qgraph.compile(source, recipe).save(tmp_path / f"{name}.onnx")
        lost[name] = 1 - tasks.embedding_cosine(run_float, tasks.session(path))
    assert lost["nf4"] < 0.8 * lost["rtn"]
    assert lost["nf4"] < 1.05 * lost["plain"]
