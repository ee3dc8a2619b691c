"""Fake quantization in torch gives the integers of the reference, and LSQ's gradients."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qgraph.numerics.blocks import lowest, quantize_groups
from qgraph.numerics.groups import first_scales, layout, rows_of, shape_of
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.reference import (
    INT32_MAX,
    SMALLEST_SCALE,
    dequantize,
    quantize,
    quantize_bias,
    quantize_weight,
    scale_zero_point,
    weight_scale_for_bias,
)
from qgraph.numerics.spec import PerAxis, PerBlock, PerTensor, QuantSpec
from qgraph.numerics.tokens import (
    dequantize_per_token,
    quantize_per_token,
    round_in_blocks,
    token_grid,
)
from qgraph.torch.fake_quant import (
    fake_quantize,
    fake_quantize_bias,
    fake_quantize_blocks,
    fake_quantize_run,
    fake_quantize_token,
    gradient_share,
    scale_for_bias,
    spread,
    step_size,
    straight_through,
)

BITS = (2, 3, 4, 5, 6, 7, 8)
U8 = QuantSpec(ir.DataType.UINT8, symmetric=False)
FLOATS = st.floats(-1e4, 1e4, width=32)
ARRAYS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=9), elements=FLOATS
)


def same(tensor: torch.Tensor, array: np.ndarray) -> None:
    np.testing.assert_array_equal(tensor.detach().numpy(), array)


def slope(y: torch.Tensor, at: torch.Tensor, upstream: torch.Tensor | None = None) -> torch.Tensor:
    """The gradient of y, weighted by `upstream`, with respect to `at`."""
    (found,) = torch.autograd.grad(y, at, upstream, retain_graph=True)
    return found


# --- integers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerAxis(0), PerAxis(1), PerBlock(0, 5), PerBlock(1, 8)]
)
def test_weights_are_those_of_the_reference(
    bits: int, granularity: PerTensor | PerAxis | PerBlock
) -> None:
    w = np.random.default_rng(bits).standard_normal((17, 13)).astype(np.float32)
    spec = QuantSpec(ir.DataType.INT8, granularity, bits=bits % 8)
    scale, zero = first_scales(rows_of(w, spec), spec)
    shape = list(shape_of(w.shape, spec))
    if isinstance(granularity, PerBlock):
        count = shape.pop(granularity.axis)
        scale = np.moveaxis(scale.reshape(*shape, count), -1, granularity.axis)
        zero = np.moveaxis(zero.reshape(*shape, count), -1, granularity.axis)
    tensors = (
        spread(
            torch.as_tensor(np.ascontiguousarray(a)).reshape(shape_of(w.shape, spec)),
            w.shape,
            *layout(spec),
        )
        for a in (scale, zero)
    )
    wide_scale, wide_zero = tensors
    y = fake_quantize(torch.from_numpy(w), wide_scale, wide_zero, lowest(spec), spec.qmax)
    q = quantize(w, wide_scale.numpy(), wide_zero.numpy(), lowest(spec), spec.qmax)
    assert q.min() >= lowest(spec)
    assert len(np.unique(q)) <= 2**bits
    same(y, dequantize(q, wide_scale.numpy(), wide_zero.numpy()))
    # and no worse than the reference's own search, which tries fewer shares of the range
    if isinstance(granularity, PerBlock):
        rows = w if granularity.axis == 0 else w.T
        found, scales, _ = quantize_groups(rows, granularity.size, spec.with_(observer="mse"))
        theirs = found * np.repeat(scales, granularity.size, 0)[: len(rows)] - rows
    else:
        axis = granularity.axis if isinstance(granularity, PerAxis) else None
        q, s, _ = quantize_weight(w, axis, spec.with_(observer="mse"))
        theirs = (
            dequantize(q, s if axis is None else s.reshape([-1, 1] if axis == 0 else [1, -1]), 0)
            - w
        )
    assert np.square(y.numpy() - w).sum() <= np.square(theirs).sum() * 1.02


@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerAxis(0), PerAxis(1), PerBlock(0, 5), PerBlock(1, 8)]
)
def test_scales_spread_as_those_of_the_reference(
    granularity: PerTensor | PerAxis | PerBlock,
) -> None:
    q, spec = np.zeros((17, 13), np.int8), QuantSpec(granularity=granularity)
    rng, shape = np.random.default_rng(0), shape_of(q.shape, spec)
    scale = np.asarray(rng.standard_normal(shape), np.float32)
    zero = rng.integers(-8, 8, shape, np.int32)
    axis, block = layout(spec)
    weight = Quantized(q, scale, np.asarray(zero), axis, block=block)
    for array, theirs in ((scale, weight.steps()), (zero, weight.zeros())):
        same(spread(torch.as_tensor(array), q.shape, axis, block), theirs)


@given(ARRAYS, st.sampled_from(BITS), st.booleans())
@settings(max_examples=60, deadline=None)
def test_data_is_that_of_the_reference(x: np.ndarray, bits: int, symmetric: bool) -> None:
    spec = QuantSpec(ir.DataType.UINT8, symmetric=symmetric, bits=bits % 8)
    scale, zero = scale_zero_point(x.min() / np.float32(2), x.max() / np.float32(2), spec)
    y = fake_quantize(
        torch.from_numpy(x), torch.as_tensor(scale), torch.as_tensor(zero), spec.qmin, spec.qmax
    )
    same(y, dequantize(quantize(x, scale, zero, spec.qmin, spec.qmax), scale, zero))


@given(ARRAYS, st.sampled_from([None, 0.0, -0.17, -2.0]))
@settings(max_examples=60, deadline=None)
def test_scales_at_run_time_are_those_of_the_reference(x: np.ndarray, bound: float | None) -> None:
    if bound is not None:
        x = np.maximum(x, np.float32(bound))
    grid, tensor = token_grid(bound), torch.from_numpy(x)
    same(
        fake_quantize_token(tensor, grid), dequantize_per_token(*quantize_per_token(x, grid), grid)
    )
    same(fake_quantize_blocks(tensor, 4), round_in_blocks(x, 4))
    scale, zero = scale_zero_point(x.min(), x.max(), U8)
    same(fake_quantize_run(tensor), dequantize(quantize(x, scale, zero, 0, 255), scale, zero))


@given(
    hnp.arrays(np.float32, 7, elements=FLOATS),
    st.floats(2**-10, 1, width=32),
    hnp.arrays(np.float32, 7, elements=st.floats(2**-20, 1, width=32)),
)
@settings(max_examples=60, deadline=None)
def test_biases_are_those_of_the_reference(b: np.ndarray, x: float, w: np.ndarray) -> None:
    x_scale, tensors = np.float32(x), [torch.as_tensor(a) for a in (b, np.float32(x), w)]
    floor = weight_scale_for_bias(w, x_scale, b)
    same(scale_for_bias(tensors[2], tensors[1], tensors[0]), floor)
    q, scale = quantize_bias(b, x_scale, floor)
    same(
        fake_quantize_bias(tensors[0], tensors[1], torch.from_numpy(floor)), dequantize(q, scale, 0)
    )
    assert abs(q).max() <= INT32_MAX // 2 * (1 + 2**-22)  # both scales are rounded to float32


def test_ties_go_to_even_and_values_beyond_are_clamped() -> None:
    x = torch.tensor([-9.0, -1.5, -0.5, 0.5, 1.5, 2.5, 1e30, float("inf")])
    y = fake_quantize(x, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), -4, 3)
    assert y.tolist() == [-4, -2, 0, 0, 2, 2, 3, 3]


# --- gradients ------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_paper() -> None:
    """Equations 3 and 5: x passes inside the range; s gets round(v) - v there, else the limit."""
    x = torch.tensor([-3.0, -1.0, -0.3, 0.0, 0.7, 0.9, 4.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    y = fake_quantize(x, scale, torch.tensor(0, dtype=torch.int32), -2, 1, share=0.25)
    upstream = torch.arange(1.0, 8.0)
    inside = torch.tensor([0.0, 1, 1, 1, 0, 0, 0])
    same(slope(y, x, upstream), (upstream * inside).numpy())
    of_scale = upstream @ torch.tensor([-2.0, 0, -1 + 0.6, 0, 1, 1, 1])
    assert slope(y, scale, upstream).item() == pytest.approx(0.25 * of_scale.item(), rel=1e-6)


def test_every_scale_gets_the_gradient_of_its_own_elements() -> None:
    w = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(ir.DataType.INT8, PerBlock(0, 3), bits=2)
    scale = torch.full((2, 4), 0.4, requires_grad=True)
    zero = torch.zeros(2, 4, dtype=torch.int32)
    wide = spread(scale, w.shape, *layout(spec)), spread(zero, w.shape, *layout(spec))
    found = slope((fake_quantize(w, *wide, -2, 1) * w).sum(), scale)
    for row in range(2):
        for column in range(4):
            alone = torch.tensor(0.4, requires_grad=True)
            part = w[3 * row : 3 * row + 3, column]
            own = slope((fake_quantize(part, alone, zero[0, 0], -2, 1) * part).sum(), alone)
            assert found[row, column].item() == pytest.approx(own.item(), abs=1e-6)


def test_a_learned_step_comes_near_the_least_error() -> None:
    """Not to it: LSQ's gradient is not that of the error, and prefers finer steps."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    zero = torch.tensor(0, dtype=torch.int32)

    def error(scale: float) -> float:
        return float((fake_quantize(x, torch.tensor(scale), zero, -4, 3) - x).square().mean())

    start, factor = torch.tensor(0.1), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([factor], lr=0.05)
    for _ in range(100):
        scale = step_size(start, factor)
        loss = (fake_quantize(x, scale, zero, -4, 3) - x).square().mean()
        factor.grad = slope(loss, factor)
        optimizer.step()
    best = min(error(s / 100) for s in range(20, 120))
    assert error(step_size(start, factor).item()) < best * 1.25
    assert error(0.1) > 5 * best


@pytest.mark.parametrize("start", [0.5, -0.5])
def test_no_step_takes_a_scale_through_zero(start: float) -> None:
    factor = torch.tensor(-1e3, requires_grad=True)
    scale = step_size(torch.tensor(start), factor)
    assert scale.item() == np.copysign(SMALLEST_SCALE, start)
    factor = torch.tensor(0.3, requires_grad=True)
    scale = step_size(torch.tensor(start), factor)
    assert slope(scale, factor).item() == pytest.approx(1 / scale.item())


def test_rounding_at_run_time_passes_gradients() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    upstream = torch.randn(3, 8)
    for y in (
        fake_quantize_token(x, token_grid(None)),
        fake_quantize_run(x),
        fake_quantize_blocks(x, 4),
    ):
        same(slope(y, x, upstream), upstream.numpy())
    same(straight_through(x, x.round()), x.detach().round().numpy())


def test_the_share_of_a_scale() -> None:
    assert gradient_share(100, 1) == pytest.approx(0.1)
    assert gradient_share(0, 0) == 1.0
