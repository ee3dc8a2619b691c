"""Arithmetic, comparison and logic, element by element; products of matrices; casts."""

from __future__ import annotations

import math
from functools import reduce

import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor

from qgraph.torch.ops.types import NARROW, WIDE_UNSIGNED, Operators, is_float, torch_dtype, wide


def add(a: Tensor, b: Tensor) -> Tensor:
    return wide(torch.add, a, b)


def sub(a: Tensor, b: Tensor) -> Tensor:
    return wide(torch.sub, a, b)


def div(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if is_float(a) else wide(_div_toward_zero, a, b)


def _div_toward_zero(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode="trunc")


def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    return wide(torch.fmod if fmod else torch.remainder, a, b)


def power(base: Tensor, exponent: Tensor) -> Tensor:
    """The result has the type of `base`, whatever that of `exponent`."""
    return wide(_power, base, exponent)


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    if is_float(exponent) and not is_float(base):
        return torch.pow(base.to(torch.float64), exponent).to(base.dtype)
    return torch.pow(base, exponent).to(base.dtype)


def absolute(x: Tensor) -> Tensor:
    return x if x.dtype in WIDE_UNSIGNED else torch.abs(x)


def sign(x: Tensor) -> Tensor:
    return wide(torch.sign, x)


def maximum(*tensors: Tensor) -> Tensor:
    return reduce(lambda a, b: wide(torch.maximum, a, b), tensors)


def minimum(*tensors: Tensor) -> Tensor:
    return reduce(lambda a, b: wide(torch.minimum, a, b), tensors)


def total(*tensors: Tensor) -> Tensor:
    return reduce(torch.add, tensors)


def mean(*tensors: Tensor) -> Tensor:
    return total(*tensors) / len(tensors)


def clip(x: Tensor, min: Tensor | None = None, max: Tensor | None = None) -> Tensor:
    if x.dtype not in WIDE_UNSIGNED:
        return x if min is None and max is None else torch.clamp(x, min, max)
    x = x if min is None else wide(torch.maximum, x, min)
    return x if max is None else wide(torch.minimum, x, max)


def less(a: Tensor, b: Tensor) -> Tensor:
    return wide(torch.lt, a, b)


def less_or_equal(a: Tensor, b: Tensor) -> Tensor:
    return wide(torch.le, a, b)


def greater(a: Tensor, b: Tensor) -> Tensor:
    return wide(torch.gt, a, b)


def greater_or_equal(a: Tensor, b: Tensor) -> Tensor:
    return wide(torch.ge, a, b)


def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    infinite = torch.isinf(x.to(torch.float32) if x.element_size() == 1 else x)
    if not detect_negative:
        infinite = infinite & (x > 0)
    return infinite if detect_positive else infinite & (x < 0)


def is_nan(x: Tensor) -> Tensor:
    return torch.isnan(x.to(torch.float32) if x.element_size() == 1 else x)


def bit_shift(x: Tensor, by: Tensor, *, direction: str) -> Tensor:
    shift = torch.bitwise_left_shift if direction == "LEFT" else torch.bitwise_right_shift
    return wide(shift, x, by)


def bitwise_not(x: Tensor) -> Tensor:
    return wide(torch.bitwise_not, x)


def cast(x: Tensor, *, to: int, saturate: int = 1) -> Tensor:
    """Floats become integers by dropping the fraction; float8 saturates unless told otherwise."""
    dtype = torch_dtype(to)
    if dtype.is_floating_point and dtype.itemsize == 1:
        return _to_float8(x, dtype, bool(saturate))
    if is_float(x) and not dtype.is_floating_point and dtype.itemsize < 4 and dtype != torch.bool:
        x = x.to(torch.int64)
    if to in NARROW:  # integers keep their lower bits
        _, low, high = NARROW[to]
        x = (x.to(torch.int64) - low) % (high - low + 1) + low
    return x.to(dtype)


def _to_float8(x: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
    x = x.to(torch.float32)
    largest = torch.finfo(dtype).max
    if saturate:
        x = x.clamp(-largest, largest)
    elif dtype == torch.float8_e4m3fn:  # torch saturates; 464 lies halfway to the next number
        x = torch.where(x.abs() > 464, math.nan, x)
    return x.to(dtype)


def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, types: list[int]) -> Tensor:
    onnx_type = types[1] or int(from_torch_dtype(like.dtype))
    return cast(x, to=onnx_type, saturate=saturate)


def bit_cast(x: Tensor, *, to: int) -> Tensor:
    return x.view(torch_dtype(to))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    return wide(torch.matmul, a, b)


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
) -> Tensor:
    y = matmul(a.t() if transA else a, b.t() if transB else b)
    if alpha != 1:
        y = y * alpha if is_float(y) else y * int(alpha)
    if c is None:
        return y
    if beta != 1:
        c = c * beta if is_float(c) else c * int(beta)
    return y + c


def einsum(*tensors: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *tensors)


def cumsum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    dim = int(axis)
    if reverse:
        x = x.flip(dim)
    sums = torch.cumsum(x, dim, dtype=x.dtype)
    if exclusive:
        sums = sums - x
    return sums.flip(dim) if reverse else sums


def cumprod(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    dim = int(axis)
    if reverse:
        x = x.flip(dim)
    if exclusive:
        first = torch.ones_like(x.narrow(dim, 0, 1))
        x = torch.cat([first, x.narrow(dim, 0, x.shape[dim] - 1)], dim)
    products = torch.cumprod(x, dim, dtype=x.dtype)
    return products.flip(dim) if reverse else products


def arange(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    first, last, step = start.item(), limit.item(), delta.item()
    count = max(math.ceil((last - first) / step), 0)
    return start + torch.arange(count, device=start.device).to(start.dtype) * delta


def fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
    transBatchA: int = 0,  # noqa: N803
    transBatchB: int = 0,  # noqa: N803
) -> Tensor:
    left, right = _turned(a, transA, transBatchA), _turned(b, transB, transBatchB)
    return alpha * torch.matmul(left, right)


def _turned(x: Tensor, matrix: int, batch: int) -> Tensor:
    if batch:  # the first axis becomes the one before the last
        x = x.movedim(0, -2)
    return x.transpose(-1, -2) if matrix and x.ndim > 1 else x


OPERATORS: Operators = {
    "Abs": absolute,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Add": add,
    "And": torch.logical_and,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "BitCast": bit_cast,
    "BitShift": bit_shift,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseNot": bitwise_not,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Cast": cast,
    "CastLike": cast_like,
    "Ceil": torch.ceil,
    "Clip": clip,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "CumProd": cumprod,
    "CumSum": cumsum,
    "Det": torch.linalg.det,
    "Div": div,
    "Einsum": einsum,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Gemm": gemm,
    "Greater": greater,
    "GreaterOrEqual": greater_or_equal,
    "IsInf": is_inf,
    "IsNaN": is_nan,
    "Less": less,
    "LessOrEqual": less_or_equal,
    "Log": torch.log,
    "MatMul": matmul,
    "Max": maximum,
    "Mean": mean,
    "Min": minimum,
    "Mod": mod,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Pow": power,
    "Range": arange,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sign": sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Sub": sub,
    "Sum": total,
    "Tan": torch.tan,
    "Where": torch.where,
    "Xor": torch.logical_xor,
}
MICROSOFT: Operators = {
    "FusedMatMul": fused_matmul,
}
