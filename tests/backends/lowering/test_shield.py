"""What was left float between integers stays float in onnxruntime, with its optimizations on."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings

from qgraph.backends.lowering.shield import shield_float
from qgraph.graph.editing import remove_dead
from qgraph.graph.reading import array, is_op
from qgraph.io.session import open_session, run
from qgraph.numerics.noise import sqnr_db
from qgraph.passes.annotate import Rule
from qgraph.pipeline.target import Target
from qgraph.pipeline.verify import check_structure
from tests.models import build, feed, ops, outputs, random_graph, weight
from tests.pipelines import TARGETS, apply, body, golden, static

PARAMETERS = "<float s = {0.05}, uint8 z = {128}, float fine = {0.0001}>"
STEP = 0.0001
CASES = {
    "conv": ("float[1,4,6,6]", "Conv (d, w)", (4, 4, 3, 3)),
    "conv with bias": ("float[1,4,6,6]", "Conv (d, w, b)", (4, 4, 3, 3)),
    "one channel": ("float[1,1,6,6]", "Conv (d, w, b)", (4, 1, 3, 3)),
    "unknown shape": ("float[A,B,C,D]", "Conv (d, w, b)", (4, 4, 3, 3)),
    "depthwise": ("float[1,4,6,6]", "Conv <group = 4> (d, w, b)", (4, 1, 3, 3)),
    "depthwise of unknown shape": ("float[A,B,C,D]", "Conv <group = 4> (d, w)", (4, 1, 3, 3)),
    "conv over time": ("float[1,4,6]", "Conv (d, w, b)", (4, 4, 3)),
    "transposed": ("float[1,4,6,6]", "ConvTranspose (d, w, b)", (4, 4, 3, 3)),
    "transposed of unknown shape": ("float[A,B,C,D]", "ConvTranspose (d, w)", (4, 2, 3, 3)),
    "gemm": ("float[6,8]", "Gemm (d, w, b)", (8, 4)),
    "gemm transposed": ("float[6,8]", "Gemm <transB = 1> (d, w, b)", (4, 8)),
    "behind a transpose":
        ("float[1,6,4,6]", "Conv (m, w, b)|m = Transpose <perm = [0,2,1,3]> (d)", (4, 4, 3, 3)),
    "behind pooling":
        ("float[1,4,6,6]", "Conv (m, w)|m = MaxPool <kernel_shape = [2,2]> (d)", (4, 4, 3, 3)),
    "behind two": (
        "float[1,6,4,6]",
        "Conv (m, w)|t = Transpose <perm = [0,2,1,3]> (d) m = MaxPool <kernel_shape = [2,2]> (t)",
        (4, 4, 3, 3),
    ),
}  # fmt: skip


def between_integers(kind: str, call: str, shape: tuple[int, ...]) -> ir.Model:
    """x -> Q -> DQ -> (mover ->) operator with a float weight -> Q -> DQ -> y.

    The weight is one large element among small ones, which a scale for the whole tensor rounds to
    zero, and the step of the result is fine enough to see that.
    """
    call, _, move = call.partition("|")
    text = f"""
    g ({kind} x) => (y) {PARAMETERS} {{
      q = QuantizeLinear (x, s, z)
      d = DequantizeLinear (q, s, z)
      {move}
      f = {call}
      p = QuantizeLinear (f, fine, z)
      y = DequantizeLinear (p, fine, z)
    }}"""
    data = weight("w", *shape).numpy() * np.float32(1e-3)
    data.reshape(-1)[-1] = 1.0
    bias = ir.Tensor(np.zeros(4, np.float32), name="b")
    return build(text, ir.Tensor(data, name="w"), *([bias] if " b)" in call else []))


def given_to(model: ir.Model, name: str) -> dict[str, np.ndarray]:
    if "unknown" not in name:
        return feed(model)
    return {"x": np.random.default_rng(0).standard_normal((1, 4, 6, 6)).astype(np.float32)}


def optimized(model: ir.Model, given_: dict[str, np.ndarray]) -> np.ndarray:
    result: np.ndarray = run(open_session(model, threads=1), given_)[0]
    return result


@pytest.mark.parametrize("name", CASES)
def test_the_runtime_rounds_float_weights_and_the_shield_keeps_it_from_that(name: str) -> None:
    model = between_integers(*CASES[name])
    given_ = given_to(model, name)
    wanted = outputs(model, given_)[0]
    # Should this fail one day, onnxruntime has learned better and the shield can go.
    assert np.abs(optimized(model, given_) - wanted).max() > 1.5 * STEP
    assert shield_float(model)
    assert not check_structure(model)
    assert np.array_equal(outputs(model, given_)[0], wanted)
    assert np.abs(optimized(model, given_) - wanted).max() < 1.5 * STEP
    assert not shield_float(model)


def test_before_and_after() -> None:
    text = """
    g (uint8[1,3,4,4] q) => (float[1,2,4,4] y) <float s = {0.5}, uint8 z = {128}> {
      d = DequantizeLinear (q, s, z)
      y = Conv (d, w)
    }"""
    w = ir.Tensor(np.arange(6, dtype=np.float32).reshape(2, 3, 1, 1), name="w")
    model = build(text, w)
    assert shield_float(model)
    remove_dead(model)
    assert body(model, weights=True) == golden("""
        weight %w = f32[2, 3, 1, 1] {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}
        weight %d_channels = f32[3] {0.5, 0.5, 0.5}
        weight %d_channels_1 = u8[3] {128, 128, 128}
        %d_float: f32[1, 3, 4, 4] = DequantizeLinear(%q, %d_channels, %d_channels_1) {axis = 1}
        %y: f32[1, 2, 4, 4] = Conv(%d_float, %w)
    """)


def test_without_a_zero_point() -> None:
    model = between_integers(*CASES["conv"])
    dq = model.graph[1]
    dq.resize_inputs(2)
    given_ = feed(model)
    wanted = outputs(model, given_)[0]
    assert shield_float(model)
    assert np.array_equal(outputs(model, given_)[0], wanted)
    assert np.abs(optimized(model, given_) - wanted).max() < 1.5 * STEP


def test_other_readers_keep_the_one_scale() -> None:
    text = f"""
    g (float[1,4,6,6] x) => (y, u) {PARAMETERS} {{
      q = QuantizeLinear (x, s, z)
      d = DequantizeLinear (q, s, z)
      y = Conv (d, w)
      u = Relu (d)
    }}"""
    model = build(text, weight("w", 4, 4, 1, 1))
    assert shield_float(model)
    scales = {}
    for node in model.graph:
        if is_op(node, "Conv", "Relu") and node.inputs[0] is not None:
            dq = node.inputs[0].producer()
            scale = array(dq.inputs[1]) if dq is not None else None
            scales[node.op_type] = scale.size if scale is not None else 0
    assert scales == {"Conv": 4, "Relu": 1}


def test_in_branches_that_read_from_outside() -> None:
    text = f"""
    g (bool flag, float[1,4,6,6] x) => (y) {PARAMETERS} {{
      q = QuantizeLinear (x, s, z)
      d = DequantizeLinear (q, s, z)
      y = If (flag) <
        then_branch = a () => (float[1,4,6,6] y1) {{ y1 = Conv (d, w) }},
        else_branch = b () => (float[1,4,6,6] y2) {{ y2 = Relu (d) }}
      >
    }}"""
    model = build(text, weight("w", 4, 4, 1, 1))
    given_ = {"flag": np.array(True), "x": feed(model)["x"]}
    wanted = outputs(model, given_)[0]
    assert shield_float(model)
    assert not check_structure(model)
    assert np.array_equal(outputs(model, given_)[0], wanted)


# --- what needs no shield -------------------------------------------------------------------------


def test_matmul_is_left_alone_by_the_runtime_too() -> None:
    model = between_integers("float[6,8]", "MatMul (d, w)", (8, 4))
    given_ = feed(model)
    assert not shield_float(model)
    assert np.abs(optimized(model, given_) - outputs(model, given_)[0]).max() < 1.5 * STEP


@pytest.mark.parametrize(
    "statements",
    [
        "y = Conv (x, w)",
        "r = Relu (d) y = Conv (r, w)",
        "k = QuantizeLinear (w, s, z) v = DequantizeLinear (k, s, z) y = Conv (d, v)",
    ],
    ids=["float data", "computed data", "integer weight"],
)
def test_nothing_to_shield(statements: str) -> None:
    text = f"""
    g (float[1,4,6,6] x) => (y) {PARAMETERS} {{
      q = QuantizeLinear (x, s, z)
      d = DequantizeLinear (q, s, z)
      {statements}
    }}"""
    model = build(text, weight("w", 4, 4, 1, 1))
    before = ops(model)
    assert not shield_float(model)
    assert ops(model) == before


def test_computed_parameters_stay_as_they_are() -> None:
    text = """
    g (float[1,4,6,6] x) => (y) {
      q, s, z = DynamicQuantizeLinear (x)
      d = DequantizeLinear (q, s, z)
      y = Conv (d, w)
    }"""
    assert not shield_float(build(text, weight("w", 4, 4, 1, 1)))


# --- in a whole pipeline --------------------------------------------------------------------------

NET = """
g (float[1,4,8,8] x) => (float[1,4,4,4] y) {
  a = Conv (x, w1)
  m = MaxPool <kernel_shape = [2,2], strides = [2,2]> (a)
  b = Conv (m, w2, b2)
  c = Conv (b, w3)
  y = Relu (c)
}"""


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("layer", ["a", "b", "c"])
def test_a_layer_that_a_rule_keeps_float_is_exact(layer: str, target: Target) -> None:
    tensors = [weight(f"w{i}", 4, 4, 1, 1) for i in (1, 2, 3)]
    hard = tensors["abc".index(layer)].numpy() * np.float32(1e-2)
    hard[0, 0] = 10.0  # what per-tensor int8 makes of the rest is nothing
    tensors["abc".index(layer)] = ir.Tensor(hard, name=f"w{'abc'.index(layer) + 1}")
    model = build(NET, *tensors, weight("b2", 4))
    given_ = feed(model)
    wanted = outputs(model, given_)[0]
    rule = Rule(("conv",), None, layers=layer)
    apply(model, static(rules=(rule,)), [given_], target)
    plain = outputs(model, given_)[0]
    assert sqnr_db(wanted, plain) > 25
    assert sqnr_db(plain, optimized(model, given_)) > 35


@settings(deadline=None, max_examples=25)
@given(random_graph())
def test_random_graphs_with_a_float_weight_among_integers(model: ir.Model) -> None:
    given_ = feed(model)
    apply(model, static(rules=(Rule(("conv", "gemm"), None, layers="n*[02468]"),)), [given_])
    assert not shield_float(model)
    plain, fast = outputs(model, given_), run(open_session(model, threads=1), given_)
    for a, b in zip(plain, fast, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2 * max(np.abs(a).max(initial=0), 1e-6))
