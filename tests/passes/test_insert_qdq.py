"""Committing: the integers, scales and biases that go into the graph are those of the reference."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import get_args

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from qgraph.errors import PipelineError, QGraphError
from qgraph.graph.annotation import IN, SPEC, STATS, Stage, stages_of
from qgraph.graph.functions import QUANTIZE_PER_TOKEN
from qgraph.graph.reading import array, attribute, is_op, nodes
from qgraph.numerics.noise import sqnr_db
from qgraph.numerics.reference import (
    SMALLEST_SCALE,
    along,
    dequantize,
    quantize,
    quantize_weight,
    scale_zero_point,
)
from qgraph.numerics.spec import PER_RUN, PerAxis, PerTensor, QuantSpec
from qgraph.passes.annotate import Annotate, Rule, Scheme
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.fold_qdq import FoldQDQ
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Pass, PassManager
from qgraph.pipeline.target import Target
from qgraph.pipeline.verify import check_structure
from tests.models import (
    build,
    feed,
    if_model,
    mlp,
    ops,
    outputs,
    random_graph,
    small_convnet,
    transformer_block,
    weight,
)
from tests.pipelines import (
    CPU,
    ONNX,
    TARGETS,
    Shipped,
    annotate,
    apply,
    body,
    both,
    dynamic,
    golden,
    initializer,
    node,
    static,
)

U8 = QuantSpec(ir.DataType.UINT8, symmetric=False)
W8 = QuantSpec(granularity=PerAxis(0), observer="absmax")
VNNI = Shipped("cpu:avx512-vnni", "avx512-vnni")


def commit(scheme: Scheme = "static", **parameters: object) -> tuple[Pass, ...]:
    return (*annotate(scheme, **parameters), InsertQDQ())


def tensor(name: str, values: object, dtype: type = np.float32) -> ir.TensorProtocol:
    return ir.Tensor(np.asarray(values, dtype), name=name)


# --- what it writes -------------------------------------------------------------------------------


def test_static_before_and_after() -> None:
    text = """
    g (float[1,2,2,2] x) => (float[1,2,2,2] y) {
      c = Conv (x, w, b)
      y = Relu (c)
    }"""
    model = build(text, tensor("w", [[[[1]], [[-2]]], [[[0]], [[0]]]]), tensor("b", [0.5, -0.25]))
    x = np.array([-1, 0, 0.5, 4.1, 1, 1, 1, 1], np.float32).reshape(1, 2, 2, 2)
    apply(model, commit(), [{"x": x}])
    assert body(model, weights=True) == golden("""
        weight %w_q = i8[2, 2, 1, 1] {64, -127, 0, 0}
        weight %w_scale = f32[2] {0.015748031, 1.1641532e-08}
        weight %w_zero = i8[2] {0, 0}
        weight %b_q = i32[2] {1587, -1073741824}
        weight %b_scale = f32[2] {0.00031496063, 2.3283064e-10}
        weight %b_zero = i32[2] {0, 0}
        weight %x_scale = f32[] {0.02}
        weight %x_zero = u8[] {50}
        weight %y_scale = f32[] {0.010196078}
        weight %y_zero = u8[] {0}
        %x_q: u8[1, 2, 2, 2] = QuantizeLinear(%x, %x_scale, %x_zero)
        %x_dq: f32[1, 2, 2, 2] = DequantizeLinear(%x_q, %x_scale, %x_zero)
        %b_dq: f32[2] = DequantizeLinear(%b_q, %b_scale, %b_zero) {axis = 0}
        %w_dq: f32[2, 2, 1, 1] = DequantizeLinear(%w_q, %w_scale, %w_zero) {axis = 0}
        %c: f32[1, 2, 2, 2] = Conv(%x_dq, %w_dq, %b_dq)
        %y_dq: f32[1, 2, 2, 2] = Relu(%c) @y
        %y_q: u8[1, 2, 2, 2] = QuantizeLinear(%y_dq, %y_scale, %y_zero)
        %y: f32[1, 2, 2, 2] = DequantizeLinear(%y_q, %y_scale, %y_zero) @y_dq
        """)


def test_scales_for_each_token_before_and_after() -> None:
    text = "g (float[N,4] x) => (float[N,2] y) { y = MatMul (x, w) }"
    model = build(text, weight("w", 4, 2))
    apply(model, commit("dynamic"))
    assert body(model).replace("%qgraph/token_", "%").replace("_128", "") == golden("""
        %w_dq: f32[4, 2] = DequantizeLinear(%w_q, %w_scale, %w_zero) {axis = 1}
        %x_q: u8[N, 4], %x_q_1: f32[*] = qgraph::QuantizePerToken(%x, %step, %zero, %floor)
        %x_dq: f32[N, 4] = qgraph::DequantizePerToken(%x_q, %x_q_1, %step, %zero)
        %y: f32[N, 2] = MatMul(%x_dq, %w_dq)
        """)


def test_scales_for_each_run_before_and_after() -> None:
    text = "g (float[N,4] x) => (float[N,2] y) { y = MatMul (x, w) }"
    model = build(text, weight("w", 4, 2))
    apply(model, commit("dynamic", rules=(Rule(("matmul",), W8, (PER_RUN,)),)))
    assert body(model) == golden("""
        %w_dq: f32[4, 2] = DequantizeLinear(%w_q, %w_scale, %w_zero) {axis = 1}
        %x_q, %x_q_1, %x_q_2 = DynamicQuantizeLinear(%x)
        %x_dq: f32[N, 4] = DequantizeLinear(%x_q, %x_q_1, %x_q_2)
        %y: f32[N, 2] = MatMul(%x_dq, %w_dq)
        """)


def test_nothing_of_the_annotation_is_left() -> None:
    model = small_convnet()
    apply(model, commit())
    values = [*model.graph.inputs, *(v for n in nodes(model) for v in n.outputs)]
    assert not any(key in v.meta for v in values for key in (SPEC, STATS))
    assert not any(IN in n.meta for n in nodes(model))
    assert Stage.COMMITTED in stages_of(model)
    assert not stages_of(model) & {Stage.ANNOTATED, Stage.CALIBRATED}


def test_the_integers_are_those_of_the_reference() -> None:
    text = "g (float[N,8] x) => (y) { y = MatMul (x, w) }"
    w = weight("w", 8, 4, spread=30)
    model = build(text, w)
    apply(model, commit("dynamic"), target=VNNI)
    q, scale, _ = quantize_weight(w.numpy(), 1, W8)
    np.testing.assert_allclose(initializer(model, "w_scale"), scale)
    np.testing.assert_array_equal(initializer(model, "w_q"), q)


def test_the_result_is_the_one_of_the_reference() -> None:
    text = "g (float[N,8] x) => (y) { y = Gemm <transB = 1> (x, w, b) }"
    model = build(text, weight("w", 4, 8), weight("b", 4))
    given_ = feed(model)
    apply(model, commit(), [given_], VNNI)
    x, w, b = given_["x"], weight("w", 4, 8).numpy(), weight("b", 4).numpy()
    scale, zero = scale_zero_point(x.min(), x.max(), U8)
    x_hat = dequantize(quantize(x, scale, zero, 0, 255), scale, zero)
    q, w_scale, _ = quantize_weight(w, 0, W8)
    w_hat = dequantize(q, along(w_scale, 0, 2), 0)
    step = scale * w_scale
    np.testing.assert_allclose(
        outputs(model, given_)[0], x_hat @ w_hat.T + np.rint(b / step) * step, rtol=1e-5, atol=1e-5
    )


# --- shared values --------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("half", [False, True])
def test_the_input_of_q_k_v_is_quantized_once(scheme: Scheme, half: bool) -> None:
    text = """
    g (float[N,8] x) => (q, k, v) {
      q = MatMul (x, wq)
      k = MatMul (x, wk)
      v = MatMul (x, wv)
    }"""
    kind = np.float16 if half else np.float32
    model = build(
        text.replace("float", "float16") if half else text,
        *(tensor(n, weight(n, 8, 8).numpy(), kind) for n in ("wq", "wk", "wv")),
    )
    apply(model, commit(scheme))
    assert sum(n.op_type in ("QuantizeLinear", QUANTIZE_PER_TOKEN) for n in model.graph) == 1
    assert ops(model).count("Cast") == (4 if half else 0)


def test_a_weight_used_along_two_axes_is_quantized_for_each() -> None:
    text = """
    g (float[N,4] x) => (float[N,4] y) {
      a = Gemm (x, w)
      y = Gemm <transB = 1> (a, w)
    }"""
    w = weight("w", 4, 4, spread=100)
    for passes in (commit("dynamic"), commit("static")):
        model = build(text, w)
        given_ = feed(model)
        before = outputs(model, given_)[0]
        apply(model, passes, [given_])
        axes = {attribute(n, "axis", 9) for n in model.graph if n.inputs[0] is not None
                and is_op(n, "DequantizeLinear") and n.inputs[0].is_initializer()}  # fmt: skip
        assert axes == {0, 1}
        assert sqnr_db(before, outputs(model, given_)[0]) > 30


def test_a_weight_shared_along_one_axis_is_stored_once() -> None:
    text = """
    g (float[N,4] x) => (float[N,4] y) {
      a = MatMul (x, w)
      y = MatMul (a, w)
    }"""
    model = build(text, weight("w", 4, 4))
    apply(model, commit("dynamic"))
    assert sum(v.dtype == ir.DataType.INT8 and len(v.shape or ()) == 2
               for v in model.graph.initializers.values()) == 1  # fmt: skip


BRANCHES = """
g (bool flag, float[N,4] x) => (float[N,4] y) {
  BEFORE
  y = If (flag) <
    then_branch = yes () => (float[N,4] a) { a = MatMul (x, w) },
    else_branch = no () => (float[N,4] b) { e = Exp (x) b = MatMul (e, w) }
  >
  AFTER
}"""


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize(
    ("before", "after"), [("", ""), ("m = MatMul (x, w)", ""), ("", "m = MatMul (y, w)")]
)
def test_a_weight_shared_with_branches_is_in_sight_of_all(
    scheme: Scheme, before: str, after: str
) -> None:
    text = BRANCHES.replace("BEFORE", before).replace("AFTER", after)
    if before or after:
        text = text.replace("(float[N,4] y) {", "(float[N,4] y, float[N,4] m) {", 1)
    for flag in (True, False):
        model = build(text, weight("w", 4, 4))
        given_ = {**feed(model), "flag": np.asarray(flag)}
        wanted = outputs(model, given_)
        apply(model, static() if scheme == "static" else dynamic(), [given_])
        assert not check_structure(model)
        for a, b in zip(wanted, both(model, given_), strict=True):
            assert sqnr_db(a, b) > 25


def test_branches_get_their_own_scales_at_run_time() -> None:
    model = if_model()
    apply(model, commit("dynamic"))
    assert ops(model) == ["DequantizeLinear", "DequantizeLinear", "If"]  # of the weights
    inner = [n.op_type for n in nodes(model) if n.graph is not model.graph]
    assert inner.count(QUANTIZE_PER_TOKEN) == 2
    for flag in (True, False):
        given_ = {**feed(model), "flag": np.asarray(flag)}
        assert sqnr_db(outputs(if_model(), given_)[0], outputs(model, given_)[0]) > 30


def test_siblings_with_different_wishes_agree_on_one_scale() -> None:
    text = """
    g (float[1,4,6,6] x) => (y, z) {
      a = Conv (x, w1, b)
      y = Conv (a, w2, b)
      z = Conv (a, w3, b)
    }"""
    model = build(text, *(weight(n, 4, 4, 1, 1) for n in ("w1", "w2", "w3")), weight("b", 4))
    given_ = feed(model)
    wanted = outputs(model, given_)
    rule = Rule(("conv",), W8, (U8.with_(observer="percentile"),), layers="z")
    apply(model, commit(rules=(rule,)), [given_])
    assert not check_structure(model)
    for a, b in zip(wanted, both(model, given_), strict=True):
        assert sqnr_db(a, b) > 28


def test_a_value_that_is_output_and_quantized_keeps_its_name() -> None:
    text = """
    g (float[1,2,4,4] x) => (float[1,2,4,4] c, float[1,2,4,4] y) {
      c = Conv (x, w)
      y = Conv (c, w)
    }"""
    model = build(text, weight("w", 2, 2, 1, 1))
    given_ = feed(model)
    wanted = outputs(model, given_)
    apply(model, static(), [given_])
    assert [v.name for v in model.graph.outputs] == ["c", "y"]
    assert ops(model).count("QuantizeLinear") == 3
    for a, b in zip(wanted, both(model, given_), strict=True):
        assert sqnr_db(a, b) > 30


def test_a_value_that_is_output_and_wanted_by_a_product_alone_stays_float_outside() -> None:
    text = """
    g (float[N,4] x) => (float[N,4] h, float[N,4] y) {
      h = Relu (x)
      y = MatMul (h, w)
    }"""
    model = build(text, weight("w", 4, 4))
    given_ = feed(model)
    wanted = outputs(model, given_)
    apply(model, static(), [given_])
    np.testing.assert_array_equal(wanted[0], both(model, given_)[0])


def test_a_graph_input_is_quantized_once_for_all_that_want_it() -> None:
    text = """
    g (float[1,2,4,4] x) => (y, z, t) {
      y = Conv (x, w)
      z = Conv (x, w)
      t = Neg (x)
    }"""
    model = build(text, weight("w", 2, 2, 1, 1))
    apply(model, commit())
    x = model.graph.inputs[0]
    assert sorted(n.op_type for n in x.consumers()) == ["Neg", "QuantizeLinear"]


# --- kinds of sites -------------------------------------------------------------------------------

SITES: dict[str, tuple[str, tuple[ir.TensorProtocol, ...]]] = {
    "conv 1-d": ("float[2,4,9] x|y = Conv <pads = [1,1]> (x, w, b)",
                 (weight("w", 6, 4, 3), weight("b", 6))),
    "conv": ("float[2,4,6,6] x|y = Conv (x, w)", (weight("w", 6, 4, 3, 3, spread=50),)),
    "grouped": ("float[2,6,6,6] x|y = Conv <group = 3, pads = [1,1,1,1]> (x, w, b)",
                (weight("w", 6, 2, 3, 3), weight("b", 6))),
    "depthwise": ("float[2,6,6,6] x|y = Conv <group = 6> (x, w, b)",
                  (weight("w", 6, 1, 3, 3), weight("b", 6))),
    "conv 3-d": ("float[1,2,4,4,4] x|y = Conv (x, w, b)",
                 (weight("w", 3, 2, 2, 2, 2), weight("b", 3))),
    "transposed": ("float[2,4,5,5] x|y = ConvTranspose (x, w, b)",
                   (weight("w", 4, 3, 2, 2), weight("b", 3))),
    "grouped transposed": ("float[2,4,5,5] x|y = ConvTranspose <group = 2> (x, w, b)",
                           (weight("w", 4, 3, 2, 2), weight("b", 6))),
    "matmul": ("float[2,3,8] x|y = MatMul (x, w)", (weight("w", 8, 5, spread=50),)),
    "vector": ("float[8] x|y = MatMul (x, w)", (weight("w", 8, 5),)),
    "gemm": ("float[5,8] x|y = Gemm (x, w, b)", (weight("w", 8, 5), weight("b", 5))),
    "gemm transposed": ("float[5,8] x|y = Gemm <transB = 1> (x, w)", (weight("w", 5, 8),)),
    "gemm scaled": ("float[5,8] x|y = Gemm <alpha = 0.5, beta = 3.0> (x, w, b)",
                    (weight("w", 8, 5), weight("b", 5))),
    "gemm one bias": ("float[5,8] x|y = Gemm (x, w, b)", (weight("w", 8, 4), weight("b", 1))),
    "gemm scalar bias": ("float[5,8] x|y = Gemm (x, w, b)", (weight("w", 8, 4), tensor("b", 0.7))),
    "gemm row bias": ("float[5,8] x|y = Gemm (x, w, b)", (weight("w", 8, 4), weight("b", 1, 4))),
    "gemm column bias": ("float[5,8] x|y = Gemm (x, w, b)", (weight("w", 8, 4), weight("b", 5, 1))),
    "gemm matrix bias": ("float[5,8] x|y = Gemm (x, w, b)", (weight("w", 8, 4), weight("b", 5, 4))),
    "gemm computed bias": ("float[5,8] x|s = ReduceSum (x) \n y = Gemm <beta = 0.5> (x, w, s)",
                           (weight("w", 8, 4),)),
    "gather": ("float[5,128] x|i = ArgMax <axis = 1, keepdims = 0> (x) \n y = Gather (w, i)",
               (weight("w", 128, 128),)),
}  # fmt: skip


def site_model(name: str, half: bool = False) -> ir.Model:
    text, tensors = SITES[name]
    inputs, statements = text.split("|")
    if half:
        tensors = tuple(tensor(str(t.name), t.numpy(), np.float16) for t in tensors)
        inputs = inputs.replace("float", "float16")
    return build(f"g ({inputs}) => (y) {{ {statements} }}", *tensors)


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("name", SITES)
def test_every_kind_of_site(name: str, target: Target, scheme: Scheme) -> None:
    model = site_model(name)
    given_ = feed(model)
    wanted = outputs(model, given_)[0]
    apply(model, static() if scheme == "static" else dynamic(), [given_], target)
    assert not check_structure(model)
    assert sqnr_db(wanted, both(model, given_)[0]) > 28


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("name", ["conv", "depthwise", "matmul", "gemm", "gemm scaled", "gather"])
def test_every_kind_of_site_in_half_precision(name: str, target: Target, scheme: Scheme) -> None:
    model = site_model(name, half=True)
    given_ = feed(model)
    wanted = outputs(model, given_)[0]
    apply(model, static() if scheme == "static" else dynamic(), [given_], target)
    found = both(model, given_)[0]
    assert found.dtype == np.float16
    assert sqnr_db(wanted, found) > 28


def test_half_precision_convolutions_hand_on_integers() -> None:
    text = """
    g (float16[1,2,4,4] x) => (float16[1,2,4,4] y) {
      c = Conv (x, w)
      r = Relu (c)
      k = Clip (r, low, six)
      d = Conv (k, w)
      y = Exp (d)
    }"""
    model = build(
        text, tensor("w", weight("w", 2, 2, 1, 1).numpy(), np.float16),
        tensor("low", 0.0, np.float16), tensor("six", 6.0, np.float16),
    )  # fmt: skip
    given_ = feed(model)
    wanted = outputs(model, given_)[0]
    apply(model, static(), [given_])
    assert ops(model) == [
        "Cast", "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Conv",
        "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Conv",
        "QuantizeLinear", "DequantizeLinear", "Cast", "Exp",
    ]  # fmt: skip
    assert sqnr_db(wanted, both(model, given_)[0]) > 28


def test_static_bias_is_int32_with_the_product_of_scales() -> None:
    for name in ("conv 1-d", "grouped", "depthwise", "gemm", "gemm scaled", "gemm one bias",
                 "gemm scalar bias", "gemm row bias"):  # fmt: skip
        model = site_model(name)
        apply(model, commit())
        bias = initializer(
            model,
            next(n for n in model.graph.initializers if n.startswith("b") and n.endswith("_q")),
        )
        scale = initializer(
            model,
            next(n for n in model.graph.initializers if n.startswith("b") and n.endswith("_scale")),
        )
        w_scale = initializer(
            model,
            next(n for n in model.graph.initializers if n.startswith("w") and n.endswith("_scale")),
        )
        assert bias.dtype == np.int32
        np.testing.assert_allclose(scale, initializer(model, "x_scale") * w_scale, rtol=1e-6)


# --- dangers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [PerAxis(0), PerTensor()])
@pytest.mark.parametrize("op", ["Conv", "Gemm"])
def test_a_bias_that_would_overflow_int32_raises_the_scale_of_its_channel(
    op: str, granularity: PerAxis | PerTensor
) -> None:
    size = (2, 3, 1, 1) if op == "Conv" else (3, 2)
    w = weight("w", *size).numpy().copy()
    w[(1, ...) if op == "Conv" else (..., 1)] = 0 if isinstance(granularity, PerAxis) else 1e-12
    w *= 1 if isinstance(granularity, PerAxis) else 1e-12
    text = f"g (float[5,3{',2,2' if op == 'Conv' else ''}] x) => (y) {{ y = {op} (x, w, b) }}"
    model = build(text, tensor("w", w), tensor("b", [0.5, 1e4]))
    given_ = feed(model)
    wanted = outputs(model, given_)[0]
    apply(model, static(weight=W8.with_(granularity=granularity)), [given_])
    q = initializer(model, "b_q")
    assert np.abs(q.astype(np.int64)).max() <= 2**30 + 1
    np.testing.assert_allclose(both(model, given_)[0][:, 1], wanted[:, 1], rtol=0.01)


def test_zero_channels_and_dead_inputs() -> None:
    text = "g (float[N,3] x) => (y) { r = Mul (x, zero) \n y = Gemm (r, w, b) }"
    w = weight("w", 3, 4).numpy().copy()
    w[:, 2] = 0
    model = build(text, tensor("w", w), tensor("b", [0, 1, 2, 3]), tensor("zero", [0, 0, 0]))
    given_ = feed(model)
    apply(model, commit(), [given_])
    scale = initializer(model, "r_scale")
    assert scale == SMALLEST_SCALE
    np.testing.assert_allclose(both(model, given_)[0], np.tile([0, 1, 2, 3], (3, 1)), atol=1e-3)


def overflows(model: ir.Model, given: Mapping[str, np.ndarray]) -> int:
    """How many pairs of products `vpmaddubsw` would saturate on this feed, over all sites.

    Pairs along K as onnxruntime's kernels add them: matrices row by row, convolutions with the
    channels last (kernel position first, then channel), padded with the zero point.
    """
    found: list[tuple[ir.Node, ir.Value, np.ndarray, np.ndarray]] = []
    for n in model.graph:
        dqs = [v.producer() if v is not None else None for v in n.inputs[:2]]
        if not is_op(n, "MatMul", "Gemm", "Conv") or any(
            dq is None or not dq.op_type.startswith("Dequantize") for dq in dqs
        ):
            continue
        data, kernel = (dq.inputs for dq in dqs if dq is not None)
        q = array(kernel[0])
        assert q is not None
        assert data[0] is not None
        zero = array(data[2]) if len(data) > 2 else None
        zero = np.asarray(128, np.uint8) if zero is None else zero
        found.append((n, data[0], q.astype(np.int32), zero))
    probe = model.graph
    for _, value, _, _ in found:
        if not value.is_graph_output():
            probe.outputs.append(value)
    results = dict(zip([v.name for v in probe.outputs], outputs(model, given), strict=True))
    total = 0
    for n, value, q, zero in found:
        x = results[value.name].astype(np.int32)
        if n.op_type == "Conv":
            total += _conv_overflows(n, x, q, int(zero))
        else:
            w = q.T if attribute(n, "transB", 0) else q
            total += _pairs(x.reshape(-1, x.shape[-1]), w)
    return total


def _conv_overflows(n: ir.Node, x: np.ndarray, w: np.ndarray, zero: int) -> int:
    groups = int(attribute(n, "group", 1))
    rank = x.ndim - 2
    pads = list(n.attributes["pads"].as_ints()) if "pads" in n.attributes else [0] * 2 * rank
    x = np.pad(
        x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)], constant_values=zero
    )
    windows = sliding_window_view(x, w.shape[2:], axis=tuple(range(2, x.ndim)))
    total = 0
    for part, kernel in zip(np.split(windows, groups, 1), np.split(w, groups, 0), strict=True):
        if kernel.shape[1] == 1:
            continue  # depthwise kernels add in int32
        last = np.moveaxis(part, 1, -1)
        k = int(np.prod(last.shape[-rank - 1 :]))
        total += _pairs(
            last.reshape(-1, k), np.moveaxis(kernel, 1, -1).reshape(kernel.shape[0], -1).T
        )
    return total


def _pairs(x: np.ndarray, w: np.ndarray) -> int:
    even = x.shape[1] // 2 * 2
    products = x[:, :even, None] * w[None, :even]
    sums = products[:, 0::2] + products[:, 1::2]
    return int(((sums > 32767) | (sums < -32768)).sum())


SATURATING: dict[str, tuple[str, tuple[int, ...]]] = {
    "matmul": ("float[64,8] x|y = MatMul (x, w)", (8, 16)),
    "odd": ("float[64,7] x|y = MatMul (x, w)", (7, 16)),
    "gemm": ("float[64,8] x|y = Gemm <transB = 1> (x, w)", (16, 8)),
    "conv": ("float[4,4,8,8] x|y = Conv <pads = [1,1,1,1]> (x, w)", (16, 4, 3, 3)),
    "odd conv": ("float[4,3,8,8] x|y = Conv <pads = [1,1,1,1]> (x, w)", (16, 3, 3, 3)),
    "pointwise": ("float[4,4,8,8] x|y = Conv (x, w)", (16, 4, 1, 1)),
    "1-d": ("float[4,4,32] x|y = Conv <pads = [2,2]> (x, w)", (16, 4, 5)),
    "grouped": ("float[4,6,8,8] x|y = Conv <group = 3, pads = [1,1,1,1]> (x, w)", (18, 2, 3, 3)),
    "depthwise": ("float[4,6,8,8] x|y = Conv <group = 6> (x, w)", (6, 1, 3, 3)),
}  # fmt: skip


def saturating(name: str, seed: int, shift: float) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Weights that fill both ends of their range, and data whose channels have different ranges."""
    text, size = SATURATING[name]
    inputs, statement = text.split("|")
    rng = np.random.default_rng([seed, len(name)])
    w = rng.choice([-1.0, -0.9, 0.05, 0.9, 1.0], size)
    model = build(f"g ({inputs}) => (y) {{ {statement} }}", tensor("w", w))
    shape = tuple(int(d) for d in model.graph.inputs[0].shape or ())  # type: ignore[arg-type]
    channels = 1 if len(shape) > 2 else -1
    spread = along(rng.choice([0.02, 0.5, 1.0, 1.0], shape[channels]), channels, len(shape))
    sides = [-1.0, 0.0, 1.0] if shift > 0 else [1.0]  # below 0: all negative, so that 0 is 255
    offset = along(rng.choice(sides, shape[channels]), channels, len(shape)) * shift
    return model, {"x": ((rng.uniform(-1, 1, shape) + offset) * spread).astype(np.float32)}


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**16), shift=st.sampled_from([-3.0, 0.0, 1.0, 3.0]))
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("name", SATURATING)
def test_no_pair_of_products_can_saturate(
    name: str, scheme: Scheme, seed: int, shift: float
) -> None:
    model, given_ = saturating(name, seed, shift)
    wanted = outputs(model, given_)[0]
    target = CPU if scheme == "static" else ONNX
    apply(model, commit(scheme), [given_], target, verify=False)
    assert overflows(model, given_) == 0
    assert sqnr_db(wanted, outputs(model, given_)[0]) > 15


def test_the_emulation_sees_what_happens_without_repair() -> None:
    for name in set(SATURATING) - {"depthwise"}:
        found = 0
        for seed, shift in itertools.product(range(3), (-3.0, 0.0, 1.0)):
            model, given_ = saturating(name, seed, shift)
            apply(model, commit("static"), [given_], VNNI, verify=False)
            found += overflows(model, given_) > 0
        assert found > 1, name


def test_groups_do_not_borrow_each_others_ranges() -> None:
    model, _ = saturating("grouped", 0, 0.0)
    x = np.random.default_rng(0).uniform(0, 1, (4, 6, 8, 8)).astype(np.float32)
    x[:, 2:] *= np.float32(0.1)
    apply(model, commit("static"), [{"x": x}], CPU, verify=False)
    assert overflows(model, {"x": x}) == 0


def test_scales_that_come_through_an_operator_that_moves_data_count_in_the_repair() -> None:
    text = """
    g (float[1,8,8,8] x) => (y) {
      a = Conv (x, w1)
      m = MaxPool <kernel_shape = [4,4], strides = [4,4]> (a)
      y = Conv (m, w2)
    }"""
    rng = np.random.default_rng(0)
    w2 = rng.choice([-1.0, -0.9, 0.05, 0.9, 1.0], (32, 8, 1, 1))
    model = build(text, tensor("w1", np.eye(8).reshape(8, 8, 1, 1)), tensor("w2", w2))
    x = rng.uniform(-3, 0.1, (1, 8, 8, 8)) * np.linspace(0.1, 1, 8).reshape(1, 8, 1, 1)
    x[:, ::2] = np.abs(x[:, ::2])
    given_ = {"x": x.astype(np.float32)}
    apply(model, (*commit("static"), FoldQDQ()), [given_], CPU)
    assert initializer(model, "a_scale") in [
        array(n.inputs[1]) for n in model.graph if is_op(n, "DequantizeLinear")
    ]
    assert overflows(model, given_) == 0


def test_a_table_that_a_product_shares_is_stored_once_and_repaired() -> None:
    text = """
    g (int64[4] ids) => (float[4,256] y) {
      e = Gather (w, ids)
      y = Gemm <transB = 1> (e, w)
    }"""
    w = np.random.default_rng(0).choice([-1.0, -0.9, 0.9, 1.0], (256, 256))
    model = build(text, tensor("w", w))
    apply(model, commit("dynamic"), target=ONNX)
    assert overflows(model, feed(model)) == 0
    assert sum(v.dtype == ir.DataType.INT8 and len(v.shape or ()) == 2
               for v in model.graph.initializers.values()) == 1  # fmt: skip


def test_the_repair_is_remarked() -> None:
    model, given_ = saturating("matmul", 0, 0.0)
    context = apply(model, commit("dynamic"), [given_], ONNX, verify=False)
    (remark,) = [r for r in context.remarks if r.pass_name == "insert-qdq"]
    assert remark.kind == "applied"
    assert 0 < remark.numbers["channels"] <= 16


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (QuantSpec(ir.DataType.INT16, PerAxis(0)), "'int16 per-axis.*integers of 4 or 8 bits"),
    ],
)
def test_weights_that_it_cannot_write(spec: QuantSpec, why: str) -> None:
    with pytest.raises(QGraphError, match=why):
        apply(mlp(), commit("dynamic", weight=spec))


def test_activations_that_it_cannot_write() -> None:
    rule = Rule(("matmul",), W8, (QuantSpec(ir.DataType.UINT16, symmetric=False),))
    with pytest.raises(QGraphError, match=r"'uint16 per-tensor.*int8 or uint8"):
        apply(mlp(), commit("static", rules=(rule,)))


def test_static_specs_without_calibration() -> None:
    with pytest.raises(PipelineError, match="was not calibrated: put insert-observers,calibrate"):
        apply(mlp(), (Canonicalize(), Annotate("static"), InsertQDQ()))


def test_committing_needs_annotation() -> None:
    with pytest.raises(PipelineError, match="annotated"):
        PassManager([InsertQDQ()])


def test_a_model_without_sites() -> None:
    for scheme in get_args(Scheme):
        model = build("g (float[2] x) => (float[2] y) { y = Relu (x) }")
        context = Context(ONNX, [feed(model)])
        PassManager(annotate(scheme)).run(model, context)
        assert not InsertQDQ().run(model, context)
        assert ops(model) == ["Relu"]


def test_symmetric_int8_activations_and_asymmetric_weights() -> None:
    text = "g (float[5,8] x) => (y) { y = MatMul (x, w) }"
    model = build(text, weight("w", 8, 4))
    given_ = feed(model)
    wanted = outputs(model, given_)[0]
    rule = Rule(
        ("matmul",),
        QuantSpec(ir.DataType.UINT8, PerAxis(0), symmetric=False, observer="absmax"),
        (QuantSpec(ir.DataType.INT8),),
    )
    apply(model, static(rules=(rule,)), [given_])
    assert initializer(model, "w_q").dtype == np.uint8
    assert initializer(model, "x_zero") == np.int8(0)
    assert sqnr_db(wanted, outputs(model, given_)[0]) > 30


# --- properties -----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(random_graph(), st.sampled_from(["static", "dynamic"]), st.sampled_from(TARGETS))
def test_committed_models_are_sound_and_saturate_nowhere(
    model: ir.Model, scheme: Scheme, target: Target
) -> None:
    given_ = feed(model)
    names = [v.name for v in model.graph.outputs]
    apply(model, commit(scheme), [given_], target)
    assert not check_structure(model)
    assert [v.name for v in model.graph.outputs] == names
    if target.saturates:
        assert overflows(model, given_) == 0


def test_a_block_of_a_transformer() -> None:
    for passes in (static(), dynamic()):
        model = transformer_block()
        given_ = feed(model)
        wanted = outputs(model, given_)[0]
        apply(model, passes, [given_])
        assert sqnr_db(wanted, both(model, given_)[0]) > 25
    assert node(model, "y").op_type == "Add"


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_data_that_comes_from_a_default(scheme: Scheme) -> None:
    text = """
    g (float[2,4] x, float[4,4] k) => (y, z) {
      y = MatMul (k, w)
      s = Mul (x, x)
      z = MatMul (s, w)
    }"""
    model = build(text, weight("w", 4, 4), weight("k", 4, 4))  # k is a default
    given_ = feed(model)
    wanted = outputs(model, given_)
    apply(model, static() if scheme == "static" else dynamic(), [given_])
    for a, b in zip(wanted, both(model, given_), strict=True):
        assert sqnr_db(a, b) > 30


def test_static_data_that_is_constant_is_left_float() -> None:
    text = "g (float[2,4] x) => (y) { y = MatMul (k, w) }"
    model = build(text, weight("w", 4, 4), weight("k", 4, 4))
    stages_of(model).add(Stage.CANONICAL)  # canonicalize would compute it
    context = apply(model, (Annotate("static"), *static()[2:]))
    assert context.remarks.verdicts()["y"].kind == "float"
    assert ops(model) == ["MatMul"]
