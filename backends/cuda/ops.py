"""Operators of torch in the namespace `qgraph`: what modules call, on a GPU and on a CPU.

Both give the same bits: integers, sums and, in float32, results. Traces and exports keep each as
one node. Importing this module registers them.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from qgraph.backends.cuda.engine import ENGINES
from qgraph.backends.cuda.launches import int8_linear as launch_linear
from qgraph.backends.cuda.launches import quantize_per_token as launch_quantize
from qgraph.backends.cuda.packing import aligned

EXACT_COLUMNS = 1 << 10
"""So many products of two int8 add up to at most 2^24, exactly in float32 in any order."""

_CPU = -1
"""The number of the engine that tests put in place of this module's implementations."""


def quantize_per_token(x: Tensor, step: float, zero: int, floor: float) -> tuple[Tensor, Tensor]:
    """The implementation for a CPU, see `references.quantize_per_token`."""
    if _CPU in ENGINES:
        return launch_quantize(x, step, zero, floor)
    columns = x.shape[-1]
    rows = x.reshape(x.shape[:-1].numel(), columns).float()
    least = torch.tensor(floor, dtype=torch.float32)
    largest = rows.abs().amax(1).maximum(least) if columns else least.repeat(len(rows))
    steps = (rows / largest[:, None] / torch.tensor(step, dtype=torch.float32)).round_()
    steps = steps.add_(zero - 128).clamp_(-128, 127).nan_to_num_(-128)
    q = pad(steps.to(torch.int8), (0, aligned(columns) - columns))
    return q, largest


def int8_linear(
    q: Tensor,
    largest: Tensor,
    w: Tensor,
    scale: Tensor,
    sums: Tensor | None,
    bias: Tensor | None,
    zero: int,
    dtype: torch.dtype,
) -> Tensor:
    """The implementation for a CPU, see `references.int8_linear`."""
    if _CPU in ENGINES:
        return launch_linear(q, largest, w, scale, sums, bias, zero, dtype)
    acc = product(q, w)
    if sums is not None:
        acc -= (zero - 128) * sums
    y = acc.float().mul_(scale).mul_(largest[:, None])
    return (y if bias is None else y.add_(bias)).to(dtype)


def product(q: Tensor, w: Tensor) -> Tensor:
    """q · wᵀ of int8 in int32; by float32, which is faster than integers, as far as it is exact."""
    acc = q.new_zeros((q.shape[0], w.shape[0]), dtype=torch.int32)
    with torch.autocast("cpu", enabled=False):
        for start in range(0, q.shape[1], EXACT_COLUMNS):
            part = slice(start, start + EXACT_COLUMNS)
            acc += linear(q[:, part].float(), w[:, part].float()).to(torch.int32)
    return acc


def _fake_quantize(x: Tensor, step: float, zero: int, floor: float) -> tuple[Tensor, Tensor]:
    tokens = math.prod(x.shape[:-1])  # which may be symbols
    q = x.new_empty((tokens, aligned(x.shape[-1])), dtype=torch.int8)
    return q, x.new_empty((tokens,), dtype=torch.float32)


def _fake_linear(
    q: Tensor,
    largest: Tensor,
    w: Tensor,
    scale: Tensor,
    sums: Tensor | None,
    bias: Tensor | None,
    zero: int,
    dtype: torch.dtype,
) -> Tensor:
    return q.new_empty((q.shape[0], w.shape[0]), dtype=dtype)


SCHEMAS = {
    "quantize_per_token": "(Tensor x, float step, int zero, float floor)"
    " -> (Tensor q, Tensor largest)",
    "int8_linear": "(Tensor q, Tensor largest, Tensor w, Tensor scale, Tensor? sums, Tensor? bias,"
    " int zero, ScalarType dtype) -> Tensor",
}
_IMPLEMENTATIONS = {
    "quantize_per_token": (quantize_per_token, launch_quantize, _fake_quantize),
    "int8_linear": (int8_linear, launch_linear, _fake_linear),
}

library: Any = torch.library.Library("qgraph", "DEF")  # type: ignore[no-untyped-call]
for _name, _schema in SCHEMAS.items():
    _tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    library.define(f"{_name}{_schema}", tags=_tags)
    _on_cpu, _on_gpu, _fake = _IMPLEMENTATIONS[_name]
    library.impl(_name, _on_cpu, "CPU")
    library.impl(_name, _on_gpu, "CUDA")
    torch.library.register_fake(f"qgraph::{_name}", cast(Any, _fake), lib=library)
