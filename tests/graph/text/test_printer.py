"""The text form: golden, and everything that ONNX can express is found in it."""

from __future__ import annotations

import base64
import itertools
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import ModelError, QGraphError
from qgraph.graph.provenance import layer
from qgraph.graph.text.printer import to_text
from qgraph.graph.text.tensors import content_hash, tensor_from
from qgraph.numerics.spec import PerAxis, PerBlock, PerTensor, PerToken, QuantSpec
from tests.models import if_model, mlp, parsed, random_graph, small_convnet, transformer_block

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
  %y: f32[batch, ?] = If(%kept) @choose {
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
  attribute eps = 0.001
  attribute axis
  input %v
  %top = ReduceMax(%v) {keepdims = $axis: int}
  %bytes = Cast(%v) {to = 2}
  output %bytes
  output %top
}
"""


def golden_model() -> ir.Model:
    """What `GOLDEN` shows, as far as ONNX's own syntax goes, which knows plain names only."""
    proto = onnx.parser.parse_model("""
    <ir_version: 10, producer_name: "pytorch", opset_import: ["" : 21, "qgraph" : 1]>
    main (float[batch,2] x, seq(float[?,3]) odd, optional(int64[]) maybe) => (float[batch,?] y)
      <float[2,2] w = {0.1, -1.5, inf, 1e-07}, int64[2] shape = {0, 2}, bfloat16 c,
       float[batch,2] m, float[batch,2] clipped, float[batch,2] kept, uint8[batch,2] q>
    {
      m = MatMul (x, w)
      c = Constant ()
      clipped = Clip (m, , m)
      kept, hidden = Dropout (clipped)
      q, s = qgraph.quantize : fast <axis = -1, eps = 1e-05> (kept)
      [choose] y = If (kept) <
        else_branch = else () => (float[batch,2] e) { e = Reshape (kept, shape) },
        then_branch = then () => (t) { t = Identity (kept) }
      >
    }
    <domain: "qgraph", overload: "fast", opset_import: ["": 21]>
    quantize <axis, eps: float = 0.001> (v) => (bytes, top) {
      top = ReduceMax <keepdims: int = @axis> (v)
      bytes = Cast <to = 2> (v)
    }""")
    return ir.from_proto(proto)


def printed(model: ir.Model) -> str:
    """The complete text of `model`, which is the same after saving and loading."""
    text = to_text(model, weights=True)
    again = ir.from_proto(ir.to_proto(model))
    assert to_text(again, weights=True) == text
    assert to_text(again) == to_text(model)
    return text


def constant_model(tensor: ir.TensorProtocol) -> ir.Model:
    """A model that is one Constant, small enough for every dtype."""
    node = ir.node("Constant", [], {"value": ir.AttrTensor("value", tensor)}, name="y")
    node.outputs[0].name = "y"
    return ir.Model(ir.Graph([], node.outputs, nodes=[node], opset_imports={"": 25}), ir_version=13)


def data_in(text: str) -> str:
    """What the tensor of `constant_model` holds, by its text."""
    found = re.search(r"Constant\(\) \{value = \w+\[[\d, ]*\] \{(.*)\}\}\n", text)
    assert found
    return found[1]


def shown(name: str) -> str:
    """The name that stands in the text like this."""
    return str(json.loads(name)) if name.startswith('"') else name


def test_golden() -> None:
    model = golden_model()
    _, odd, maybe = model.graph.inputs
    matmul, constant, _, dropout, quantize, choose = model.graph
    odd.name, maybe.shape = "odd name", None
    matmul.name, matmul.outputs[0].name = "/fc1/MatMul", "/fc1/m"
    constant.attributes.add(ir.AttrTensor("value", ir.tensor(0.5, ir.DataType.BFLOAT16)))
    dropout.outputs[1].name = ""
    quantize.attributes.add(ir.AttrString("mode", "up\n"))
    choose.attributes["else_branch"].as_graph().name = None
    spec = QuantSpec(ir.DataType.INT8, PerAxis(1), observer="absmax", group="qkv")
    model.graph.initializers["w"].meta["qgraph.spec"] = spec
    spec = QuantSpec(ir.DataType.UINT8, symmetric=False, observer="minmax")
    model.graph.inputs[0].meta["qgraph.spec"] = spec
    spec = QuantSpec(ir.DataType.UINT8, PerToken(), observer="dynamic")
    matmul.meta["qgraph.in"] = {0: spec}
    assert to_text(model) == GOLDEN


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
    text = to_text(model, weights=True)
    assert '\nmetadata !{"a": "1"}\n' in text
    assert '\ngraph mlp !{"b": "two \\"words\\""} {\n' in text
    assert ' = MatMul(%x, %w0) !{"c": "line\\nline"}\n' in text
    assert '  input %x: f32[batch, 4] !{"d": "\\udcff\\u0000\\u00e9"}\n' in text
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
def test_models_print_the_same_when_loaded_again(model: ir.Model) -> None:
    printed(model)


@settings(max_examples=40, deadline=None)
@given(random_graph())
def test_random_graphs_print_the_same_when_loaded_again(model: ir.Model) -> None:
    printed(model)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(DTYPES), st.sampled_from([(), (0,), (1,), (3,), (2, 4), (3, 3)]), st.data())
def test_every_bit_of_every_dtype_is_shown(
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
    text = printed(constant_model(tensor))
    assert f" {{value = {dtype.short_name()}{list(shape)} {{" in text
    if encoded := re.fullmatch('base64 "(.*)"', data_in(text)):
        assert base64.b64decode(encoded[1]) == tensor.tobytes()
        return
    elements = data_in(text).split(", ") if data_in(text) else []
    assert tensor_from(dtype, shape, elements).tobytes() == tensor.tobytes()


@given(st.lists(st.floats(width=32), max_size=8), st.sampled_from([np.float32, np.float64]))
def test_small_float_tensors_show_numbers(
    values: list[float], kind: type[np.floating[Any]]
) -> None:
    array = np.array(values, kind)
    text = to_text(constant_model(ir.Tensor(array)))
    if "base64" not in text:
        elements = data_in(text).split(", ") if values else []
        np.testing.assert_array_equal(np.array(elements, kind), array)
    assert "base64" not in text or np.isnan(array).any()


@given(st.lists(st.binary(max_size=5), max_size=12))
def test_string_tensors_are_shown(values: list[bytes]) -> None:
    tensor = ir.StringTensor(values, shape=ir.Shape([len(values)]))
    items = json.loads(f"[{data_in(printed(constant_model(tensor)))}]")
    assert [item.encode("utf-8", "surrogateescape") for item in items] == values


@given(
    st.text(min_size=1), st.text(min_size=1), st.text(), st.text(min_size=1), st.text(min_size=1)
)
def test_names_of_any_characters_are_shown(
    value: str, node: str, domain: str, attribute: str, dim: str
) -> None:
    x = ir.Value(name=value, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([dim]))
    made = ir.Node(domain, value, [x], [ir.AttrString(attribute, node)], name=node)
    made.outputs[0].name = value + "'"
    graph = ir.Graph([x], made.outputs, nodes=[made], name=value, opset_imports={domain: 1})
    text = printed(ir.Model(graph, ir_version=10))
    name = r'("(?:[^"\\]|\\.)*"|[\w./$;@+~|:-]+)'
    found = re.fullmatch(
        f"""ir_version = 10

graph {name} {{
  opset (?:{name} )?1
  input %{name}: f32\\[{name}\\]
  %{name} = (?:{name}::)?{name}\\(%{name}\\)(?: @{name})? {{{name} = {name}}}
  output %{name}
}}
""",
        text,
    )
    assert found
    y, of = value + "'", made.domain or None
    names = [value, domain or None, value, dim, y, of, value, value, node, attribute, node, y]
    if node == y:
        names[8] = None
    assert [n and shown(n) for n in found.groups()] == names


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


ATTRIBUTES = """\
Foo() {
    bytes = b"\\udcff\\u0000",
    float = 0.1,
    floats = [1.0, inf, -inf, nan],
    graph = graph one {
      opset 21
      input %x: f32[2]
      %y = Relu(%x)
      output %y
    },
    graphs = [
      graph one {
        opset 21
        input %x: f32[2]
        %y = Relu(%x)
        output %y
      },
      graph one {
        opset 21
        input %x: f32[2]
        %y = Relu(%x)
        output %y
      },
    ],
    huge = inf,
    int = -3,
    ints = [1, 2],
    no_floats = floats[],
    no_graphs = graphs[],
    no_ints = ints[],
    no_strings = strings[],
    no_tensors = tensors[],
    no_types = type_protos[],
    ref = $outer: floats,
    string = "",
    strings = ["a", "b, c"],
    tensor = i4[2] {1, 2},
    tensors = [i4[2] {1, 2}, i4[2] {1, 2}],
    type = seq(f32[2, ?]),
    types = [seq(f32[2, ?]), seq(f32[2, ?])],
  }
  output %y
}
"""


def test_every_kind_of_attribute_is_shown() -> None:
    tensor = ir.tensor([1, 2], ir.DataType.INT4)
    kind = ir.TypeAndShape(ir.SequenceType(ir.TensorType(ir.DataType.FLOAT)), ir.Shape([2, None]))
    graphs = [parsed("one (float[2] x) => (y) { y = Relu (x) }").graph for _ in range(3)]
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
        ir.AttrGraph("graph", graphs[0]),
        ir.AttrGraphs("graphs", graphs[1:]),
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
    assert to_text(model, weights=True).partition("  %y = ")[2] == ATTRIBUTES


def test_types_of_any_nesting_are_shown() -> None:
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
    text = to_text(ir.Model(ir.Graph(values, values, nodes=[]), ir_version=10))
    assert re.findall("  input (.*)\n", text) == [
        "%v0",
        "%v1: ?[]",
        '%v2: ?["2*n", "two words", ?, 7]',
        "%v3: s[*]",
        "%v4: s[]",
        '%v5: s["2*n", "two words", ?, 7]',
        "%v6: seq(optional(s[*]))",
        "%v7: seq(optional(s[]))",
        '%v8: seq(optional(s["2*n", "two words", ?, 7]))',
        "%v9: sparse(i8[*])",
        "%v10: sparse(i8[])",
        '%v11: sparse(i8["2*n", "two words", ?, 7])',
    ]


def test_an_initializer_can_be_the_default_of_an_input() -> None:
    value = ir.val("my w", ir.DataType.FLOAT, [1])
    value.const_value = ir.tensor([2.0], name="my w")
    graph = ir.Graph([value], [value], nodes=[], initializers=[value], name="g")
    text = printed(ir.Model(graph, ir_version=10))
    assert text.endswith("""
graph g {
  input %"my w": f32[1]
  weight %"my w" = f32[1] {2.0}
  output %"my w": f32[1]
}
""")


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
def test_specs_are_shown(on_value: QuantSpec, on_use: QuantSpec) -> None:
    assert QuantSpec.parse(str(on_value)) == on_value
    model = mlp((2, 2))
    model.graph.inputs[0].meta["qgraph.spec"] = on_value
    model.graph[0].meta["qgraph.in"] = {1: on_use}
    text = to_text(model)
    for found, spec in (
        (re.search(r"input %x: f32\[batch, 2\] <(.*)>\n", text), on_value),
        (re.search(r"MatMul\(%x, %w0 <(.*)>\)\n", text), on_use),
    ):
        assert found
        assert QuantSpec.parse(shown(found[1])) == spec


@pytest.mark.parametrize(
    "text", ["", "int8", "int9 per-tensor sym minmax", "int8 per-axis sym minmax"]
)
def test_misspelt_specs_are_refused(text: str) -> None:
    with pytest.raises(QGraphError, match="write it like"):
        QuantSpec.parse(text)


def test_an_initializer_without_data_is_refused() -> None:
    model = mlp((2, 2))
    model.graph.initializers["w0"].const_value = None
    with pytest.raises(ModelError, match="initializer 'w0' has no data"):
        to_text(model)


@pytest.mark.parametrize("folder", ["simple", "pytorch-operator"])
def test_models_of_the_onnx_package(folder: str) -> None:
    paths = sorted((ONNX_DATA / folder).glob("*/model.onnx"))
    assert paths
    for path in paths:
        printed(ir.load(path))


def _node_cases() -> Iterator[Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from collect_testcases(None)


@pytest.mark.slow
def test_every_node_case_of_onnx_prints_the_same_when_loaded_again() -> None:
    count = 0
    for case in _node_cases():
        printed(ir.from_proto(case.model))
        count += 1
    assert count > 1000


@pytest.mark.slow
def test_large_models_of_the_onnx_package() -> None:
    for folder, pattern in (("light", "*.onnx"), ("pytorch-converted", "*/model.onnx")):
        for path in sorted((ONNX_DATA / folder).glob(pattern)):
            model = ir.load(path)
            model.model_version = model.model_version or None  # 0 is not saved
            printed(model)


def test_printing_does_not_depend_on_how_the_model_was_made() -> None:
    assert to_text(transformer_block()) == to_text(transformer_block())
    proto = ir.to_proto(small_convnet())
    assert isinstance(proto, onnx.ModelProto)
    assert to_text(ir.from_proto(proto)) == to_text(small_convnet())
