"""From tensors to launches: which kernel, grid, shared memory and arguments; for every engine.

The operators of `qgraph.backends.cuda.ops` on a GPU; results are those of `references`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from qgraph.backends.cuda.choice import PRODUCTS, choose
from qgraph.backends.cuda.driver import engine_of
from qgraph.backends.cuda.packing import aligned
from qgraph.backends.cuda.variants import ELEMENTS
from qgraph.errors import QGraphError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qgraph.backends.cuda.engine import Engine

THREADS = 256
"""Of a block of `quantize` and of `epilogue`."""


@functools.cache
def element(dtype: torch.dtype) -> str:
    """How kernels are named after what they read or write."""
    return {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}[str(dtype).split(".")[1]]


def prepare(device: int, dtype: torch.dtype) -> None:
    """Load every kernel that layers with results of this type may call on a device; what they
    quantize may be of any type, under autocast.

    Raises:
        QGraphError: the device or its driver is too old, or a compiler is needed and missing.
    """
    engine = engine_of(device)
    for read in ELEMENTS:
        engine.load(f"quantize_{read}")
    for kernel in ("epilogue", *(product.kernel for product in PRODUCTS)):
        engine.load(f"{kernel}_{element(dtype)}")


def quantize_per_token(x: Tensor, step: float, zero: int, floor: float) -> tuple[Tensor, Tensor]:
    """x (..., K) to q int8 (M, K up to a multiple of 64) and largest float32 (M,)."""
    import torch

    shape = x.shape
    k = shape[-1]
    m, ld = x.numel() // k if k else shape[:-1].numel(), aligned(k)
    q = torch.empty(m, ld, dtype=torch.int8, device=x.device)
    largest = torch.empty(m, dtype=torch.float32, device=x.device)
    if m:
        engine_of(x.get_device()).run(
            _quantizer(x.dtype),
            (m, 1),
            THREADS,
            THREADS // 32 * 4,
            x.contiguous(),
            q,
            largest,
            k,
            ld,
            step,
            zero - 128,
            floor,
        )
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
    """y (M, N) of `dtype`: q (M, K) by w (N, K), K a multiple of 64; scale, sums, bias (N,).

    Raises:
        QGraphError: the weights are on another device or of another width.
    """
    import torch

    (m, k), (n, columns), device = q.shape, w.shape, q.get_device()
    if columns != k or w.get_device() != device:  # a kernel would read what is not its own
        raise QGraphError(
            f"int8_linear: activations of {k} columns on {q.device}, weights of {columns} on "
            f"{w.device}: move both to one device, and pad weights as qgraph's modules do"
        )
    y = torch.empty(m, n, dtype=dtype, device=q.device)
    if not m or not n:
        return y
    engine = engine_of(device)
    launch = _product(m, n, k, engine.arch, engine.multiprocessors, dtype)
    if launch is None:
        multiply_by_library(engine, y, q, largest, w, scale, sums, bias, zero)
    else:
        engine.run(*launch, q, w, scale, largest, sums, bias, y, m, n, k, zero - 128)
    return y


@functools.cache
def _quantizer(dtype: torch.dtype) -> str:
    return f"quantize_{element(dtype)}"


@functools.lru_cache(maxsize=4096)
def _product(
    m: int, n: int, k: int, arch: int, multiprocessors: int, dtype: torch.dtype
) -> tuple[str, tuple[int, int], int, int] | None:
    """What `choose` says, as a launch."""
    product = choose(m, n, k, arch, multiprocessors)
    if product is None:
        return None
    name = f"{product.kernel}_{element(dtype)}"
    return name, product.grid(m, n), product.threads, product.shared


def multiply_by_library(
    engine: Engine,
    y: Tensor,
    q: Tensor,
    largest: Tensor,
    w: Tensor,
    scale: Tensor,
    sums: Tensor | None,
    bias: Tensor | None,
    zero: int,
) -> None:
    """Fill y by cuBLAS and a kernel for the rest."""
    import torch

    m, n = y.shape
    grid = (m, -(-n // (THREADS * 4)))
    acc = torch._int_mm(q, w.t())
    name = f"epilogue_{element(y.dtype)}"
    engine.run(name, grid, THREADS, 0, acc, scale, largest, sums, bias, y, n, zero - 128)
