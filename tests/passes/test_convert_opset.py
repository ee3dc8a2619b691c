"""Raising the opset: equal results, what stays where it is, and what is declined."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.backends.onnx import OnnxTarget
from qgraph.graph.reading import nodes, opset
from qgraph.graph.text.printer import to_text
from qgraph.io.session import open_session, run
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.convert_opset import ConvertOpset
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import PassManager
from qgraph.pipeline.target import Target
from tests.end_to_end.test_conformance import (
    CHUNKS,
    FOLDERS,
    Case,
    close,
    failures,
    generated,
    node_cases,
    on_disk,
)
from tests.end_to_end.test_conformance import run as run_file
from tests.models import feed, ops, outputs, random_graph, weight


def parse(text: str, *tensors: ir.TensorProtocol, version: int) -> ir.Model:
    header = f'<ir_version: 6, opset_import: ["" : {version}, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(f"{header}\n{text}")
    proto.graph.initializer.extend(ir.serde.serialize_tensor(tensor) for tensor in tensors)
    return ir.from_proto(proto)


def converted(model: ir.Model, version: int) -> Context:
    """Canonicalize and convert in place, checking that the results stay."""
    given = feed(model)
    before = outputs(model, given)
    context = Context(target=Mock(spec=Target))
    PassManager([Canonicalize(), ConvertOpset(version)], verify=True).run(model, context)
    assert opset(model) == version
    for optimized in (False, True):
        after = run(open_session(model, optimized=optimized, threads=1), given)
        for old, new in zip(before, after, strict=True):
            np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)
    return context


def test_golden_text() -> None:
    model = parse(
        """
    f (float[2,1,3] x) => (float[2,3] y) {
      r = Relu (x)
      s = Squeeze <axes = [1]> (r)
      y = Softmax (s)
    }""",
        version=11,
    )
    squeeze = model.graph[1]
    squeeze.name, squeeze.metadata_props["layer"] = "encoder.squeeze", "encoder"
    context = converted(model, 13)
    assert (
        to_text(model)
        == """\
ir_version = 7

graph f {
  opset 13
  opset com.microsoft 1
  input %x: f32[2, 1, 3]
  weight %encoder.squeeze_Constant = i64[1] {1}
  %r: f32[2, 1, 3] = Relu(%x)
  %s: f32[2, 3] = Squeeze(%r, %encoder.squeeze_Constant) @encoder.squeeze
  %y: f32[2, 3] = Softmax(%s) {axis = -1}
  output %y: f32[2, 3]
}
"""
    )
    assert model.graph[1].metadata_props["layer"] == "encoder"
    assert context.remarks[-1].numbers == {"replaced_nodes": 2}


def test_a_softmax_that_flattens() -> None:
    model = parse(
        "f (float[2,3,4] x) => (float[2,3,4] y) { h = Softmax <axis = 1> (x) y = Relu (h) }",
        version=11,
    )
    converted(model, 21)
    found = [node.name for node in nodes(model)]
    assert len(found) == len(set(found))
    assert "Softmax" in ops(model)


def test_bodies_foreign_nodes_and_absent_outputs() -> None:
    model = parse(
        """
    f (bool c, float[2,8] x) => (float[2,4] y, float[2,8] z)
    {
      y = If (c) <
        then_branch = t () => (float[2,4] o) {
          u = Unsqueeze <axes = [0]> (x)
          p, q = Split <axis = 2, split = [4, 4]> (u)
          s = Squeeze <axes = [0]> (p)
          o = Softmax <axis = 1> (s)
        },
        else_branch = e () => (float[2,4] o) {
          m = MatMul (x, w)
          g = com.microsoft.Gelu (m)
          h, i, j, k = Split <axis = 1> (g)
          o = Add (h, i)
        }>
      z, mean = com.microsoft.SkipLayerNormalization (x, x, scale, bias)
    }""",
        weight("w", 8, 16),
        weight("scale", 8),
        weight("bias", 8),
        version=12,
    )
    foreign = model.graph[1]
    converted(model, 18)
    assert foreign in list(model.graph)
    assert model.opset_imports["com.microsoft"] == 1


def test_weights_are_not_read() -> None:
    def read() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    lazy = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape([64, 64]), name="w")
    model = parse("f (float[2,64] x) => (float[2,64] y) { y = MatMul (x, w) }", version=12)
    value = model.graph[0].inputs[1]
    assert value is not None
    value.const_value, value.type, value.shape = lazy, ir.TensorType(ir.DataType.FLOAT), lazy.shape
    model.graph.register_initializer(value)
    context = Context(target=Mock(spec=Target))
    assert ConvertOpset(13).run(model, context)
    assert model.graph[0].inputs[1] is value


def test_a_newer_model_is_left_alone() -> None:
    model = parse("f (float[2] x) => (float[2] y) { y = Relu (x) }", version=17)
    context = Context(target=Mock(spec=Target))
    assert not ConvertOpset(13).run(model, context)
    assert opset(model) == 17
    assert not context.remarks


def declines(model: ir.Model, reason: str) -> None:
    before = to_text(model, weights=True)
    context = Context(target=Mock(spec=Target))
    assert not ConvertOpset(13).run(model, context)
    assert to_text(model, weights=True) == before
    assert context.remarks[-1].kind == "declined"
    assert reason in context.remarks[-1].message


def test_functions_must_be_inlined_first() -> None:
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 12, "local" : 1]>
    f (float[2] x) => (float[2] y) { y = local.twice (x) }
    <domain: "local", opset_import: ["" : 12]>
    twice (v) => (r) { r = Add (v, v) }""")
    declines(model, "opset 12 cannot become 13: function 'twice'")


def test_what_the_converter_refuses_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
        raise RuntimeError("\nNo Adapter For Relu\n")

    monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)
    model = parse("f (float[2] x) => (float[2] y) { y = Relu (x) }", version=12)
    declines(model, "No Adapter For Relu")


def test_the_scan_of_opset_8_is_declined() -> None:
    model = parse(
        """
    f (float[1,2] a, float[1,3,2] x) => (float[1,2] y, float[1,3,2] z) {
      y, z = Scan <num_scan_inputs = 1, body = b (float[2] s, float[2] i)
          => (float[2] t, float[2] o) {
        t = Add (s, i)
        o = Relu (t)
      }> (, a, x)
    }""",
        version=8,
    )
    declines(model, "batch axis")


MOVED = {
    "upsample": (9, 'Upsample <mode = "linear"> (x, s)', [1, 1, 2, 2]),
    "upsample-nearest": (9, 'Upsample <mode = "nearest"> (x, s)', [1, 1, 1.5, 1.7]),
    "resize": (10, 'Resize <mode = "linear"> (x, s)', [1, 1, 1.5, 1.7]),
    "resize-down": (10, 'Resize <mode = "nearest"> (x, s)', [1, 1, 0.6, 0.5]),
    "hardmax": (11, "Hardmax <axis = 2> (x)", []),
    "group-norm": (18, "GroupNormalization <num_groups = 2> (x, s, s)", [1.5, 0.5]),
}


@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize("version", [13, 21])
def test_what_the_converter_gets_wrong(name: str, version: int) -> None:
    old, call, numbers = MOVED[name]
    text = f"m (float[2,4,6,6] x) => (float[p,q,r,t] y) {{ y = {call} }}"
    tensors = [ir.Tensor(np.array(numbers, np.float32), name="s")] if numbers else []
    model = parse(text, *tensors, version=old)
    if old < version:
        converted(model, version)


def test_other_results_are_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what is known to be wrong were not known, both models running would tell."""
    monkeypatch.setattr("qgraph.passes.convert_opset.is_own", lambda *_: False)
    model = parse("m (float[2,4,6] x) => (float[p,q,r] y) { y = Hardmax (x) }", version=11)
    context = Context(target=OnnxTarget())
    PassManager([Canonicalize(), ConvertOpset(13)]).run(model, context)
    assert opset(model) == 11
    assert "output 'y' would be another one" in str(context.remarks)
    assert outputs(model, feed(model))[0].sum() == 2


@settings(deadline=None, max_examples=25)
@given(random_graph(), st.sampled_from([22, 23, 24]))
def test_random_graphs_keep_their_results(model: ir.Model, version: int) -> None:
    converted(model, version)


def raised(case: Case, folder: Path) -> None:
    """Convert to opset 21 and run: raises or finds another result."""
    model = ir.load(case.path)
    context = Context(target=Mock(spec=Target))
    PassManager([Canonicalize(), ConvertOpset(21)]).run(model, context)
    if [r for r in context.remarks if r.kind == "declined"]:
        return
    path = folder / "out.onnx"
    ir.save(model, path)
    onnx.checker.check_model(path)
    for (_, wanted), got in zip(case.data, run_file(path, case, False), strict=True):
        assert close(wanted, got, case.rtol, case.atol), "other result"


@pytest.mark.slow
@pytest.mark.parametrize("group", [*FOLDERS, *range(CHUNKS)])
def test_conformance_cases_keep_their_results(group: str | int, tmp_path: Path) -> None:
    if isinstance(group, str):
        cases = on_disk(group)
    else:
        cases = node_cases(generated()[group::CHUNKS], tmp_path)
    _, problems = failures(cases, lambda case: raised(case, tmp_path))
    assert not problems, "\n".join(problems)
