"""Weights in blocks and of 4 bits: their numerics, how they are written and lowered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qgraph.errors import PipelineError
from qgraph.graph.annotation import IN
from qgraph.graph.reading import array, attribute
from qgraph.io.models import load, save
from qgraph.numerics.noise import sqnr_db
from qgraph.numerics.saturation import can_saturate
from qgraph.numerics.spec import PER_RUN, PER_TOKEN, WEIGHT, PerAxis, PerBlock, QuantSpec
from qgraph.passes.annotate import Annotate, Rule
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.convert_opset import ConvertOpset
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.passes.lower import Lower
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Pass
from qgraph.pipeline.target import Target
from tests.models import build, feed, if_model, ops, outputs, weight
from tests.pipelines import (
    COMMIT,
    CPU,
    ONNX,
    TARGETS,
    Shipped,
    apply,
    body,
    both,
    golden,
    initializer,
    specs,
)

INT4 = QuantSpec(ir.DataType.INT4, PerBlock(0, 4), observer="mse")
VNNI = Shipped("cpu:avx512-vnni", "avx512-vnni")
FREE = 1 << 20
"""A limit that leaves scales as they are."""


def product(k: int = 10, n: int = 6, *, trans_b: bool = False, spread: float = 1.0) -> ir.Model:
    """x (batch, k) times a weight; a Gemm if that is transposed."""
    op = "Gemm <transB = 1, alpha = 2.0> (x, w, b)" if trans_b else "MatMul (x, w)"
    text = f"g (float[batch,{k}] x) => (float[batch,{n}] y) {{ y = {op} }}"
    w = weight("w", k, n, spread=spread).numpy()
    held = ir.Tensor(np.ascontiguousarray(w.T) if trans_b else w, name="w")
    return build(text, held, *([weight("b", n)] if trans_b else []))


def in_blocks(spec: QuantSpec = INT4, *activations: QuantSpec) -> tuple[Pass, ...]:
    """The passes up to annotation."""
    rule = Rule(("matmul", "gemm"), spec, activations or (PER_TOKEN,))
    return Canonicalize(), Annotate("dynamic", rules=(rule,))


# --- how they are written -------------------------------------------------------------------------


def test_before_and_after() -> None:
    w = np.array([[14, 0], [-3, 0], [7, 0], [2, 0], [1, 1]], np.float32)
    text = "g (float[batch,5] x) => (float[batch,2] y) { y = MatMul (x, w) }"
    model = build(text, ir.Tensor(w, name="w"))
    spec = INT4.with_(granularity=PerBlock(0, 2), observer="absmax")
    apply(model, in_blocks(spec), target=VNNI)
    assert specs(model) == {"y": {0: str(PER_TOKEN), 1: str(spec)}}
    apply(model, [InsertQDQ()], target=VNNI)
    lines = body(model, weights=True).splitlines()
    assert "\n".join(line for line in lines if "%w" in line) == golden("""
        weight %w_q = i4[5, 2] {#b509fd2b}
        weight %w_scale = f32[3, 2] {-1.75, 8.6736174e-19, -0.875, 8.6736174e-19, -0.125, -0.125}
        %w_dq: f32[5, 2] = DequantizeLinear(%w_q, %w_scale) {axis = 0, block_size = 2}
        %y: f32[batch, 2] = MatMul(%x_dq, %w_dq)
    """)
    q = initializer(model, "w_q").astype(np.int8)
    assert q.tolist() == [[-8, 0], [2, 0], [-8, 0], [-2, 0], [-8, -8]]


def test_lowered_to_int8_columns() -> None:
    model = product(k=6, n=2)
    apply(model, (*in_blocks(), *COMMIT), target=VNNI)
    nodes = [line for line in body(model).splitlines() if "%w" in line]
    assert "\n".join(nodes) == golden("""
        %w_q_Cast: f32[6, 2] = Cast(%w_q) {to = 1}
        %w_q_spread = Gather(%w_q_ratio, %qgraph/blocks_6_4) {axis = 0}
        %w_q_Mul: f32[6, 2] = Mul(%w_q_Cast, %w_q_spread)
        %w_q_Round: f32[6, 2] = Round(%w_q_Mul)
        %w_q_Round_int8: i8[6, 2] = Cast(%w_q_Round) {to = 3}
        %y_MatMulIntegerToFloat: f32[batch, 2] = com.microsoft::MatMulIntegerToFloat(%x_q_rounded, %w_q_Round_int8, %qgraph/token_step_128, %w_q_column_scale, %qgraph/token_zero_128)
    """)  # noqa: E501


def test_standard_blocks_stay() -> None:
    model = product(k=6, n=2)
    apply(model, (*in_blocks(), *COMMIT), target=ONNX)
    nodes = [line for line in body(model).splitlines() if "%w" in line]
    assert "\n".join(nodes) == golden("""
        %w_dq: f32[6, 2] = DequantizeLinear(%w_q, %w_scale) {axis = 0, block_size = 4}
        %y: f32[batch, 2] = MatMul(%x_dq, %w_dq)
    """)
    assert model.graph.initializers["w_q"].dtype == ir.DataType.INT4


@pytest.mark.parametrize("target", [*TARGETS, VNNI], ids=lambda t: t.name)
@pytest.mark.parametrize("trans_b", [False, True], ids=["MatMul", "Gemm"])
@pytest.mark.parametrize("activation", [PER_TOKEN, PER_RUN], ids=["token", "run"])
@pytest.mark.parametrize(
    "spec",
    [
        INT4,
        INT4.with_(bits=3),
        INT4.with_(granularity=PerBlock(0, 64)),
        INT4.with_(granularity=PerAxis(1)),
        WEIGHT.with_(bits=6, granularity=PerBlock(0, 5)),
        WEIGHT.with_(granularity=PerBlock(0, 5)),
        INT4.with_(dtype=ir.DataType.UINT4, symmetric=False),
    ],
    ids=str,
)
def test_every_target_computes_the_same(
    spec: QuantSpec, activation: QuantSpec, trans_b: bool, target: Target, tmp_path: Path
) -> None:
    model = product(trans_b=trans_b)
    given_ = feed(model)
    wanted = outputs(model, given_)[0]
    apply(model, (*in_blocks(spec, activation), *COMMIT), [given_], target)  # verified: exact
    found = both(model, given_)[0]
    assert sqnr_db(wanted, found) > {3: 10, 4: 15, 6: 24, 8: 30}[spec.width]
    integer = {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger"}
    blocks = isinstance(spec.granularity, PerBlock)
    declined = blocks and (activation == PER_RUN or spec.width > 4)  # columns of 8 bits instead
    assert bool(integer & set(ops(model))) is (target is not ONNX or declined)
    save(model, tmp_path / "model.onnx")
    np.testing.assert_array_equal(both(load(tmp_path / "model.onnx"), given_)[0], found)


def test_four_bits_are_four_bits_on_disk(tmp_path: Path) -> None:
    sizes = {}
    for spec in (INT4.with_(granularity=PerBlock(0, 64)), WEIGHT):
        model = product(k=512, n=512)
        apply(model, (*in_blocks(spec), *COMMIT), target=CPU, verify=False)
        save(model, tmp_path / "model.onnx")
        sizes[spec] = sum(file.stat().st_size for file in tmp_path.iterdir())
    four, eight = sizes.values()
    assert four < 0.6 * eight


def test_onnxruntime_folds_the_columns_when_it_loads_them(tmp_path: Path) -> None:
    import onnx
    import onnxruntime as ort

    model = product(k=64, n=32)
    apply(model, (*in_blocks(), *COMMIT), target=VNNI)
    save(model, tmp_path / "model.onnx")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    kinds = {n.op_type for n in graph.node}
    assert kinds.isdisjoint({"Cast", "Gather"})
    (matrix,) = (i for i in graph.initializer if list(i.dims) == [64, 32])
    assert matrix.data_type == onnx.TensorProto.INT8


def test_a_saturating_target_keeps_pairs_within_int16() -> None:
    for target, limit in ((CPU, 64), (VNNI, 127)):
        model = product(k=64, n=8)
        apply(model, (*in_blocks(), *COMMIT), target=target)
        (value,) = (n.outputs[0] for n in model.graph if n.outputs[0].name == "w_q_Round_int8")
        model.graph.outputs.append(value)
        columns = outputs(model, feed(model))[1].astype(np.int32)
        assert limit / 2 < np.abs(columns).max() <= limit
        assert not (target.saturates and can_saturate(columns, 255).any())


# --- where they cannot be -------------------------------------------------------------------------


def test_eight_bits_in_blocks_have_no_room_in_int8_columns() -> None:
    spec = WEIGHT.with_(granularity=PerBlock(0, 5))
    model = product()
    context = apply(model, in_blocks(spec), target=CPU)
    assert specs(model)["y"][1] == str(WEIGHT.with_(granularity=PerAxis(1)))
    assert [str(r) for r in context.remarks if r.kind == "declined"] == [
        "[annotate] declined MatMul y: weights are not int8 in blocks of 5: "
        "int8 columns have no room for blocks of 8 bits"
    ]
    assert context.remarks.verdicts()["y"].message.startswith("weights int8 per-channel")


def test_old_opsets_and_other_operators_get_eight_bits_per_channel() -> None:
    model = product()
    model.opset_imports[""] = 17
    context = apply(model, in_blocks(), verify=False)
    assert specs(model)["y"][1] == str(WEIGHT.with_(granularity=PerAxis(1)))
    assert any("opset 17 knows no blocks" in r.message for r in context.remarks)
    apply(model, (ConvertOpset(21), *in_blocks()))
    assert specs(model)["y"][1] == str(INT4)

    text = "g (int64[2] ids) => (float[2,64] y) { y = Gather (w, ids) }"
    table = build(text, weight("w", 3000, 64))
    context = apply(table, (Canonicalize(), Annotate("dynamic", weight=INT4)))
    assert specs(table)["y"] == {0: str(INT4.with_(granularity=PerBlock(1, 4)))}
    context = apply(table, (Canonicalize(), Annotate("dynamic", weight=INT4)), target=VNNI)
    assert specs(table)["y"] == {0: str(WEIGHT)}  # its kernel wants blocks of 16 and more


def test_a_site_that_stays_float_says_why() -> None:
    rule = Rule(("matmul",), INT4, ())
    model = product()
    context = apply(model, (Canonicalize(), Annotate("dynamic", rules=(rule,))), target=CPU)
    remark = context.remarks.verdicts()["y"]
    assert (remark.kind, IN in model.graph[0].meta) == ("float", False)
    assert "float activations" in remark.message


def test_blocks_that_cannot_be_written() -> None:
    model = product()
    apply(model, [Canonicalize()])
    model.graph[0].meta[IN] = {0: PER_TOKEN, 1: INT4.with_(dtype=ir.DataType.INT16)}
    with pytest.raises(PipelineError, match=r"cannot write '.*blocks of a matrix"):
        InsertQDQ().run(model, Context(ONNX))


# --- elsewhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_products_in_branches(target: Target) -> None:
    model = if_model()
    given_ = feed(model)
    wanted = outputs(model, given_)[0]
    apply(model, (*in_blocks(), *COMMIT), [given_], target)
    assert sqnr_db(wanted, both(model, given_)[0]) > 12
    held = {v.dtype for v in model.graph.initializers.values()}
    assert ir.DataType.INT4 in held


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_half_precision(target: Target) -> None:
    text = "g (float16[batch,8] x) => (float16[batch,4] y) { y = MatMul (x, w) }"
    model = build(text, ir.Tensor(weight("w", 8, 4).numpy().astype(np.float16), name="w"))
    given_ = feed(model)
    wanted = outputs(model, given_)[0]
    apply(model, (*in_blocks(), *COMMIT), [given_], target)
    assert sqnr_db(wanted, both(model, given_)[0]) > 15


def test_blocks_brought_along_by_a_model_are_left_alone() -> None:
    text = """
    g (float[batch,8] x) => (float[batch,4] y) {
      w = DequantizeLinear <axis = 0, block_size = 4> (q, s)
      y = MatMul (x, w)
    }"""
    rng = np.random.default_rng(0)
    q = ir.Tensor(rng.integers(-7, 8, (8, 4)).astype(np.int8), name="q", dtype=ir.DataType.INT4)
    s = ir.Tensor(rng.uniform(0.1, 1, (2, 4)).astype(np.float32), name="s")
    model = build(text, q, s)
    given_ = feed(model)
    wanted = outputs(model, given_)[0]
    before = body(model)
    for target in TARGETS:
        assert not target.legalize(model)
        assert body(model) == before
        np.testing.assert_array_equal(outputs(model, given_)[0], wanted)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(2, 50), st.integers(2, 6), st.booleans(),
    st.integers(0, 2**16), st.sampled_from([*TARGETS, VNNI]),
)  # fmt: skip
def test_any_product(
    k: int, n: int, size: int, bits: int, trans_b: bool, seed: int, target: Target
) -> None:
    """Whatever its shape, lowering costs half a step of int8 columns at most."""
    assume(bits <= 4 or target is not ONNX)
    dtype = ir.DataType.INT4 if bits <= 4 else ir.DataType.INT8
    width = 0 if bits in (4, 8) else bits
    spec = QuantSpec(dtype, PerBlock(0, size), bits=width, observer="mse")
    model = product(k, n, trans_b=trans_b, spread=3.0)
    given_ = feed(model, seed)
    apply(model, (*in_blocks(spec), InsertQDQ()), [given_], target)
    before = outputs(model, given_)[0]
    dq = next(n for n in model.graph if attribute(n, "block_size", 0))
    w = [array(value) for value in dq.inputs[:2]]
    assert w[0] is not None
    assert w[1] is not None
    largest = np.abs(w[0].astype(np.float32)).max() * np.abs(w[1]).max() * (1 + trans_b)
    apply(model, [Lower()], [given_], target, verify=False)
    after = both(model, given_)[0]
    step = largest / (64 if target.saturates else 127)
    drift = 0.51 * step * np.abs(given_["x"]).sum(axis=1, keepdims=True) + 1e-4
    assert (np.abs(after - before) <= drift).all()
    blocked = [n for n in model.graph if attribute(n, "block_size", 0) and len(n.inputs) == 2]
    assert bool(blocked) is (target is ONNX)
