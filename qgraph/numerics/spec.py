"""How one tensor is to be quantized: a frozen value, compared and printed by its fields."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir

from qgraph.errors import QGraphError

RangeMethod = Literal["minmax", "percentile", "entropy", "mse", "absmax", "dynamic"]
"""How the range is found: from calibration (the first four), from the weight itself (`absmax`,
`mse`), or at run time (`dynamic`)."""

Codebook = Literal["nf4", "fp4"]
"""Tables of 16 levels that codes of 4 bits stand for, see :mod:`qgraph.numerics.codebooks`."""


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    def __str__(self) -> str:
        return "per-tensor"


@dataclass(frozen=True)
class PerAxis:
    """One scale for each index of `axis`."""

    axis: int

    def __str__(self) -> str:
        return f"per-axis({self.axis})"


@dataclass(frozen=True)
class PerToken:
    """One scale for each vector along the last axis, computed at run time."""

    def __str__(self) -> str:
        return "per-token"


@dataclass(frozen=True)
class PerBlock:
    """One scale for each run of `size` consecutive elements along `axis`."""

    axis: int
    size: int

    def __post_init__(self) -> None:
        if self.size >= 1 << 31:
            raise QGraphError(f"blocks of {self.size} elements are too large: use less than 2^31")

    def __str__(self) -> str:
        return f"per-block({self.axis}, {self.size})"


Granularity = PerTensor | PerAxis | PerToken | PerBlock

_BITS = {
    ir.DataType.INT8: 8,
    ir.DataType.UINT8: 8,
    ir.DataType.INT4: 4,
    ir.DataType.UINT4: 4,
    ir.DataType.INT2: 2,
    ir.DataType.UINT2: 2,
    ir.DataType.INT16: 16,
    ir.DataType.UINT16: 16,
    ir.DataType.INT32: 32,
    ir.DataType.FLOAT8E4M3FN: 8,
    ir.DataType.FLOAT8E5M2: 8,
}
FLOAT8 = {ir.DataType.FLOAT8E4M3FN: 448, ir.DataType.FLOAT8E5M2: 57344}
"""Floats of 8 bits, and the largest number that each holds; they have no integers."""
_SIGNED = {
    ir.DataType.INT2,
    ir.DataType.INT4,
    ir.DataType.INT8,
    ir.DataType.INT16,
    ir.DataType.INT32,
}

_SYNTAX = re.compile(
    r"(?P<dtype>\w+)(?::(?P<bits>\d+))? "
    r"per-(?P<kind>tensor|token|axis(?=\(-?\d+\))|block(?=\(-?\d+, ))"
    r"(?:\((?P<axis>-?\d+)(?:, (?P<size>\d+))?\))? "
    r"(?P<symmetry>sym|asym) (?P<observer>\w+)"
    r"(?: codebook=(?P<codebook>\w+)(?P<double> double)?)?(?: group=(?P<group>.+))?",
    re.DOTALL,
)


@dataclass(frozen=True)
class QuantSpec:
    """How to quantize one tensor.

    Attributes:
        dtype: integer type that holds the result, or a float of 8 bits.
        granularity: which elements share a scale.
        symmetric: the zero point is the middle of the range (0 signed, 128 for uint8).
        observer: how the range is found, see :data:`RangeMethod`.
        bits: levels used, at most the width of `dtype` (3-bit weights live in int4). 0 = all of it.
        group: tensors whose specs name the same group share one scale and zero point.
        codebook: what the integers stand for, if not for themselves; uint4 in blocks.
        double: the scales of a codebook's blocks are quantized, too (QLoRA's double quantization).

    Raises:
        QGraphError: `dtype` is no type that qgraph quantizes to, or narrower than `bits`, or cannot
            have this codebook.
    """

    dtype: ir.DataType = ir.DataType.INT8
    granularity: Granularity = PerTensor()
    symmetric: bool = True
    observer: RangeMethod = "minmax"
    bits: int = 0
    group: str | None = None
    codebook: Codebook | None = None
    double: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _BITS:
            known = "use an integer dtype or float8"
            raise QGraphError(f"cannot quantize to {self.dtype.name}: {known}")
        if self.dtype in FLOAT8 and (self.bits or not self.symmetric):
            raise QGraphError(f"{self.dtype.name} has neither fewer bits nor zero points")
        if self.bits and not 2 <= self.bits <= _BITS[self.dtype]:
            raise QGraphError(
                f"bits={self.bits} does not fit {self.dtype.name}: use 2 to {_BITS[self.dtype]}"
            )
        if self.codebook not in (None, *get_args(Codebook)):
            known = ", ".join(get_args(Codebook))
            raise QGraphError(f"codebook '{self.codebook}' is unknown: use one of {known}")
        in_blocks = isinstance(self.granularity, PerBlock)
        if self.codebook and not (self.dtype == ir.DataType.UINT4 and in_blocks):
            raise QGraphError(f"codes of {self.codebook} are uint4 in blocks, see PerBlock")
        if self.double and not self.codebook:
            raise QGraphError("only scales of a codebook's blocks are quantized twice")

    @property
    def dynamic(self) -> bool:
        """Whether the range is found at run time."""
        return self.observer == "dynamic"

    @property
    def width(self) -> int:
        """Number of bits whose levels are used."""
        return self.bits or _BITS[self.dtype]

    @property
    def qmin(self) -> int:
        """Smallest integer used. Symmetric ranges give up their lowest, so that -q exists."""
        if self.dtype in FLOAT8:
            return -FLOAT8[self.dtype]
        if self.dtype in _SIGNED:
            return -(1 << (self.width - 1)) + int(self.symmetric and self.width > 2)
        return int(self.symmetric and self.width > 2)

    @property
    def qmax(self) -> int:
        """Largest integer used, or largest number of a float."""
        if self.dtype in FLOAT8:
            return FLOAT8[self.dtype]
        return (1 << (self.width - 1)) - 1 if self.dtype in _SIGNED else (1 << self.width) - 1

    def with_(self, **changes: object) -> QuantSpec:
        """A copy with some fields changed."""
        return replace(self, **dict[str, Any](changes))

    @staticmethod
    def parse(text: str) -> QuantSpec:
        """The spec that prints as `text`.

        Raises:
            QGraphError: `text` is not what `str(spec)` gives.
        """
        match = _SYNTAX.fullmatch(text)
        dtype = match and ir.DataType.__members__.get(match["dtype"].upper())
        methods: tuple[RangeMethod, ...] = get_args(RangeMethod)
        observer = next((m for m in methods if match and m == match["observer"]), None)
        if not match or not dtype or not observer:
            raise QGraphError(
                f"'{text}' is not a quantization: write it like 'int8 per-axis(0) sym minmax'"
            )
        axis, size = (int(match[name] or 0) for name in ("axis", "size"))
        granularities: dict[str, Granularity] = {
            "tensor": PerTensor(),
            "axis": PerAxis(axis),
            "token": PerToken(),
            "block": PerBlock(axis, size),
        }
        return QuantSpec(
            dtype,
            granularities[match["kind"]],
            match["symmetry"] == "sym",
            observer,
            int(match["bits"] or 0),
            match["group"],
            match["codebook"],  # type: ignore[arg-type]
            bool(match["double"]),
        )

    def __str__(self) -> str:
        kind = "sym" if self.symmetric else "asym"
        bits = f":{self.bits}" if self.bits else ""
        table = f" codebook={self.codebook}" if self.codebook else ""
        double = " double" if self.double else ""
        group = f" group={self.group}" if self.group else ""
        spec = f"{self.dtype.name.lower()}{bits} {self.granularity} {kind} {self.observer}"
        return f"{spec}{table}{double}{group}"


NUMPY: dict[ir.DataType, type[Any]] = {
    ir.DataType.INT8: np.int8,
    ir.DataType.UINT8: np.uint8,
    ir.DataType.INT4: np.int8,
    ir.DataType.UINT4: np.uint8,
    **{dtype: dtype.numpy().type for dtype in FLOAT8},
}
"""Array types that hold the integers; onnx-ir packs those of 4 bits when it writes them."""
NIBBLES = (ir.DataType.INT4, ir.DataType.UINT4)

PER_TOKEN = QuantSpec(ir.DataType.UINT8, PerToken(), symmetric=True, observer="dynamic")
PER_RUN = QuantSpec(ir.DataType.UINT8, PerTensor(), symmetric=False, observer="dynamic")
"""Activations with one scale for each run, as DynamicQuantizeLinear computes it."""
WEIGHT = QuantSpec(ir.DataType.INT8, PerAxis(0), symmetric=True, observer="absmax")
SMALL_INTEGERS = 21
"""Opset from which on DequantizeLinear takes blocks and 4-bit integers, and QuantizeLinear makes
float8 without a zero point."""


def describe(activation: QuantSpec | None, weight: QuantSpec) -> str:
    """How a site is quantized, in words for a remark."""
    data = "float activations" if activation is None else f"activations {words(activation)}"
    return f"weights {words(weight)}, {data}"


def words(spec: QuantSpec) -> str:
    """A spec in words for a remark; axes are the site's own, which its name tells."""
    granularity = "per-channel" if isinstance(spec.granularity, PerAxis) else str(spec.granularity)
    if isinstance(spec.granularity, PerBlock):
        granularity = f"in blocks of {spec.granularity.size}"
    when = "dynamic " if spec.dynamic else ""
    return f"{when}{spec.codebook or spec.dtype.name.lower()} {granularity}"


def with_channels(spec: QuantSpec, axis: int) -> QuantSpec:
    """The spec of a weight with its output channels along `axis`; blocks divide the other axis of
    the matrix."""
    if isinstance(spec.granularity, PerBlock):
        return spec.with_(granularity=PerBlock(1 - axis, spec.granularity.size))
    if isinstance(spec.granularity, PerAxis):
        return spec.with_(granularity=PerAxis(axis))
    return spec
