"""Folding drops conversions that cancel, keeps every integer, and leaves the others alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import PipelineError
from qgraph.graph.annotation import Stage
from qgraph.numerics.reference import dequantize, quantize
from qgraph.passes.annotate import Scheme
from qgraph.passes.fold_qdq import FoldQDQ, clamp_bounds
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import PassManager
from qgraph.pipeline.target import Target
from qgraph.pipeline.verify import check_structure
from tests.models import build, feed, ops, outputs, random_graph, weight
from tests.pipelines import ONNX, TARGETS, annotate, apply, body, golden

COMMITTED = frozenset({Stage.COMMITTED})
PARAMETERS = "<float s = {0.1}, uint8 z = {3}, uint8 zero = {0}, float t = {0.2}>"


def fold(text: str, *tensors: ir.TensorProtocol, x: np.ndarray | None = None) -> ir.Model:
    """Fold and check that every output keeps every bit."""
    model = build(text.replace("PARAMETERS", PARAMETERS), *tensors)
    given_ = feed(model) if x is None else {"x": x}
    before = outputs(model, given_)
    PassManager([FoldQDQ()], verify=True, given=COMMITTED).run(model, Context(ONNX, [given_]))
    for a, b in zip(before, outputs(model, given_), strict=True):
        np.testing.assert_array_equal(a, b)
    return model


def test_conversions_that_cancel() -> None:
    model = fold("""
    g (uint8[2,3] x) => (float[2,3] y) PARAMETERS {
      d = DequantizeLinear (x, s, z)
      q = QuantizeLinear (d, s, z)
      y = DequantizeLinear (q, s, z)
    }""")
    assert body(model) == "%y: f32[2, 3] = DequantizeLinear(%x, %s, %z)"


def test_integers_are_moved_instead_of_floats() -> None:
    model = fold("""
    g (uint8[1,2,4,6] x) => (float[12,2] y)
    <float s = {0.1}, uint8 z = {3}, int64[2] two = {2,12}> {
      d = DequantizeLinear (x, s, z)
      p = MaxPool <kernel_shape = [1,2], strides = [1,2]> (d)
      q = QuantizeLinear (p, s, z)
      e = DequantizeLinear (q, s, z)
      r = Reshape (e, two)
      u = QuantizeLinear (r, s, z)
      f = DequantizeLinear (u, s, z)
      t = Transpose <perm = [1,0]> (f)
      v = QuantizeLinear (t, s, z)
      y = DequantizeLinear (v, s, z)
    }""")
    assert body(model) == golden("""
        %p: u8[1, 2, 4, 3] = MaxPool(%x) {kernel_shape = [1, 2], strides = [1, 2]}
        %r: u8[2, 12] = Reshape(%p, %two)
        %t: u8[12, 2] = Transpose(%r) {perm = [1, 0]}
        %y: f32[12, 2] = DequantizeLinear(%t, %s, %z)
        """)


def test_clamps_go_into_the_clamp_of_quantization() -> None:
    model = fold("""
    g (float[8] x) => (uint8[8] y)
    <float s = {0.1}, uint8 z = {0}, float low = {-1}, float top = {30}> {
      r = Relu (x)
      c = Clip (r, low, top)
      y = QuantizeLinear (c, s, z)
    }""")
    assert body(model) == "%y: u8[8] = QuantizeLinear(%x, %s, %z)"


def test_what_a_clamp_uncovers_cancels_too() -> None:
    model = fold("""
    g (uint8[8] x) => (float[8] y) PARAMETERS {
      d = DequantizeLinear (x, s, zero)
      r = Relu (d)
      q = QuantizeLinear (r, s, zero)
      y = DequantizeLinear (q, s, zero)
    }""")
    assert ops(model) == ["DequantizeLinear"]


UNTOUCHED = {
    "other scale": "d = DQ (x, s, z)  q = Q (d, t, z)",
    "other zero point": "d = DQ (x, s, z)  q = Q (d, s, zero)",
    "computed scale": "n = Mul (s, s)  d = DQ (x, n, z)  q = Q (d, n, z)",
    "clamp inside the range": "d = DQ (x, t, z)  r = Clip (d, one, one)  q = Q (r, s, z)",
    "levels below 0": "d = DQ (x, t, z)  r = Relu (d)  q = Q (r, s, z)",
    "computed bounds": "d = DQ (x, t, z)  n = Neg (s)  r = Clip (d, n)  q = Q (r, s, zero)",
    "computes": "d = DQ (x, s, z)  r = AveragePool <kernel_shape = [1,1]> (d)  q = Q (r, s, z)",
    "moved and used elsewhere": "d = DQ (x, s, z)  r = Transpose (d)  q = Q (r, s, z)  m = Neg (r)",
    "clamped and used elsewhere": "d = DQ (x, t, z)  r = Relu (d)  q = Q (r, s, zero)  m = Neg (r)",
    "channels": "d = DQ <axis = 1> (x, ch, zch)  q = Q <axis = 1> (d, ch, zch)",
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_does_not_cancel_stays(name: str) -> None:
    text = UNTOUCHED[name].replace("  ", "\n")
    text = text.replace("DQ", "DequantizeLinear").replace("Q (", "QuantizeLinear (")
    text = text.replace("Q <", "QuantizeLinear <")
    outputs_ = "y, m" if " m = " in text else "y"
    text = f"""
    g (uint8[1,2,4,4] x) => ({outputs_})
    <float s = {{0.1}}, uint8 z = {{3}}, uint8 zero = {{0}}, float t = {{0.2}}, float one = {{1}},
     float[2] ch = {{0.1, 0.2}}, uint8[2] zch = {{3, 4}}> {{
      {text}
      y = Identity (q)
    }}"""
    before = ops(build(text))
    assert ops(fold(text)) == before


@pytest.mark.parametrize("output", ["q", "r"])
def test_graph_outputs_keep_their_names_and_values(output: str) -> None:
    model = fold(f"""
    g (uint8[2,3] x) => (y, {output}) PARAMETERS {{
      d = DequantizeLinear (x, s, z)
      r = Transpose (d)
      q = QuantizeLinear (r, s, z)
      y = DequantizeLinear (q, s, z)
    }}""")
    assert [v.name for v in model.graph.outputs] == ["y", output]


def test_a_missing_zero_point_means_another_type_on_either_side() -> None:
    model = fold("""
    g (int8[2,3] x) => (y) PARAMETERS {
      d = DequantizeLinear (x, s)
      q = QuantizeLinear (d, s)
      y = DequantizeLinear (q, s)
    }""")
    assert ops(model) == ["DequantizeLinear", "QuantizeLinear", "DequantizeLinear"]


def test_pooling_stays_float_where_it_has_no_kernel_for_the_integers() -> None:
    model = fold("""
    g (uint16[1,1,4,4] x) => (y) <float s = {0.1}, uint16 z = {3}> {
      d = DequantizeLinear (x, s, z)
      p = MaxPool <kernel_shape = [2,2]> (d)
      q = QuantizeLinear (p, s, z)
      y = DequantizeLinear (q, s, z)
    }""")
    assert ops(model)[1] == "MaxPool"
    assert model.graph[1].inputs[0] is not model.graph.inputs[0]


def test_branches_are_folded_too() -> None:
    model = build(
        """
    g (bool flag, uint8[2,3] x) => (float[2,3] y) PARAMETERS {
      d = DequantizeLinear (x, s, z)
      y = If (flag) <
        then_branch = yes () => (float[2,3] a) {
          q = QuantizeLinear (d, s, z)
          a = DequantizeLinear (q, s, z)
        },
        else_branch = no () => (float[2,3] b) { b = Neg (d) }
      >
    }""".replace("PARAMETERS", PARAMETERS)
    )
    PassManager([FoldQDQ()], verify=True, given=COMMITTED).run(model, Context(ONNX))
    assert sum(n.op_type == "QuantizeLinear" for n in model.graph.all_nodes()) == 0
    given_ = feed(model)
    x = given_["x"].astype(np.int32)
    wanted = dequantize(x, np.float32(0.1), 3)
    for flag, sign in ((True, 1), (False, -1)):
        np.testing.assert_array_equal(
            outputs(model, {**given_, "flag": np.asarray(flag)})[0], sign * wanted
        )


def test_folding_needs_committed_quantization() -> None:
    with pytest.raises(PipelineError, match="committed"):
        PassManager([FoldQDQ()])


def test_nothing_to_fold() -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    assert not FoldQDQ().run(model, Context(ONNX))


def test_bounds_of_old_clips() -> None:
    node = ir.node("Clip", [ir.val("x")], {"min": -1.0, "max": 6.0})
    assert clamp_bounds(node) == (-1.0, 6.0)
    big = float(np.finfo(np.float32).max)
    assert clamp_bounds(ir.node("Clip", [ir.val("x")])) == (-big, big)
    assert clamp_bounds(ir.node("Clip", [ir.val("x"), ir.val("low")])) == (None, big)


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(2.0**-20, 2.0**20, width=32),
    zero=st.integers(0, 255),
    low=st.floats(-1e4, 1e4, width=32),
    span=st.floats(0, 1e4, width=32),
)
def test_a_clamp_that_is_dropped_changed_no_integer(
    scale: float, zero: int, low: float, span: float
) -> None:
    high = np.float32(low) + np.float32(span)
    text = f"""
    g (float[512] x) => (uint8[512] y)
    <float s = {{{scale!r}}}, uint8 z = {{{zero}}},
     float low = {{{low!r}}}, float top = {{{float(high)!r}}}> {{
      c = Clip (x, low, top)
      y = QuantizeLinear (c, s, z)
    }}"""
    around = np.linspace(low - 1 - 300 * scale, float(high) + 1 + 300 * scale, 506)
    x = np.concatenate([around, [-3e38, 3e38, 0, low, high, -0.0]]).astype(np.float32)
    model = fold(text, x=x)
    wanted = quantize(np.clip(x, np.float32(low), high), np.float32(scale), zero, 0, 255)
    np.testing.assert_array_equal(outputs(model, {"x": x})[0], wanted)


@settings(max_examples=40, deadline=None)
@given(random_graph(), st.sampled_from(["static", "dynamic"]), st.sampled_from(TARGETS))
def test_folding_keeps_every_output_of_a_committed_model(
    model: ir.Model, scheme: Scheme, target: Target
) -> None:
    given_ = feed(model)
    apply(model, (*annotate(scheme), InsertQDQ()), [given_], target, verify=False)
    before = outputs(model, given_)
    count = len(list(model.graph))
    apply(model, [FoldQDQ()], [given_], target)
    assert not check_structure(model)
    assert len(list(model.graph)) <= count
    for a, b in zip(before, outputs(model, given_), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_convolutions_hand_on_integers_through_what_moves_them() -> None:
    text = """
    g (float[1,2,4,4] x) => (float[1,2,4,4] y) {
      c = Conv (x, w)
      r = Relu (c)
      p = MaxPool <kernel_shape = [1,1]> (r)
      y = Conv (p, w)
    }"""
    model = build(text, weight("w", 2, 2, 1, 1))
    apply(model, (*annotate("static"), InsertQDQ(), FoldQDQ()))
    assert ops(model) == [
        "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Conv", "QuantizeLinear",
        "MaxPool", "DequantizeLinear", "DequantizeLinear", "Conv", "QuantizeLinear",
        "DequantizeLinear",
    ]  # fmt: skip
