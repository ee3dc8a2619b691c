"""Correct each output channel of a rounded layer by a gain and an offset, before training."""

from __future__ import annotations

import inspect
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from qgraph.numerics.groups import layout
from qgraph.numerics.spec import PerAxis
from qgraph.torch.fake_quant import spread
from qgraph.torch.to_module import onnx_node
from qgraph.training.quantizers import WeightQuantizer


def regression(y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and offset of each channel for which gain · y + offset is nearest to `target`.

    Args:
        y, target: (N, channels, ...).

    Returns:
        (channels,) each; gains between a half and two.
    """
    ours, theirs = (a.transpose(0, 1).flatten(1) for a in (y, target))
    mean, aim = ours.mean(1), theirs.mean(1)
    centered = ours - mean[:, None]
    power = centered.square().mean(1)
    slope = (centered * theirs).mean(1) / power.clamp(min=1e-12)
    gain = torch.where(power > 1e-12, slope, 1.0).clamp(0.5, 2.0)
    return gain, aim - gain * mean


class Recorder(fx.Interpreter):
    """Runs a model and keeps what these nodes put out, in `outputs`."""

    def __init__(self, module: fx.GraphModule, nodes: set[str]) -> None:
        super().__init__(module)
        self.nodes = nodes
        self.outputs: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = onnx_node(n)
        if n.op == "call_function" and name in self.nodes:
            self.outputs[name] = result
        return result


def in_order(module: fx.GraphModule, inputs: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
    """The arguments of `forward` as `fx.Interpreter` takes them."""
    return list(inspect.signature(module.forward).bind(*inputs, **named).arguments.values())


class MatchChannels(fx.Interpreter):
    """Runs the rounded model, and corrects each layer before the next one reads it.

    The problem: at few bits the errors of a channel's weights do not cancel. They shift its output
    and shrink or stretch it, the same way for all data; where a channel has few weights, as in a
    depthwise convolution, that is most of the error::

        y = scale · (x * Wq) + b        y = (gain · scale) · (x * Wq) + (gain · b + offset)

    The integers of the weights stay. Only layers with a bias and a fixed scale for each channel,
    both their own, are corrected.

    Source: after Finkelstein et al. 2019, "Fighting Quantization Bias With Bias", for the offset,
    and the re-estimation of batch normalization of Nagel et al. 2022, "Overcoming Oscillations in
    Quantization-Aware Training", for both; here by least squares.
    """

    def __init__(self, module: fx.GraphModule, targets: dict[str, Tensor]) -> None:
        super().__init__(module)
        self.targets, self.layers = targets, layers(module)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = onnx_node(n)
        if n.op != "call_function" or name not in self.targets:
            return result
        quantizer, weight, bias = self.layers[name]
        gain, offset = regression(result, self.targets.pop(name))
        quantizer.start.mul_(gain)
        weight.mul_(spread(gain, weight.shape, *layout(quantizer.spec)))
        bias.mul_(gain.reshape(bias.shape)).add_(offset.reshape(bias.shape))
        shape = [1, -1, *[1] * (result.ndim - 2)]
        return result * gain.reshape(shape) + offset.reshape(shape)


def layers(module: fx.GraphModule) -> dict[str, tuple[WeightQuantizer, Tensor, Tensor]]:
    """The layers that can be corrected, by node: quantizer, weight and bias."""
    by_node = {}
    for node in module.graph.nodes:
        quantizer = module.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(quantizer, WeightQuantizer) or len(node.args) < 2:
            continue
        weight, bias = (_own(module, argument) for argument in node.args)
        kind = quantizer.spec.granularity
        if weight is None or bias is None or not isinstance(kind, PerAxis):
            continue
        if quantizer.start.numel() == bias.numel() == quantizer.outputs:
            by_node[str(onnx_node(node))] = quantizer, weight, bias
    return by_node


def _own(module: nn.Module, node: fx.Node) -> Tensor | None:
    """The weight that a node reads, transposed or not, if nobody else reads it."""
    if len(node.users) > 1:
        return None
    if node.op == "get_attr":
        weight: Tensor = attrgetter(str(node.target))(module)
        return weight if isinstance(weight, nn.Parameter) else None
    source = _own(module, node.all_input_nodes[0]) if node.target is torch.t else None
    return None if source is None else source.t()
