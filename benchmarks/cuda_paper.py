"""What the kernels can reach on paper, by chip: bytes, issue slots, shared memory, tensor cores.

    python -m benchmarks.cuda_paper

Arithmetic with data sheets; nothing of it was measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A chip."""

    name: str
    bandwidth: float
    """Bytes a second that a copy reaches."""
    multiprocessors: int
    clock: float
    products: int
    """Of int8 and int8, a clock and multiprocessor, dense, by `mma.sync`."""

    @property
    def slots(self) -> float:
        """Instructions a multiprocessor can issue while 512 bytes of weights arrive, 4 a clock."""
        return 4 * 512 * self.multiprocessors * self.clock / self.bandwidth

    def microseconds(self, columns: int, channels: int) -> float:
        """To read the weights of a layer once."""
        return (columns * channels + 4 * channels) / self.bandwidth * 1e6


HOPPER = 4096 * 5 // 8  # mma.sync reaches about 5/8 of wgmma's peak
DEVICES = (
    Device("A100 80GB", 0.90 * 2.04e12, 108, 1.41e9, 2048),
    Device("H100 SXM", 0.92 * 3.35e12, 132, 1.75e9, HOPPER),
    Device("H200", 0.92 * 4.80e12, 132, 1.75e9, HOPPER),
    Device("RTX 4090", 0.92 * 1.01e12, 128, 2.52e9, 1024),
)
SHAPES = ((4096, 4096), (4096, 12288), (4096, 14336), (14336, 4096), (8192, 8192))
"""Columns and channels."""
TILES = ((64, 64, 32, 32), (128, 128, 64, 32), (128, 128, 64, 64))
"""Tokens and channels of a block and of a warp."""


def tensor_share(tile: tuple[int, int, int, int], products: int) -> float:
    """Of the tensor cores' peak, as far as shared memory and issue slots allow."""
    m, n, warp_m, warp_n = tile
    warps = m // warp_m * (n // warp_n)
    rows = warp_m / 16 + warp_n / 16
    tensor = m * n * 32 / products  # clocks of a step of 32 columns
    shared = warps * rows * 4 + (m + n) * 32 / 128  # ldmatrix.x4 is 4 wavefronts; copies write
    issue = warps * (warp_m / 16 * (warp_n / 8) + rows + 6) / 4
    return tensor / max(tensor, shared, issue)


def main() -> None:
    """Print three tables."""
    print("microseconds to read the weights once, columns x channels")
    for device in DEVICES:
        row = (f"{k}x{n} {device.microseconds(k, n):.1f}" for k, n in SHAPES)
        print(f"  {device.name:10s} {'  '.join(row)}")
    print("issue slots while 512 bytes of weights arrive")
    for device in DEVICES:
        print(f"  {device.name:10s} {device.slots:.0f}")
    print("share of the peak of mma.sync, by tile")
    for device in DEVICES:
        shares = (
            f"{t[0]}x{t[1]} by {t[2]}x{t[3]} {tensor_share(t, device.products):.2f}" for t in TILES
        )
        print(f"  {device.name:10s} {'  '.join(shares)}")


if __name__ == "__main__":
    main()
