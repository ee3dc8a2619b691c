"""Tensors that live in a file beside the model."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir

from qgraph.errors import ModelError
from qgraph.graph.reading import initializers


def settle(model: ir.Model, file: Path, inline_bytes: int) -> tuple[Path, ...]:
    """Check every external tensor of `model`. Returns the data files.

    Those of up to `inline_bytes` are read, since they travel inside the serialised graph, and so
    are those of Constant nodes, which a runtime that gets the graph as bytes cannot find.
    """
    data: dict[Path, int] = {}
    for value in initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            settled = _settle(tensor, file, data)
            value.const_value = in_memory(settled) if tensor.nbytes <= inline_bytes else settled
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for body in bodies:
        for node in body.all_nodes():
            for name, attribute in list(node.attributes.items()):
                if attribute.type != ir.AttributeType.TENSOR or attribute.is_ref():
                    continue
                tensor = attribute.as_tensor()
                if isinstance(tensor, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(
                        name, in_memory(_settle(tensor, file, data))
                    )
    return tuple(data)


def _settle(tensor: ir.ExternalTensor, file: Path, data: dict[Path, int]) -> ir.ExternalTensor:
    """`tensor` with its data file checked; file sizes are collected in `data`."""
    where = f"{file}: the external data of '{tensor.name}'"
    path = file.parent / tensor.location
    if os.path.isabs(tensor.location) or ".." in Path(tensor.location).parts:
        raise ModelError(f"{where} lies outside the model's folder ({tensor.location}): refused")
    if path not in data:
        if not path.is_file():
            raise ModelError(f"{where} is missing: put {path.name} into {path.parent}")
        # A download cache keeps model and data as links into one folder of blobs.
        folders = (file.parent.resolve(), file.resolve().parent)
        if not any(path.resolve().is_relative_to(folder) for folder in folders):
            raise ModelError(f"{where} is a link out of the model's folder: copy {path} into it")
        data[path] = path.stat().st_size
    offset, length = tensor.offset or 0, tensor.length or tensor.nbytes
    if offset < 0 or length < tensor.nbytes or offset + length > data[path]:
        raise ModelError(f"{where} is cut off in {path.name}: download or copy that file again")
    # onnx-ir refuses links as such; what the checks above let through gets its plain path.
    linked = path.stat().st_nlink > 1 or path.resolve() != path.parent.resolve() / path.name
    tensor.base_dir = file.parent
    return external(tensor, path.resolve()) if linked else tensor


def external(tensor: ir.ExternalTensor, path: str | os.PathLike[str]) -> ir.ExternalTensor:
    """The same stretch of `path` with its own memory map."""
    return ir.ExternalTensor(
        path, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name
    )


def in_memory(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    """A copy in memory; `tensor` and its memory map are left alone."""
    return ir.external_data.convert_tensors_from_external([external(tensor, tensor.path)])[0]
