"""The text form: golden, round trips over all that ONNX can express, and errors with a line."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import ModelError, QGraphError
from qgraph.graph.provenance import layer
from qgraph.graph.text.parser import from_text
from qgraph.graph.text.printer import to_text
from qgraph.graph.text.tensors import content_hash
from qgraph.io.session import open_session, run
from qgraph.numerics.spec import PerAxis, PerBlock, PerTensor, PerToken, QuantSpec
from tests.models import (
    feed,
    if_model,
    mlp,
    outputs,
    random_graph,
    small_convnet,
    transformer_block,
)

ONNX_DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
DTYPES = [d for d in ir.DataType if d not in (ir.DataType.UNDEFINED, ir.DataType.STRING)]

GOLDEN = """\
ir_version = 10
producer_name = "pytorch"

graph main {
  opset 21
  opset qgraph 1
  input %x: f32[batch, 2] <uint8 per-tensor asym minmax>
  input %"odd name": seq(f32[?, 3])
  input %maybe: optional(i64[*])
  weight %w <int8 per-axis(1) sym absmax group=qkv> = f32[2, 2] {0.1, -1.5, inf, 1e-07}
  weight %shape = i64[2] {0, 2}
  %/fc1/m: f32[batch, 2] = MatMul(%x <uint8 per-token sym dynamic>, %w) @/fc1/MatMul
  %c: bf16[] = Constant() {value = bf16[] {0.5}}
  %clipped: f32[batch, 2] = Clip(%/fc1/m, _, %/fc1/m)
  %kept: f32[batch, 2], _ = Dropout(%clipped)
  %q: u8[batch, 2], %s = qgraph::quantize:fast(%kept) {axis = -1, eps = 1e-05, mode = "up\\n"}
  %y: f32[batch, ?] = If(%flags) @choose {
    else_branch = graph {
      %e: f32[batch, 2] = Reshape(%kept, %shape)
      output %e: f32[batch, 2]
    },
    then_branch = graph then {
      %t = Identity(%kept)
      output %t
    },
  }
  output %y: f32[batch, ?]
}

function qgraph::quantize:fast {
  opset 21
  attribute axis
  attribute eps = 0.001
  input %v
  %top = ReduceMax(%v) {keepdims = $axis: int}
  %bytes = Cast(%v) {to = 2}
  output %bytes
  output %top
}
"""


def round_trip(model: ir.Model) -> ir.Model:
    """`model` through its complete text, which must print again as the same bytes."""
    text = to_text(model, weights=True)
    parsed = from_text(text)
    assert to_text(parsed, weights=True) == text
    assert to_text(parsed) == to_text(model)
    return parsed


def constant_model(tensor: ir.TensorProtocol) -> ir.Model:
    """A model that is one Constant, small enough for every dtype."""
    node = ir.node("Constant", [], {"value": ir.AttrTensor("value", tensor)}, name="y")
    node.outputs[0].name = "y"
    return ir.Model(ir.Graph([], node.outputs, nodes=[node], opset_imports={"": 25}), ir_version=13)


def constant_of(model: ir.Model) -> ir.TensorProtocol:
    """The tensor that `constant_model` was given."""
    return model.graph[0].attributes["value"].as_tensor()


def test_golden() -> None:
    text = GOLDEN.replace("If(%flags)", "If(%kept)")
    model = from_text(text)
    assert to_text(model) == text
    assert to_text(from_text(to_text(model, weights=True))) == text
    matmul = model.graph[0]
    assert matmul.name == "/fc1/MatMul"
    assert matmul.meta["qgraph.in"] == {
        0: QuantSpec(ir.DataType.UINT8, PerToken(), observer="dynamic")
    }
    expected = QuantSpec(ir.DataType.INT8, PerAxis(1), observer="absmax", group="qkv")
    assert model.graph.initializers["w"].meta["qgraph.spec"] == expected
    odd = model.graph.inputs[1]
    assert isinstance(odd.type, ir.SequenceType)
    assert odd.name == "odd name"
    assert model.graph[3].outputs[1].name == ""
    assert model.graph[4].op_identifier() == ("qgraph", "quantize", "fast")


def test_a_built_model_prints_as_expected() -> None:
    model = mlp((4, 2))
    model.graph.inputs[0].meta["qgraph.stats"] = "[-1,\n 2]"
    model.graph[0].metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'encoder.fc', 'matmul']"
    weight = model.graph.initializers["w0"]
    assert weight.const_value is not None
    weight.const_value = ir.Tensor(np.arange(10, dtype=np.float32).reshape(5, 2))
    bias = model.graph.initializers["b0"]
    bias.const_value = ir.Tensor(np.array([0.1, -2], np.float32))
    assert to_text(model) == (
        "ir_version = 10\n\n"
        "graph mlp {\n"
        "  opset 21\n"
        "  input %x: f32[batch, 4]  // [-1, 2]\n"
        "  weight %w0 = f32[5, 2] {#" + content_hash(weight.const_value) + "}\n"
        "  weight %b0 = f32[2] {0.1, -2.0}\n"
        "  %m0: f32[batch, 2] = MatMul(%x, %w0)  // encoder.fc\n"
        "  %y: f32[batch, 2] = Add(%m0, %b0)\n"
        "  output %y: f32[batch, 2]\n"
        "}\n"
    )


def test_the_hash_depends_on_dtype_shape_and_data_alone() -> None:
    data = np.arange(12, dtype=np.int32)
    known = content_hash(ir.Tensor(data))
    assert known == content_hash(ir.Tensor(data.copy(), name="other"))
    others = [data + 1, data.reshape(3, 4), data.view(np.uint32)]
    assert known not in {content_hash(ir.Tensor(other)) for other in others}


def test_all_metadata_is_in_the_complete_text_and_none_of_it_in_the_short_one() -> None:
    model = mlp((4, 2))
    model.metadata_props["a"] = "1"
    model.graph.metadata_props["b"] = 'two "words"'
    model.graph[0].metadata_props["c"] = "line\nline"
    model.graph.inputs[0].metadata_props["d"] = "\udcff\x00é"
    parsed = round_trip(model)
    assert parsed.metadata_props == model.metadata_props
    assert parsed.graph.metadata_props == model.graph.metadata_props
    assert parsed.graph[0].metadata_props == model.graph[0].metadata_props
    assert parsed.graph.inputs[0].metadata_props == model.graph.inputs[0].metadata_props
    assert "words" not in to_text(model)


@pytest.mark.parametrize("scopes", [None, "[]", "['only']", "not a list", "[unclosed"])
def test_layer_is_empty_where_it_is_not_known(scopes: str | None) -> None:
    node = ir.node("Relu", [None])
    if scopes is not None:
        node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    assert layer(node) == ""


@pytest.mark.parametrize(
    "model", [mlp(), small_convnet(), transformer_block(), if_model()], ids=lambda m: m.graph.name
)
def test_models_compute_the_same_after_a_round_trip(model: ir.Model) -> None:
    inputs = feed(model)
    for old, new in zip(outputs(model, inputs), outputs(round_trip(model), inputs), strict=True):
        np.testing.assert_array_equal(old, new)


@settings(max_examples=40, deadline=None)
@given(random_graph())
def test_random_graphs_compute_the_same_after_a_round_trip(model: ir.Model) -> None:
    inputs = feed(model)
    for old, new in zip(outputs(model, inputs), outputs(round_trip(model), inputs), strict=True):
        np.testing.assert_array_equal(old, new)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from([(), (0,), (1,), (3,), (2, 4), (3, 3)]), st.data())
def test_every_bit_of_every_dtype_comes_back(
    dtype: ir.DataType, shape: tuple[int, ...], data: st.DataObject
) -> None:
    size = -(-int(np.prod(shape)) * dtype.bitwidth // 8)
    raw = data.draw(st.binary(min_size=size, max_size=size))
    if dtype == ir.DataType.BOOL:
        raw = bytes(byte & 1 for byte in raw)
    if dtype.bitwidth < 8:
        array = np.frombuffer(raw, np.uint8)
        if dtype.bitwidth == 6 and int(np.prod(shape)) * 6 % 8:
            array = np.zeros_like(array)
        tensor: ir.TensorProtocol = ir.PackedTensor(array, dtype, shape=shape)
    else:
        tensor = ir.Tensor(np.frombuffer(raw, dtype.numpy()).reshape(shape), dtype=dtype)
    parsed = constant_of(round_trip(constant_model(tensor)))
    assert (parsed.dtype, parsed.shape) == (dtype, ir.Shape(shape))
    assert parsed.tobytes() == tensor.tobytes()


@given(st.lists(st.floats(width=32), max_size=8), st.sampled_from([np.float32, np.float64]))
def test_small_float_tensors_show_numbers(
    values: list[float], kind: type[np.floating[Any]]
) -> None:
    array = np.array(values, kind)
    text = to_text(constant_model(ir.Tensor(array)))
    parsed = constant_of(from_text(text)).numpy()
    np.testing.assert_array_equal(parsed, array)
    assert "base64" not in text or np.isnan(array).any()


@given(st.lists(st.binary(max_size=5), max_size=12))
def test_string_tensors_come_back(values: list[bytes]) -> None:
    tensor = ir.StringTensor(values, shape=ir.Shape([len(values)]))
    parsed = constant_of(round_trip(constant_model(tensor)))
    assert isinstance(parsed, ir.StringTensor)
    assert list(parsed.string_data()) == values


@given(
    st.text(min_size=1), st.text(min_size=1), st.text(), st.text(min_size=1), st.text(min_size=1)
)
def test_names_of_any_characters_come_back(
    value: str, node: str, domain: str, attribute: str, dim: str
) -> None:
    x = ir.Value(name=value, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([dim]))
    made = ir.Node(domain, value, [x], [ir.AttrString(attribute, node)], name=node)
    made.outputs[0].name = value + "'"
    graph = ir.Graph([x], made.outputs, nodes=[made], name=value, opset_imports={domain: 1})
    parsed = round_trip(ir.Model(graph, ir_version=10)).graph
    assert (parsed.name, parsed[0].name, parsed[0].op_type) == (value, node, value)
    assert [v.name for v in (*parsed.inputs, *parsed.outputs)] == [value, value + "'"]
    assert parsed[0].domain == made.domain
    assert parsed[0].attributes[attribute].value == node
    assert str(parsed.inputs[0].shape) == str(x.shape)


def test_common_names_need_no_quotes() -> None:
    for name in (
        "/layer.0/q_proj/MatMul_output_0",
        "model/dense/BiasAdd:0",
        "onnx::MatMul_12",
        "é",
    ):
        x = ir.val(name, ir.DataType.FLOAT, [1])
        text = to_text(ir.Model(ir.Graph([x], [x], nodes=[]), ir_version=10))
        assert f"input %{name}: f32[1]" in text


def test_every_kind_of_attribute_comes_back() -> None:
    tensor = ir.tensor([1, 2], ir.DataType.INT4)
    kind = ir.TypeAndShape(ir.SequenceType(ir.TensorType(ir.DataType.FLOAT)), ir.Shape([2, None]))
    graph = mlp((2, 2)).graph
    attributes = [
        ir.AttrInt64("int", -3),
        ir.AttrInt64s("ints", [1, 2]),
        ir.AttrInt64s("no_ints", []),
        ir.AttrFloat32("float", 0.1),
        ir.AttrFloat32("huge", 1e300),
        ir.AttrFloat32s("floats", [1.0, float("inf"), -float("inf"), float("nan")]),
        ir.AttrFloat32s("no_floats", []),
        ir.AttrString("string", ""),
        ir.Attr("bytes", ir.AttributeType.STRING, b"\xff\x00"),
        ir.AttrStrings("strings", ["a", "b, c"]),
        ir.AttrStrings("no_strings", []),
        ir.AttrTensor("tensor", tensor),
        ir.AttrTensors("tensors", [tensor, tensor]),
        ir.AttrTensors("no_tensors", []),
        ir.AttrGraph("graph", graph),
        ir.AttrGraphs("graphs", [mlp((2, 2)).graph, mlp((2, 2)).graph]),
        ir.AttrGraphs("no_graphs", []),
        ir.AttrTypeProto("type", kind),
        ir.AttrTypeProtos("types", [kind, kind]),
        ir.AttrTypeProtos("no_types", []),
        ir.RefAttr("ref", "outer", ir.AttributeType.FLOATS),
    ]
    node = ir.Node("", "Foo", [], attributes, outputs=[ir.Value(name="y")], name="")
    model = ir.Model(
        ir.Graph([], node.outputs, nodes=[node], opset_imports={"": 21}), ir_version=10
    )
    parsed = round_trip(model).graph[0].attributes
    assert set(parsed) == set(node.attributes)
    for attribute in attributes:
        assert parsed[attribute.name].type == attribute.type
    for name in ("int", "ints", "no_ints", "no_floats", "string", "bytes", "strings", "no_strings"):
        assert parsed[name].value == node.attributes[name].value
    assert parsed["float"].value == np.float32(0.1)
    assert parsed["ref"].ref_attr_name == "outer"


def test_types_of_any_nesting_come_back() -> None:
    tensor = ir.TensorType(ir.DataType.STRING)
    kinds: list[ir.TypeProtocol | None] = [
        None,
        tensor,
        ir.SequenceType(ir.OptionalType(tensor)),
        ir.SparseTensorType(ir.DataType.INT8),
    ]
    shapes = [None, ir.Shape([]), ir.Shape(["2*n", "two words", None, 7])]
    pairs = list(itertools.product(kinds, shapes))
    values = [ir.Value(name=f"v{i}", type=t, shape=s) for i, (t, s) in enumerate(pairs)]
    parsed = round_trip(ir.Model(ir.Graph(values, values, nodes=[]), ir_version=10))
    for value, (kind, shape) in zip(parsed.graph.inputs, pairs, strict=True):
        assert value.type == kind
        assert value.shape == shape


def test_an_initializer_can_be_the_default_of_an_input() -> None:
    text = """graph {
      input %"my w": f32[1]
      weight %"my w" = f32[1] {2.0}
      output %"my w": f32[1]
    }"""
    model = from_text(text)
    value = model.graph.initializers["my w"]
    assert value is model.graph.inputs[0] is model.graph.outputs[0]
    round_trip(model)


GROUPS = st.one_of(st.none(), st.text(min_size=1))
SPECS = st.builds(
    QuantSpec,
    st.sampled_from([ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.INT32]),
    st.one_of(
        st.just(PerTensor()),
        st.just(PerToken()),
        st.builds(PerAxis, st.integers(-4, 4)),
        st.builds(PerBlock, st.integers(-4, 4), st.integers(1, 512)),
    ),
    st.booleans(),
    st.sampled_from(["minmax", "percentile", "entropy", "mse", "absmax", "dynamic"]),
    st.sampled_from([0, 2, 3, 4]),
    GROUPS,
)


@given(SPECS, SPECS)
def test_specs_come_back(on_value: QuantSpec, on_use: QuantSpec) -> None:
    assert QuantSpec.parse(str(on_value)) == on_value
    model = mlp((2, 2))
    model.graph.inputs[0].meta["qgraph.spec"] = on_value
    model.graph[0].meta["qgraph.in"] = {1: on_use}
    parsed = from_text(to_text(model))
    assert parsed.graph.inputs[0].meta["qgraph.spec"] == on_value
    assert parsed.graph[0].meta["qgraph.in"] == {1: on_use}


@pytest.mark.parametrize(
    "text", ["", "int8", "int9 per-tensor sym minmax", "int8 per-axis sym minmax"]
)
def test_misspelt_specs_are_refused(text: str) -> None:
    with pytest.raises(QGraphError, match="write it like"):
        QuantSpec.parse(text)


BODY = "graph g {\n  input %x: f32[2]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the text has no graph"),
        ("model {", "line 1: expected 'graph', 'function' or a field"),
        ("graph g {\n", "line 2: expected a value, found 'the end of the text'"),
        (BODY + "  %y = Relu(%z)\n}", "line 3: '%z' is used but not defined above"),
        (BODY + "  %x = Relu(%x)\n}", "line 3: '%x' is defined twice"),
        (BODY + "  %y = Relu(%x\n}", "line 4: expected ',', found '}'"),
        (BODY + "  %y: f99[2] = Relu(%x)\n}", "line 3: unknown dtype 'f99'"),
        (BODY + "  %y <int8> = Relu(%x)\n}", "line 3: 'int8' is not a quantization"),
        (BODY + "  weight %w = f32[2] {1.0}\n}", r"line 3: the data does not fit f32\[2\]"),
        (BODY + "  weight %w = i4[1] {8}\n}", "line 3: .*: a number is out of range"),
        (BODY + "  weight %w = u8[1] {300}\n}", r"line 3: the data does not fit u8\[1\]"),
        (BODY + '  weight %w = u8[1] {base64 "?"}\n}', r"line 3: the data does not fit u8\[1\]"),
        (
            BODY + "  weight %w = f32[n] {1.0}\n}",
            "line 3: a tensor needs a dtype and a static shape",
        ),
        (
            BODY + "  weight %w = f32[9] {#0123abcd}\n}",
            "line 3: .* print the model with weights=True",
        ),
        (BODY + "  %y = Foo(%x) {a = [1, 2.0]}\n}", "line 3: a list needs items of one kind"),
        (BODY + "  %y = Foo(%x) {a = []}\n}", "line 3: a list needs items of one kind"),
        (BODY + "  %y = Foo(%x) {a = $b: c}\n}", "line 3: 'c' is not a kind of attribute"),
        (BODY + '  %y = Foo(%x) {a = "\\q"}\n}', "line 3: .* is not a string"),
        (BODY + "  opset 1.5\n}", "line 3: expected an integer"),
        (BODY + "  ^\n}", r"line 3: expected a value, found '\^'"),
    ],
)
def test_errors_give_the_line(text: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        from_text(text)


def test_an_initializer_without_data_is_refused() -> None:
    model = mlp((2, 2))
    model.graph.initializers["w0"].const_value = None
    with pytest.raises(ModelError, match="initializer 'w0' has no data"):
        to_text(model)


@given(st.text(alphabet='%@#<>{}[]()=,:!$"\\_ab1.\n /', max_size=40))
def test_garbage_is_refused_cleanly(garbage: str) -> None:
    with pytest.raises(ModelError, match=r"^line \d+: "):
        from_text(BODY + garbage + " ^")


@pytest.mark.parametrize("folder", ["simple", "pytorch-operator"])
def test_models_of_the_onnx_package(folder: str) -> None:
    paths = sorted((ONNX_DATA / folder).glob("*/model.onnx"))
    assert paths
    for path in paths:
        round_trip(ir.load(path))


def _node_cases() -> Iterator[Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from collect_testcases(None)


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, list):
        return len(old) == len(new) and all(map(_same, old, new))
    if old is None:
        return new is None
    return old.dtype == new.dtype and np.array_equal(old, new, equal_nan=old.dtype.kind == "f")


@pytest.mark.slow
def test_every_node_case_of_onnx_computes_the_same() -> None:
    ran = 0
    for case in _node_cases():
        model = ir.from_proto(case.model)
        parsed = round_trip(model)
        names = [value.name for value in case.model.graph.input]
        inputs = dict(zip(names, case.data_sets[0][0], strict=False))
        try:
            expected = run(open_session(model, optimized=False, threads=1), inputs)
        except Exception:
            continue  # onnxruntime does not have every operator
        assert _same(expected, run(open_session(parsed, optimized=False, threads=1), inputs)), (
            case.name
        )
        ran += 1
    assert ran > 1000


@pytest.mark.slow
def test_large_models_of_the_onnx_package() -> None:
    for folder, pattern in (("light", "*.onnx"), ("pytorch-converted", "*/model.onnx")):
        for path in sorted((ONNX_DATA / folder).glob(pattern)):
            round_trip(ir.load(path))


def test_printing_does_not_depend_on_how_the_model_was_made() -> None:
    assert to_text(transformer_block()) == to_text(transformer_block())
    proto = ir.to_proto(small_convnet())
    assert isinstance(proto, onnx.ModelProto)
    assert to_text(ir.from_proto(proto)) == to_text(small_convnet())
