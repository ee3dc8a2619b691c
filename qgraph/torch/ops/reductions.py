"""Reductions over axes, largest elements, sorting."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qgraph.torch.ops.types import Ints, Operators, integer, ints, is_float

Reduction = Callable[[Tensor, list[int], bool], Tensor]


def _reduce(
    function: Reduction, x: Tensor, axes: Ints | None, keepdims: int, noop_with_empty_axes: int
) -> Tensor:
    dims = [] if axes is None else [axis % max(x.ndim, 1) for axis in ints(axes)]
    if not dims and not noop_with_empty_axes:
        dims = list(range(x.ndim))
    if not dims:  # nothing to reduce: what is done to each element still is
        return function(x.unsqueeze(0), [0], False)
    return function(x, dims, bool(keepdims))


def _total(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return torch.sum(x, dims, keep, dtype=x.dtype)


def reduce_sum(
    x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    return _reduce(_total, x, axes, keepdims, noop_with_empty_axes)


def _mean(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    if is_float(x):
        return torch.mean(x, dims, keep)
    count = math.prod(x.shape[dim] for dim in dims)
    return torch.div(_total(x, dims, keep), count, rounding_mode="trunc").to(x.dtype)


def reduce_mean(
    x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    return _reduce(_mean, x, axes, keepdims, noop_with_empty_axes)


def _extreme(function: Callable[..., Tensor], empty: str) -> Reduction:
    def reduced(x: Tensor, dims: list[int], keep: bool) -> Tensor:
        if x.numel():
            return function(x, dims, keepdim=keep)
        shape = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
        if x.dtype == torch.bool:
            extreme = torch.full(shape, empty == "max", dtype=x.dtype, device=x.device)
        else:
            info = torch.finfo(x.dtype) if is_float(x) else torch.iinfo(x.dtype)
            extreme = torch.full(shape, getattr(info, empty), dtype=x.dtype, device=x.device)
            if is_float(x):
                extreme = extreme * math.inf
        return extreme if keep else extreme.squeeze(dims)

    return reduced


_max, _min = _extreme(torch.amax, "min"), _extreme(torch.amin, "max")


def reduce_max(
    x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    return _reduce(_max, x, axes, keepdims, noop_with_empty_axes)


def reduce_min(
    x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    return _reduce(_min, x, axes, keepdims, noop_with_empty_axes)


def _product(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in sorted(dims, reverse=True):
        x = torch.prod(x, dim, keep, dtype=x.dtype)
    return x


def reduce_prod(
    x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    return _reduce(_product, x, axes, keepdims, noop_with_empty_axes)


def _l1(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return _total(torch.abs(x), dims, keep)


def reduce_l1(
    x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    return _reduce(_l1, x, axes, keepdims, noop_with_empty_axes)


def _l2(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    if is_float(x):
        norm: Tensor = torch.linalg.vector_norm(x, 2, dims, keep)
        return norm
    return torch.sqrt(_total(x * x, dims, keep).to(torch.float64)).to(x.dtype)


def reduce_l2(
    x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    return _reduce(_l2, x, axes, keepdims, noop_with_empty_axes)


def _sum_square(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return _total(x * x, dims, keep)


def reduce_sum_square(
    x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    return _reduce(_sum_square, x, axes, keepdims, noop_with_empty_axes)


def _log_sum(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return torch.log(_total(x, dims, keep)).to(x.dtype)


def reduce_log_sum(
    x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    return _reduce(_log_sum, x, axes, keepdims, noop_with_empty_axes)


def _log_sum_exp(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x if is_float(x) else x.to(torch.float64), dims, keep).to(x.dtype)


def reduce_log_sum_exp(
    x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    return _reduce(_log_sum_exp, x, axes, keepdims, noop_with_empty_axes)


def argmax(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _arg(x, True, axis, keepdims, select_last_index)


def argmin(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _arg(x, False, axis, keepdims, select_last_index)


def _arg(x: Tensor, largest: bool, axis: int, keepdims: int, last: int) -> Tensor:
    ordered = x.flip(axis) if last else x
    # Where several are equal, torch promises the first only of a boolean's largest elements.
    best = (torch.amax if largest else torch.amin)(ordered, axis, keepdim=True)
    index = torch.argmax((ordered == best).to(torch.uint8), axis, keepdim=bool(keepdims))
    return x.shape[axis] - 1 - index if last else index


def topk(
    x: Tensor, k: Ints, *, axis: int = -1, largest: int = 1, sorted: int = 1, outputs: int
) -> tuple[Tensor, Tensor]:
    """Of equal elements the earlier one comes first, which `torch.topk` does not promise."""
    values, indices = torch.sort(x, stable=True, dim=axis, descending=bool(largest))
    count = integer(k)
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


def unique(
    x: Tensor, *, axis: int | None = None, sorted: int = 1, outputs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dim = 0 if axis is None else axis
    x = x.flatten() if axis is None else x
    values, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True, dim=dim)
    positions = torch.arange(inverse.numel(), device=x.device)
    first = torch.full_like(counts, inverse.numel())
    first = first.scatter_reduce(0, inverse, positions, "amin")
    if not sorted:
        order = torch.argsort(first)
        values, first, counts = values.index_select(dim, order), first[order], counts[order]
        inverse = torch.argsort(order)[inverse]
    return values, first, inverse, counts


def nonzero(x: Tensor) -> Tensor:
    return torch.nonzero(x).t()


OPERATORS: Operators = {
    "ArgMax": argmax,
    "ArgMin": argmin,
    "NonZero": nonzero,
    "ReduceL1": reduce_l1,
    "ReduceL2": reduce_l2,
    "ReduceLogSum": reduce_log_sum,
    "ReduceLogSumExp": reduce_log_sum_exp,
    "ReduceMax": reduce_max,
    "ReduceMean": reduce_mean,
    "ReduceMin": reduce_min,
    "ReduceProd": reduce_prod,
    "ReduceSum": reduce_sum,
    "ReduceSumSquare": reduce_sum_square,
    "TopK": topk,
    "Unique": unique,
}
