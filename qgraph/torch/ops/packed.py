"""Products with weights that are packed in bytes, and tables of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qgraph.numerics.codebooks import LEVELS
from qgraph.numerics.spec import Codebook
from qgraph.torch.fake_quant import straight_through
from qgraph.torch.ops.types import NARROW, Operators


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """The unsigned integers in bytes, those in the low bits first, along the last axis."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def matmul_nbits(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,  # noqa: N803
    N: int,  # noqa: N803
    bits: int = 4,
    block_size: int,
    accuracy_level: int = 0,
    weight_prepacked: int = 0,
) -> Tensor:
    """`a` times a packed weight, (N, blocks, bytes), with a scale for each block.

    Accuracy level 4 lets a runtime round `a` to 8 bits, block by block; this does, and gradients
    pass it as if it did not.
    """
    count = -(-K // block_size)
    q = unpacked(b.reshape(N, count, -1), bits).to(scales.dtype)  # (N, count, block_size)
    if zero_points is None:
        zero = torch.full((N, count), 1 << (bits - 1), dtype=scales.dtype, device=b.device)
    elif zero_points.dtype == torch.uint8:
        zero = unpacked(zero_points.reshape(N, -1), bits)[:, :count].to(scales.dtype)
    else:
        zero = zero_points.reshape(N, count)
    step = scales.reshape(N, count)
    if g_idx is None:
        weight = ((q - zero[..., None]) * step[..., None]).reshape(N, -1)[:, :K]
    else:
        group = g_idx[:K].to(torch.int64)
        weight = (q.reshape(N, -1)[:, :K] - zero[:, group]) * step[:, group]
    if accuracy_level == 4 and block_size in (16, 32, 64, 128, 256) and g_idx is None:
        a = straight_through(a, _rounded(a.detach(), block_size))
    return F.linear(a, weight.to(a.dtype), bias)


def _rounded(x: Tensor, block_size: int) -> Tensor:
    """Each block of the last axis rounded to multiples of a 127th of its largest magnitude."""
    length = x.shape[-1]
    blocks = F.pad(x, [0, -length % block_size])
    blocks = blocks.reshape(*x.shape[:-1], -1, block_size)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale == 0, 0, 1 / scale)
    rounded: Tensor = torch.round(blocks * inverse) * scale
    return rounded.flatten(-2)[..., :length]


_BOOKS: tuple[Codebook, ...] = ("fp4", "nf4")
"""The codebooks by their number in the operator."""


def matmul_bnb4(
    a: Tensor,
    b: Tensor,
    absmax: Tensor,
    *,
    K: int,  # noqa: N803
    N: int,  # noqa: N803
    block_size: int,
    quant_type: int,
    training_mode: int = 0,
    transB: int = 1,  # noqa: N803
) -> Tensor:
    """`a` times a weight of bitsandbytes: NF4 (type 1) or FP4 (0), the high half of bytes first."""
    table = torch.tensor(LEVELS[_BOOKS[quant_type]], dtype=absmax.dtype, device=b.device)
    codes = torch.stack([b >> 4, b & 15], -1).flatten()[: N * K]
    step = absmax.repeat_interleave(block_size)[: N * K]
    weight = (table[codes.to(torch.int64)] * step).reshape((N, K) if transB else (K, N))
    return torch.matmul(a, (weight.t() if transB else weight).to(a.dtype))


def gather_block_quantized(
    data: Tensor,
    indices: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    *,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
    types: list[int],
) -> Tensor:
    """Rows of a quantized table as floats; bytes hold several unsigned integers each."""
    rows = (slice(None),) * (gather_axis % data.ndim) + (indices.to(torch.int64),)
    if types[0] in NARROW:
        default = 0
        q, zero = data, zero_points
    else:
        default = 1 << (bits - 1)
        q = unpacked(data, bits)
        zero = None if zero_points is None else unpacked(zero_points, bits)
    axis = quantize_axis % data.ndim
    length = scales.shape[axis]

    def whole(blocks: Tensor) -> Tensor:
        every = blocks.narrow(axis, 0, length).repeat_interleave(block_size, axis)
        return every.narrow(axis, 0, q.shape[axis])

    number = q[rows].to(scales.dtype)
    offset = default if zero is None else whole(zero)[rows].to(scales.dtype)
    return (number - offset) * whole(scales)[rows]


MICROSOFT: Operators = {
    "GatherBlockQuantized": gather_block_quantized,
    "MatMulBnb4": matmul_bnb4,
    "MatMulNBits": matmul_nbits,
}
