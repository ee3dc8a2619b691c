"""Quantization in torch that gradients pass: the integers of the reference numerics, in floats.

The functions compute what the reference computes, in float32 and in the same order, so that the
integers are equal bit for bit; rounding passes gradients as if it were not there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from qgraph.numerics.reference import INT32_MAX, SMALLEST_SCALE
from qgraph.numerics.tokens import SMALLEST_TOKEN, TokenGrid


class _LearnedStep(Function):
    """Quantize and dequantize, with the gradients of LSQ."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, share: float
    ) -> Tensor:
        steps = x.float() / scale
        low, high = (qmin - zero).float(), (qmax - zero).float()
        ctx.save_for_backward(steps, scale, low, high)
        ctx.share = share
        return steps.round().clamp_(low, high).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        steps, scale, low, high = ctx.saved_tensors
        # In place where it can be: for images, this is a third of the time that training takes.
        clipped = steps.clamp(low, high)
        inside = (clipped == steps).float()
        of_x = (gradient * inside).to(gradient.dtype)
        if not ctx.needs_input_grad[1]:
            return of_x, None, None, None, None, None
        slope = clipped.round_().addcmul_(steps, inside, value=-1).mul_(gradient)
        of_scale = slope.sum_to_size(scale.shape) * ctx.share
        return of_x, of_scale.to(scale.dtype), None, None, None, None


def fake_quantize(
    x: Tensor, scale: Tensor, zero: Tensor, qmin: int, qmax: int, share: float = 1.0
) -> Tensor:
    """(clip(round(x / scale) + zero, qmin, qmax) - zero) · scale.

    Gradients: that of x passes where x is inside the range. Per element, that of the scale is
    round(x / s) - x / s inside the range, and the nearest limit outside.

    Args:
        x: floats; computed in float32.
        scale, zero: float32 and int32, broadcast against x.
        share: factor of the scale's gradient, 1 / √(N · qmax) in the paper.

    Source: Esser et al. 2020, "Learned Step Size Quantization", equations 1 to 5.
    """
    result: Tensor = _LearnedStep.apply(x, scale, zero, qmin, qmax, share)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(x: Tensor, y: Tensor) -> Tensor:
    """y, with the gradient of x (Bengio et al. 2013)."""
    result: Tensor = _StraightThrough.apply(x, y.detach().to(x.dtype))  # type: ignore[no-untyped-call]
    return result


class _Step(Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, log_factor: Tensor) -> Tensor:
        scale = start * log_factor.exp()
        smallest = float(SMALLEST_SCALE)
        scale = torch.where(start < 0, scale.clamp(max=-smallest), scale.clamp(min=smallest))
        ctx.save_for_backward(scale)
        return scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (scale,) = ctx.saved_tensors
        return None, gradients[0] / scale


def step_size(start: Tensor, log_factor: Tensor) -> Tensor:
    """start · exp(log_factor): a scale that no optimizer can push through 0.

    Adam's steps do not depend on the size of what they change, and scales are as small as they
    like; weight decay pulls to the start instead of to 0. The gradient is that of the scale divided
    by the scale, not multiplied by it, which makes a small step of plain gradient descent the one
    that LSQ takes on the scale itself.
    """
    result: Tensor = _Step.apply(start, log_factor)  # type: ignore[no-untyped-call]
    return result


def gradient_share(elements: float, qmax: int) -> float:
    """LSQ's factor 1 / √(N · qmax) for a scale that `elements` share."""
    return 1 / math.sqrt(max(elements, 1) * max(qmax, 1))


# ------------------------------------------------------------------------------ scales at run time


def fake_quantize_token(x: Tensor, grid: TokenGrid) -> Tensor:
    """:func:`tokens.quantize_per_token` and back: a scale for each vector along the last axis."""
    with torch.no_grad():
        exact = x.float()
        floor, step = exact.new_tensor(grid.floor), exact.new_tensor(grid.step)
        largest = torch.maximum(exact.abs().amax(-1, keepdim=True), floor)
        q = (exact / largest / step).round().clamp(-grid.zero, 255 - grid.zero)
        y = q * step * largest
    return straight_through(x, y)


def fake_quantize_run(x: Tensor) -> Tensor:
    """DynamicQuantizeLinear and back: one scale for all of x, uint8."""
    with torch.no_grad():
        exact = x.float()
        low, high = (bound.to(exact) for bound in torch.aminmax(exact))
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / 255).clamp(min=float(SMALLEST_SCALE))
        zero = (-low / scale).round().clamp(0, 255)
        y = (exact / scale).round().clamp(-zero, 255 - zero) * scale
    return straight_through(x, y)


def fake_quantize_blocks(x: Tensor, size: int) -> Tensor:
    """:func:`tokens.round_in_blocks`: a scale for each block of each token, symmetric int8."""
    with torch.no_grad():
        padded = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % size))
        blocks = padded.reshape(*x.shape[:-1], -1, size)
        largest = blocks.abs().amax(-1, keepdim=True).clamp(min=float(SMALLEST_TOKEN))
        scale = largest * largest.new_tensor(np.float32(1 / 127))
        y = ((blocks / scale).round() * scale).flatten(-2)[..., : x.shape[-1]]
    return straight_through(x, y)


# ------------------------------------------------------------------------------------- biases


def fake_quantize_bias(bias: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    """:func:`reference.quantize_bias` and back: int32 with the scale x · w.

    Args:
        bias: (N,).
        x_scale: one.
        w_scale: one, or (N,).
    """
    with torch.no_grad():
        scale = (x_scale.float() * w_scale.float()).expand(bias.shape)
        steps = (bias.float().double() / scale.double()).round().clamp(-INT32_MAX, INT32_MAX)
        y = steps.float() * scale
    return straight_through(bias, y)


def scale_for_bias(w_scale: Tensor, x_scale: Tensor, bias: Tensor) -> Tensor:
    """:func:`reference.weight_scale_for_bias`: large enough for the bias to fit; (N,)."""
    with torch.no_grad():
        needed = bias.float().double().abs() / (x_scale.double() * (INT32_MAX // 2))
    if w_scale.ndim == 0:
        return torch.maximum(w_scale, needed.max().float())
    return torch.maximum(w_scale, needed.float())


# ------------------------------------------------------------------------------------ shapes


def spread(values: Tensor, shape: Sequence[int], axis: int | None, block: int) -> Tensor:
    """Scales or zero points so that they broadcast against a tensor.

    Args:
        values: one; or one for each index of `axis`; or shape of the tensor, but for `axis`, along
            which each of them belongs to a block of elements.
        shape: of the tensor.
        axis, block: see :func:`groups.layout`.
    """
    if axis is None:
        return values
    if block:
        return values.repeat_interleave(block, axis).narrow(axis, 0, shape[axis])
    sizes = [1] * len(shape)
    sizes[axis] = -1
    return values.reshape(sizes)
