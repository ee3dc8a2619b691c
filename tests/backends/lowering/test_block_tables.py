"""Lookup tables of few bits: blocks, the kernel for them, and tables tied to a product."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.numerics.noise import sqnr_db
from qgraph.recipes.recipe import Recipe
from qgraph.recipes.weight_only import awq, gptq, hqq, rtn
from tests.models import build, ops, outputs, weight
from tests.pipelines import ONNX, Shipped, apply, body, both, golden

VNNI = Shipped("cpu:avx512-vnni", "avx512-vnni")
ROWS, K = 1024, 64


def lookup(k: int = K) -> ir.Model:
    text = f"g (int64[n] ids) => (float[n,{k}] y) {{ y = Gather (table, ids) }}"
    return build(text, weight("table", ROWS, k))


def tied(k: int = K) -> ir.Model:
    text = f"""g (int64[n] ids) => (float[n,{ROWS}] y) {{
        h = Gather (table, ids)
        y = MatMul (h, w)
    }}"""
    model = build(text, weight("table", ROWS, k))
    turned = np.ascontiguousarray(weight("table", ROWS, k).numpy().T)
    value = ir.Value(
        name="w", const_value=ir.tensor(turned, name="w"),
        type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(turned.shape),
    )  # fmt: skip
    model.graph.register_initializer(value)
    model.graph[1].replace_input_with(1, value)
    return model


FEED = {"ids": np.array([3, 0, ROWS - 1, 512], np.int64)}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k", [64, 72])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_table_in_blocks(bits: int, k: int, symmetric: bool) -> None:
    model = lookup(k)
    wanted = outputs(model, FEED)[0]
    recipe = rtn(group_size=32, embedding_bits=bits, symmetric=symmetric)
    apply(model, recipe.passes[:-1], target=VNNI)
    committed = outputs(model, FEED)[0]
    apply(model, recipe.passes[-1:], target=VNNI)
    assert ops(model) == ["GatherBlockQuantized"]
    np.testing.assert_allclose(both(model, FEED)[0], committed, rtol=1e-6, atol=1e-7)
    assert sqnr_db(wanted, committed) > {2: 3, 3: 11, 4: 18}[bits]


def test_before_and_after_with_a_product_that_has_the_same_weight() -> None:
    model = tied()
    wanted = outputs(model, FEED)[0]
    apply(model, rtn(group_size=32, embedding_bits=4, bodies=1).passes, target=VNNI)
    assert body(model) == golden("""
        %w_q_packed_rows: u8[1024, 32] = Reshape(%w_q_packed, %w_q_packed_shape)
        %h_rows_rows: f32[n, 64] = com.microsoft::GatherBlockQuantized(%w_q_packed_rows, %ids, %w_q_scales) @h {bits = 4, block_size = 32, gather_axis = 0, quantize_axis = 1}
        %y: f32[n, 1024] = com.microsoft::MatMulNBits(%h_rows_rows, %w_q_packed, %w_q_scales) {K = 64, N = 1024, accuracy_level = 4, bits = 4, block_size = 32}
    """)  # noqa: E501
    assert sqnr_db(wanted, both(model, FEED)[0]) > 15


def test_a_product_with_a_padded_block() -> None:
    model = tied(72)
    wanted = outputs(model, FEED)[0]
    apply(model, rtn(group_size=32, embedding_bits=4, bodies=1).passes, target=VNNI)
    assert ops(model) == ["Reshape", "Slice", "GatherBlockQuantized", "MatMulNBits"]
    assert sqnr_db(wanted, both(model, FEED)[0]) > 15
    held = [v.const_value for v in model.graph.initializers.values()]
    assert sum(t.nbytes for t in held if t) < 1.3 * 1024 * 96 / 2  # stored once


@pytest.mark.parametrize("recipe", [awq, gptq, hqq])
def test_other_methods_leave_a_tied_table_to_rounding(recipe: Callable[..., Recipe]) -> None:
    model = tied()
    wanted = outputs(model, FEED)[0]
    passes = recipe(group_size=32, embedding_bits=4, symmetric=True, bodies=1).passes
    apply(model, passes, [FEED], target=VNNI)
    factors = ["Mul"] if recipe is awq else []  # scaled with the product, and back at the lookup
    assert ops(model) == ["Reshape", "GatherBlockQuantized", *factors, "MatMulNBits"]
    assert sqnr_db(wanted, both(model, FEED)[0]) > 15


def test_other_bits_are_stored_apart() -> None:
    model = tied()
    context = apply(model, rtn(group_size=32, embedding_bits=3, bodies=1).passes, target=VNNI)
    assert "stored apart" not in str(context.remarks)
    assert ops(model) == ["GatherBlockQuantized", "MatMulNBits"]


def test_standard_operators_elsewhere() -> None:
    model = lookup()
    wanted = outputs(model, FEED)[0]
    apply(model, rtn(group_size=32, embedding_bits=4, bodies=1).passes, target=ONNX)
    assert set(ops(model)) == {"DequantizeLinear", "Gather"}
    assert sqnr_db(wanted, both(model, FEED)[0]) > 18
