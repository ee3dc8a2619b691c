"""Gathering, scattering and choosing by index or condition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qgraph.torch.ops.types import Operators


def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    rows = (slice(None),) * (axis % x.ndim) + (indices.to(torch.int64),)
    return x[rows]


def _positive(indices: Tensor, count: int) -> Tensor:
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + count, indices)


def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, _positive(indices, x.shape[axis]))


def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    rank = indices.ndim - 1
    batches = [
        torch.arange(x.shape[axis], device=x.device).reshape([-1] + [1] * (rank - axis - 1))
        for axis in range(batch_dims)
    ]
    return x[(*batches, *indices.to(torch.int64).unbind(-1))]


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def scatter_elements(
    x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    index = _positive(indices, x.shape[axis])
    if reduction == "none":
        return torch.scatter(x, axis, index, updates)
    if reduction == "add":
        return torch.scatter_add(x, axis, index, updates)
    return torch.scatter_reduce(x, axis, index, updates, _REDUCTIONS[reduction])


def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    depth = indices.shape[-1]
    lead, rest = x.shape[:depth], math.prod(x.shape[depth:])
    row = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for axis, index in enumerate(indices.unbind(-1)):
        row = row * lead[axis] + _positive(index, lead[axis])
    rows = row.reshape(-1, 1).expand(-1, rest)
    flat = x.reshape(math.prod(lead), rest)
    new = updates.reshape(-1, rest)
    return scatter_elements(flat, rows, new, axis=0, reduction=reduction).reshape(x.shape)


def tensor_scatter(
    cache: Tensor,
    update: Tensor,
    write_indices: Tensor | None = None,
    *,
    axis: int = -2,
    mode: str = "linear",
) -> Tensor:
    axis, batch, count = axis % cache.ndim, cache.shape[0], update.shape[axis]
    start = 0 if write_indices is None else write_indices.reshape(batch, 1)
    places = (torch.arange(count, device=cache.device) + start).expand(batch, count)
    if mode == "circular":
        places = places % cache.shape[axis]
    shape = [1] * cache.ndim
    shape[0], shape[axis] = batch, count
    return torch.scatter(cache, axis, places.reshape(shape).expand(update.shape), update)


def reverse_sequence(
    x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0
) -> Tensor:
    time = torch.arange(x.shape[time_axis], device=x.device)
    length = lengths.reshape(-1, 1)
    order = torch.where(time < length, length - 1 - time, time)  # (batch, time)
    order = order if batch_axis < time_axis else order.t()
    shape = [1] * x.ndim
    shape[batch_axis], shape[time_axis] = x.shape[batch_axis], x.shape[time_axis]
    return torch.gather(x, time_axis, order.reshape(shape).expand(x.shape))


def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    if axis is None:
        x, axis = x.flatten(), 0
    return x.index_select(axis, torch.nonzero(condition).flatten())


def one_hot(indices: Tensor, depth: Tensor, values: Tensor, *, axis: int = -1) -> Tensor:
    count = int(depth)
    axis = axis % (indices.ndim + 1)
    index = _positive(indices, count).unsqueeze(axis)
    shape = [1] * index.ndim
    shape[axis] = count
    places = torch.arange(count, device=indices.device).reshape(shape)
    return torch.where(index == places, values[1], values[0])


OPERATORS: Operators = {
    "Compress": compress,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "OneHot": one_hot,
    "ReverseSequence": reverse_sequence,
    "Scatter": scatter_elements,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "TensorScatter": tensor_scatter,
}
