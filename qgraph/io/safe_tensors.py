"""Weights beside an ONNX file in a file that safetensors reads, too: one copy for both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from qgraph.graph.reading import INLINE_BYTES, unmap

KINDS = {
    ir.DataType.FLOAT: "F32",
    ir.DataType.FLOAT16: "F16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.DOUBLE: "F64",
    ir.DataType.INT8: "I8",
    ir.DataType.UINT8: "U8",
    ir.DataType.INT16: "I16",
    ir.DataType.INT32: "I32",
    ir.DataType.INT64: "I64",
}
"""What safetensors calls the types of weights."""
_ALIGNMENT = 64


def is_weight(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor goes there: all but single numbers, and short lists of integers that steer
    operators, which runtimes look at before they read weights."""
    if tensor.dtype not in KINDS or tensor.size < 2:
        return False
    floats = tensor.dtype.is_floating_point() or tensor.dtype == ir.DataType.INT8
    return floats or tensor.nbytes > INLINE_BYTES


def write(tensors: Sequence[ir.TensorProtocol], file: Path) -> list[ir.ExternalTensor]:
    """Write tensors under their names, one after the other; returns where each lies.

    Raises:
        OSError: the file cannot be written.
    """
    # Wide ones first, so that each begins at a multiple of its numbers' size; nothing lies between.
    order = sorted(range(len(tensors)), key=lambda i: -tensors[i].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, end = [0] * len(tensors), 0
    for i in order:
        tensor, begins[i] = tensors[i], end
        end += tensor.nbytes
        header[str(tensor.name)] = {
            "dtype": KINDS[tensor.dtype],
            "shape": list(tensor.shape.numpy()),
            "data_offsets": [begins[i], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    start = 8 + len(text)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for i in order:
            out.write(tensors[i].tobytes())
            unmap(tensors[i])
    return [
        ir.ExternalTensor(
            file.name,
            start + begin,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=str(tensor.name),
            base_dir=file.parent,
        )
        for tensor, begin in zip(tensors, begins, strict=True)
    ]
