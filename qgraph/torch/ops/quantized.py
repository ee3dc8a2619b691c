"""Quantization, and products of integers."""

from __future__ import annotations

import torch
from torch import Tensor

from qgraph.torch.fake_quant import spread
from qgraph.torch.ops.convolution import conv
from qgraph.torch.ops.types import NARROW, Operators, torch_dtype


def broadcast(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """Scales or zero points as ONNX has them, so that they broadcast against `x`: a single one may
    come as a vector, and blocks show in the rank."""
    if block_size and parameter.ndim == x.ndim:
        return spread(parameter, x.shape, axis, block_size)
    if parameter.numel() == 1:
        return parameter.reshape(())
    return spread(parameter, x.shape, axis, 0)


def saturated(x: Tensor, onnx_type: int, dtype: torch.dtype) -> Tensor:
    """Whole numbers as integers of a type, those beyond its range at its ends."""
    if onnx_type in NARROW:
        held, low, high = NARROW[onnx_type]
        return x.clamp(low, high).to(held)
    info = torch.iinfo(dtype)
    return x.clamp(info.min, info.max).to(torch.int32).to(dtype)


def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
    types: list[int],
) -> Tensor:
    """Round half to even, add the zero point, saturate."""
    kind = output_dtype or (types[2] if len(types) > 2 else 0)
    held = torch.uint8 if zero_point is None else zero_point.dtype
    dtype = torch_dtype(kind) if kind else held
    exact = torch_dtype(precision) if precision else scale.dtype
    y = x.to(exact) / broadcast(scale, x, axis, block_size).to(exact)
    zero = None if zero_point is None else broadcast(zero_point, x, axis, block_size)
    if dtype.is_floating_point:
        y = y if zero is None else y + zero.to(exact)
        largest = torch.finfo(dtype).max
        return (y.clamp(-largest, largest) if saturate else y).to(dtype)
    y = torch.round(y)
    return saturated(y if zero is None else y + zero.to(torch.int32), kind, dtype)


def dequantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    step = broadcast(scale, x, axis, block_size)
    if x.dtype.is_floating_point:
        x = x.to(scale.dtype)
    if zero_point is not None:
        zero = broadcast(zero_point, x, axis, block_size)
        if x.dtype.is_floating_point:
            x = x - zero.to(x.dtype)
        else:
            x = x.to(torch.int32) - zero.to(torch.int32)
    y = x.to(scale.dtype) * step
    return y.to(torch_dtype(output_dtype)) if output_dtype else y


def dynamic_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point (uint8) of the whole of `x`, zero included."""
    low, high = torch.aminmax(x) if x.numel() else (x.new_zeros(()), x.new_zeros(()))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(high == low, 1, scale)
    zero = torch.round((-low / scale).clamp(0, 255)).to(torch.uint8)
    return scale, zero


def dynamic_quantize_linear(x: Tensor, *, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero = dynamic_range(x)
    q = saturated(torch.round(x / scale) + zero.to(torch.int32), 0, torch.uint8)
    return q, scale, zero


def _centred(x: Tensor, zero_point: Tensor | None, rows: bool) -> Tensor:
    """Integers without their zero point, in float64, which adds up products exactly."""
    wide = x.to(torch.float64)
    if zero_point is None:
        return wide
    return wide - _of_rows(zero_point, rows).to(torch.float64)


def _of_rows(parameter: Tensor, rows: bool) -> Tensor:
    """A vector with an entry for each row of a matrix so that it broadcasts."""
    return parameter.unsqueeze(-1) if rows and parameter.ndim == 1 else parameter


def _product(a: Tensor, b: Tensor, a_zero: Tensor | None, b_zero: Tensor | None) -> Tensor:
    return torch.matmul(_centred(a, a_zero, True), _centred(b, b_zero, False))


def matmul_integer(
    a: Tensor,
    b: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
) -> Tensor:
    return _product(a, b, a_zero_point, b_zero_point).to(torch.int32)


def conv_integer(
    x: Tensor,
    w: Tensor,
    x_zero_point: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    per_channel = None if w_zero_point is None else broadcast(w_zero_point, w, 0, 0)
    y = conv(
        _centred(x, x_zero_point, False),
        _centred(w, per_channel, False),
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        pads=pads,
        strides=strides,
    )
    return y.to(torch.int32)


def requantized(y: Tensor, factor: Tensor, zero_point: Tensor) -> Tensor:
    """An int32 accumulator at another scale."""
    scaled = torch.round(y.to(torch.float32) * factor.to(torch.float32))
    return saturated(scaled + zero_point.to(torch.int32), 0, zero_point.dtype)


def qlinear_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
) -> Tensor:
    y = _product(a, b, a_zero_point, b_zero_point).to(torch.int32)
    factor = _of_rows(a_scale, True) * b_scale / _of_rows(y_scale, True)
    return requantized(y, factor, _of_rows(y_zero_point, True))


def qlinear_conv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    y = conv_integer(
        x,
        w,
        x_zero_point,
        w_zero_point,
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        pads=pads,
        strides=strides,
    )
    if bias is not None:
        y = y + broadcast(bias, y, 1, 0)
    return requantized(y, broadcast(x_scale * w_scale / y_scale, y, 1, 0), y_zero_point)


def matmul_integer_to_float(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    y = _product(a, b, a_zero_point, b_zero_point).to(a_scale.dtype)
    y = y * (a_scale * b_scale)
    return y if bias is None else y + bias


def dynamic_quantize_matmul(
    a: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    q, scale, zero = dynamic_quantize_linear(a, outputs=3)
    return matmul_integer_to_float(q, b, scale, b_scale, zero, b_zero_point, bias)


OPERATORS: Operators = {
    "ConvInteger": conv_integer,
    "DequantizeLinear": dequantize_linear,
    "DynamicQuantizeLinear": dynamic_quantize_linear,
    "MatMulInteger": matmul_integer,
    "QLinearConv": qlinear_conv,
    "QLinearMatMul": qlinear_matmul,
    "QuantizeLinear": quantize_linear,
}
MICROSOFT: Operators = {
    "DequantizeLinear": dequantize_linear,
    "DynamicQuantizeMatMul": dynamic_quantize_matmul,
    "MatMulIntegerToFloat": matmul_integer_to_float,
    "QuantizeLinear": quantize_linear,
}
