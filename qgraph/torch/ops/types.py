"""What the operators in torch share: types, and how their arguments arrive.

Every operator is one plain Python function that autograd can follow.  Inputs come by position,
`None` for each absent one; ONNX attributes come by keyword under their own names, with the
defaults of ONNX.  More keywords are filled in for the functions that declare them: `opset`, the
version of the operator's domain; `types`, the ONNX type of each input, 0 where it is not known;
and `outputs`, how many results are wanted: functions with `outputs` return a tuple of at least so
many.  What an older opset gave as an attribute and a newer one gives as an input is one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype
from torch import Tensor

Ints = Tensor | Sequence[int]
"""Integers that steer an operator: a tensor if they are computed, else a list."""
Operators = Mapping[str, Callable[..., Any]]
"""Functions by the operator's name, of one domain."""

NARROW: Mapping[int, tuple[torch.dtype, int, int]] = {
    int(ir.DataType.INT4): (torch.int8, -8, 7),
    int(ir.DataType.UINT4): (torch.uint8, 0, 15),
    int(ir.DataType.INT2): (torch.int8, -2, 1),
    int(ir.DataType.UINT2): (torch.uint8, 0, 3),
}
"""Types of less than a byte: the type of torch that holds them, their least and largest value."""

WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""Types for which torch has few functions."""


def torch_dtype(onnx_type: int) -> torch.dtype:
    """The type of torch that holds values of this ONNX type."""
    if onnx_type in NARROW:
        return NARROW[onnx_type][0]
    return to_torch_dtype(ir.DataType(onnx_type))


def ints(values: Ints) -> list[int]:
    """Steering integers as Python ones; a scalar is a list of one."""
    if isinstance(values, Tensor):
        numbers = values.tolist()
        return numbers if isinstance(numbers, list) else [numbers]
    return list(values)


def integer(value: Ints) -> int:
    """A steering integer."""
    return ints(value)[0]


def wide(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function`, for unsigned types that it does not know by way of int64."""
    dtype = tensors[0].dtype
    if dtype not in WIDE_UNSIGNED:
        return function(*tensors)
    result = function(*(_as_int64(t) if t.dtype in WIDE_UNSIGNED else t for t in tensors))
    return result.to(dtype) if result.dtype == torch.int64 else result


def _as_int64(tensor: Tensor) -> Tensor:
    signed = tensor.to(torch.int64)
    if tensor.dtype == torch.uint64 and bool((signed < 0).any()):
        raise NotImplementedError("torch cannot compute with uint64 of 2**63 and more")
    return signed


def pieces(x: Tensor, sizes: Sequence[int], axis: int) -> tuple[Tensor, ...]:
    """Consecutive parts of `x`."""
    return torch.split_with_sizes(x, list(sizes), axis)


def is_float(tensor: Tensor) -> bool:
    """Whether the tensor holds floating-point numbers, of 8 bits too."""
    return tensor.is_floating_point()
