"""Hard sigmoids and scale-and-shift chains become one operator; nothing else does."""

from __future__ import annotations

from typing import Literal
from unittest.mock import Mock

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings

from benchmarks import zoo
from qgraph.graph.text.printer import to_text
from qgraph.io.models import load
from qgraph.io.random_feed import first_feed
from qgraph.io.session import open_session, run
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.fold_batch_norm import FoldBatchNorm
from qgraph.passes.fuse import Fuse
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import PassManager
from qgraph.pipeline.target import Target
from tests.models import build, feed, ops, outputs, random_graph


def fused(model: ir.Model) -> None:
    """Fuse in place, checking that the results stay."""
    given = {name: value * 5 for name, value in feed(model).items()}
    before = outputs(model, given)
    context = Context(target=Mock(spec=Target))
    PassManager([Canonicalize(), Fuse()], verify=True).run(model, context)
    for optimized in (False, True):
        after = run(open_session(model, optimized=optimized, threads=1), given)
        for old, new in zip(before, after, strict=True):
            np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)


def test_golden_text() -> None:
    model = build("""
    f (float[1,2,3,3] x) => (float[1,1,3,3] y)
    <float three = {3}, float low = {0}, float six = {6}, float a = {2}, float[2,1,1] b = {1, 2},
     float[1,2,1,1] w = {1, 1}> {
      s = Add (x, three)
      c = Clip (s, low, six)
      g = Mul (x, c)
      h = Div (g, six)
      m = Mul (h, a)
      n = Add (m, b)
      y = Conv (n, w)
    }""")
    fused(model)
    assert (
        to_text(model)
        == """\
ir_version = 10

graph f {
  opset 21
  input %x: f32[1, 2, 3, 3]
  weight %w = f32[1, 2, 1, 1] {1.0, 1.0}
  weight %n_scale = f32[2] {2.0, 2.0}
  weight %n_shift = f32[2] {1.0, 2.0}
  weight %n_mean = f32[2] {0.0, 0.0}
  weight %n_variance = f32[2] {1.0, 1.0}
  %h_HardSigmoid: f32[1, 2, 3, 3] = HardSigmoid(%x) {alpha = 0.16666667, beta = 0.5}
  %h_Mul: f32[1, 2, 3, 3] = Mul(%x, %h_HardSigmoid)
  %n_1: f32[1, 2, 3, 3] = \
BatchNormalization(%h_Mul, %n_scale, %n_shift, %n_mean, %n_variance) {epsilon = 0.0}
  %y: f32[1, 1, 3, 3] = Conv(%n_1, %w)
  output %y: f32[1, 1, 3, 3]
}
"""
    )


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("y = Div (c, six)", ["HardSigmoid"]),
        ("y = Mul (c, sixth)", ["HardSigmoid"]),
        ("d = Div (c, six) y = Mul (d, x)", ["HardSigmoid", "Mul"]),
        ("d = Mul (c, z) y = Mul (sixth, d)", ["HardSigmoid", "Mul"]),
        ("d = Mul (z, c) y = Div (d, six)", ["HardSigmoid", "Mul"]),
        ("y = Div (six, c)", ["Add", "Clip", "Div"]),
        ("y = Div (c, three)", ["Add", "Clip", "Div"]),
        ("d = Mul (c, c) y = Div (d, six)", ["HardSigmoid", "Add", "Clip", "Mul"]),
    ],
)
def test_forms_of_a_hard_sigmoid(body: str, left: list[str]) -> None:
    model = build(f"""
    f (float[2,3] x, float[2,3] z) => (float[2,3] y)
    <float[1] three = {{3}}, float low = {{0}}, float six = {{6}},
     float[1,1] sixth = {{0.16666667}}> {{
      s = Add (three, x)
      c = Clip (s, low, six)
      {body}
    }}""")
    if "Div (six, c)" in body:
        PassManager([Canonicalize(), Fuse()]).run(model, Context(target=Mock(spec=Target)))
    else:
        fused(model)
    assert sorted(ops(model)) == sorted(left)


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ("m = Mul (a, x) n = Add (b, m) y = Conv (n, w)", False),
        ("m = Mul (x, c) n = Add (m, c) y = Conv (n, w)", False),
        ("m = Mul (x, a) n = Add (m, b) y = Relu (n)", True),
        ("m = Mul (x, row) n = Add (m, b) y = Conv (n, w)", True),
        ("m = Mul (x, a) n = Add (m, b) o = Conv (n, w) y = Sub (o, m)", True),
        ("m = Mul (x, x) n = Add (m, b) y = Conv (n, w)", True),
    ],
)
def test_scale_and_shift(body: str, kept: bool) -> None:
    text = f"""
    f (float[1,2,3,3] x) => (float[1,2,3,3] y)
    <float a = {{2}}, float[1] b = {{1}}, float[1,2,1,1] c = {{3, 4}}, float[3] row = {{1, 2, 3}},
     float[2,2,1,1] w = {{1, 2, 3, 4}}> {{
      {body}
    }}"""
    model = build(text)
    fused(model)
    assert ("BatchNormalization" not in ops(model)) == kept


def test_half_floats_stay() -> None:
    tensors = [
        ir.Tensor(np.array(value, np.float16), name=name)
        for name, value in (("three", 3), ("low", 0), ("six", 6))
    ]
    model = build(
        """
    f (float16[2,3] x) => (float16[2,3] y) {
      s = Add (x, three)
      c = Clip (s, low, six)
      y = Div (c, six)
    }""",
        *tensors,
    )
    PassManager([Canonicalize(), Fuse()]).run(model, Context(target=Mock(spec=Target)))
    assert ops(model) == ["Add", "Clip", "Div"]


@settings(deadline=None, max_examples=15)
@given(random_graph())
def test_random_graphs_keep_their_results(model: ir.Model) -> None:
    fused(model)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sites"), [("det", 23), ("rec", 25)])
def test_text_detection_and_recognition(kind: Literal["det", "rec"], sites: int) -> None:
    path = zoo.ppocr(kind)
    given = first_feed(load(path), None, 0)
    before = run(open_session(load(path), optimized=False), given)
    model = load(path)
    passes = [Canonicalize(), FoldBatchNorm(), Fuse()]
    PassManager(passes).run(model, Context(target=Mock(spec=Target)))
    assert ops(model).count("Clip") == 0
    assert ops(model).count("BatchNormalization") == sites
    after = run(open_session(model), given)
    np.testing.assert_allclose(after[0], before[0], rtol=1e-3, atol=1e-6)
