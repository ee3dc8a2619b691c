"""Constants of a graph as parameters and buffers of a module."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from qgraph.graph.names import numbered
from qgraph.graph.provenance import layer
from qgraph.graph.reading import MICROSOFT, is_op, node_name, unmap
from qgraph.torch.coverage import operator_key
from qgraph.torch.ops.types import torch_dtype

SETTINGS: dict[tuple[str, str], tuple[int, ...]] = {
    ("", "BatchNormalization"): (3, 4),
    ("", "Clip"): (1, 2),
    ("", "DequantizeLinear"): (1, 2),
    ("", "Dropout"): (1,),
    ("", "OneHot"): (2,),
    ("", "Pad"): (2,),
    ("", "QuantizeLinear"): (1, 2),
    ("", "Range"): (0, 1, 2),
    ("", "Resize"): (1, 2),
    ("", "RotaryEmbedding"): (1, 2),
    ("", "Upsample"): (1,),
    (MICROSOFT, "GroupQueryAttention"): (7, 8),
    (MICROSOFT, "RotaryEmbedding"): (2, 3),
    ("qgraph", "DequantizePerToken"): (1, 2, 3),
    ("qgraph", "QuantizePerToken"): (1, 2, 3),
    ("qgraph", "RoundInBlocks"): (2, 3),
}
"""Inputs that say how an operator works: floats there are no weights, training leaves them."""


class Parameters:
    """The parameters and buffers of one graph, or one body, in a module of their own.

    Attributes:
        root: holds them; submodules are where dots in names lead.
        origins: for the path of each, the name of the constant it came from, and whether it is held
            transposed.
    """

    def __init__(self) -> None:
        self.root = nn.Module()
        self.origins: dict[str, tuple[str, bool]] = {}
        self.taken: set[str] = set()

    def add(self, value: ir.Value, tensor: ir.TensorProtocol) -> str:
        """Hold a constant: where."""
        data = to_torch(tensor)
        unmap(tensor)
        trains = _trainable(value, data)
        path = self._path(value, trains)
        turned = trains and _of_linear(value)
        data = data.t().contiguous() if turned else data
        hold(self.root, path, nn.Parameter(data) if trains else data)
        self.origins[path] = str(value.name), turned
        return path

    def add_attribute(self, attribute: ir.Attr) -> str:
        """Hold the tensor that an attribute is: where."""
        path = numbered(re.sub(r"\W", "_", attribute.name), self.taken)
        hold(self.root, path, to_torch(attribute.as_tensor()))
        return path

    def add_body(self, name: str, body: nn.Module) -> str:
        """Hold the body of a control-flow operator: where."""
        path = numbered(name, self.taken)
        self.root.add_module(path, body)
        return path

    def add_layer(self, node: ir.Node, module: nn.Module) -> str:
        """Hold the module that a node became: where, at its layer's place if that is free."""
        path = self._free(layer(node) or node_name(node))
        hold(self.root, path, module)
        return path

    def _path(self, value: ir.Value, trains: bool) -> str:
        """Where the weight goes in the module: dots lead into submodules."""
        name = str(value.name or "constant")
        if trains and "." not in name:
            user = next((node for node, _ in _uses(value) if layer(node)), None)
            if user is not None:
                name = f"{layer(user)}.{_role(user, value)}"
        return self._free(name)

    def _free(self, name: str) -> str:
        """A dotted path as modules can have it, where nothing lies yet."""
        parts = [re.sub(r"\W", "_", part) or "_" for part in name.strip(".").split(".")]
        wished = ".".join(f"{part}_" if hasattr(nn.Module, part) else part for part in parts)
        path = numbered(wished, self.taken)
        while _is_taken(self.root, path):
            path = numbered(wished, self.taken)
        return path


def _is_taken(root: nn.Module, path: str) -> bool:
    """Whether something lies at a dotted path, be it a bias that is None."""
    found: object = root
    for step in path.split("."):
        if not hasattr(found, step):
            return False
        found = getattr(found, step)
    return True


def to_torch(tensor: ir.TensorProtocol) -> torch.Tensor:
    """A copy in torch; integers of less than a byte as int8 or uint8."""
    data, dtype = tensor.numpy(), torch_dtype(tensor.dtype)
    if tensor.dtype.bitwidth < 8:
        return torch.from_numpy(data.astype(np.int8 if dtype == torch.int8 else np.uint8))
    data = np.array(data, order="C")
    # numpy knows neither bfloat16 nor float8
    if tensor.dtype.is_floating_point() and data.dtype.type.__module__ != "numpy":
        width = np.uint16 if data.dtype.itemsize == 2 else np.uint8
        return torch.from_numpy(data.view(width)).view(dtype)
    return torch.from_numpy(data)


def hold(root: nn.Module, path: str, data: torch.Tensor | nn.Module) -> None:
    """Put a tensor or a module at a dotted path, making the modules that lead there."""
    *modules, name = path.split(".")
    for step in modules:
        if not hasattr(root, step):
            root.add_module(step, nn.Module())
        root = getattr(root, step)
    if isinstance(data, nn.Module):
        root.add_module(name, data)
    elif isinstance(data, nn.Parameter):
        root.register_parameter(name, data)
    else:
        root.register_buffer(name, data)


def _trainable(value: ir.Value, data: torch.Tensor) -> bool:
    if not data.is_floating_point() or data.ndim == 0 or data.element_size() == 1:
        return False
    if data.numel() == 1 and not value.is_initializer():
        return False  # a number written as a Constant node
    return any(index not in SETTINGS.get(operator_key(node), ()) for node, index in _uses(value))


def _uses(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    for use in value.uses():
        yield use.node, use.idx


def _of_linear(value: ir.Value) -> bool:
    """Whether this is the weight of a `torch.nn.Linear`, which the exporter has transposed."""
    uses = list(_uses(value))
    return len(uses) == 1 and uses[0][1] == 1 and _is_linear(uses[0][0])


def _is_linear(node: ir.Node) -> bool:
    origin = node.metadata_props.get("pkg.torch.onnx.fx_node", "")
    return is_op(node, "MatMul") and "torch.ops.aten.linear" in origin


def _role(node: ir.Node, value: ir.Value) -> str:
    """What torch calls a weight that `node` uses."""
    index = next(index for user, index in _uses(value) if user is node)
    return "bias" if index == 2 or node.op_type == "Add" else "weight"
