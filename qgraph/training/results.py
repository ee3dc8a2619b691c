"""What was trained, written back: into the annotated model, or torch's own."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from qgraph.errors import ModelError
from qgraph.graph.annotation import set_trained_scale
from qgraph.graph.reading import array, node_name
from qgraph.graph.sites import site_of
from qgraph.torch.to_module import onnx_value, weight_names, write_back
from qgraph.training.insert_quantizers import quantized_weights, values
from qgraph.training.quantizers import DataQuantizer
from qgraph.weights.site_weight import replace_weight


@torch.no_grad()
def annotate(model: ir.Model, raised: fx.GraphModule) -> None:
    """Give the annotated model its trained weights, and the integers and scales of training.

    Args:
        model: `raised` was made of one like it.
        raised: holds quantizers whose scales are chosen.
    """
    write_back(raised, model)
    nodes = {node_name(node): node for node in model.graph}
    for name, quantizer, weight, bias in quantized_weights(raised):
        site = site_of(nodes[name])
        assert site is not None
        replace_weight(model, site, quantizer.integers(weight, bias), "trained")
    named = {str(value.name): value for value in values(model)}
    for node in raised.graph.nodes:
        if node.op == "call_module":
            module = raised.get_submodule(node.target)
            if isinstance(module, DataQuantizer):
                scale, zero = (a.cpu().numpy() for a in (module.scale, module.zero))
                set_trained_scale(named[str(onnx_value(node))], scale, zero)


@torch.no_grad()
def copy_weights(raised: fx.GraphModule, model: ir.Model, module: nn.Module) -> list[str]:
    """Copy trained float weights into the parameters of `module` that held the same before.

    Args:
        raised: holds the trained weights.
        model: `raised` was made of it; it holds the weights from before training.
        module: as it was before training.

    Returns:
        names of the parameters that were written.

    Raises:
        ModelError: some trained weight has no counterpart. Nothing is written.
    """
    parameters = dict(module.named_parameters())
    trained: dict[str, Tensor] = {}
    for path, (name, turned) in weight_names(raised).items():
        weight, before = attrgetter(path)(raised), _constant(model, name)
        if before is None or not isinstance(weight, nn.Parameter):
            continue
        target = next(_counterparts(before.T if turned else before, parameters, trained), None)
        if target is None:
            raise ModelError(
                f"no parameter holds what '{path}' held before training: it was merged with a "
                "batch normalization or factor; nothing was written"
            )
        key, transposed = target
        trained[key] = weight.T if transposed else weight
    for key, value in trained.items():
        parameters[key].copy_(value)
    return list(trained)


def _constant(model: ir.Model, name: str) -> np.ndarray | None:
    """The initializer, or result of a Constant node, of this name."""
    value = model.graph.initializers.get(name)
    return array(value or next((v for v in values(model) if v.name == name), None))


def _counterparts(
    before: np.ndarray, parameters: dict[str, nn.Parameter], taken: dict[str, Tensor]
) -> Iterator[tuple[str, bool]]:
    """Names of the parameters that hold the same numbers, and whether transposed."""
    for name, parameter in parameters.items():
        if name in taken or parameter.numel() != before.size:
            continue
        data = parameter.detach().cpu().numpy()
        if np.array_equal(data, before):
            yield name, False
        elif data.ndim == 2 and np.array_equal(data.T, before):
            yield name, True
