"""The verifier: for each rule a model that breaks it and ones, close by, that do not."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings

from qgraph.graph.annotation import STAGES_KEY, Stage
from qgraph.numerics.noise import relative_error
from qgraph.numerics.spec import QuantSpec
from qgraph.pipeline.verify import check_structure
from tests.models import if_model, mlp, parsed, random_graph, small_convnet, transformer_block


def problems(values: str, *lines: str, output: str = "d", domain: str = "") -> list[str]:
    """What the verifier says of a graph with input x (2, 4) that holds these lines.

    Args:
        values: its initializers, and types of others.
        domain: what the model imports besides ONNX.
    """
    body = "\n".join(lines)
    model = parsed(f"g (float[2,4] x) => ({output}) <{values}> {{\n{body}\n}}")
    if domain:
        model.opset_imports[domain] = 1
    return check_structure(model)


def known(**tensors: str) -> str:
    """Initializers by name, from their types and data."""
    return ", ".join(text.replace("{", f"{name} = {{") for name, text in tensors.items())


def node(output: str, op: str, inputs: str, attributes: str = "") -> str:
    """A line of a graph; without attributes there may be no `<>`."""
    return f"{output} = {op} {f'<{attributes}>' if attributes else ''} ({inputs})"


def quantized(
    scale: str, zero: str = "uint8 {128}", attributes: str = "", domain: str = ""
) -> list[str]:
    """What it says of x quantized and dequantized like this."""
    prefix = f"{domain}." if domain else ""
    integers = re.split(r"\W", zero)[0]
    return problems(
        f"{known(s=scale, z=zero)}, {integers}[2,4] q",
        node("q", f"{prefix}QuantizeLinear", "x, s, z", attributes),
        node("d", f"{prefix}DequantizeLinear", "q, s, z", attributes),
        domain=domain,
    )


@pytest.mark.parametrize(
    "model", [mlp(), small_convnet(), transformer_block(), if_model()], ids=lambda m: m.graph.name
)
def test_sound_models_have_no_problems(model: ir.Model) -> None:
    assert check_structure(model) == []


@settings(max_examples=30, deadline=None)
@given(random_graph())
def test_random_models_have_no_problems(model: ir.Model) -> None:
    assert check_structure(model) == []


FOUR = "float[4] {1.0, 2.0, 3.0, 4.0}"
FOUR_ZEROS = "uint8[4] {1, 2, 3, 4}"
SQUARE = "float[2,2] {1.0, 2.0, 3.0, 4.0}"
SQUARE_ZEROS = "uint8[2,2] {1, 2, 3, 4}"
INT4_ZEROS = "int4[2] {129}"  # as ONNX stores them, two in a byte: 1 and -8


@pytest.mark.parametrize(
    ("scale", "zero", "attributes"),
    [
        ("float {0.5}", "uint8 {128}", ""),
        ("float[1] {0.5}", "int8[1] {0}", ""),
        (FOUR, FOUR_ZEROS, "axis = 1"),
        (FOUR, FOUR_ZEROS, "axis = -1"),
        (FOUR, FOUR_ZEROS, ""),
        ("float[2] {1.0, 2.0}", INT4_ZEROS, "axis = 0"),
        (SQUARE, SQUARE_ZEROS, "axis = 1, block_size = 2"),
        (SQUARE, SQUARE_ZEROS, "axis = 1, block_size = 3"),
        ("float[1,4] {1.0, 2.0, 3.0, 4.0}", "uint8[1,4] {1, 2, 3, 4}", "axis = 0, block_size = 2"),
    ],
)
@pytest.mark.parametrize("domain", ["", "com.microsoft"])
def test_sound_quantization(scale: str, zero: str, attributes: str, domain: str) -> None:
    assert quantized(scale, zero, attributes, domain) == []


@pytest.mark.parametrize(
    ("scale", "zero", "attributes", "problem"),
    [
        ("float {0.0}", "uint8 {0}", "", "its scale is not finite and positive everywhere"),
        ("float {-1.0}", "uint8 {0}", "", "its scale is not finite and positive everywhere"),
        ("float {nan}", "uint8 {0}", "", "its scale is not finite and positive everywhere"),
        (
            "float[2] {1.0, inf}",
            "uint8[2] {0, 0}",
            "axis = 0",
            "its scale is not finite and positive",
        ),
        (FOUR, FOUR_ZEROS, "axis = 0", "4 scales for 2 channels on axis 0"),
        (FOUR, FOUR_ZEROS, "axis = 2", "axis 2 is outside rank 2"),
        (FOUR, FOUR_ZEROS, "axis = -3", "axis -3 is outside rank 2"),
        (SQUARE, SQUARE_ZEROS, "", "a scale of rank 2 needs a block_size"),
        (
            SQUARE,
            SQUARE_ZEROS,
            "axis = 1, block_size = 4",
            "2 scales on axis 1, blocks of 4 along axis 1 need 1",
        ),
        (
            SQUARE,
            SQUARE_ZEROS,
            "axis = 0, block_size = 1",
            "2 scales on axis 1, blocks of 1 along axis 0 need 4",
        ),
        (FOUR, FOUR_ZEROS, "block_size = 1", "blocks need a scale of rank 2, not 1"),
        ("float {1.0}", FOUR_ZEROS, "", "zero point has shape [4], scale []"),
    ],
)
def test_broken_quantization(scale: str, zero: str, attributes: str, problem: str) -> None:
    found = quantized(scale, zero, attributes)
    assert len(found) == 2
    assert found[0].startswith(f"QuantizeLinear 'q': {problem}")
    assert found[1].startswith(f"DequantizeLinear 'd': {problem}")


def test_a_computed_scale_and_a_missing_zero_point_are_fine() -> None:
    lines = ["q, s, z = DynamicQuantizeLinear (x)", "d = DequantizeLinear (q, s, z)"]
    assert problems("", *lines) == []
    assert problems(known(s="float {1.0}"), "q = QuantizeLinear (x, s)", output="q") == []


def test_the_zero_point_has_the_type_of_the_integers() -> None:
    values = known(s="float {1.0}", z="int8 {0}", w="uint8[2] {1, 2}")
    found = problems(values, "d = DequantizeLinear (w, s, z)")
    assert found == ["DequantizeLinear 'd': zero point is INT8, the integers are UINT8"]
    found = problems(values, "q = QuantizeLinear (x, s, z)", output="uint8[2,4] q")
    assert found == ["QuantizeLinear 'q': zero point is INT8, the integers are UINT8"]
    assert problems(values, "q = QuantizeLinear (x, s, z)", output="q") == []


@pytest.mark.parametrize(("zero", "sound"), [(0, True), (1, False)])
def test_an_int32_bias_has_no_zero_point(zero: int, sound: bool) -> None:
    values = known(s="float {1.0}", z=f"int32 {{{zero}}}", b="int32[2] {5, 6}")
    found = problems(values, "d = DequantizeLinear (b, s, z)")
    assert found == (
        [] if sound else ["DequantizeLinear 'd': an int32 bias must have zero point 0"]
    )


def with_bias(
    op: str, w_scale: str, bias_scale: str, attributes: str = "", bias: str = "int32[2] {5, 6}"
) -> list[str]:
    """What it says of a Gemm or Conv (2 output channels, x scale 0.5) with quantized inputs."""
    shape = "4,2"
    if "transB" in attributes or op == "Conv":
        shape = "2,4" if op == "Gemm" else "2,4,1"
    axis = 1 if op == "Gemm" and "transB" not in attributes else 0
    values = known(
        xs="float {0.5}",
        xz="uint8 {128}",
        ws=w_scale,
        bs=bias_scale,
        w=f"int8[{shape}] {{1, 2, 3, 4, 5, 6, 7, 8}}",
        b=bias,
    )
    return problems(
        f"{values}, uint8[2,4] q",
        node("q", "QuantizeLinear", "x, xs, xz"),
        node("xd", "DequantizeLinear", "q, xs, xz"),
        node("wd", "DequantizeLinear", "w, ws", f"axis = {axis}"),
        node("bd", "DequantizeLinear", "b, bs", "axis = 0"),
        node("y", op, "xd, wd, bd", attributes),
        output="y",
    )


@pytest.mark.parametrize(
    ("op", "w_scale", "bias_scale", "attributes"),
    [
        ("Conv", "float {0.1}", "float {0.05}", ""),
        ("Conv", "float[2] {0.1, 0.2}", "float[2] {0.05, 0.1}", ""),
        ("Gemm", "float[2] {0.1, 0.2}", "float[2] {0.05, 0.1}", ""),
        ("Gemm", "float[2] {0.1, 0.2}", "float[2] {0.05, 0.1}", "transB = 1"),
        ("Gemm", "float[1] {0.1}", "float {0.05}", "transB = 1"),
        ("Gemm", "float {0.1}", "float[2] {0.05, 0.05}", ""),
        ("Gemm", "float {0.1}", "float {0.1}", "alpha = 2.0"),
        ("Gemm", "float {0.1}", "float {0.025}", "beta = 2.0"),
    ],
)
def test_a_bias_scale_that_is_the_product(
    op: str, w_scale: str, bias_scale: str, attributes: str
) -> None:
    assert with_bias(op, w_scale, bias_scale, attributes) == []


@pytest.mark.parametrize(
    ("op", "w_scale", "bias_scale", "attributes", "problem"),
    [
        ("Conv", "float {0.1}", "float {0.1}", "", "bias scale is not input scale times weight"),
        (
            "Conv",
            "float[2] {0.1, 0.2}",
            "float[2] {0.1, 0.05}",
            "",
            "bias scale is not input scale",
        ),
        ("Conv", "float[2] {0.1, 0.2}", "float {0.05}", "", "bias scale is not input scale times"),
        (
            "Gemm",
            "float[2] {0.1, 0.2}",
            "float[2] {0.05, 0.2}",
            "transB = 1",
            "bias scale is not input",
        ),
        ("Gemm", "float {0.1}", "float {0.05}", "alpha = 2.0", "bias scale is not input scale"),
        ("Gemm", "float {0.1}", "float[2] {0.05, 0.1}", "", "bias scale is not input scale times"),
    ],
)
def test_a_bias_scale_that_is_not_the_product(
    op: str, w_scale: str, bias_scale: str, attributes: str, problem: str
) -> None:
    found = with_bias(op, w_scale, bias_scale, attributes)
    assert len(found) == 1
    assert problem in found[0]


def test_bias_scales_of_another_count_than_weight_scales() -> None:
    found = with_bias(
        "Conv", "float[2] {0.1, 0.1}", "float[3] {1.0, 1.0, 1.0}", bias="int32[3] {1, 2, 3}"
    )
    assert found == ["Conv 'y': 3 bias scales for 2 weight scales"]


def test_a_bias_that_is_no_int32_may_have_any_scale() -> None:
    assert with_bias("Conv", "float {0.1}", "float {7.0}", bias="int8[2] {5, 6}") == []


def branches(scale: float) -> ir.Model:
    """An If whose one branch rounds x with this scale."""
    return parsed(f"""
    g (bool flag, float[2] x) => (y) <float s = {{{scale}}}> {{
      y = If (flag) <
        then_branch = a () => (d) {{ q = QuantizeLinear (x, s) d = DequantizeLinear (q, s) }},
        else_branch = b () => (d) {{ d = Relu (x) }}
      >
    }}""")


def test_rules_hold_in_branches_and_see_weights_outside() -> None:
    assert check_structure(branches(0.1)) == []
    found = check_structure(branches(-0.1))
    assert [p.partition(":")[0] for p in found] == ["QuantizeLinear 'q'", "DequantizeLinear 'd'"]


def test_a_branch_that_uses_what_nobody_made() -> None:
    model = branches(0.1)
    body = model.graph[0].attributes["else_branch"].as_graph()
    body[0].replace_input_with(0, ir.Value(name="ghost"))
    assert check_structure(model) == ["Relu 'd': its input 'ghost' comes from nowhere"]


def test_a_branch_that_uses_a_value_of_its_sibling() -> None:
    model = branches(0.1)
    bodies = [model.graph[0].attributes[f"{name}_branch"].as_graph() for name in ("then", "else")]
    bodies[1][0].replace_input_with(0, bodies[0][0].outputs[0])
    found = check_structure(model)
    assert found == [
        "Relu 'd': its input 'q' comes from QuantizeLinear 'q', which runs later or out of sight"
    ]


def test_a_node_that_runs_before_its_input() -> None:
    model = mlp()
    last = model.graph[-1]
    model.graph.remove(last)
    model.graph.insert_before(model.graph[0], last)
    assert check_structure(model) == [
        "Add 'y': its input 'm1' comes from MatMul 'm1', which runs later or out of sight"
    ]


def test_an_input_from_a_node_that_was_removed() -> None:
    model = mlp()
    model.graph.remove(model.graph[1])
    assert check_structure(model) == [
        "Relu 'h0': its input 'a0' comes from Add 'a0', which was removed"
    ]


def test_an_output_that_nothing_computes() -> None:
    model = mlp()
    model.graph.outputs.append(ir.Value(name="ghost"))
    assert check_structure(model) == ["output 'ghost' comes from nowhere"]


def test_functions_are_checked_too() -> None:
    for domain in ("own", "qgraph"):
        model = parsed(f"""
        g (float[2] x) => (y) {{ y = {domain}.twice (x) }}
        <domain: "{domain}", opset_import: ["" : 21]> twice (x) => (y) {{ y = Add (x, x) }}""")
        model.opset_imports[domain] = 1
        assert check_structure(model) == []
        (function,) = model.functions.values()
        function[0].replace_input_with(1, ir.Value(name="ghost"))
        assert check_structure(model) == ["Add 'y': its input 'ghost' comes from nowhere"]


def test_names_are_unique() -> None:
    model = mlp()
    model.graph[0].outputs[0].name = "h0"
    assert check_structure(model) == ["Relu 'h0': value name 'h0' is taken"]
    model = mlp()
    model.graph[0].outputs[0].name = "x"
    assert check_structure(model) == ["MatMul 'x': value name 'x' is taken"]


def test_a_branch_may_not_reuse_a_name_from_outside() -> None:
    model = if_model()
    body = model.graph[0].attributes["then_branch"].as_graph()
    body[0].outputs[0].name = "wa"
    assert check_structure(model) == ["MatMul 'wa': value name 'wa' is taken"]


def test_domains_are_imported() -> None:
    assert problems("", "y = own.Foo (x)", output="y", domain="own") == []
    found = problems("", "y = own.Foo (x)", output="y")
    assert found == ["Foo 'y': the model imports no version of its domain 'own'"]
    model = mlp()
    model.graph.opset_imports["ai.onnx"] = model.graph.opset_imports.pop("")
    assert check_structure(model) == []


@pytest.mark.parametrize("key", ["qgraph.spec", "qgraph.stats", "qgraph.in"])
def test_a_committed_model_has_one_truth(key: str) -> None:
    model = mlp()
    node = model.graph[1]
    if key == "qgraph.in":
        node.meta[key] = {0: QuantSpec()}
    else:
        node.outputs[0].meta[key] = QuantSpec()
    assert check_structure(model) == []
    model.meta[STAGES_KEY] = {Stage.COMMITTED}
    found = check_structure(model)
    assert found[0] == f"Add 'a0': '{key}' is left in its meta though the model is committed"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([1.0, -2.0], [1.0, -2.0], 0.0),
        ([1.0, -2.0], [1.0, -1.0], 0.5),
        ([1.0, np.inf], [0.0, np.inf], 1.0),
        ([1.0, np.nan], [1.0, np.nan], 0.0),
        ([1.0, 2.0], [1.0, np.nan], np.inf),
        ([1.0, np.inf], [1.0, -np.inf], np.inf),
        ([0.0, 0.0], [0.0, 1e-12], 1.0),
        ([[1.0]], [1.0], np.inf),
        ([], [], 0.0),
        ([True, False], [True, True], 1.0),
        ([3, 4], [3, 2], 0.5),
        (["a"], ["a"], 0.0),
        (["a"], ["b"], np.inf),
    ],
)
def test_relative_error(old: list[object], new: list[object], expected: float) -> None:
    assert relative_error(np.array(old), np.array(new)) == pytest.approx(expected)
