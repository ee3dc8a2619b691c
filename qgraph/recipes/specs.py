"""Specs that several recipes use."""

from __future__ import annotations

from typing import Literal, get_args

import onnx_ir as ir

from qgraph.errors import QGraphError
from qgraph.numerics.spec import WEIGHT, PerAxis, PerBlock, QuantSpec

WeightRange = Literal["mse", "absmax"]


def int8_weight(bits: int) -> QuantSpec:
    """Weights of 2 to 8 bits with a scale for each output channel, stored as int8."""
    if not 2 <= bits <= 8:
        raise QGraphError(f"bits={bits} is out of range: use 2 to 8")
    return WEIGHT if bits == 8 else WEIGHT.with_(bits=bits)


def checked_group_size(group_size: int) -> int:
    """The group size, if it is one."""
    if not isinstance(group_size, int) or (group_size and group_size < 16):
        raise QGraphError(
            f"group_size={group_size} is out of range: use 0 (per channel), or 16 and more"
        )
    return group_size


def few_bits(bits: int, group_size: int, symmetric: bool, observer: WeightRange) -> QuantSpec:
    """Integers of 2 to 8 bits in blocks of rows, or with a scale for each output channel."""
    int8_weight(bits)  # refuses what is out of range
    if observer not in get_args(WeightRange):
        known = ", ".join(get_args(WeightRange))
        raise QGraphError(f"observer '{observer}' is unknown for weights: use one of {known}")
    signed, unsigned = ir.DataType.INT8, ir.DataType.UINT8
    if bits <= 4:
        signed, unsigned = ir.DataType.INT4, ir.DataType.UINT4
    size = checked_group_size(group_size)
    return QuantSpec(
        signed if symmetric else unsigned,
        PerBlock(0, size) if size else PerAxis(0),
        symmetric,
        observer,
        bits=0 if bits in (4, 8) else bits,
    )


def in_groups(bits: int, group_size: int | Literal["auto"]) -> QuantSpec:
    """Integers of 2 to 8 bits in blocks of rows, unless 8 bits do without or the size is 0."""
    weight = int8_weight(bits)
    if bits < 8:
        dtype = ir.DataType.INT4 if bits <= 4 else ir.DataType.INT8
        weight = weight.with_(dtype=dtype, bits=0 if bits == 4 else bits, observer="absmax")
    size = (64 if bits < 8 else 0) if group_size == "auto" else checked_group_size(group_size)
    return weight.with_(granularity=PerBlock(0, size)) if size else weight


def int8_blocks(size: int) -> QuantSpec:
    """Data rounded to int8 at run time, with a scale for each block of each token."""
    return QuantSpec(ir.DataType.INT8, PerBlock(-1, size), observer="dynamic")
