"""Rounding that is learned by gradients: AdaRound's relaxation and AutoRound's offsets."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qgraph.numerics.quantized import Quantized
from qgraph.torch.block import Block
from qgraph.torch.fake_quant import spread, straight_through

STRETCH = (-0.1, 1.1)
"""The sigmoid is stretched to this range before it is cut off at 0 and 1 (gamma and zeta)."""
SHARPNESS = (20.0, 2.0)
"""The exponent of the regulariser, at first and at last."""
WARM_UP = 0.2
"""Share of the steps before weights are pushed to either side."""
RANGE = (0.5, 1.5)
"""How far the ends of a range can move, in units of where they were."""
RATE = 0.05
"""Of AdaRound's descent; V is about -2.4 where a weight is rounded down, 2.4 where it is up."""
PENALTY = 10.0
"""What undecided weights cost, in units of the loss of rounding to nearest."""
CHECKS = 8
"""How many times, spread over the steps, AutoRound measures its loss on all calibration data."""


# ------------------------------------------------------------------------------------ AdaRound


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) = clip(sigmoid(V) · (zeta - gamma) + gamma, 0, 1): eq. 23."""
    low, high = STRETCH
    return (torch.sigmoid(v) * (high - low) + low).clamp(0, 1)


def inverse_sigmoid(h: Tensor) -> Tensor:
    """V with h(V) = h, for h in 0..1."""
    low, high = STRETCH
    return torch.logit((h - low) / (high - low))


def undecided(h: Tensor, sharpness: float) -> Tensor:
    """f(V) = 1 - |2h - 1|^beta: 0 for what is rounded, 1 halfway: eq. 24, element by element."""
    return 1 - (2 * h - 1).abs().pow(sharpness)


def sharpness(progress: float) -> float:
    """The exponent beta after this share of the steps, 0 to 1, or infinity during the warm-up.

    At first the regulariser is flat but for the ends, and moves only what is nearly decided.
    """
    first, last = SHARPNESS
    t = (progress - WARM_UP) / (1 - WARM_UP)
    return math.inf if t < 0 else last + (first - last) * (1 + math.cos(math.pi * t)) / 2


class UpOrDown(nn.Module):
    """AdaRound: each weight goes to the integer above or below it, or between them meanwhile.

    Attributes:
        v: learned; h(v) = 0 is the integer below, 1 the one above.
    """

    base: Tensor
    steps: Tensor
    zeros: Tensor

    def __init__(self, w: NDArray[Any], nearest: Quantized, low: int, high: int) -> None:
        """
        Args:
            w: float weight.
            nearest: the weight rounded to nearest; its scales stay.
            low, high: range of the integers.
        """
        super().__init__()
        self.nearest, self.low, self.high = nearest, low, high
        self.register_buffer("steps", torch.tensor(nearest.steps()))
        self.register_buffer("zeros", torch.tensor(nearest.zeros(), dtype=torch.float32))
        exact = torch.tensor(np.asarray(w, np.float32)) / self.steps
        self.register_buffer("base", exact.floor())
        self.v = nn.Parameter(inverse_sigmoid(exact - self.base))

    def up(self) -> Tensor:
        """h(V): how far each weight is rounded up."""
        return rectified_sigmoid(self.v)

    def forward(self) -> Tensor:
        return self._at(self.up())

    def _at(self, up: Tensor) -> Tensor:
        q = (self.base + up).clamp(self.low - self.zeros, self.high - self.zeros)
        return q * self.steps

    @torch.no_grad()
    def integers(self) -> Quantized:
        q = (self.base + (self.up() >= 0.5) + self.zeros).clamp(self.low, self.high)
        return replace(self.nearest, q=q.numpy().astype(self.nearest.q.dtype))


# ----------------------------------------------------------------------------------- AutoRound


class Offset(nn.Module):
    """AutoRound: an offset for each weight before it is rounded, and both ends of each range.

    Attributes:
        v: offset, in steps, -0.5 to 0.5.
        bottom, top: factors on the ends of the range that the integers cover; symmetric ranges
            have `top` alone. Shape of the scales.
    """

    w: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(
        self, w: NDArray[Any], nearest: Quantized, low: int, high: int, symmetric: bool
    ) -> None:
        super().__init__()
        self.nearest, self.low, self.high, self.symmetric = nearest, low, high, symmetric
        self.register_buffer("w", torch.tensor(np.asarray(w, np.float32)))
        self.register_buffer("scale", torch.tensor(nearest.scale))
        self.register_buffer("zero", torch.tensor(nearest.zero, dtype=torch.float32))
        self.v = nn.Parameter(torch.zeros(w.shape))
        self.bottom = nn.Parameter(torch.ones(self.scale.shape), requires_grad=not symmetric)
        self.top = nn.Parameter(torch.ones(self.scale.shape))

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as they stand, shape of the scales."""
        if self.symmetric:
            return self.scale * self.top, self.zero
        below = (self.low - self.zero) * self.scale * self.bottom
        above = (self.high - self.zero) * self.scale * self.top
        scale = (above - below) / (self.high - self.low)
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        return scale, rounded(self.low - below / scale).clamp(self.low, self.high)

    def forward(self) -> Tensor:
        scale, zero = (self._spread(a) for a in self.grid())
        return (self._integers(scale, zero) - zero) * scale

    def _integers(self, scale: Tensor, zero: Tensor) -> Tensor:
        return (rounded(self.w / scale + self.v) + zero).clamp(self.low, self.high)

    def _spread(self, values: Tensor) -> Tensor:
        return spread(values, self.w.shape, self.nearest.axis, self.nearest.block)

    @torch.no_grad()
    def integers(self) -> Quantized:
        scale, zero = self.grid()
        q = self._integers(self._spread(scale), self._spread(zero)).numpy()
        return replace(
            self.nearest,
            q=q.astype(self.nearest.q.dtype),
            scale=scale.numpy(),
            zero=zero.numpy().astype(np.int32),
        )

    @torch.no_grad()
    def descend(self, rate: float) -> None:
        """One step of signed gradient descent: everything moves by `rate`, within its bounds."""
        for parameter, bounds in ((self.v, (-0.5, 0.5)), (self.bottom, RANGE), (self.top, RANGE)):
            if parameter.grad is not None:
                parameter.sub_(rate * parameter.grad.sign()).clamp_(*bounds)
                parameter.grad = None


def rounded(x: Tensor) -> Tensor:
    """x rounded to nearest, half to even; gradients pass as if it were not."""
    return straight_through(x, x.round())


# ------------------------------------------------------------------------------------ learning


def batches(feeds: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Feeds of each step, in an order that is drawn anew when all have been seen."""
    rng = np.random.default_rng(seed)
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < min(size, feeds):
            waiting += rng.permutation(feeds).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def learn_up_or_down(
    block: Block, weights: Sequence[UpOrDown], plain: float, steps: int, order: Iterator[list[int]]
) -> None:
    """AdaRound by Adam: the block's error, and a penalty on what is undecided, eq. 21.

    Both are in units that all models share: the error in those of rounding to nearest.

    Args:
        plain: loss of rounding to nearest.
    """
    optimizer = torch.optim.Adam([w.v for w in weights], RATE)
    count = sum(w.v.numel() for w in weights)
    for step, feeds in enumerate(order):
        beta = sharpness(step / steps)
        loss = block.loss([w() for w in weights], feeds) / plain
        if beta < math.inf:
            loss = loss + PENALTY * sum(undecided(w.up(), beta).sum() for w in weights) / count
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


def learn_offsets(
    block: Block, weights: Sequence[Offset], plain: float, steps: int, order: Iterator[list[int]]
) -> None:
    """AutoRound by signed gradients: the rate falls from 1 / steps to 0; the best is kept."""
    least, best_states = plain, [copy.deepcopy(w.state_dict()) for w in weights]
    for step, feeds in enumerate(order):
        torch.autograd.backward(block.loss([w() for w in weights], feeds))
        for w in weights:
            w.descend((1 - step / steps) / steps)
        if (step + 1) % max(1, steps // CHECKS) and step + 1 < steps:
            continue
        loss = block.total([w() for w in weights])
        if loss < least:
            least, best_states = loss, [copy.deepcopy(w.state_dict()) for w in weights]
    for w, state in zip(weights, best_states, strict=True):
        w.load_state_dict(state)
