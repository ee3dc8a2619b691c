"""Shapes: looking at them, changing them, cutting and joining, padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qgraph.torch.ops.types import Ints, Operators, ints, pieces, torch_dtype


def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[slice(start, end)], dtype=torch.int64, device=x.device)


def size(x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), device=x.device)


def reshape(x: Tensor, shape: Ints, *, allowzero: int = 0) -> Tensor:
    sizes = ints(shape)
    if not allowzero:
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.ndim if axis < 0 else axis
    rows = x.shape[:axis].numel()
    return x.reshape(rows, x.shape[axis:].numel())


def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(ints(axes))


def unsqueeze(x: Tensor, axes: Ints) -> Tensor:
    places = ints(axes)
    for axis in sorted(axis % (x.ndim + len(places)) for axis in places):
        x = x.unsqueeze(axis)
    return x


def transpose(x: Tensor, *, perm: list[int] | None = None) -> Tensor:
    return x.permute(list(perm) if perm is not None else list(range(x.ndim))[::-1])


def concat(*tensors: Tensor, axis: int) -> Tensor:
    # torch.cat drops empty vectors of whatever rank, which would hide a mistake.
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)


def split(
    x: Tensor,
    split: Ints | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    outputs: int,
) -> tuple[Tensor, ...]:
    if split is not None:
        return pieces(x, ints(split), axis)
    total, count = x.shape[axis], num_outputs or outputs
    part = -(-total // count)
    return pieces(x, [max(min(part, total - i * part), 0) for i in range(count)], axis)


def cut(
    x: Tensor, starts: Ints, ends: Ints, axes: Ints | None = None, steps: Ints | None = None
) -> Tensor:
    first, last = ints(starts), ints(ends)
    along = ints(axes) if axes is not None else list(range(len(first)))
    strides = ints(steps) if steps is not None else [1] * len(first)
    for begin, end, axis, step in zip(first, last, along, strides, strict=True):
        taken = range(*slice(begin, end, step).indices(x.shape[axis]))
        if step > 0:
            index = [slice(None)] * (axis % x.ndim) + [slice(taken.start, taken.stop, step)]
            x = x[tuple(index)] if len(taken) else x.narrow(axis, 0, 0)
        else:
            x = x.index_select(axis, torch.tensor(taken, dtype=torch.int64, device=x.device))
    return x


def expand(x: Tensor, shape: Ints) -> Tensor:
    sizes = ints(shape)
    rank = max(len(sizes), x.ndim)
    have, new = ([1] * (rank - len(s)) + list(s) for s in (x.shape, sizes))
    return x.broadcast_to([h if n == 1 else n for h, n in zip(have, new, strict=True)])


def tile(x: Tensor, repeats: Ints) -> Tensor:
    return x.repeat(ints(repeats))


def pad(
    x: Tensor,
    pads: Ints,
    value: Tensor | float | None = None,
    axes: Ints | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    """Negative numbers cut off."""
    amounts = ints(pads)
    along = [a % x.ndim for a in ints(axes)] if axes is not None else list(range(x.ndim))
    before, after = [0] * x.ndim, [0] * x.ndim
    for i, axis in enumerate(along):
        before[axis], after[axis] = amounts[i], amounts[i + len(along)]
    if mode == "constant":
        flat = [n for pair in zip(before[::-1], after[::-1], strict=True) for n in pair]
        filler = value.item() if isinstance(value, Tensor) else value or 0
        return F.pad(x, flat, value=filler)
    for axis in along:
        if before[axis] or after[axis]:
            index = torch.arange(-before[axis], x.shape[axis] + after[axis], device=x.device)
            x = x.index_select(axis, _inside(index, x.shape[axis], mode))
    return x


def _inside(index: Tensor, count: int, mode: str) -> Tensor:
    """Positions inside an axis that stand for positions beyond its ends."""
    if mode == "edge":
        return index.clamp(0, count - 1)
    if mode == "wrap":
        return index % count
    period = max(2 * (count - 1), 1)  # reflect
    return count - 1 - (index % period - (count - 1)).abs()


def constant_of_shape(shape: Ints, *, value: Tensor | None = None) -> Tensor:
    if value is None:
        device = shape.device if isinstance(shape, Tensor) else None
        return torch.zeros(ints(shape), device=device)
    return value.reshape(()).expand(ints(shape))


def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    kind = x.dtype if dtype is None else torch_dtype(dtype)
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
    return (columns - rows[:, None] == k).to(kind)


def trilu(x: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    diagonal = 0 if k is None else int(k)
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    if mode == "DCR":
        blocks = x.reshape(n, blocksize, blocksize, -1, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        blocks = x.reshape(n, -1, blocksize, blocksize, h, w).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(n, c // blocksize**2, h * blocksize, w * blocksize)


def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return blocks.permute(order).reshape(n, -1, h // blocksize, w // blocksize)


def center_crop_pad(x: Tensor, shape: Ints, *, axes: list[int] | None = None) -> Tensor:
    lengths = ints(shape)
    for axis, length in zip(axes or range(len(lengths)), lengths, strict=True):
        have = x.shape[axis]
        if length < have:
            x = x.narrow(axis, (have - length) // 2, length)
        elif length > have:
            before = (length - have) // 2
            x = pad(x, [before, length - have - before], axes=[axis])
    return x


def bernoulli(x: Tensor, *, dtype: int | None = None, seed: float = 0.0) -> Tensor:
    return torch.bernoulli(x).to(x.dtype if dtype is None else torch_dtype(dtype))


def random_normal(
    *, shape: list[int], mean: float = 0.0, scale: float = 1.0, dtype: int = 1, seed: float = 0.0
) -> Tensor:
    """All draws come from torch's own generator."""
    return torch.normal(mean, scale, shape).to(torch_dtype(dtype))


def random_normal_like(
    x: Tensor, *, mean: float = 0.0, scale: float = 1.0, dtype: int | None = None, seed: float = 0.0
) -> Tensor:
    kind = x.dtype if dtype is None else torch_dtype(dtype)
    return torch.normal(mean, scale, x.shape, device=x.device).to(kind)


def random_uniform(
    *, shape: list[int], low: float = 0.0, high: float = 1.0, dtype: int = 1, seed: float = 0.0
) -> Tensor:
    return (torch.rand(shape) * (high - low) + low).to(torch_dtype(dtype))


def random_uniform_like(
    x: Tensor, *, low: float = 0.0, high: float = 1.0, dtype: int | None = None, seed: float = 0.0
) -> Tensor:
    kind = x.dtype if dtype is None else torch_dtype(dtype)
    return (torch.rand(x.shape, device=x.device) * (high - low) + low).to(kind)


OPERATORS: Operators = {
    "Bernoulli": bernoulli,
    "CenterCropPad": center_crop_pad,
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "EyeLike": eye_like,
    "Flatten": flatten,
    "Pad": pad,
    "RandomNormal": random_normal,
    "RandomNormalLike": random_normal_like,
    "RandomUniform": random_uniform,
    "RandomUniformLike": random_uniform_like,
    "Reshape": reshape,
    "Shape": shape,
    "Size": size,
    "Slice": cut,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "Transpose": transpose,
    "Trilu": trilu,
    "Unsqueeze": unsqueeze,
}
