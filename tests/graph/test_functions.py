"""Bodies of qgraph's operators agree with the reference, in every opset; they go when uncalled."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qgraph.graph.editing import insert
from qgraph.graph.functions import (
    DEQUANTIZE_PER_TOKEN,
    DOMAIN,
    OBSERVER,
    QUANTIZE_PER_TOKEN,
    declare,
    grid_values,
    is_call,
    undeclare_unused,
)
from qgraph.graph.reading import nodes
from qgraph.io.session import open_session, run
from qgraph.numerics.tokens import (
    SYMMETRIC_GRID,
    TokenGrid,
    dequantize_per_token,
    quantize_per_token,
    token_grid,
)
from qgraph.pipeline.verify import check_structure
from tests.models import build, if_model, outputs

GRIDS = [SYMMETRIC_GRID, token_grid(0.0), token_grid(-0.17)]


def tokens_model(grid: TokenGrid, version: int = 21) -> ir.Model:
    """x -> integers, magnitudes, and what they stand for."""
    model = build("g (float[N,K] x) => (float[N,K] y) { y = Identity (x) }")
    model.graph.opset_imports[""] = version
    for name in (QUANTIZE_PER_TOKEN, DEQUANTIZE_PER_TOKEN):
        declare(model, name)
    step, zero, floor = grid_values(model, grid)
    x, last = model.graph.inputs[0], model.graph[0]
    q = insert(
        model, last, QUANTIZE_PER_TOKEN, [x, step, zero, floor], base="q", domain=DOMAIN, outputs=2
    )
    q.outputs[0].type, q.outputs[1].type = (
        ir.TensorType(ir.DataType.UINT8), ir.TensorType(ir.DataType.FLOAT),
    )  # fmt: skip
    back = insert(
        model, last, DEQUANTIZE_PER_TOKEN, [*q.outputs, step, zero], base="d", domain=DOMAIN
    )
    last.replace_input_with(0, back.outputs[0])
    model.graph.outputs.extend(q.outputs)
    return model


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: str(g.zero))
@pytest.mark.parametrize("version", [13, 17, 18, 21])
@pytest.mark.parametrize("optimized", [False, True])
def test_bodies_are_the_reference_bit_for_bit(
    grid: TokenGrid, version: int, optimized: bool
) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((40, 33)) * rng.choice([1e-3, 1, 50], (40, 1))).astype(np.float32)
    if grid.zero < 128:
        x = np.maximum(x, -0.17 if grid.zero else 0.0).astype(np.float32)
    x[3] = 0
    y, q, largest = run(open_session(tokens_model(grid, version), optimized=optimized), {"x": x})
    wanted, magnitudes = quantize_per_token(x, grid)
    np.testing.assert_array_equal(q, wanted)
    np.testing.assert_array_equal(largest, magnitudes)
    np.testing.assert_allclose(y, dequantize_per_token(wanted, magnitudes, grid), rtol=1e-6)
    assert not y[3].any()


@settings(max_examples=60, deadline=None)
@given(
    x=hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
        elements=st.floats(-1e6, 1e6, width=32),
    ),
    lowest=st.sampled_from([None, 0.0, -0.17, -0.28, -1.0, -5.0]),
)  # fmt: skip
def test_every_token_comes_back_within_a_step(x: np.ndarray, lowest: float | None) -> None:
    grid = token_grid(lowest)
    if lowest is not None:
        x = np.maximum(x, np.float32(lowest))
    y, q, largest = run(open_session(tokens_model(grid), optimized=False), {"x": x})
    assert (np.abs(y - x) <= largest * grid.step * 0.51 + 1e-30).all()
    np.testing.assert_array_equal(q, quantize_per_token(x, grid)[0])


def test_grids_are_shared_and_told_apart() -> None:
    model = tokens_model(SYMMETRIC_GRID)
    again = grid_values(model, SYMMETRIC_GRID)
    other = grid_values(model, token_grid(0.0))
    assert again == grid_values(model, SYMMETRIC_GRID)
    assert not set(again) & set(other)


def test_declared_once_and_dropped_when_uncalled() -> None:
    model = tokens_model(SYMMETRIC_GRID)
    declare(model, QUANTIZE_PER_TOKEN)
    assert sorted(f.name for f in model.functions.values()) == [
        DEQUANTIZE_PER_TOKEN,
        QUANTIZE_PER_TOKEN,
    ]
    declare(model, OBSERVER)
    undeclare_unused(model)
    assert OBSERVER not in {f.name for f in model.functions.values()}
    assert not check_structure(model)
    bare = build("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    declare(bare, OBSERVER)
    undeclare_unused(bare)
    assert not bare.functions
    assert DOMAIN not in bare.opset_imports


def test_a_call_in_a_branch_counts() -> None:
    model = if_model()
    declare(model, OBSERVER)
    inner = next(n for n in nodes(model) if n.graph is not model.graph)
    observer = insert(model, inner, OBSERVER, [inner.inputs[0]], base="o", domain=DOMAIN)
    observer.outputs[0].type, observer.outputs[0].shape = (
        inner.inputs[0].type, inner.inputs[0].shape,  # type: ignore[union-attr]
    )  # fmt: skip
    inner.replace_input_with(0, observer.outputs[0])
    undeclare_unused(model)
    assert is_call(observer, OBSERVER)
    assert (DOMAIN, OBSERVER, "") in model.functions


def test_an_observer_is_the_identity() -> None:
    model = build("g (float[3] x) => (float[3] y) { y = Identity (x) }")
    declare(model, OBSERVER)
    model.graph[0].domain, model.graph[0].op_type = DOMAIN, OBSERVER
    x = np.array([1, -2, 3], np.float32)
    np.testing.assert_array_equal(outputs(model, {"x": x})[0], x)
    assert not is_call(None, OBSERVER)
