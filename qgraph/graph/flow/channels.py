"""Arrays that say which channel each element of a value ends up in further down.

Such an array stands beside a value and broadcasts to it; where an element ends up in no channel, it
is -1. Here is what becomes of one when the value is broadcast or reshaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Channels = NDArray[np.intp]
Size = int | str
"""A dimension: its size, or its name where only that is known."""


@dataclass(frozen=True, eq=False)
class Part:
    """An input to be divided.

    Attributes:
        index: which input.
        channels: broadcast to the input; only a term or factor may be the smaller one of the two.
        ties: (n, 2), pairs of channels that meet in one element of the input.
    """

    index: int
    channels: Channels
    ties: Channels = field(default_factory=lambda: np.empty((0, 2), np.intp))


def trimmed(channels: Channels) -> Channels:
    """Without the axes in front along which nothing varies; the last axis stays."""
    lead = next((i for i, n in enumerate(channels.shape[:-1]) if n != 1), channels.ndim - 1)
    return channels.reshape(channels.shape[lead:])


def met(index: int, channels: Channels, shape: Sequence[int | None]) -> Part | None:
    """The part for an input of this shape that is broadcast to the shape of `channels`.

    None where a size is unknown, or where a channel would meet what must not be divided.
    """
    narrow = channels
    sizes = [1] * (channels.ndim - len(shape)) + [*shape[max(0, len(shape) - channels.ndim) :]]
    for axis, (wide, size) in enumerate(zip(channels.shape, sizes, strict=True)):
        if wide != 1 and wide != size:
            if size != 1 or not shape:
                return None
            narrow = narrow.take([0], axis)
    pairs = np.stack(np.broadcast_arrays(narrow, channels), axis=-1).reshape(-1, 2)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return None if (pairs < 0).any() else Part(index, trimmed(narrow), pairs)


def reshaped(channels: Channels, after: Sequence[Size], before: Sequence[Size]) -> Channels | None:
    """The channels beside a value of shape `before`, given those beside its reshape to `after`.

    Axes are matched from the right, in groups of equal products. None if those along which the
    channels vary do not line up.
    """
    channels, out, into = trimmed(channels), list(after), list(before)
    wide, narrow = list[int](), list[int]()
    while len(wide) < channels.ndim:
        count = _equal_products(out, into)
        if count is None:
            return None
        left, right = out[-count[0] :], into[-count[1] :]
        del out[-count[0] :], into[-count[1] :]
        end = channels.ndim - len(wide)
        if math.prod(channels.shape[max(0, end - len(left)) : end]) == 1:
            left, right = [1] * len(left), [1] * len(right)
        wide, narrow = [*_known(left), *wide], [*_known(right), *narrow]
        if len(_known(left)) < len(left) or len(_known(right)) < len(right):
            return None
    result = np.broadcast_to(channels, wide).reshape(narrow)
    for axis in range(result.ndim):  # the batches of a channel may have become elements of an axis
        if (result == result.take([0], axis)).all():
            result = result.take([0], axis)
    return trimmed(result)


def _equal_products(a: Sequence[Size], b: Sequence[Size]) -> tuple[int, int] | None:
    """How many of the last axes of `a` and of `b` have the same product, one or more of each."""
    i = j = 1
    while i <= len(a) and j <= len(b):
        left, right = _product(a[-i:]), _product(b[-j:])
        if left == right:
            return i, j
        if left < right:
            i += 1
        else:
            j += 1
    return None


def _product(sizes: Sequence[Size]) -> tuple[int, int, list[str]]:
    names = sorted(n for n in sizes if isinstance(n, str))
    return math.prod(_known(sizes)), len(names), names


def _known(sizes: Sequence[Size]) -> list[int]:
    return [n for n in sizes if isinstance(n, int)]
