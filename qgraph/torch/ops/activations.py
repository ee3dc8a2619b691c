"""Activation functions and dropout."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qgraph.torch.ops.types import Operators


def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


def selu(
    x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875
) -> Tensor:
    return gamma * F.elu(x, alpha)


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def prelu(x: Tensor, slope: Tensor, *, opset: int) -> Tensor:
    if opset < 7 and slope.numel() > 1:  # then slopes went with the channels
        slope = slope.reshape([-1] + [1] * (x.ndim - 2))
    return torch.where(x < 0, slope * x, x)


def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, 0)


def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    moved = torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0))
    return moved.to(x.dtype)


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return x * torch.sigmoid(alpha * x)


def swiglu(gate: Tensor, x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return swish(gate, alpha=alpha) * x


def softplus(x: Tensor) -> Tensor:
    return F.softplus(x)


def softsign(x: Tensor) -> Tensor:
    return F.softsign(x)


def hard_swish(x: Tensor) -> Tensor:
    return F.hardswish(x)


def mish(x: Tensor) -> Tensor:
    return F.mish(x)


def softmax(x: Tensor, *, axis: int | None = None, opset: int) -> Tensor:
    return _normalized(lambda t, dim: torch.softmax(t, dim), x, axis, opset)


def log_softmax(x: Tensor, *, axis: int | None = None, opset: int) -> Tensor:
    return _normalized(lambda t, dim: torch.log_softmax(t, dim), x, axis, opset)


def hardmax(x: Tensor, *, axis: int | None = None, opset: int) -> Tensor:
    return _normalized(_first_largest, x, axis, opset)


def _first_largest(x: Tensor, dim: int) -> Tensor:
    first = torch.argmax(x, dim, keepdim=True)
    return torch.zeros_like(x).scatter(dim, first, 1)


def _normalized(
    function: Callable[[Tensor, int], Tensor], x: Tensor, axis: int | None, opset: int
) -> Tensor:
    """Along one axis; before opset 13 over all axes from `axis` on, taken for one."""
    if opset >= 13:
        return function(x, -1 if axis is None else axis)
    axis = (1 if axis is None else axis) % max(x.ndim, 1)
    return function(x.flatten(axis), axis).reshape(x.shape)


def dropout(
    x: Tensor,
    ratio: Tensor | None = None,
    training_mode: Tensor | None = None,
    *,
    seed: int = 0,
    outputs: int,
) -> tuple[Tensor, Tensor]:
    """Drops only where the graph itself asks for training; the draw is torch's own."""
    share = 0.5 if ratio is None else float(ratio)
    if training_mode is None or not bool(training_mode) or share == 0:
        return x, torch.ones_like(x, dtype=torch.bool)
    mask = torch.rand(x.shape, device=x.device) >= share
    return torch.where(mask, x / (1 - share), 0), mask


def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    return x * torch.sigmoid(alpha * x)


OPERATORS: Operators = {
    "Celu": celu,
    "Dropout": dropout,
    "Elu": elu,
    "Gelu": gelu,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "Hardmax": hardmax,
    "LeakyRelu": leaky_relu,
    "LogSoftmax": log_softmax,
    "Mish": mish,
    "PRelu": prelu,
    "Relu": torch.relu,
    "Selu": selu,
    "Shrink": shrink,
    "Sigmoid": torch.sigmoid,
    "Softmax": softmax,
    "Softplus": softplus,
    "Softsign": softsign,
    "SwiGLU": swiglu,
    "Swish": swish,
    "Tanh": torch.tanh,
    "ThresholdedRelu": thresholded_relu,
}
MICROSOFT: Operators = {
    "BiasGelu": bias_gelu,
    "FastGelu": fast_gelu,
    "Gelu": gelu,
    "QuickGelu": quick_gelu,
}
