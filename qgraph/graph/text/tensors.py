"""Tensors in the text form of a model: elements as text, and back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir


def content_hash(tensor: ir.TensorProtocol) -> str:
    """The hash that is printed: eight hex digits, for readers who compare two texts."""
    return digest(tensor, 4)


def digest(tensor: ir.TensorProtocol, size: int) -> str:
    """`size` bytes, as hex digits, that depend on dtype, shape and data alone.

    What lies in a file is read in chunks, and not mapped into memory.
    """
    state = hashlib.blake2b(f"{tensor.dtype.name}{tensor.shape.numpy()}".encode(), digest_size=size)
    if tensor.dtype == ir.DataType.STRING:
        state.update(repr(strings_of(tensor)).encode())
    elif isinstance(tensor, ir.ExternalTensor):
        tensor.tofile(SimpleNamespace(write=state.update))
    else:
        state.update(tensor.tobytes())
    return state.hexdigest()


def strings_of(tensor: ir.TensorProtocol) -> list[bytes]:
    """The items of a string tensor, in C order."""
    # numpy's own fixed-width strings would drop NUL bytes at the end.
    items = tensor.string_data() if isinstance(tensor, ir.StringTensor) else tensor.numpy().flat
    return [item.encode() if isinstance(item, str) else bytes(item) for item in items]


def elements_of(tensor: ir.TensorProtocol) -> list[str]:
    """The shortest text of each element in C order; complex ones as real and imaginary parts."""
    array = tensor.numpy().reshape(-1)
    if array.dtype.kind == "c":
        array = array.view(array.real.dtype)
    if array.dtype.kind == "b":
        return ["true" if item else "false" for item in array]
    if tensor.dtype.is_integer():
        return [str(int(item)) for item in array]
    wide = array if array.dtype == np.float64 else array.astype(np.float32)
    return [str(item) for item in wide]


def tensor_from(
    dtype: ir.DataType, shape: Sequence[int], elements: Sequence[str]
) -> ir.TensorProtocol:
    """The tensor that :func:`elements_of` gave these texts for, up to the bits of a NaN."""
    array: np.ndarray
    kind = dtype.numpy()
    if dtype == ir.DataType.BOOL:
        array = np.array([("false", "true").index(e) for e in elements], kind)
    elif dtype.is_integer():
        wide = np.int64 if dtype.bitwidth < 8 else kind
        array = np.array([int(e) for e in elements], wide).astype(kind)
    elif kind.kind == "c":
        real = np.zeros(0, kind).real.dtype
        array = np.array([float(e) for e in elements], real).view(kind)
    else:
        with np.errstate(over="ignore"):
            array = np.array([float(e) for e in elements], np.float64).astype(kind)
    return ir.Tensor(array.reshape(tuple(shape)), dtype=dtype)
