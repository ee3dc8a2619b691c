"""What onnxruntime fuses, taken apart again: the same results, and a verdict for every product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

import qgraph
from qgraph.graph.fused_products import take_apart, why_fused
from qgraph.graph.names import unique_names
from qgraph.graph.types import infer_types
from qgraph.io.models import save
from qgraph.io.session import open_session, run
from qgraph.numerics.noise import sqnr_db
from tests.models import build, feed, ops, outputs, parsed, small_convnet, weight


def fused(text: str, *tensors: ir.TensorProtocol, opset: int = 17) -> ir.Model:
    """A model with operators of com.microsoft."""
    model = parsed(text, *tensors)
    model.opset_imports.update({"": opset, "com.microsoft": 1})
    model.ir_version = 8
    infer_types(model)
    return model


def same_apart(model: ir.Model) -> list[str]:
    """The operators after everything was taken apart, with the same results at both levels."""
    given = feed(model)
    before = outputs(model, given)
    unique_names(model)
    names = [node.name for node in model.graph]
    assert sum(take_apart(model, node) for node in list(model.graph))
    infer_types(model)
    for optimized in (False, True):
        after = run(open_session(model, optimized=optimized, threads=1), given)
        for old, new in zip(before, after, strict=True):
            np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-5)
    assert {*names} <= {node.name for node in model.graph}
    return ops(model)


@pytest.mark.parametrize(
    ("attributes", "data", "shape", "expected"),
    [
        ("alpha = 0.25", "b,t,8", (8, 4), ["MatMul"]),
        ("transB = 1", "b,t,8", (4, 8), ["MatMul"]),
        ("transA = 1, transB = 1, alpha = 2.0", "b,8,3", (4, 8), ["Transpose", "MatMul"]),
        ("alpha = 0.5", "b,3,8", (2, 8, 4), ["MatMul"]),
    ],
)
def test_a_scaled_product(
    attributes: str, data: str, shape: tuple[int, ...], expected: list[str]
) -> None:
    data = data.replace("b", "2") if len(shape) > 2 else data
    text = f"""f (float[{data}] x) => (float[] y) {{
      y = com.microsoft.FusedMatMul <{attributes}> (x, w)
    }}"""
    assert same_apart(fused(text, weight("w", *shape))) == expected


def test_products_that_stay_fused_say_why() -> None:
    text = """f (float[2,3,8] x, float[2,8,4] z) => (float[] y, float[] u) {
      y = com.microsoft.FusedMatMul <alpha = 0.5> (x, z)
      u = com.microsoft.FusedMatMul <transBatchA = 1> (x, w)
    }"""
    model = fused(text, weight("w", 8, 4))
    assert not sum(take_apart(model, node) for node in list(model.graph))
    assert [why_fused(node) for node in model.graph] == [
        "both operands are computed: it has no weight",
        "it moves the batch axis of an operand",
    ]


@pytest.mark.parametrize(
    ("activation", "parts"),
    [
        ("Relu", ["Relu"]),
        ("LeakyRelu <alpha = 0.3>", ["LeakyRelu"]),
        ("Sigmoid", ["Sigmoid"]),
        ("Tanh", ["Tanh"]),
        ("HardSigmoid <alpha = 0.3, beta = 0.4>", ["HardSigmoid"]),
    ],
)
@pytest.mark.parametrize("product", ["Gemm <transB = 1> (x, w)", "Conv (z, k)"])
def test_what_onnxruntime_fused_with_an_activation(
    activation: str, parts: list[str], product: str, tmp_path: Path
) -> None:
    data = "float[b,8] x" if "x" in product else "float[b,3,6,6] z"
    function, _, attributes = activation.partition(" ")
    text = f"f ({data}) => (float[] y) {{ p = {product}\n y = {function} {attributes} (p) }}"
    used = weight("w", 4, 8) if "x" in product else weight("k", 4, 3, 3, 3)
    model = optimized(build(text, used), tmp_path)
    assert same_apart(model) == [product.split()[0], *parts]


def test_a_convolution_with_a_sum_and_bounds() -> None:
    text = """f (float[b,3,6,6] x, float[b,4,4,4] z) => (float[] y) {
      y = com.microsoft.FusedConv
        <activation = "Clip", activation_params = [-0.5, 0.5]> (x, k, c, z)
    }"""
    tensors = [weight("k", 4, 3, 3, 3), weight("c", 4)]
    assert same_apart(fused(text, *tensors)) == ["Conv", "Add", "Clip"]


@pytest.mark.parametrize("mask", ["", "int32[b,t] m"])
@pytest.mark.parametrize("opset", [11, 17])
def test_attention_of_an_encoder(mask: str, opset: int) -> None:
    given = f", {mask}" if mask else ""
    text = f"""f (float[b,t,16] x{given}) => (float[] y) {{
      y = com.microsoft.Attention <num_heads = 2, scale = 0.3> (x, w, b{", m" if mask else ""})
    }}"""
    model = fused(text, weight("w", 16, 48), weight("b", 48), opset=opset)
    assert same_apart(model) == ["MatMul", "Add", "Split", "MultiHeadAttention"]


def test_attention_with_a_past_stays() -> None:
    text = """f (float[2,3,16] x, float[2,2,2,5,8] p) => (float[] y, float[] q) {
      y, q = com.microsoft.Attention <num_heads = 2, unidirectional = 1> (x, w, b, , p)
    }"""
    model = fused(text, weight("w", 16, 48), weight("b", 48))
    (node,) = model.graph
    assert not take_apart(model, node)
    assert "past" in (why_fused(node) or "")


def optimized(model: ir.Model, folder: Path, level: str = "EXTENDED") -> ir.Model:
    """The model as onnxruntime saves it after its own optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}"
    )
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    save(model, folder / "model.onnx")
    onnxruntime.InferenceSession(folder / "model.onnx", options)
    return qgraph.load(folder / "optimized.onnx")


def test_a_model_that_onnxruntime_has_optimized_is_quantized_as_its_original(
    tmp_path: Path,
) -> None:
    model = optimized(small_convnet(), tmp_path)
    assert "FusedConv" in ops(model)
    given = feed(model)
    want = outputs(model, given)[0]
    batches = [feed(model, seed) for seed in range(4)]
    for target in ("onnx", "cpu"):
        compiled = qgraph.compile(model, "static", batches, target=target)
        assert sqnr_db(want, compiled(**given)) > 25
        kinds = [r.op for r in compiled.remarks.verdicts().values()]
        assert sorted(kinds) == ["Conv", "Conv", "Gemm"]


def test_a_layout_of_one_machine_has_a_reason(tmp_path: Path) -> None:
    model = optimized(small_convnet(channels=16), tmp_path, "ALL")
    blocked = [node for node in model.graph if node.domain == "com.microsoft.nchwc"]
    if not blocked:
        pytest.skip("this machine has no layout of its own")
    verdicts = qgraph.compile(model, "dynamic").remarks.verdicts().values()
    assert all("laid it out" in r.message for r in verdicts if r.op == "Conv")
