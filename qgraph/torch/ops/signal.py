"""Windows, Fourier transforms and mel filters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qgraph.torch.ops.types import Ints, Operators, integer, torch_dtype


def _cosines(
    size: Ints, periodic: int, output_datatype: int, coefficients: Sequence[float]
) -> Tensor:
    count = integer(size)
    step = 2 * math.pi / (count if periodic else max(count - 1, 1))
    angle = torch.arange(count, dtype=torch.float64) * step
    window = sum(c * torch.cos(k * angle) for k, c in enumerate(coefficients))
    assert isinstance(window, Tensor)
    return window.to(torch_dtype(output_datatype))


def hann_window(size: Ints, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _cosines(size, periodic, output_datatype, (0.5, -0.5))


def hamming_window(size: Ints, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _cosines(size, periodic, output_datatype, (25 / 46, -21 / 46))


def blackman_window(size: Ints, *, output_datatype: int = 1, periodic: int = 1) -> Tensor:
    return _cosines(size, periodic, output_datatype, (0.42, -0.5, 0.08))


def _complex(x: Tensor) -> Tensor:
    """The last axis holds real parts, or real and imaginary ones."""
    return x[..., 0] if x.shape[-1] == 1 else torch.complex(x[..., 0], x[..., 1])


def _parts(x: Tensor) -> Tensor:
    return torch.stack([x.real, x.imag], -1)


def dft(
    x: Tensor,
    dft_length: Ints | None = None,
    axis: Ints | int | None = None,
    *,
    inverse: int = 0,
    onesided: int = 0,
    opset: int,
) -> Tensor:
    """Before opset 20 the axis is an attribute and 1 by default, since then an input and -2."""
    if axis is None:
        axis = 1 if opset < 20 else -2
    dim = axis if isinstance(axis, int) else integer(axis)
    dim = dim % x.ndim
    length = None if dft_length is None else integer(dft_length)
    data = _complex(x)
    if inverse and onesided:
        real: Tensor = torch.fft.irfft(data, length, dim)
        return real.unsqueeze(-1)
    if inverse:
        return _parts(torch.fft.ifft(data, length, dim))
    if onesided:
        return _parts(torch.fft.rfft(data.real if data.is_complex() else data, length, dim))
    return _parts(torch.fft.fft(data, length, dim))


def stft(
    signal: Tensor,
    frame_step: Ints,
    window: Tensor | None = None,
    frame_length: Ints | None = None,
    *,
    onesided: int = 1,
) -> Tensor:
    """(batch, frames, bins, 2)."""
    data = _complex(signal) if signal.ndim == 3 else signal
    if frame_length is not None:
        length = integer(frame_length)
    else:
        assert window is not None
        length = window.shape[0]
    frames = data.unfold(1, length, integer(frame_step))
    frames = frames if window is None else frames * window
    if onesided and not frames.is_complex():
        return _parts(torch.fft.rfft(frames))
    return _parts(torch.fft.fft(frames))


def mel_weight_matrix(
    num_mel_bins: Ints,
    dft_length: Ints,
    sample_rate: Ints,
    lower_edge_hertz: Tensor,
    upper_edge_hertz: Tensor,
    *,
    output_datatype: int = 1,
) -> Tensor:
    """Triangular filters, (spectrogram bins, mel bins), whose edges fall on whole bins."""
    count, size = integer(num_mel_bins), integer(dft_length)
    low, high = (
        2595 * math.log10(1 + float(edge) / 700) for edge in (lower_edge_hertz, upper_edge_hertz)
    )
    mel = low + torch.arange(count + 2, dtype=torch.float64) * ((high - low) / (count + 2))
    hertz = 700 * (10 ** (mel / 2595) - 1)
    edges = torch.floor((size + 1) * hertz / integer(sample_rate))
    bins = torch.arange(size // 2 + 1, dtype=torch.float64)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (bins - left) / (centre - left).clamp(min=1)
    falling = (right - bins) / (right - centre).clamp(min=1)
    filters = torch.where(bins < centre, rising, falling).clamp(min=0)
    filters = torch.where(bins == centre, 1, filters)
    return filters.to(torch_dtype(output_datatype))


OPERATORS: Operators = {
    "BlackmanWindow": blackman_window,
    "DFT": dft,
    "HammingWindow": hamming_window,
    "HannWindow": hann_window,
    "MelWeightMatrix": mel_weight_matrix,
    "STFT": stft,
}
