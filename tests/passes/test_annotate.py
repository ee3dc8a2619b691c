"""Annotation says of every site what is wanted of it, and asks the target whether it pays."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import PipelineError, QGraphError
from qgraph.graph.annotation import IN, SPEC
from qgraph.graph.sites import Site, sites
from qgraph.numerics.spec import PER_RUN, PerAxis, PerBlock, PerTensor, QuantSpec
from qgraph.passes.annotate import Annotate, Rule, Scheme
from qgraph.passes.canonicalize import Canonicalize
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import PassManager
from qgraph.pipeline.target import Target, Verdict
from qgraph.weights.unfit import SMALL_TABLE
from tests.models import (
    build,
    feed,
    if_model,
    mlp,
    outputs,
    random_graph,
    transformer_block,
    weight,
)
from tests.pipelines import CPU, ONNX, TARGETS, annotate, apply, body, golden, node, specs

U8, TOKEN = "uint8 per-tensor asym minmax", "uint8 per-token sym dynamic"


@dataclass(frozen=True)
class Picky(type(ONNX)):  # type: ignore[misc]
    """A target on which only activations with one scale for each run win, and nothing else."""

    wins: tuple[str, ...] = ("per-tensor",)
    speedup: float = 1.5
    asked: list[str] = field(default_factory=list, compare=False)

    def supports(self, site: Site, activation: QuantSpec | None, weight: QuantSpec) -> Verdict:
        kind = "weight only" if activation is None else str(activation.granularity)
        self.asked.append(f"{site.name} {kind}")
        return Verdict(kind in self.wins, f"{kind} is what it is", self.speedup)


def mark(
    model: ir.Model, scheme: Scheme = "dynamic", target: Target = ONNX, **more: object
) -> Context:
    """Canonicalize and annotate."""
    passes = [Canonicalize(), Annotate(scheme, **more)]  # type: ignore[arg-type]
    context = Context(target)
    PassManager(passes, verify=True).run(model, context)
    return context


def test_dynamic_marks_uses_alone() -> None:
    model = mlp((4, 2, 2))
    mark(model)
    w = "<int8 per-axis(1) sym absmax>"
    assert body(model) == golden(f"""
        %m0: f32[batch, 2] = MatMul(%x <{TOKEN}>, %w0 {w})
        %a0: f32[batch, 2] = Add(%m0, %b0)
        %h0: f32[batch, 2] = Relu(%a0)
        %m1: f32[batch, 2] = MatMul(%h0 <{TOKEN}>, %w1 {w})
        %y: f32[batch, 2] = Add(%m1, %b1)
        """)


CHAIN = """
g (float[1,2,4,4] x) => (float[1,3,4,4] y) {
  c = Conv (x, w1)
  r = Relu (c)
  s = Add (r, r)
  y = Conv (s, w2)
}"""


def test_static_convolutions_write_integers_and_glue_joins_them() -> None:
    model = build(CHAIN, weight("w1", 2, 2, 1, 1), weight("w2", 3, 2, 1, 1))
    mark(model, "static", observer="minmax")
    assert body(model) == golden(f"""
        %c: f32[1, 2, 4, 4] = Conv(%x <{U8}>, %w1 <int8 per-axis(0) sym absmax>)
        %r: f32[1, 2, 4, 4] <{U8}> = Relu(%c)
        %s: f32[1, 2, 4, 4] <{U8}> = Add(%r <{U8}>, %r <{U8}>)
        %y: f32[1, 3, 4, 4] <{U8}> = Conv(%s <{U8}>, %w2 <int8 per-axis(0) sym absmax>)
        """)


def test_glue_whose_users_take_no_integers_stays_float() -> None:
    text = CHAIN.replace("y = Conv (s, w2)", "y = Exp (s)").replace("1,3", "1,2")
    model = build(text, weight("w1", 2, 2, 1, 1))
    mark(model, "static")
    assert list(specs(model)) == ["c"]
    assert SPEC not in node(model, "s").outputs[0].meta


def test_glue_with_a_constant_operand_stays_float() -> None:
    model = build(
        CHAIN.replace("Add (r, r)", "Mul (r, two)"),
        weight("w1", 2, 2, 1, 1), weight("w2", 3, 2, 1, 1), weight("two", 2, 1, 1),
    )  # fmt: skip
    mark(model, "static")
    assert list(specs(model)) == ["c", "y"]


def test_a_clamp_inside_a_branch_is_not_the_output_of_a_convolution_outside() -> None:
    text = """
    g (bool flag, float[1,2,4,4] x) => (float[1,2,4,4] y) {
      c = Conv (x, w1)
      y = If (flag) <
        then_branch = yes () => (float[1,2,4,4] a) { a = Relu (c) },
        else_branch = no () => (float[1,2,4,4] b) { b = Exp (x) }
      >
    }"""
    model = build(text, weight("w1", 2, 2, 1, 1))
    mark(model, "static")
    assert SPEC in node(model, "c").outputs[0].meta
    assert SPEC not in node(model, "a").outputs[0].meta


AXES = """
g (float[2,3] a, float[1,4,5] s, float[1,4,5,5] i, int64[2] ids) => (y1, y2, y3, y4, y5, y6, y7) {
  y1 = MatMul (a, w34)
  y2 = Gemm (a, w34)
  y3 = Gemm <transB = 1> (a, w43)
  y4 = Conv (s, w1d)
  y5 = Conv <group = 4> (i, wdw)
  y6 = ConvTranspose <group = 2> (i, wt)
  y7 = Gather (table, ids)
}"""


def axes_model() -> ir.Model:
    return build(
        AXES,
        weight("w34", 3, 4), weight("w43", 4, 3), weight("w1d", 6, 4, 2),
        weight("wdw", 4, 1, 3, 3), weight("wt", 4, 3, 2, 2), weight("table", 1024, 64),
    )  # fmt: skip


def test_the_axis_of_every_kind_of_weight() -> None:
    model = axes_model()
    mark(model, "static")
    found = {
        name: next(s for s in by.values() if s.startswith("int8"))
        for name, by in specs(model).items()
    }
    assert found == {
        f"y{i}": f"int8 per-axis({axis}) sym absmax"
        for i, axis in enumerate((1, 1, 0, 0, 0, 1, 0), start=1)
    }  # fmt: skip
    assert specs(model)["y7"] == {0: "int8 per-axis(0) sym absmax"}


def test_a_weight_shared_by_two_sites_has_an_axis_for_each_use() -> None:
    text = """
    g (float[2,4] x) => (float[2,4] y) {
      a = Gemm (x, w)
      y = Gemm <transB = 1> (a, w)
    }"""
    model = build(text, weight("w", 4, 4))
    mark(model)
    assert specs(model)["a"][1] == "int8 per-axis(1) sym absmax"
    assert specs(model)["y"][1] == "int8 per-axis(0) sym absmax"


def test_every_site_gets_exactly_one_verdict() -> None:
    model = transformer_block()
    context = mark(model)
    verdicts = context.remarks.verdicts()
    assert set(verdicts) == {site.name for site in sites(model)}
    assert verdicts["scores"].kind == verdicts["mixed"].kind == "float"
    assert "both operands are computed" in verdicts["mixed"].message
    assert verdicts["q"].message == "weights int8 per-channel, activations dynamic uint8 per-token"


def test_branches_are_dynamic_in_both_schemes() -> None:
    for scheme in ("static", "dynamic"):
        model = if_model()
        mark(model, scheme)
        for name in ("y1", "y2"):
            assert specs(model)[name][0] == "uint8 per-token sym dynamic"


def test_the_first_activation_that_wins_is_taken() -> None:
    model, target = mlp((4, 2)), Picky()
    context = mark(model, target=target)
    assert target.asked == ["m0 per-token", "m0 per-tensor"]
    assert specs(model)["m0"][0] == str(PER_RUN)
    assert context.remarks.verdicts()["m0"].numbers == {"speedup": 1.5}


def test_a_site_stays_float_where_nothing_wins_and_says_the_first_reason() -> None:
    model = mlp((4, 2))
    context = mark(model, target=Picky(wins=()))
    assert not specs(model)
    assert str(context.remarks.verdicts()["m0"]) == (
        "[annotate] float MatMul m0: per-token is what it is"
    )


def test_the_reason_is_that_of_the_weights_that_were_asked_for() -> None:
    @dataclass(frozen=True)
    class Slow(type(ONNX)):  # type: ignore[misc]
        def supports(self, site: Site, activation: QuantSpec | None, weight: QuantSpec) -> Verdict:
            return Verdict(False, f"{weight.dtype.name} is slow here")

    int4 = QuantSpec(ir.DataType.INT4, PerBlock(0, 32))
    rules = (Rule(("matmul",), int4, (PER_RUN, None)),)
    context = mark(mlp((4, 2)), target=Slow(), rules=rules)  # int8 columns are tried, too
    assert context.remarks.verdicts()["m0"].message == "INT4 is slow here"


@pytest.mark.parametrize(("speedup", "kept"), [(0.8, False), (1.2, True)])
def test_convolutions_are_weighed_together(speedup: float, kept: bool) -> None:
    model = build(CHAIN, weight("w1", 2, 2, 1, 1), weight("w2", 3, 2, 1, 1))
    context = mark(model, "static", Picky(speedup=speedup))
    assert bool(specs(model)) is kept
    assert {r.kind for r in context.remarks.verdicts().values()} == {
        "quantized" if kept else "float"
    }
    if not kept:
        assert not any(SPEC in v.meta for n in model.graph for v in n.outputs)


def test_rules_come_first_and_go_by_layer() -> None:
    int4 = QuantSpec(ir.DataType.INT8, PerAxis(0), observer="absmax", bits=4)
    rules = (
        Rule(("matmul",), None, layers="m0", why="it is fragile"),
        Rule(("matmul",), int4, (PER_RUN,), layers="m*"),
    )
    model = mlp((4, 3, 2))
    context = mark(model, rules=rules)
    assert specs(model) == {"m1": {0: str(PER_RUN), 1: "int8:4 per-axis(1) sym absmax"}}
    assert context.remarks.verdicts()["m0"].message == "it is fragile"


def test_weights_alone_where_the_rule_names_no_activation() -> None:
    model = mlp((4, 2))
    mark(model, rules=(Rule(("matmul",), QuantSpec(granularity=PerAxis(0))),))
    assert specs(model) == {"m0": {1: "int8 per-axis(1) sym minmax"}}


@pytest.mark.parametrize(
    ("text", "tensors", "why"),
    [
        ("y = Gather (w, ids)", [weight("w", 8, 8)], "its table is too small to matter"),
        ("y = Gather <axis = 1> (w, ids)", [weight("w", 256, 256)], "along an inner axis"),
        ("z = Cast <to = 11> (x)\n y = MatMul (z, w)",
         [ir.Tensor(np.eye(3), name="w")], "its weight is DOUBLE, which no integer kernel"),
        ("y = Gemm <transA = 1> (x, w)", [weight("w", 2, 2)], "its data is transposed"),
        ("y = Conv (t, t)", [], "its weight is computed or not floating-point"),
    ],
)  # fmt: skip
def test_sites_that_cannot_be_quantized_say_why(
    text: str, tensors: list[ir.TensorProtocol], why: str
) -> None:
    model = build(f"g (float[2,3] x, float[1,1,3,3] t, int64[2] ids) => (y) {{ {text} }}", *tensors)
    context = mark(model)
    assert not specs(model)
    assert [why in r.message for r in context.remarks.verdicts().values()] == [True]


def test_a_table_counts_from_a_certain_size() -> None:
    assert SMALL_TABLE == 128 * 128 * 4
    for rows, kept in ((127, False), (128, True)):
        text = "g (int64[2] ids) => (float[2,128] y) { y = Gather (w, ids) }"
        model = build(text, weight("w", rows, 128))
        mark(model)
        assert bool(specs(model)) is kept


def test_a_product_of_two_computed_values_has_no_weight_that_a_rule_could_name() -> None:
    model = build("g (float[2,3] a, float[3,2] b) => (float[2,2] y) { y = MatMul (a, b) }")
    rule = Rule(("activations",), QuantSpec(granularity=PerAxis(0)), (PER_RUN,))
    context = mark(model, rules=(rule,))
    assert not specs(model)
    assert context.remarks.verdicts()["y"].kind == "float"


def test_a_model_without_sites() -> None:
    for scheme in ("static", "dynamic"):
        model = build("g (float[2] x) => (float[2] y) { y = Relu (x) }")
        context = mark(model, scheme)
        assert not specs(model)
        assert not context.remarks


def test_half_precision_weights_are_sites_too() -> None:
    text = "g (float16[2,4] x) => (float16[2,4] y) { y = MatMul (x, w) }"
    model = build(text, ir.Tensor(np.eye(4, dtype=np.float16), name="w"))
    mark(model)
    assert list(specs(model)) == ["y"]


def test_annotation_needs_a_canonical_model() -> None:
    with pytest.raises(PipelineError, match="canonical"):
        PassManager([Annotate()])


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"observer": "dynamic"}, "observer 'dynamic'.*auto, minmax, percentile, entropy, mse"),
        ({"observer": "median"}, "observer 'median'"),
        ({"scheme": "lazy"}, "scheme 'lazy'.*static, dynamic"),
    ],
)
def test_parameters_that_no_kernel_can_follow(parameters: dict[str, object], why: str) -> None:
    with pytest.raises(QGraphError, match=why):
        mark(mlp(), **parameters)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(random_graph(), st.sampled_from(["static", "dynamic"]), st.sampled_from(TARGETS))
def test_annotation_computes_the_same_and_covers_every_site(
    model: ir.Model, scheme: Scheme, target: Target
) -> None:
    given_ = feed(model)
    before = outputs(model, given_)
    context = mark(model, scheme, target)
    for a, b in zip(before, outputs(model, given_), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    verdicts = context.remarks.verdicts()
    for site in sites(model):
        assert (verdicts[site.name].kind == "quantized") is (
            site.w_index in site.node.meta.get(IN, {})
        )
    for n in model.graph:
        assert all(n.inputs[i] is not None for i in n.meta.get(IN, {}))


def test_per_tensor_weights_keep_one_scale() -> None:
    model = mlp((4, 2))
    mark(model, weight=QuantSpec(granularity=PerTensor()))
    assert specs(model)["m0"][1] == "int8 per-tensor sym minmax"


def test_the_same_on_both_schemes_of_the_shared_pipeline() -> None:
    model = mlp()
    context = apply(model, annotate("static"), target=CPU)
    assert context.remarks.verdicts()["m0"].message.endswith("activations uint8 per-tensor")
