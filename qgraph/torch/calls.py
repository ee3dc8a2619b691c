"""Calls of a raised module with inputs by name."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.errors import ModelError, QGraphError
from qgraph.graph.reading import dims
from qgraph.io.kv_cache import Completer, required_inputs

try:
    import torch
except ImportError:
    raise ModelError('modules need torch: pip install "qgraph-compiler[torch]"') from None

from torch import Tensor, nn

from qgraph.torch.ops.types import torch_dtype


def checked_device(device: Any) -> torch.device:
    """A device of this machine.

    Raises:
        QGraphError: there is none such.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise QGraphError(f"device '{device}' is unknown: {reason}") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise QGraphError(f"torch sees {count} NVIDIA GPUs here, no '{device}': use device='cpu'")
    return found


def call(
    module: nn.Module, model: ir.Model, complete: Completer, named: Mapping[str, Any]
) -> list[Tensor]:
    """The outputs of `module`, which moves to where the tensors are.

    Args:
        model: that the module was raised from.
        complete: fills in what language models need besides their data.
        named: tensors, and arrays beside them, by input name.

    Raises:
        QGraphError: inputs are missing, on several devices, or of another type or shape.
    """
    device = _common_device(named)
    given = {name: torch.as_tensor(value, device=device) for name, value in named.items()}
    required = required_inputs(model)
    if any(value.name not in given for value in required):
        feed = complete({name: value.detach().cpu().numpy() for name, value in given.items()})
        if (lacking := complete.lacking(feed, named)) is not None:
            raise QGraphError(lacking)
        made = {name: array for name, array in feed.items() if name not in given}
        given |= {name: torch.as_tensor(np.asarray(a), device=device) for name, a in made.items()}
    inputs = [*required, *(v for v in model.graph.inputs if v.is_initializer())]
    arguments = [_fitting(value, given.get(str(value.name))) for value in inputs]
    where = next((t.device for t in chain(module.parameters(), module.buffers())), device)
    if where != device:
        module.to(device)
    with torch.no_grad():
        results = module(*arguments)
    return list(results) if isinstance(results, tuple) else [results]


def _common_device(named: Mapping[str, Any]) -> torch.device:
    devices = {name: v.device for name, v in named.items() if isinstance(v, Tensor)}
    first, *others = devices
    for name in others:
        if devices[name] != devices[first]:
            raise QGraphError(
                f"input '{first}' is on {devices[first]} and '{name}' on {devices[name]}: "
                "give all on one device"
            )
    return devices[first]


def _fitting(value: ir.Value, tensor: Tensor | None) -> Tensor | None:
    """The input as the model takes it: wide floats are narrowed, as they are for onnxruntime."""
    if tensor is None or value.dtype is None:
        return tensor
    wanted = torch_dtype(value.dtype)
    if tensor.dtype == torch.float64 and wanted.is_floating_point:
        tensor = tensor.to(wanted)
    if tensor.dtype != wanted:
        raise QGraphError(
            f"input '{value.name}' is {tensor.dtype}, and the model takes {wanted}: convert it"
        )
    sizes = dims(value)
    if value.shape is not None and (
        len(sizes) != tensor.ndim
        or any(size not in (None, found) for size, found in zip(sizes, tensor.shape, strict=True))
    ):
        raise QGraphError(
            f"input '{value.name}' has shape {list(tensor.shape)}, and the model takes "
            f"{value.shape}: give that"
        )
    return tensor
