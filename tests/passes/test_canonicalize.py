"""Canonicalization and constant folding: golden texts, equal results, and what must stay alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings

from benchmarks import zoo
from qgraph.graph.annotation import Stage, stages_of
from qgraph.graph.reading import graphs, nodes
from qgraph.graph.sites import site_of, sites
from qgraph.graph.text.printer import to_text
from qgraph.io.models import load
from qgraph.io.random_feed import first_feed
from qgraph.io.session import open_session, run
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.convert_opset import ConvertOpset
from qgraph.passes.fold_batch_norm import FoldBatchNorm
from qgraph.passes.fold_constants import FoldConstants
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import PassManager
from qgraph.pipeline.target import Target
from tests.models import feed, if_model, mlp, ops, outputs, random_graph, small_convnet, weight


def context() -> Context:
    return Context(target=Mock(spec=Target))


def parse(text: str, *tensors: ir.TensorProtocol, opset: int = 17, ir_version: int = 8) -> ir.Model:
    header = (
        f'<ir_version: {ir_version}, opset_import: ["" : {opset}, "com.microsoft" : 1, "own" : 1]>'
    )
    proto = onnx.parser.parse_model(f"{header}\n{text}")
    proto.graph.initializer.extend(ir.serde.serialize_tensor(tensor) for tensor in tensors)
    return ir.from_proto(proto)


def parse_lazy(text: str, weight: ir.LazyTensor) -> ir.Model:
    """A model whose weight is read only when somebody asks for it."""
    return ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["" : 17]>\n{text}', initializers=[weight]
    )


def canonical(model: ir.Model) -> Context:
    """Canonicalize in place, checking that signature and results stay."""
    names = [[v.name for v in values] for values in (model.graph.inputs, model.graph.outputs)]
    given = feed(model)
    before = outputs(model, given)
    found = context()
    PassManager([Canonicalize()], verify=True).run(model, found)
    assert names == [
        [v.name for v in values] for values in (model.graph.inputs, model.graph.outputs)
    ]
    for optimized in (False, True):
        after = run(open_session(model, optimized=optimized, threads=1), given)
        for old, new in zip(before, after, strict=True):
            np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)
    return found


def names(model: ir.Model) -> list[str]:
    values = [v.name for graph in graphs(model) for v in graph.inputs]
    values += [v.name for node in nodes(model) for v in node.outputs if v.name != ""]
    return [str(name) for name in (*values, *model.graph.initializers)]


def test_golden_text() -> None:
    model = parse("""
    f (float[2,4] x) => (float[2,3] y)
    <float[3,4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}, float[3] b = {2, 4, 6}> {
      wt = Transpose (w)
      p = Identity (x)
      m = Gemm <alpha = 2.0, beta = 0.5> (p, wt, b)
      unused = Abs (m)
      r = Relu (m)
      y = Identity (r)
    }""")
    canonical(model)
    text = to_text(model)
    assert (
        text
        == """\
ir_version = 8

graph f {
  opset 17
  opset com.microsoft 1
  opset own 1
  input %x: f32[2, 4]
  weight %wt_alpha = f32[4, 3] {#6600600b}
  weight %b_beta = f32[3] {1.0, 2.0, 3.0}
  %m: f32[2, 3] = Gemm(%x, %wt_alpha, %b_beta)
  %y: f32[2, 3] = Relu(%m) @r
  output %y: f32[2, 3]
}
"""
    )
    assert Stage.CANONICAL in stages_of(model)


def test_a_canonical_model_stays_as_it_is() -> None:
    for model in (mlp(), small_convnet(), if_model()):
        Canonicalize().run(model, context())
        text = to_text(model, weights=True)
        assert not Canonicalize().run(model, context())
        assert to_text(model, weights=True) == text


@settings(deadline=None, max_examples=25)
@given(random_graph())
def test_random_graphs_keep_their_results(model: ir.Model) -> None:
    canonical(model)
    found = names(model)
    assert len(found) == len(set(found))


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 21, 23])
def test_constants_mean_what_the_opset_says(opset: int) -> None:
    """Softmax flattens before opset 13: a folder that knows only the newest operators is wrong."""
    model = parse(
        """
    f (float[2,3,4] x) => (float[2,3,4] y) <float[2,3,4] w> {
      s = Softmax <axis = 1> (w)
      y = Add (x, s)
    }""",
        weight("w", 2, 3, 4),
        opset=opset,
    )
    canonical(model)
    assert ops(model) == ["Add"]


def test_constant_nodes_of_every_kind_become_initializers() -> None:
    model = parse("""
    f (float[2,2] x) => (float[2,2] y, int64[2] z) {
      a = Constant <value = float[2] {1.0, 2.0}> ()
      b = Constant <value_float = 3.0> ()
      c = Constant <value_floats = [3.0, 4.0]> ()
      d = Constant <value_int = 1> ()
      e = Constant <value_ints = [1, 2]> ()
      xa = Mul (x, a)
      xb = Mul (xa, b)
      y = Mul (xb, c)
      s = Shape (y)
      t = Mul (s, e)
      z = Add (t, d)
    }""")
    canonical(model)
    assert "Constant" not in ops(model)
    assert ops(model)[:3] == ["Mul", "Mul", "Mul"]


def test_random_numbers_quantization_and_foreign_nodes_are_left_alone() -> None:
    model = parse(
        """
    f (float[2,4] x) => (float[2,4] y, float[2,4] z, float[2,4] r)
    <float scale = {0.1}, int8 zero = {0}, int8[4,4] w> {
      dq = DequantizeLinear (w, scale, zero)
      y = MatMul (x, dq)
      g = com.microsoft.Gelu (x)
      z = Identity (g)
      n = RandomNormal <shape = [2, 4], seed = 1.0> ()
      o = Mul (n, x)
      r = Sub (o, o)
    }""",
        ir.Tensor(np.arange(16, dtype=np.int8).reshape(4, 4), name="w"),
    )
    Canonicalize().run(model, context())
    assert ops(model) == ["DequantizeLinear", "MatMul", "Gelu", "RandomNormal", "Mul", "Sub"]


def test_an_unknown_operator_is_kept_with_its_absent_outputs() -> None:
    model = parse("""
    f (float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
      a, , b = own.Odd (x, , w)
      y = Add (a, b)
    }""")
    Canonicalize().run(model, context())
    odd = model.graph[0]
    assert [v.name for v in odd.outputs] == ["a", "", "b"]
    assert odd.inputs[1] is None


def test_what_would_grow_is_not_folded() -> None:
    """The result of Expand would take 40 GB: its size is known before anything is computed."""
    model = parse("""
    f (float[1] x) => (float[1] y) <int64[2] n = {100000, 100000}, int64 m = {100000}> {
      big = ConstantOfShape (n)
      count = ReduceSum <keepdims = 0> (big)
      zero = Constant <value_int = 0> ()
      one = Constant <value_int = 1> ()
      steps = Range (zero, m, one)
      last = ReduceMax <keepdims = 0> (steps)
      lastf = Cast <to = 1> (last)
      h = Add (x, count)
      y = Add (h, lastf)
    }""")
    Canonicalize().run(model, context())
    assert ops(model)[:3] == ["ConstantOfShape", "ReduceSum", "Range"]


def test_large_weights_are_folded_on_demand() -> None:
    reads = 0

    def read() -> ir.TensorProtocol:
        nonlocal reads
        reads += 1
        return weight("w", 16, 32)

    model = parse_lazy(
        """
    f (int64[2] i, float[2,32] x) => (float[2,32] e, float[2,16] y) <float[16,32] w> {
      e = Gather (w, i)
      wt = Transpose <perm = [1, 0]> (w)
      y = MatMul (x, wt)
    }""",
        ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape([16, 32]), name="w"),
    )
    found = context()
    FoldConstants(lazy=64).run(model, found)
    assert reads == 0
    assert ops(model) == ["Gather", "MatMul"]
    assert [site.kind for site in sites(model)] == ["gather", "matmul"]
    tensor = model.graph.initializers["wt"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), weight("w", 16, 32).numpy().T)
    assert reads == 1
    assert any(r.kind == "note" and "on demand" in r.message for r in found.remarks)


def test_half_floats_keep_their_dtype() -> None:
    model = parse(
        """
    f (float16[2,4] x) => (float16[2,3] y) <float16[3,4] w, float16[1] s> {
      scaled = Mul (w, s)
      wt = Transpose (scaled)
      y = MatMul (x, wt)
    }""",
        ir.Tensor(weight("w", 3, 4).numpy().astype(np.float16), name="w"),
        ir.Tensor(np.array([0.5], np.float16), name="s"),
    )
    canonical(model)
    assert ops(model) == ["MatMul"]
    assert model.graph[0].inputs[1].dtype == ir.DataType.FLOAT16  # type: ignore[union-attr]


def test_names_are_unique_in_every_body() -> None:
    model = parse(
        """
    f (bool c, float[2,64] x) => (float[2,64] y) <float[64,64] w> {
      y = If (c) <
        then_branch = t () => (float[2,64] o) { h = Relu (x) o = MatMul (h, w) },
        else_branch = e () => (float[2,64] o) {
          k = Constant <value_ints = [2, 64]> ()
          h = Reshape (x, k)
          big = ConstantOfShape <value = float[1] {1.0}> (k)
          o = Add (h, big)
        }>
    }""",
        weight("w", 64, 64),
    )
    for graph in graphs(model):
        for i, node in enumerate(graph):
            node.name = f"node{i}"
    canonical(model)
    found = names(model)
    assert len(found) == len(set(found))
    node_names = [node.name for node in nodes(model)]
    assert len(node_names) == len(set(node_names))


def test_constants_of_a_body_move_to_the_main_graph_where_they_are_large() -> None:
    model = parse("""
    f (bool c, float[2,4] x) => (float[n,m] y) {
      y = If (c) <
        then_branch = t () => (float[n,m] o) {
          shape = Constant <value_ints = [20, 20]> ()
          ones = ConstantOfShape <value = float[1] {1.0}> (shape)
          some = Constant <value = float[2,4] {1, 2, 3, 4, 5, 6, 7, 8}> ()
          s = Add (x, some)
          o = Identity (ones)
        },
        else_branch = e () => (float[n,m] o) { o = Identity (x) }>
    }""")
    given = feed(model)
    before = outputs(model, {**given, "c": np.array(True)})
    Canonicalize().run(model, context())
    np.testing.assert_array_equal(before[0], outputs(model, {**given, "c": np.array(True)})[0])
    assert [v.name for v in model.graph.initializers.values()] == ["ones"]


def test_the_branch_that_is_taken_replaces_an_if() -> None:
    model = parse("""
    f (float[2,4] x) => (float[2,4] y) <float[4] w = {1, 2, 3, 4}> {
      s = Shape (x)
      rank = Size (s)
      two = Constant <value_int = 2> ()
      c = Equal (rank, two)
      y = If (c) <
        then_branch = t () => (float[2,4] o) {
          h = Add (x, w)
          yes = Constant <value = bool {1}> ()
          o = If (yes) <
            then_branch = tt () => (float[2,4] i) { i = Mul (h, h) },
            else_branch = te () => (float[2,4] i) { i = Identity (h) }>
        },
        else_branch = e () => (float[2,4] o) { o = Identity (x) }>
    }""")
    canonical(model)
    assert ops(model) == ["Add", "Mul"]


def test_a_taken_branch_may_return_an_input_or_one_value_twice() -> None:
    model = parse("""
    f (float[2] x) => (float[2] y, float[2] z) <bool c = {1}> {
      y, z = If (c) <
        then_branch = t () => (float[2] a, float[2] b) { a = Identity (x) b = Identity (x) },
        else_branch = e () => (float[2] a, float[2] b) { a = Neg (x) b = Neg (x) }>
    }""")
    canonical(model)
    assert ops(model) == ["Identity", "Identity"]


def test_identities_stay_where_a_body_returns_a_value_from_outside() -> None:
    model = parse("""
    f (bool c, float[2] x) => (float[2] y, float[2] z, float[2] w) {
      h = Abs (x)
      y = If (c) <
        then_branch = t () => (float[2] a) { a = Identity (h) },
        else_branch = e () => (float[2] a) { b = Relu (h) a = Identity (b) }>
      z = Identity (h)
      w = Identity (h)
    }""")
    canonical(model)
    assert ops(model) == ["Abs", "If", "Identity"]


def test_loops_keep_their_results() -> None:
    model = parse("""
    f (float[2] x) => (float[2] y, float[k,2] all) {
      n = Constant <value_int = 3> ()
      go = Constant <value = bool {1}> ()
      y, all = Loop (n, go, x) <body = body (int64 i, bool c, float[2] v)
          => (bool c2, float[2] v2, float[2] out) {
        one = Constant <value_float = 1.0> ()
        two = Add (one, one)
        c2 = Identity (c)
        t = Mul (v, two)
        v2 = Identity (t)
        out = Identity (t)
      }>
    }""")
    canonical(model)
    body = (
        next(node for node in model.graph if node.op_type == "Loop").attributes["body"].as_graph()
    )
    assert [node.op_type for node in body] == ["Identity", "Mul", "Identity"]


def test_inference_dropout_goes_training_dropout_stays() -> None:
    model = parse(
        """
    f (float[4] x) => (float[4] y) <bool on = {1}, bool off = {0}, float half = {0.5}> {
      a = Dropout (x)
      b = Dropout (a, half, off)
      h = Relu (b)
      c, mask = Dropout (h, half, on)
      z = Sub (c, c)
      y = Add (h, z)
    }"""
    )
    Canonicalize().run(model, context())
    assert ops(model) == ["Relu", "Dropout", "Sub", "Add"]


def test_a_weight_with_leading_ones_becomes_a_matrix() -> None:
    text = """
    f (float[2,3,4] x, float[3,4] u) => (float[2,3,5] y, float[1,3,5] z) <float[1,4,5] w> {
      y = MatMul (x, w)
      z = MatMul (u, w)
    }"""
    model = parse(text, weight("w", 1, 4, 5))
    canonical(model)
    first, second = (site_of(node) for node in model.graph)
    assert first is not None
    assert first.kind == "matmul"
    # The second result has the weight's rank: its weight stays as it is.
    assert second is not None
    assert second.kind == "activations"


def test_functions_are_inlined_but_those_of_qgraph() -> None:
    header = '<ir_version: 8, opset_import: ["" : 17, "local" : 1, "qgraph" : 1]>'
    model = ir.from_onnx_text(f"""{header}
    f (float[2] x) => (float[2] y) {{
      a = local.twice (x)
      b = qgraph.Same (a)
      y = local.twice (b)
    }}
    <domain: "local", opset_import: ["" : 17]>
    twice (v) => (r) {{ r = Add (v, v) }}
    <domain: "qgraph", opset_import: ["" : 17]>
    Same (v) => (r) {{ r = Identity (v) }}
    """)
    canonical(model)
    assert ops(model) == ["Add", "Same", "Add"]
    assert [f.name for f in model.functions.values()] == ["Same"]


def test_functions_of_another_opset_stay_calls() -> None:
    header = '<ir_version: 8, opset_import: ["" : 17, "local" : 1]>'
    model = ir.from_onnx_text(f"""{header}
    f (float[2] x) => (float[2] y) {{ a = Abs (x) y = local.twice (a) }}
    <domain: "local", opset_import: ["" : 18]>
    twice (v) => (r) {{ r = Add (v, v) }}
    """)
    found = context()
    Canonicalize().run(model, found)
    assert ops(model) == ["Abs", "twice"]
    assert len(model.functions) == 1
    assert any(r.kind == "declined" and "Opset mismatch" in r.message for r in found.remarks)


def test_a_default_that_callers_may_override_stays_an_input() -> None:
    text = "f (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> { y = Mul (x, w) }"
    model = parse(text)
    Canonicalize().run(model, context())
    assert [v.name for v in model.graph.inputs] == ["x", "w"]
    assert list(model.graph.initializers) == ["w"]


def test_old_models_list_constants_as_inputs_and_no_longer_do() -> None:
    text = "f (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> { y = Mul (x, w) }"
    model = parse(text, ir_version=3)
    found = context()
    Canonicalize().run(model, found)
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert model.ir_version == 4
    assert any("no longer inputs" in r.message for r in found.remarks)
    onnx.checker.check_model(ir.to_proto(model))


def test_a_node_that_does_not_run_is_kept() -> None:
    """Shapes that do not fit fail when they are reached, which may be never."""
    model = parse("""
    f (bool c, float[2] x) => (float[k] y) <float[2] a = {1, 2}, float[3] b = {1, 2, 3}> {
      y = If (c) <
        then_branch = t () => (float[k] o) { o = Neg (x) },
        else_branch = e () => (float[k] o) { ab = Add (a, b) o = Add (ab, x) }>
    }""")
    Canonicalize().run(model, context())
    assert [node.op_type for node in nodes(model)] == ["If", "Neg", "Add", "Add"]


def test_sparse_and_string_constants_are_left_alone() -> None:
    model = parse("""
    f (float[2] x) => (float[2] y, string s) {
      t = Constant <value_string = "wörter"> ()
      s = Identity (t)
      y = Abs (x)
    }""")
    Canonicalize().run(model, context())
    assert ops(model) == ["Constant", "Abs"]


def test_weights_are_not_read() -> None:
    def read() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    lazy = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape([64, 64]), name="w")
    text = "f (float[2,64] x) => (float[2,64] y) <float[64,64] w> { y = MatMul (x, w) }"
    model = parse_lazy(text, lazy)
    Canonicalize().run(model, context())
    assert model.graph[0].outputs[0].dtype == ir.DataType.FLOAT


REAL: dict[str, Callable[[], Path]] = {
    "efficientnet": zoo.efficientnet_lite0_onnx,
    "minilm": zoo.minilm_onnx,
    "det": lambda: zoo.ppocr("det"),
    "rec": lambda: zoo.ppocr("rec"),
    "cls": lambda: zoo.ppocr("cls"),
    "silero": lambda: zoo.silero_vad("silero_vad.onnx"),
    "silero-16k": lambda: zoo.silero_vad("silero_vad_16k_op15.onnx"),
    "magika": zoo.magika,
    "smollm2": zoo.smollm2_genai,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models_keep_their_results(name: str) -> None:
    """All float-stage passes, in seconds, without reading large weights."""
    path = REAL[name]()
    given = first_feed(load(path), None, 0)
    before = run(open_session(load(path), optimized=False), given)
    model = load(path)
    manager = PassManager([Canonicalize(), FoldBatchNorm(), ConvertOpset(21)])
    manager.run(model, context())
    assert sum(timing.seconds for timing in manager.timings) < 10
    assert "BatchNormalization" not in {node.op_type for node in nodes(model)}
    found = names(model)
    assert len(found) == len(set(found))
    for optimized in (False, True):
        after = run(open_session(model, optimized=optimized), given)
        for old, new in zip(before, after, strict=True):
            scale = max(np.abs(old).max(initial=0), 1e-2)
            np.testing.assert_allclose(new, old, rtol=1e-3, atol=1e-4 * scale)
    if name == "smollm2":
        assert {site.kind for site in sites(model)} == {"gather", "matmul"}
