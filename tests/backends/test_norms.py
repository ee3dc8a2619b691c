"""Residual norms taken apart compute what the fused ones do, in operators that stay apart."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings

from qgraph.backends.cpu.norms import part_norms, part_rms_norms
from qgraph.backends.cpu.target import CpuTarget
from qgraph.graph.editing import remove_dead
from qgraph.pipeline.verify import check_structure
from tests.models import build, feed, ops, outputs, random_graph, weight
from tests.pipelines import body, golden

LAYER_NORM = """
g (float[2,3,8] x, float[2,3,8] r) => (float[2,3,8] y) {
  s = Add (x, r)
  y = LayerNormalization <axis = -1, epsilon = 1e-6> (s, gamma, beta)
}"""
WITH_BIAS = """
g (float[2,3,8] x, float[2,3,8] r) => (float[2,3,8] y) {
  a = Add (bias, x)
  s = Add (a, r)
  y = LayerNormalization <axis = -1> (s, gamma, beta)
}"""
NORM = (weight("gamma", 8), weight("beta", 8))


def same(model: ir.Model, reference: ir.Model, rtol: float = 1e-5) -> None:
    """Both compute the same, optimizations on and off."""
    from qgraph.io.session import open_session, run

    assert not check_structure(model)
    given_ = feed(reference)
    wanted = outputs(reference, given_)
    for optimized in (False, True):
        found = run(open_session(model, optimized=optimized, threads=1), given_)
        for a, b in zip(wanted, found, strict=True):
            np.testing.assert_allclose(b, a, rtol=rtol, atol=rtol)


def optimized_ops(model: ir.Model, tmp_path: str) -> list[str]:
    """Operator types of the graph that onnxruntime really runs."""
    import onnxruntime as ort

    from qgraph.io.session import session_options

    options = session_options(threads=1)
    options.optimized_model_filepath = f"{tmp_path}/optimized.onnx"
    data = ir.to_proto(model).SerializeToString()
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node]


# --- LayerNormalization ---------------------------------------------------------------------------


def test_layer_norm_before_and_after(tmp_path: str) -> None:
    model = build(LAYER_NORM, *NORM)
    reference = model.clone()
    assert "SkipLayerNormalization" in optimized_ops(model, tmp_path)
    assert part_norms(model)
    assert body(model) == golden("""
        %s_sum: f32[2, 3, 8] = Sum(%x, %r)
        %y: f32[2, 3, 8] = LayerNormalization(%s_sum, %gamma, %beta) {axis = -1, epsilon = 1e-06}
    """)
    assert optimized_ops(model, tmp_path) == ["Sum", "LayerNormalization"]
    same(model, reference)


def test_a_bias_joins_the_sum(tmp_path: str) -> None:
    model = build(WITH_BIAS, *NORM, weight("bias", 8))
    reference = model.clone()
    assert part_norms(model)
    remove_dead(model)
    assert body(model) == golden("""
        %s_sum: f32[2, 3, 8] = Sum(%bias, %x, %r)
        %y: f32[2, 3, 8] = LayerNormalization(%s_sum, %gamma, %beta) {axis = -1}
    """)
    assert optimized_ops(model, tmp_path) == ["Sum", "LayerNormalization"]
    same(model, reference)


def test_a_biased_value_that_others_read_is_added_as_it_is() -> None:
    text = WITH_BIAS.replace("(float[2,3,8] y)", "(float[2,3,8] y, float[2,3,8] z)")
    model = build(text.replace("}", "  z = Relu (a)\n}"), *NORM, weight("bias", 8))
    reference = model.clone()
    assert part_norms(model)
    assert ops(model) == ["Add", "Sum", "LayerNormalization", "Relu"]
    same(model, reference)


def test_two_computed_values_added_before_do_not_join() -> None:
    text = WITH_BIAS.replace("Add (bias, x)", "Add (r, x)")
    model = build(text, *NORM)
    reference = model.clone()
    assert part_norms(model)
    assert ops(model) == ["Add", "Sum", "LayerNormalization"]
    same(model, reference)


@pytest.mark.parametrize("outputs_", ["float[2,3,8] y, float[2,3,8] s", "float[2,3,8] y"])
def test_the_sum_is_used_again(outputs_: str) -> None:
    text = f"""
    g (float[2,3,8] x, float[2,3,8] r) => ({outputs_}, float[2,3,8] z) {{
      s = Add (x, r)
      n = LayerNormalization <axis = -1> (s, gamma, beta)
      y = Mul (n, n)
      z = Add (y, s)
    }}"""
    model = build(text, *NORM)
    reference = model.clone()
    assert part_norms(model)
    assert "Sum" in ops(model)
    assert [v.name for v in model.graph.outputs] == [v.name for v in reference.graph.outputs]
    same(model, reference)


def test_two_norms_of_one_sum() -> None:
    text = """
    g (float[2,3,8] x, float[2,3,8] r) => (float[2,3,8] y, float[2,3,8] z) {
      s = Add (x, r)
      y = LayerNormalization <axis = -1> (s, gamma, beta)
      z = LayerNormalization <axis = -1> (s, beta, gamma)
    }"""
    model = build(text, *NORM)
    reference = model.clone()
    assert part_norms(model)
    assert ops(model) == ["Sum", "LayerNormalization", "LayerNormalization"]
    same(model, reference)


def test_half_precision_is_left_alone() -> None:
    half = [ir.Tensor(t.numpy().astype(np.float16), name=t.name) for t in NORM]
    model = build(LAYER_NORM.replace("float[", "float16["), *half)
    assert not part_norms(model)
    assert ops(model) == ["Add", "LayerNormalization"]


@pytest.mark.parametrize("op", ["Mul", "Sub", "Sum"])
def test_norms_of_something_else_are_left_alone(op: str) -> None:
    model = build(LAYER_NORM.replace("Add", op), *NORM)
    assert not part_norms(model)
    assert ops(model) == [op, "LayerNormalization"]


def test_a_norm_of_an_input_is_left_alone() -> None:
    text = """
    g (float[2,3,8] s) => (float[2,3,8] y) {
      y = LayerNormalization <axis = -1> (s, gamma, beta)
    }"""
    assert not part_norms(build(text, *NORM))


# --- SkipSimplifiedLayerNormalization -------------------------------------------------------------


def rms(signature: str, statements: str, *tensors: ir.TensorProtocol) -> ir.Model:
    """A model with onnxruntime's own operators."""
    header = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'
    proto = onnx.parser.parse_model(f"{header} g {signature} {{ {statements} }}")
    for tensor in tensors:
        initializer = ir.to_proto(tensor)
        assert isinstance(initializer, onnx.TensorProto)
        proto.graph.initializer.append(initializer)
    return ir.from_proto(proto)


SIGNATURE = "(float[2,3,8] x, float[2,3,8] r) => (float[2,3,8] y)"
TWO = "(float[2,3,8] x, float[2,3,8] r) => (float[2,3,8] y, float[2,3,8] s)"
SKIP = "com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 1e-6>"
GAMMA, BIAS = weight("gamma", 8), weight("bias", 8)


@pytest.mark.parametrize("bias", [False, True])
def test_rms_norm_before_and_after(bias: bool, tmp_path: str) -> None:
    inputs = "x, r, gamma" + (", bias" if bias else "")
    model = rms(TWO, f"y, m, v, s = {SKIP} ({inputs})", GAMMA, *([BIAS] if bias else []))
    reference = model.clone()
    assert part_rms_norms(model)
    more = ", %bias" if bias else ""
    assert body(model) == golden(f"""
        %s: f32[2, 3, 8] = Sum(%x, %r{more}) @y_sum
        %y: f32[2, 3, 8] = SimplifiedLayerNormalization(%s, %gamma) {{axis = -1, epsilon = 1e-06}}
    """)
    assert sorted(optimized_ops(model, tmp_path)) == ["SimplifiedLayerNormalization", "Sum"]
    same(model, reference)


def test_the_sum_of_one_is_the_residual_of_the_next() -> None:
    text = f"a, m, v, s = {SKIP} (x, r, gamma) b = Relu (a) y, m2, v2, t = {SKIP} (b, s, gamma)"
    model = rms(SIGNATURE, text, GAMMA)
    model.graph[1].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    reference = model.clone()
    assert part_rms_norms(model)
    parted = ["Sum", "SimplifiedLayerNormalization"]
    assert ops(model) == [*parted, "Relu", *parted]
    same(model, reference)


def test_without_the_sum() -> None:
    model = rms(SIGNATURE, f"y = {SKIP} (x, r, gamma)", GAMMA)
    reference = model.clone()
    assert part_rms_norms(model)
    same(model, reference)


def test_the_default_epsilon_stays() -> None:
    skip = SKIP.split(" <")[0]
    model = rms(SIGNATURE, f"z = Sub (x, x) y = {skip} (x, z, gamma)", GAMMA)
    model.graph[0].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    reference = model.clone()
    assert part_rms_norms(model)
    given_ = feed(model)
    given_["x"] *= np.float32(1e-6)  # where the epsilon is what counts
    (wanted,), (found,) = outputs(reference, given_), outputs(model, given_)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_statistics_that_are_read_keep_the_operator() -> None:
    signature = "(float[2,3,8] x, float[2,3,8] r) => (float[2,3,8] y, float[2,3,1] v)"
    model = rms(signature, f"y, m, v = {SKIP} (x, r, gamma)", GAMMA)
    assert not part_rms_norms(model)


def test_half_precision_rms_is_left_alone() -> None:
    half = ir.Tensor(GAMMA.numpy().astype(np.float16), name="gamma")
    model = rms(SIGNATURE.replace("float[", "float16["), f"y = {SKIP} (x, r, gamma)", half)
    assert not part_rms_norms(model)


# --- when, and what else --------------------------------------------------------------------------


@pytest.mark.parametrize(("speedup", "parted"), [(0.8, False), (1.0, False), (1.6, True)])
def test_the_measured_table_decides(
    speedup: float, parted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qgraph.backends import cpu

    class FakeTable:
        def speedup(self, case: object) -> float:
            return speedup

    monkeypatch.setattr(cpu.target, "host_table", FakeTable)
    target = CpuTarget()
    model = build(LAYER_NORM, *NORM)
    assert target.legalize(model) == parted
    assert ("Sum" in ops(model)) == parted


@settings(deadline=None, max_examples=25)
@given(random_graph())
def test_graphs_without_norms_stay_as_they_are(model: ir.Model) -> None:
    before = body(model)
    assert not part_norms(model)
    assert not part_rms_norms(model)
    assert body(model) == before
