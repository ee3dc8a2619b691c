"""Convolution and pooling over any number of spatial axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qgraph.torch.ops.types import Ints, Operators, ints, is_float

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d,
}  # fmt: skip
_MAX_POOL: dict[int, Callable[..., tuple[Tensor, Tensor]]] = {
    1: F.max_pool1d_with_indices, 2: F.max_pool2d_with_indices, 3: F.max_pool3d_with_indices,
}  # fmt: skip


class Window(NamedTuple):
    """A window that slides over the spatial axes; each field has one number per axis."""

    size: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[int]
    after: list[int]

    def reach(self, axis: int) -> int:
        """From the first element that the window covers to the last."""
        return self.dilations[axis] * (self.size[axis] - 1) + 1

    def pads(self) -> list[int]:
        """As `torch.nn.functional.pad` takes them: the last axis first."""
        return _interleaved(self.before, self.after)


def _interleaved(before: Sequence[int], after: Sequence[int]) -> list[int]:
    pairs = zip(reversed(before), reversed(after), strict=True)
    return [n for pair in pairs for n in pair]


def window(
    x: Tensor,
    size: Sequence[int],
    strides: Sequence[int] | None,
    dilations: Sequence[int] | None,
    pads: Sequence[int] | None,
    auto_pad: str,
) -> Window:
    """The window with its padding made explicit."""
    rank = len(size)
    step, spread = list(strides or [1] * rank), list(dilations or [1] * rank)
    edges = list(pads or [0] * (2 * rank))
    padded = Window(list(size), step, spread, edges[:rank], edges[rank:])
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        for axis in range(rank):
            length = x.shape[axis + 2]
            count = -(-length // step[axis])
            total = max((count - 1) * step[axis] + padded.reach(axis) - length, 0)
            less, more = total // 2, total - total // 2
            padded.before[axis] = less if auto_pad == "SAME_UPPER" else more
            padded.after[axis] = more if auto_pad == "SAME_UPPER" else less
    return padded


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    w = window(x, weight.shape[2:], strides, dilations, pads, auto_pad)
    padding = w.before
    if w.before != w.after:
        x, padding = F.pad(x, w.pads()), [0] * len(w.size)
    return _CONV[len(w.size)](x, weight, bias, w.strides, padding, w.dilations, group)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    output_padding: list[int] | None = None,
    output_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    w = window(x, weight.shape[2:], strides, dilations, pads, "NOTSET")
    rank = len(w.size)
    extra = list(output_padding or [0] * rank)
    y = _TRANSPOSED[rank](
        x, weight, None, stride=w.strides, groups=group, dilation=w.dilations
    )  # nothing cut off yet
    lengths = list(output_shape or [])[-rank:]
    if not lengths and auto_pad.startswith("SAME"):
        lengths = [n * s for n, s in zip(x.shape[2:], w.strides, strict=True)]
    before, after = w.before, w.after
    if lengths:
        spare = [y.shape[i + 2] + extra[i] - lengths[i] for i in range(rank)]
        half = [n // 2 for n in spare]
        rest = [n - h for n, h in zip(spare, half, strict=True)]
        before, after = (half, rest) if auto_pad == "SAME_UPPER" else (rest, half)
    cut = _interleaved([-n for n in before], [e - n for e, n in zip(extra, after, strict=True)])
    y = F.pad(y, cut)
    return y if bias is None else y + bias.reshape([-1] + [1] * rank)


def _pooled_lengths(x: Tensor, w: Window, ceil_mode: int) -> list[int]:
    """How often the window fits; in ceil mode also where it begins inside and ends beyond."""
    lengths = []
    for axis, (before, after) in enumerate(zip(w.before, w.after, strict=True)):
        have = x.shape[axis + 2]
        steps = (have + before + after - w.reach(axis)) / w.strides[axis]
        count = (math.ceil if ceil_mode else math.floor)(steps) + 1
        if ceil_mode and (count - 1) * w.strides[axis] >= have + before:
            count -= 1  # it would begin in the padding behind
        lengths.append(count)
    return lengths


def _stretched(x: Tensor, w: Window, ceil_mode: int) -> list[int]:
    """The padding behind that makes every window whole."""
    return [
        (count - 1) * w.strides[axis] + w.reach(axis) - x.shape[axis + 2] - w.before[axis]
        for axis, count in enumerate(_pooled_lengths(x, w, ceil_mode))
    ]


def max_pool(
    x: Tensor,
    *,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    storage_order: int = 0,
    strides: list[int] | None = None,
    outputs: int,
) -> tuple[Tensor, ...]:
    """Values and, if two outputs are wanted, their positions in the flattened input."""
    w = window(x, kernel_shape, strides, dilations, pads, auto_pad)
    data = x if is_float(x) else x.to(torch.float32)
    edges = _interleaved(w.before, _stretched(x, w, ceil_mode))
    if any(edges):
        data = F.pad(data, edges, value=-math.inf)
    zeros = [0] * len(w.size)
    pool = _MAX_POOL[len(w.size)]
    values, indices = pool(data, w.size, w.strides, zeros, w.dilations, False)
    values = values.to(x.dtype)
    if outputs == 1:
        return (values,)
    places, inner = list(x.shape[2:]), indices
    coordinates: list[Tensor] = []
    for axis in reversed(range(len(places))):
        coordinates.insert(0, inner % data.shape[axis + 2] - w.before[axis])
        inner = inner // data.shape[axis + 2]
    plane = torch.arange(x.shape[0] * x.shape[1], device=x.device)
    plane = plane.reshape(x.shape[0], x.shape[1], *[1] * len(places))
    within = torch.zeros_like(indices)
    order = list(enumerate(coordinates))
    for axis, coordinate in reversed(order) if storage_order else order:
        within = within * places[axis] + coordinate
    return values, plane * math.prod(places) + within


def max_unpool(
    x: Tensor,
    indices: Tensor,
    output_shape: Ints | None = None,
    *,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    w = window(x, kernel_shape, strides, None, pads, "NOTSET")
    natural = [*x.shape[:2]]
    for axis, (before, after) in enumerate(zip(w.before, w.after, strict=True)):
        inner = (x.shape[axis + 2] - 1) * w.strides[axis] + w.size[axis]
        natural.append(inner - before - after)
    y = torch.zeros(math.prod(natural), dtype=x.dtype, device=x.device)
    y = y.scatter(0, indices.flatten(), x.flatten()).reshape(natural)
    if output_shape is None:
        return y
    missing = [n - have for n, have in zip(ints(output_shape), natural, strict=True)]
    return F.pad(y, _interleaved([0] * len(missing), missing))


def _sums(x: Tensor, w: Window) -> Tensor:
    """Sum over each window of a tensor that is already padded."""
    kernel = torch.ones([1, 1, *w.size], dtype=x.dtype, device=x.device)
    flat = x.reshape(-1, 1, *x.shape[2:])
    y = _CONV[len(w.size)](flat, kernel, None, w.strides, 0, w.dilations)
    return y.reshape(*x.shape[:2], *y.shape[2:])


def average_pool(
    x: Tensor,
    *,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    w = window(x, kernel_shape, strides, dilations, pads, auto_pad)
    behind = _stretched(x, w, ceil_mode)
    sums = _sums(F.pad(x, _interleaved(w.before, behind)), w)
    if not any(w.before) and max(behind) <= 0:
        return sums / math.prod(w.size)
    ones = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype, device=x.device)
    if count_include_pad:  # the padding asked for counts, that which ceil mode adds does not
        ones = F.pad(ones, w.pads(), value=1.0)
        behind = [b - a for b, a in zip(behind, w.after, strict=True)]
        counted = F.pad(ones, _interleaved([0] * len(behind), behind))
    else:
        counted = F.pad(ones, _interleaved(w.before, behind))
    return sums / _sums(counted, w)


def lp_pool(
    x: Tensor,
    *,
    kernel_shape: list[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    p: int = 2,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    w = window(x, kernel_shape, strides, dilations, pads, auto_pad)
    powers = F.pad(x.abs() ** p, _interleaved(w.before, _stretched(x, w, ceil_mode)))
    return _sums(powers, w) ** (1 / p)


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.ndim))


def global_average_pool(x: Tensor) -> Tensor:
    return torch.mean(x, _spatial(x), True)


def global_max_pool(x: Tensor) -> Tensor:
    return torch.amax(x, _spatial(x), True)


def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, p, _spatial(x), True)
    return norm


def col2im(
    columns: Tensor,
    image_shape: Ints,
    block_shape: Ints,
    *,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Adds up what overlapping blocks, (N, C * block, count), put at each place of the image."""
    image = ints(image_shape)
    w = window(columns, ints(block_shape), strides, dilations, pads, "NOTSET")
    padded = [b + n + a for b, n, a in zip(w.before, image, w.after, strict=True)]
    place = torch.zeros(1, 1, dtype=torch.int64, device=columns.device)
    for axis, length in enumerate(padded):
        count = (length - w.reach(axis)) // w.strides[axis] + 1
        within = torch.arange(w.size[axis], device=columns.device) * w.dilations[axis]
        start = torch.arange(count, device=columns.device) * w.strides[axis]
        own = within[:, None] + start
        place = place[:, None, :, None] * length + own[None, :, None, :]
        place = place.reshape(place.shape[0] * place.shape[1], -1)
    n, channels = columns.shape[0], columns.shape[1] // math.prod(w.size)
    y = columns.new_zeros(n, channels, math.prod(padded))
    y = y.index_add(2, place.flatten(), columns.reshape(n, channels, -1))
    return F.pad(
        y.reshape(n, channels, *padded), _interleaved([-b for b in w.before], [-a for a in w.after])
    )


def deform_conv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    offset_group: int = 1,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Deformable convolution over two spatial axes: each tap is sampled where `offset` says."""
    w = window(x, weight.shape[2:], strides, dilations, pads, "NOTSET")
    n, channels, height, width = x.shape
    taps = math.prod(w.size)
    rows, columns = offset.shape[2:]
    moved = offset.reshape(n, offset_group, taps, 2, rows, columns)
    weights = None if mask is None else mask.reshape(n, offset_group, taps, 1, rows, columns)
    parts = x.reshape(n * offset_group, channels // offset_group, height, width)
    grid_y = torch.arange(rows, device=x.device)[:, None] * w.strides[0] - w.before[0]
    grid_x = torch.arange(columns, device=x.device) * w.strides[1] - w.before[1]
    sampled = []
    for tap, (i, j) in enumerate(itertools.product(*map(range, w.size))):
        place_y = moved[:, :, tap, 0] + grid_y + i * w.dilations[0]
        place_x = moved[:, :, tap, 1] + grid_x + j * w.dilations[1]
        # grid_sample counts from -1 to 1, outer edge to outer edge.
        grid = torch.stack([(2 * place_x + 1) / width - 1, (2 * place_y + 1) / height - 1], -1)
        grid = grid.reshape(n * offset_group, rows, columns, 2)
        part = F.grid_sample(parts, grid, align_corners=False)
        part = part.reshape(n, offset_group, -1, rows, columns)
        sampled.append(part if weights is None else part * weights[:, :, tap])
    stacked = torch.stack(sampled, 3).reshape(n, group, -1, rows * columns)
    kernels = weight.reshape(group, weight.shape[0] // group, -1)
    y = torch.matmul(kernels, stacked).reshape(n, -1, rows, columns)
    return y if bias is None else y + bias[:, None, None]


OPERATORS: Operators = {
    "AveragePool": average_pool,
    "Col2Im": col2im,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "DeformConv": deform_conv,
    "GlobalAveragePool": global_average_pool,
    "GlobalLpPool": global_lp_pool,
    "GlobalMaxPool": global_max_pool,
    "LpPool": lp_pool,
    "MaxPool": max_pool,
    "MaxUnpool": max_unpool,
}
