"""Which kernel multiplies: one table by tokens, channels, columns and architecture.

On paper until a device has measured it (`benchmarks/cuda_first_contact.py`, stage `crossover`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """A kernel's name without its element type, and how it is launched."""

    kernel: str
    tokens: int
    channels: int
    threads: int
    shared: int
    """Bytes of shared memory."""

    def grid(self, m: int, n: int) -> tuple[int, int]:
        """Blocks for m tokens and n channels."""
        return -(-n // self.channels), -(-m // self.tokens)


SMALL = tuple(Product(f"w8a8_small_{t}", 8 * t, 16, 256, 8 * t * 512) for t in (1, 2, 4))
"""Bound by reading the weights once: the fewest tiles of 8 tokens that hold all of them."""
TILES_64 = Product("w8a8_64", 64, 64, 128, 4 * 2 * 64 * 64)
TILES_128 = Product("w8a8_128", 128, 128, 256, 3 * 2 * 128 * 64)
PRODUCTS = (*SMALL, TILES_64, TILES_128)

LIBRARY_COLUMNS = {90: 4096, 100: 1024}
"""Columns from which cuBLAS is faster where tiles fill the device, by architecture.

Its products reach about 3/4 of the peak where `mma.sync` reaches half of Hopper's and a quarter of
sm_100's, but its int32 sums are written and read again: 8 bytes an output. Elsewhere the library
uses `mma.sync` too.
"""


def choose(m: int, n: int, k: int, arch: int, multiprocessors: int) -> Product | None:
    """What multiplies m tokens by n channels of k columns; None for the library's product."""
    for small in SMALL:
        if m <= small.tokens:
            return small
    blocks_x, blocks_y = TILES_128.grid(m, n)
    if blocks_x * blocks_y < multiprocessors:
        return TILES_64
    columns = LIBRARY_COLUMNS.get(arch // 10 * 10)
    if columns is not None and k >= columns and n % 8 == 0:
        return None
    return TILES_128
