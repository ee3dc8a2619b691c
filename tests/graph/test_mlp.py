"""The products of MLPs, by what lies between them."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from hypothesis import given, settings

from qgraph.graph.mlp import in_mlp
from qgraph.graph.sites import sites
from tests.models import build, mlp, random_graph, small_convnet, transformer_block, weight


def found(model: ir.Model) -> list[str]:
    """Names of the first outputs of the products in MLPs."""
    return [str(site.node.outputs[0].name) for site in sites(model) if in_mlp(site)]


def between(body: str, *tensors: ir.TensorProtocol, opset: str = "") -> list[str]:
    """What is found in x -> MatMul -> h -> `body` -> r -> MatMul."""
    text = f"""
    g (float[batch,8] x, float[batch,8] other) => (float[batch,8] y) {{
      h = MatMul (x, w1)
      {body}
      y = MatMul (r, w2)
    }}"""
    model = build(text, weight("w1", 8, 8), weight("w2", 8, 8), *tensors)
    return found(model)


def test_a_gated_mlp_and_not_the_attention_before_it() -> None:
    assert found(transformer_block()) == ["gate", "up", "down"]


def test_plain_mlps_and_not_convolutions() -> None:
    assert found(mlp()) == ["m0", "m1"]
    assert found(mlp((8, 8, 8, 8))) == ["m0", "m1", "m2"]
    assert found(mlp((8, 8))) == []
    assert found(small_convnet()) == []


@pytest.mark.parametrize(
    "body",
    [
        "r = Gelu (h)",
        "r = Tanh (h)",
        "r = Clip (h, low, high)",
        "e = Erf (h) s = Add (e, h) r = Mul (s, h)",
        "f = Relu (h) t = Transpose <perm = [1,0]> (f) r = Transpose <perm = [1,0]> (t)",
        "s = Sigmoid (h) m = Mul (s, h) u = MatMul (other, w3) r = Mul (m, u)",
        "b = Add (h, b1) f = Relu (b) r = Identity (f)",
    ],
)
def test_what_may_lie_between(body: str) -> None:
    constants = [ir.Tensor(weight("c", 1).numpy().reshape(()), name=n) for n in ("low", "high")]
    names = between(body, weight("w3", 8, 8), weight("b1", 8), *constants)
    assert names == (["h", "u", "y"] if "u =" in body else ["h", "y"])


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("r = Identity (h)", "no activation function"),
        ("r = Add (h, h)", "no activation function"),
        ("f = Relu (h) r = LayerNormalization (f, b1, b1)", "a normalization"),
        ("f = Relu (h) r = Softmax (f)", "a softmax"),
        ("f = Sigmoid (h) r = Mul (f, other)", "gates what no product computed"),
        ("f = Sigmoid (h) a = MatMul (f, other2) r = Relu (a)", "attention"),
    ],
)
def test_what_may_not(body: str, why: str) -> None:
    body = body.replace("other2", "t")
    if "(f, t)" in body:
        body = "t = Transpose <perm = [1,0]> (other) " + body.replace(
            "r = Relu (a)", "z = Relu (a)"
        )
        body += " r = MatMul (z, other)"
    assert between(body, weight("b1", 8)) == [], why


def test_fused_activation_functions() -> None:
    model = transformer_block()
    act = next(n for n in model.graph if n.op_type == "Sigmoid")
    act.op_type, act.domain = "FastGelu", "com.microsoft"
    assert found(model) == ["gate", "up", "down"]
    act.domain = "elsewhere"
    assert found(model) == []


@settings(deadline=None, max_examples=40)
@given(random_graph())
def test_any_graph(model: ir.Model) -> None:
    """Whatever is found lies at an end of a Relu, the only activation function here."""
    names = found(model)
    relu = any(n.op_type == "Relu" for n in model.graph)
    assert relu or not names
    assert len(names) != 1
