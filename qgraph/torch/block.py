"""A part of a model as a torch module, and what it is to give on calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from qgraph.errors import QGraphError
from qgraph.numerics.quantized import Quantized

try:
    import torch
except ImportError:
    raise QGraphError(
        'learned rounding needs torch: pip install "qgraph-compiler[torch]"'
    ) from None

from torch import Tensor, nn


class Block:
    """A part of a model, and what it is to give on calibration data.

    Attributes:
        module: takes the inputs of the part, then the weights that are learned.
        seen: of each feed, the inputs: what the model gives whose earlier weights are rounded.
        targets: of each feed, the outputs of the float model; None for those that the weights do
            not reach.
        counts: of each feed, what the squared error of each output counts, which broadcasts.
        power: of each output, that of its targets, the mean over the feeds.
        unpaired: feeds that were left out of the loss, as their outputs have other shapes than
            their targets.
    """

    def __init__(
        self,
        module: nn.Module,
        seen: Sequence[Sequence[NDArray[Any]]],
        targets: Sequence[Sequence[NDArray[Any] | None]],
        masks: Sequence[NDArray[Any] | None],
        tokens: bool,
    ) -> None:
        """
        Args:
            masks: of each feed, 0 for tokens that do not count, where its shape is that of tokens.
            tokens: vectors along the last axis count alike, whatever their magnitude.
        """
        self.module = module.requires_grad_(False)
        self.seen = [[_tensor(a) for a in feed] for feed in seen]
        self.targets = [[a if a is None else _tensor(a) for a in feed] for feed in targets]
        self.counts = [
            [a if a is None else importance(a, mask, tokens) for a in feed]
            for feed, mask in zip(self.targets, masks, strict=True)
        ]
        signals = [self._signals(feed) for feed in range(len(self.targets))]
        self.power = torch.stack(signals).mean(0)
        self.unpaired: set[int] = set()

    def _signals(self, feed: int) -> Tensor:
        """Of each output that the weights reach, the power of its target."""
        pairs = zip(self.targets[feed], self.counts[feed], strict=True)
        return torch.stack([_sum(c, a.float()) for a, c in pairs if a is not None])

    @property
    def finite(self) -> bool:
        """Whether the targets are."""
        return bool(self.power.isfinite().all())

    @property
    def reached(self) -> bool:
        """Whether the targets are not zeros alone."""
        return bool(self.power.any())

    def error(self, weights: Sequence[Quantized]) -> float:
        """The loss of these weights over all feeds."""
        return self.total([torch.from_numpy(weight.float()) for weight in weights])

    def loss(self, weights: Sequence[Tensor], feeds: Sequence[int]) -> Tensor:
        """Power of the error over power of the targets, the mean over outputs.

        Args:
            weights: of the sites, in order.
            feeds: which of them to look at.
        """
        return torch.stack([self._of(weights, feed) for feed in feeds]).mean()

    def _of(self, weights: Sequence[Tensor], feed: int) -> Tensor:
        outputs = self.module(*self.seen[feed], *weights)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        noise = []
        for y, t, count in zip(outputs, self.targets[feed], self.counts[feed], strict=True):
            if t is None:
                continue
            if y.shape != t.shape:  # tokens that were sent other ways than in the float model
                self.unpaired.add(feed)
                return torch.stack([w.sum() for w in weights]).sum() * 0
            noise.append(_sum(count, y.float() - t))
        return (torch.stack(noise) / self.power)[self.power > 0].mean()

    @torch.no_grad()
    def total(self, weights: Sequence[Tensor]) -> float:
        """The loss over all feeds."""
        return float(self.loss(weights, range(len(self.seen))))


def _tensor(a: NDArray[Any]) -> Tensor:
    return torch.as_tensor(a if a.flags.writeable else a.copy())


def _sum(count: Tensor | None, errors: Tensor) -> Tensor:
    assert count is not None
    return (count * errors.square()).sum()


def importance(target: Tensor, mask: NDArray[Any] | None, tokens: bool) -> Tensor:
    """What squared errors of an output count, (..., 1).

    Args:
        target: the output, (..., channels) if it has tokens.
        mask: 0 for tokens that do not count; used where its shape is (...).
        tokens: bring each token to unit power: a language model's first one may be a thousand
            times larger than all others, and would have the weights to itself.
    """
    count = torch.ones((*target.shape[:-1], 1) if target.ndim else ())
    if tokens and target.ndim:
        power = target.float().square().mean(-1, keepdim=True)
        count = torch.where(power > 0, 1 / power.clamp(min=1e-30), 0)
    if mask is not None and mask.shape == target.shape[:-1]:
        count = count * torch.as_tensor(mask != 0)[..., None]
    return count
