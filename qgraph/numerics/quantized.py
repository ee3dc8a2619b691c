"""A weight in integers with its scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph.numerics.blocks import blockwise
from qgraph.numerics.codebooks import NestedScales
from qgraph.numerics.reference import along, dequantize, dequantize_float8
from qgraph.numerics.spec import FLOAT8

Arrays = Mapping[str, np.ndarray]


def to_arrays(weights: Sequence[Quantized | None]) -> dict[str, np.ndarray]:
    """Weights, none of them from a table, as they are kept. See :func:`from_arrays`."""
    arrays = {"count": np.array(len(weights))}
    for i, w in enumerate(weights):
        if w is not None:
            layout = np.array([-1 if w.axis is None else w.axis, w.repaired, w.block])
            parts = {"q": w.q, "scale": w.scale, "zero": w.zero, "layout": layout}
            arrays |= {f"{i}.{part}": data for part, data in parts.items()}
    return arrays


def from_arrays(arrays: Arrays) -> list[Quantized | None]:
    """The weights of :func:`to_arrays`."""
    weights: list[Quantized | None] = []
    for i in range(int(arrays["count"])):
        if f"{i}.q" not in arrays:
            weights.append(None)
            continue
        q, scale, zero = (arrays[f"{i}.{part}"] for part in ("q", "scale", "zero"))
        axis, repaired, block = arrays[f"{i}.layout"].tolist()
        weights.append(Quantized(q, scale, zero, None if axis < 0 else axis, repaired, block))
    return weights


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight in integers, or in float8.

    Attributes:
        q: int8, uint8 or float8, shape of the weight.
        scale: float32, 1-D along `axis`, or 0-D. Of blocks: one for each, (blocks, N), or
            (N, blocks) for a weight (N, K); can be negative.
        zero: zero point, int32, shape of scale.
        axis: output-channel axis, or None for one scale; of blocks the axis K that they divide.
        repaired: channels requantized so that no u8·s8 pair can overflow int16.
        block: elements along `axis` that share a scale, 0 where the weight is not in blocks.
        table: float32 (16,), what integers in blocks stand for; None: for themselves.
        nested: how `scale` is stored if it is quantized, too; None: as it is.
    """

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    axis: int | None
    repaired: int = 0
    block: int = 0
    table: np.ndarray | None = None
    nested: NestedScales | None = None

    def steps(self) -> np.ndarray:
        """What one step of each integer is worth: float32, broadcasts against `q`."""
        if self.axis is None:
            return self.scale
        if not self.block:
            return along(self.scale, self.axis, self.q.ndim)
        return self._blockwise(self.scale)

    def zeros(self) -> np.ndarray:
        """The zero point of each integer: int32, broadcasts against `q`."""
        if self.block:
            return self._blockwise(self.zero)
        return self.zero if self.zero.ndim != 1 else along(self.zero, self.axis or 0, self.q.ndim)

    def float(self) -> np.ndarray:
        """What the integers stand for."""
        if self.table is not None:
            return np.asarray(self.table[self.q] * self.steps(), np.float32)
        if ir.DataType.from_numpy(self.q.dtype) in FLOAT8:
            return dequantize_float8(self.q, self.steps())
        return dequantize(self.q, self.steps(), self.zeros())

    def _blockwise(self, values: np.ndarray) -> np.ndarray:
        if self.axis:
            return blockwise(values.T, self.block, self.q.shape[1]).T
        return blockwise(values, self.block, self.q.shape[0])
