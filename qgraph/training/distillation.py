"""How far a model's outputs are from its teacher's, and where inside they are compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from qgraph.graph.reading import constant, is_op, node_name


def distances(outputs: Any, targets: Any, temperature: float) -> Tensor:
    """The mean of :func:`distance` over the outputs."""
    pairs = zip(_floats(outputs), _floats(targets), strict=True)
    return torch.stack([distance(y, t, temperature) for y, t in pairs]).mean()


def distance(y: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Squared error over the mean square, or with a temperature the divergence of the softmaxes;
    see :meth:`qgraph.training.module.QuantizedModule.distillation_loss`."""
    if not temperature:
        return (y - target).square().mean() / target.square().mean().clamp(min=1e-12)
    soft = torch.log_softmax(y.flatten(0, -2) / temperature, -1)
    soft_target = torch.log_softmax(target.flatten(0, -2) / temperature, -1)
    loss = nn.functional.kl_div(soft, soft_target, log_target=True, reduction="batchmean")
    return loss * temperature**2


def _floats(outputs: Any) -> list[Tensor]:
    tensors = outputs if isinstance(outputs, tuple | list) else [outputs]
    return [y for y in tensors if isinstance(y, Tensor) and y.is_floating_point()]


def compared_nodes(model: ir.Model, sites: Iterable[str]) -> set[str]:
    """The nodes whose outputs are compared, for these sites.

    What a residual branch adds counts no more than it shows in the sum: by itself it may be small,
    and its errors large, and not matter.
    """
    nodes = {node_name(node): node for node in model.graph}
    return {node_name(with_residual(nodes[name])) for name in sites}


def with_residual(node: ir.Node) -> ir.Node:
    """The Add of two computed values that alone reads what this node computes, or the node."""
    last = node
    while len(readers := last.outputs[0].consumers()) == 1 and is_op(readers[0], "Add"):
        last = readers[0]
        if all(constant(value) is None for value in last.inputs):
            return last
    return node
