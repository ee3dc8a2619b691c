"""From tensors to launches: which kernel, grid, shared memory and arguments; for every engine.

The operators of `qgraph.backends.cuda.ops` on a GPU; results are those of `references`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from qgraph.backends.cuda.choice import PRODUCTS, Product, choose
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

    k = x.shape[-1]
    m, ld = x.shape[:-1].numel(), aligned(k)
    q = x.new_empty((m, ld), dtype=torch.int8)
    largest = x.new_empty((m,), dtype=torch.float32)
    if m:
        engine_of(x.get_device()).run(
            f"quantize_{element(x.dtype)}",
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
    (m, k), n, device = q.shape, w.shape[0], q.get_device()
    if w.shape[1] != k or w.get_device() != device:  # a kernel would read what is not its own
        raise QGraphError(
            f"int8_linear: activations of {k} columns on {q.device}, weights of {w.shape[1]} on "
            f"{w.device}: move both to one device, and pad weights as qgraph's modules do"
        )
    y = q.new_empty((m, n), dtype=dtype)
    if not m or not n:
        return y
    engine = engine_of(device)
    product = choose(m, n, k, engine.arch, engine.multiprocessors)
    multiply(engine, product, y, q, largest, w, scale, sums, bias, zero)
    return y


def multiply(
    engine: Engine,
    product: Product | None,
    y: Tensor,
    q: Tensor,
    largest: Tensor,
    w: Tensor,
    scale: Tensor,
    sums: Tensor | None,
    bias: Tensor | None,
    zero: int,
) -> None:
    """Fill y by one of our products, or by the library's and the kernel for the rest."""
    (m, k), n = q.shape, w.shape[0]
    rest = (scale, largest, sums, bias, y)
    if product is None:
        import torch

        grid = (m, -(-n // (THREADS * 4)))
        acc = torch._int_mm(q, w.t())
        engine.run(f"epilogue_{element(y.dtype)}", grid, THREADS, 0, acc, *rest, n, zero - 128)
        return
    kernel, grid = f"{product.kernel}_{element(y.dtype)}", product.grid(m, n)
    engine.run(kernel, grid, product.threads, product.shared, q, w, *rest, m, n, k, zero - 128)
