"""The modules that quantization-aware training puts into a graph: one for each value and weight."""

from __future__ import annotations

import math
from enum import Enum

import numpy as np
import torch
from torch import Tensor, nn

from qgraph.numerics.blocks import lowest
from qgraph.numerics.groups import first_scales, layout, rows_of, shape_of
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.reference import quantize, scale_zero_point
from qgraph.numerics.spec import NUMPY, PerBlock, PerToken, QuantSpec
from qgraph.numerics.tokens import TokenGrid
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
)

SAMPLES = 8192
"""Elements of each value that are kept until its first scale is chosen."""


class Mode(Enum):
    """What quantizers do to what they are given."""

    PASS = 1
    OBSERVE = 2
    QUANTIZE = 3


class Phase:
    """The mode of all quantizers of a module."""

    def __init__(self) -> None:
        self.mode = Mode.PASS


class DataQuantizer(nn.Module):
    """A value with a fixed scale, observed first, then learned.

    Attributes:
        spec: one scale for the tensor.
        low, high: what has been observed.
        sample: evenly spaced elements of what was observed, the first `count` of it.
        start: the first scale, chosen by :meth:`freeze`; zero: the zero point, which stays.
        log_factor: what training makes of the scale, see :func:`fake_quant.step_size`.
    """

    low: Tensor
    high: Tensor
    sample: Tensor
    count: Tensor
    start: Tensor
    zero: Tensor

    def __init__(self, spec: QuantSpec, phase: Phase, each: int, learn: bool) -> None:
        super().__init__()
        self.spec, self.each = spec, each
        self.phase = phase
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("sample", torch.zeros(SAMPLES))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("start", torch.ones(()))
        self.register_buffer("zero", torch.zeros((), dtype=torch.int32))
        self.log_factor = nn.Parameter(torch.zeros(()), requires_grad=learn)

    @property
    def scale(self) -> Tensor:
        return step_size(self.start, self.log_factor)

    def forward(self, x: Tensor) -> Tensor:
        if self.phase.mode is Mode.QUANTIZE:
            elements = x.numel() / max(x.shape[0], 1) if x.ndim else 1
            share = gradient_share(elements, self.spec.qmax - self.spec.qmin)
            return fake_quantize(x, self.scale, self.zero, self.spec.qmin, self.spec.qmax, share)
        if self.phase.mode is Mode.OBSERVE:
            self._observe(x.detach().float().flatten())
        return x

    def _observe(self, x: Tensor) -> None:
        if not x.numel():
            return
        low, high = torch.aminmax(x)
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))
        # The first batches fill the sample, later ones take the place of older elements.
        picked = x[:: max(1, x.numel() // self.each)][: self.each]
        at = int(self.count) % SAMPLES
        picked = picked[: SAMPLES - at]
        self.sample[at : at + picked.numel()] = picked
        self.count += picked.numel()

    def freeze(self) -> None:
        """Choose the first scale."""
        seen = self.sample[: min(int(self.count), SAMPLES)].cpu().numpy()
        low, high = (np.float32(bound.item()) for bound in (self.low, self.high))
        silent = low == high == 0
        if silent or (self.spec.observer == "minmax" and self.spec.width == 8):
            # A residual branch whose last layer starts at 0 has no range yet: that of 1 learns.
            low, high = (np.float32(-1), np.float32(1)) if silent else (low, high)
            scale, zero = scale_zero_point(low, high, self.spec)
        else:
            (scale,), (zero,) = first_scales(seen[np.newaxis], self.spec)
        self.start.copy_(torch.as_tensor(scale))
        self.zero.copy_(torch.as_tensor(zero))


class TokenQuantizer(nn.Module):
    """Data whose scales are computed at run time: for each token, run, or block of a token."""

    def __init__(self, spec: QuantSpec, grid: TokenGrid, phase: Phase) -> None:
        super().__init__()
        self.spec, self.grid, self.phase = spec, grid, phase

    def forward(self, x: Tensor) -> Tensor:
        if self.phase.mode is not Mode.QUANTIZE:
            return x
        if isinstance(self.spec.granularity, PerToken):
            return fake_quantize_token(x, self.grid)
        if isinstance(self.spec.granularity, PerBlock):
            return fake_quantize_blocks(x, self.spec.granularity.size)
        return fake_quantize_run(x)


class WeightQuantizer(nn.Module):
    """The weight of a site, and the bias that its integer kernel adds.

    Attributes:
        spec: one scale for the tensor, each index of an axis, or each block.
        start, zero, log_factor: as in :class:`DataQuantizer`, one for each scale.
    """

    start: Tensor
    zero: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, ...],
        phase: Phase,
        learn: bool,
        data: DataQuantizer | None,
        outputs: int,
    ) -> None:
        super().__init__()
        self.spec, self.phase, self.outputs = spec, phase, outputs
        scales = shape_of(shape, spec)
        self.register_buffer("start", torch.ones(scales))
        self.register_buffer("zero", torch.zeros(scales, dtype=torch.int32))
        self.log_factor = nn.Parameter(torch.zeros(scales), requires_grad=learn)
        self._data = (data,)  # in a tuple, so that its parameters are not listed twice

    def scale(self, bias: Tensor | None = None) -> Tensor:
        """Of the weight: 0-D, (N,), or one for each block; large enough for the bias."""
        scale = step_size(self.start, self.log_factor)
        (data,) = self._data
        return scale if bias is None or data is None else scale_for_bias(scale, data.scale, bias)

    def forward(self, w: Tensor, bias: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The weight; with a bias, both."""
        if self.phase.mode is not Mode.QUANTIZE:
            return w if bias is None else (w, bias)
        bias = bias if bias is None else bias.reshape(-1).expand(self.outputs)
        scale, (data,) = self.scale(bias), self._data
        share = gradient_share(w.numel() / max(scale.numel(), 1), self.spec.qmax)
        steps, zeros = (spread(a, w.shape, *layout(self.spec)) for a in (scale, self.zero))
        rounded = fake_quantize(w, steps, zeros, lowest(self.spec), self.spec.qmax, share)
        if bias is None:
            return rounded
        assert data is not None
        return rounded, fake_quantize_bias(bias, data.scale, scale)

    def freeze(self, w: Tensor) -> None:
        """Choose the first scales."""
        array = w.detach().cpu().numpy()
        if not array.any():  # a layer that starts at 0: as if it had the weights of other layers
            usual = self.spec.qmax * math.sqrt(array.size / max(self.outputs, 1))
            self.start.fill_(1 / max(usual, 1))
            return
        kind = self.spec.granularity
        scale, zero = (
            torch.from_numpy(a) for a in first_scales(rows_of(array, self.spec), self.spec)
        )
        shape = list(self.start.shape)
        if isinstance(kind, PerBlock):  # rows run over the other axes first
            count = shape.pop(kind.axis)
            scale, zero = (a.reshape(*shape, count).movedim(-1, kind.axis) for a in (scale, zero))
        self.start.copy_(scale.reshape(self.start.shape))
        self.zero.copy_(zero.reshape(self.zero.shape))

    @torch.no_grad()
    def take(self, weight: Quantized, w: Tensor) -> None:
        """Start from this rounded weight."""
        w.copy_(torch.from_numpy(weight.float()))
        self.start.copy_(torch.from_numpy(weight.scale).reshape(self.start.shape))
        self.zero.copy_(torch.from_numpy(weight.zero).reshape(self.zero.shape))
        self.log_factor.zero_()

    @torch.no_grad()
    def integers(self, w: Tensor, bias: Tensor | None) -> Quantized:
        """What insert-qdq writes."""
        bias = bias if bias is None else bias.reshape(-1).expand(self.outputs)
        scale, (axis, block) = self.scale(bias), layout(self.spec)
        steps, zeros = (spread(a, w.shape, axis, block).cpu().numpy() for a in (scale, self.zero))
        q = quantize(w.float().cpu().numpy(), steps, zeros, lowest(self.spec), self.spec.qmax)
        return Quantized(
            np.ascontiguousarray(q, NUMPY[self.spec.dtype]),
            scale.cpu().numpy(),
            self.zero.cpu().numpy(),
            axis,
            block=block,
        )
