"""What the measured table is asked for: an operator of some size under some lowering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Lowering = Literal[
    "per-token", "per-run", "blocks", "static", "conv", "pointwise", "depthwise", "norm", "rms-norm"
]


@dataclass(frozen=True, order=True)
class Case:
    """One entry: an operator of rounded size under one lowering.

    Attributes:
        lowering: products of `per-token` or `per-run` dynamic or `static` activations with a
            constant int8 weight; products in `blocks`; static convolutions of three kinds; residual
            norms taken apart.
        k, n: input and output channels, rounded to powers of two.
        m: rows of the product, or output pixels of the convolution.
        chain: convolutions in a row, with conversions at both ends only.
        bits, block: of the weights of products in blocks, and the size of these.
    """

    lowering: Lowering
    k: int
    n: int
    m: int
    chain: int = 1
    bits: int = 8
    block: int = 0

    def __str__(self) -> str:
        chain = f" chain={self.chain}" if self.chain > 1 else ""
        blocks = f" bits={self.bits} block={self.block}" if self.block else ""
        return f"{self.lowering} {self.k}x{self.n} m={self.m}{chain}{blocks}"


def rounded(size: int, most: int = 2048) -> int:
    """The nearest power of two between 8 and `most`."""
    return int(min(most, max(8, 2 ** round(np.log2(max(size, 1))))))
