"""Target `cuda`: what it lowers to, what stays float and why, and that any onnxruntime runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph.backends import get_target
from qgraph.backends.cuda.functions import (
    INT8_LINEAR,
    INT8_LINEAR_WITH_BIAS,
    int8_linear,
    int8_linear_with_bias,
)
from qgraph.cli import main
from qgraph.errors import QGraphError
from qgraph.graph.functions import declare
from qgraph.graph.sites import Site, sites
from qgraph.io.session import open_session, run
from qgraph.numerics.spec import PER_RUN, PER_TOKEN, WEIGHT, PerAxis, PerBlock
from tests import models

RECIPES: dict[str, dict[str, object]] = {
    "w8a8": {}, "smoothquant": {"lkd": False}, "llm-int8": {}, "zeroquant": {}, "dynamic": {},
}  # fmt: skip


def calls(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes() if node.domain == "qgraph"]


def products_of(model: ir.Model) -> list[Site]:
    return [site for site in sites(model) if site.is_product]


def compiled(model: ir.Model, recipe: str = "w8a8", **parameters: object) -> qgraph.CompiledModel:
    feeds = [models.feed(model, seed) for seed in range(4)]
    return qgraph.compile(model, recipe, feeds, "cuda", verify=True, **parameters)  # type: ignore[arg-type]


def both_levels(model: ir.Model, feed: dict[str, np.ndarray]) -> list[list[np.ndarray]]:
    """The outputs with onnxruntime's optimizations off and on."""
    return [run(open_session(model, optimized=level), feed) for level in (False, True)]


def call_model(bias: bool) -> ir.Model:
    """A model of one call, everything an input but the function."""
    name = INT8_LINEAR_WITH_BIAS if bias else INT8_LINEAR
    kinds: dict[str, tuple[ir.DataType, list[str | int | None]]] = {
        "q": (ir.DataType.UINT8, ["m", "k"]),
        "largest": (ir.DataType.FLOAT, ["m", 1]),
        "weight": (ir.DataType.INT8, ["n", "k"]),
        "scale": (ir.DataType.FLOAT, ["n"]),
        "zero": (ir.DataType.UINT8, []),
        **({"bias": (ir.DataType.FLOAT, ["n"])} if bias else {}),
    }
    inputs = [ir.val(key, dtype, shape) for key, (dtype, shape) in kinds.items()]
    y = ir.val("y", ir.DataType.FLOAT, ["m", "n"])
    node = ir.node(name, inputs, domain="qgraph", outputs=[y])
    graph = ir.Graph(inputs, [y], nodes=[node], opset_imports={"": 21}, name="call")
    model = ir.Model(graph, ir_version=10)
    declare(model, name, int8_linear_with_bias if bias else int8_linear)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("zero", [0, 32, 128])
def test_the_bodies_are_exact_at_every_level(bias: bool, zero: int) -> None:
    rng = np.random.default_rng(zero)
    m, n, k = 5, 7, 131
    q = rng.integers(0, 256, (m, k), dtype=np.uint8)
    w = rng.integers(-128, 128, (n, k)).astype(np.int8)
    q[0], w[0] = 255, 127  # pairs of these do not fit into 16 bits
    scale, largest, b = (rng.random(size, np.float32) for size in ((n,), (m, 1), (n,)))
    acc = (q.astype(np.int64) - zero) @ w.astype(np.int64).T
    wanted = acc.astype(np.float32) * scale * largest + (b if bias else np.float32(0))
    feed: dict[str, np.ndarray] = {
        "q": q,
        "largest": largest,
        "weight": w,
        "scale": scale,
        "zero": np.array(zero, np.uint8),
    }
    if bias:
        feed["bias"] = b
    for found in both_levels(call_model(bias), feed):
        np.testing.assert_array_equal(found[0], wanted)


def test_no_body_multiplies_signed_integers() -> None:
    """On a CPU without VNNI onnxruntime's u8·s8 sums saturate."""
    for make in (int8_linear, int8_linear_with_bias):
        nodes = {node.op_type: node for node in make(21)}
        columns = nodes["MatMulInteger"].inputs[1]
        assert columns is not None
        cast = nodes["Transpose"].inputs[0]
        assert columns.producer() is nodes["Transpose"]
        assert cast is not None
        assert cast.producer().attributes["to"].as_int() == int(ir.DataType.UINT8)  # type: ignore[union-attr]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("build", [models.mlp, models.transformer_block, models.if_model])
def test_recipes_lower_to_calls_that_any_onnxruntime_runs(
    recipe: str, build: Callable[[], ir.Model]
) -> None:
    model = build()
    result = compiled(model, recipe, **RECIPES[recipe])
    products = [op for op in calls(result.model) if op.startswith(INT8_LINEAR)]
    assert len(products) == sum(r.kind == "quantized" for r in result.remarks.verdicts().values())
    assert len(products) == len(products_of(model))
    feed = models.feed(model, 9)
    plain, optimized = both_levels(result.model, feed)
    np.testing.assert_array_equal(plain[0], optimized[0])
    wanted = models.outputs(model, feed)[0]
    assert np.abs(plain[0] - wanted).max() < 0.05 * np.abs(wanted).max()


def test_a_bias_joins_its_product() -> None:
    text = """
    gemms (float[batch,8] x) => (float[batch,4] y) {
      a = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (x, w0, b0)
      r = Relu (a)
      m = MatMul (r, w1)
      s = Add (b1, m)
      y = Add (s, b2)
    }"""
    tensors = [models.weight("w0", 6, 8), models.weight("w1", 6, 4)]
    tensors += [models.weight("b0", 6), models.weight("b1", 4), models.weight("b2", 1, 4)]
    model = models.build(text, *tensors)
    result = compiled(model, "dynamic")
    assert [n.op_type for n in result.model.graph if n.op_type not in ("Mul", "Relu")] == [
        "QuantizePerToken", INT8_LINEAR_WITH_BIAS, "QuantizePerToken", INT8_LINEAR_WITH_BIAS, "Add",
    ]  # fmt: skip
    feed = models.feed(model, 5)
    wanted = models.outputs(model, feed)[0]
    np.testing.assert_allclose(result(feed), wanted, atol=0.03 * np.abs(wanted).max())


def test_a_weight_of_two_products_is_stored_once() -> None:
    text = "two (float[3,8] x) => (float[3,8] y) { a = MatMul (x, w) \n y = MatMul (a, w) }"
    result = compiled(models.build(text, models.weight("w", 8, 8)), "dynamic")
    held = [v for v in result.model.graph.initializers.values() if v.dtype == ir.DataType.INT8]
    assert len(held) == 1


@pytest.mark.parametrize(
    ("text", "weights", "activation", "weight", "why"),
    [
        ("y = Conv (x, w)", (4, 8, 1), PER_TOKEN, WEIGHT, "target cpu"),
        ("y = Gather (w, i)", (9, 4), None, WEIGHT, "tables stay float"),
        ("y = MatMul (x, w)", (8, 4), None, WEIGHT, "scales by token"),
        ("y = MatMul (x, w)", (8, 4), PER_RUN, WEIGHT.with_(granularity=PerAxis(1)), "w8a8"),
        (
            "y = MatMul (x, w)", (8, 4), PER_TOKEN, WEIGHT.with_(granularity=PerBlock(0, 16)),
            "group_size=0",
        ),
        ("y = MatMul (x, w)", (8, 4), PER_TOKEN, WEIGHT.with_(dtype=ir.DataType.INT4), "bits=8"),
        ("y = MatMul (x, w)", (131072, 1), PER_TOKEN, WEIGHT.with_(granularity=PerAxis(1)), "32 b"),
        ("r = Relu (x) \n y = MatMul (r, w)", (65794, 1), PER_TOKEN,
         WEIGHT.with_(granularity=PerAxis(1)), "32 bits"),
    ],
)  # fmt: skip
def test_what_stays_float_is_told_what_takes_it(
    text: str, weights: tuple[int, ...], activation: object, weight: object, why: str
) -> None:
    kind = (
        "int64[2] i" if "Gather" in text else f"float[1,{weights[1 if 'Conv' in text else 0]},2] x"
    )
    kind = kind.replace(",2] x", "] x") if "MatMul" in text else kind
    model = models.build(
        f"one ({kind}) => (float[a,b] y) {{ {text} }}", models.weight("w", *weights)
    )
    verdict = get_target("cuda").supports(next(sites(model)), activation, weight)  # type: ignore[arg-type]
    assert not verdict.ok
    assert why in verdict.reason


def test_widths_whose_sums_fit_are_taken() -> None:
    model = models.build("one (float[1,131071] x) => (float[1,1] y) { y = MatMul (x, w) }",
                         models.weight("w", 131071, 1))  # fmt: skip
    spec = WEIGHT.with_(granularity=PerAxis(1))
    assert get_target("cuda").supports(products_of(model)[0], PER_TOKEN, spec).ok


def test_smoothquant_O2_takes_scales_by_token() -> None:  # noqa: N802
    result = compiled(models.transformer_block(), "smoothquant", level="O2", lkd=False)
    assert all(r.kind == "quantized" for r in result.remarks.verdicts().values() if r.op == "MatMul"
               and r.site not in ("scores", "mixed"))  # fmt: skip


@pytest.mark.parametrize("recipe", ["static", "nf4", "fp8"])
def test_recipes_that_do_not_lower_are_refused(recipe: str) -> None:
    with pytest.raises(QGraphError, match="use recipe w8a8, smoothquant, llm-int8, zeroquant"):
        compiled(models.mlp((64, 64, 8)), recipe)


@pytest.mark.parametrize("name", ["cuda:fp4", "cuda:", "cuda:sm80"])
def test_other_names_are_unknown(name: str) -> None:
    with pytest.raises(QGraphError, match=r"unknown target .*: use one of cpu, .*cuda"):
        get_target(name)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    ir.save(models.mlp(), model)
    assert main(["compile", str(model), "-r", "dynamic", "-t", "cuda", "-o", str(out)]) == 0
    assert calls(qgraph.load(out)).count("QuantizePerToken") == 2
    capsys.readouterr()
    assert main(["compile", str(model), "-r", "nf4", "-t", "cuda", "-o", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["targets"]) == 0
    assert "cuda" in capsys.readouterr().out
