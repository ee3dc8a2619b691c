"""Quantizers in a raised model, where insert-qdq will put conversions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter, getitem

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from qgraph.graph.annotation import (
    annotated,
    is_annotated,
    known_static_spec,
    spec_of,
    static_spec,
    static_uses,
)
from qgraph.graph.ops import MOVES, lowest_value
from qgraph.graph.reading import constant_tensor, is_op, node_name, release
from qgraph.graph.sites import Site, site_of
from qgraph.numerics.spec import QuantSpec
from qgraph.numerics.tokens import token_grid
from qgraph.torch.to_module import onnx_node, onnx_value, raise_model, set_onnx_node, set_onnx_value
from qgraph.training.quantizers import DataQuantizer, Phase, TokenQuantizer, WeightQuantizer
from qgraph.weights.site_weight import constant_bias


class InsertQuantizers:
    """Puts quantizers where insert-qdq will put conversions."""

    def __init__(self, model: ir.Model, phase: Phase, learn: bool, batches: int) -> None:
        self.model, self.phase, self.learn = model, phase, learn
        self.each = max(1, 8192 // batches)
        self.raised = raise_model(model)
        self.graph = self.raised.graph
        self.calls = {name: n for n in self.graph.nodes if (name := onnx_node(n)) is not None}
        self.held = {name: n for n in self.graph.nodes if (name := onnx_value(n)) is not None}
        self.data: dict[ir.Value, DataQuantizer] = {}
        self.runtime: dict[tuple[ir.Value, QuantSpec], fx.Node] = {}

    def module(self) -> fx.GraphModule:
        self.raised.add_module("quantizers", nn.Module())
        for node, specs in annotated(self.model):
            for index, spec in specs.items():
                value = node.inputs[index]
                if spec.dynamic and value is not None:
                    self._dynamic(node, index, value, spec)
        for value in list(values(self.model)):
            if static_spec(value) is not None:
                self._static(value)
        shared: dict[tuple[ir.Value, QuantSpec], str] = {}
        for node, specs in annotated(self.model):
            site = site_of(node)
            if site is not None and site.w_index in specs:
                self._weight(site, specs, shared)
        self.graph.lint()
        self.raised.recompile()
        return self.raised

    def _named(self, name: str, module: nn.Module) -> str:
        """Where the module is: `quantizers.<name>`."""
        path = "quantizers." + "".join(c if c.isalnum() else "_" for c in name)
        while _has(self.raised, path):
            path += "_"
        self.raised.add_submodule(path, module)
        return path

    def _call(self, before: fx.Node, path: str, arguments: tuple[fx.Node, ...]) -> fx.Node:
        with self.graph.inserting_before(before):
            return self.graph.call_module(path, arguments)

    def _quantizer(self, value: ir.Value) -> DataQuantizer:
        """The quantizer of a value: what only moves data has that of its source."""
        spec, producer = known_static_spec(value), value.producer()
        if is_op(producer, *MOVES) and is_annotated(producer):
            source = producer.inputs[0]
            if source is not None and static_spec(source) == spec:
                return self._quantizer(source)
        if value not in self.data:
            self.data[value] = DataQuantizer(spec, self.phase, self.each, self.learn)
            self._named(str(value.name), self.data[value])
        return self.data[value]

    def _static(self, value: ir.Value) -> None:
        shared = spec_of(value) is not None
        quantizer = self._quantizer(value)
        path = next(p for p, m in self.raised.named_modules() if m is quantizer)
        x = self.held[str(value.name)]
        behind = x.next
        while behind.op in ("placeholder", "get_attr"):
            behind = behind.next
        new = self._call(behind, path, (x,))
        set_onnx_value(new, value)
        for node, index in static_uses(value):
            self.calls[node_name(node)].update_arg(index, new)
        if shared and value.is_graph_output():
            output = next(n for n in self.graph.nodes if n.op == "output")
            output.replace_input_with(x, new)

    def _dynamic(self, node: ir.Node, index: int, value: ir.Value, spec: QuantSpec) -> None:
        key, call = (value, spec), self.calls[node_name(node)]
        if key not in self.runtime:
            quantizer = TokenQuantizer(spec, token_grid(lowest_value(value)), self.phase)
            path = self._named(f"{value.name}_at_run_time", quantizer)
            self.runtime[key] = self._call(call, path, (self.held[str(value.name)],))
        call.update_arg(index, self.runtime[key])

    def _weight(
        self,
        site: Site,
        specs: Mapping[int, QuantSpec],
        shared: dict[tuple[ir.Value, QuantSpec], str],
    ) -> None:
        spec, data = specs[site.w_index], specs.get(site.x_index)
        static = data is not None and not data.dynamic
        of_data = self._quantizer(site.x) if static else None
        has_bias = static and constant_bias(site) is not None
        key = (site.weight, spec)
        if static or key not in shared:
            tensor = constant_tensor(site.weight)
            shape = tuple(tensor.shape.numpy())
            quantizer = WeightQuantizer(spec, shape, self.phase, self.learn, of_data, site.kn[1])
            path = self._named(f"{site.name}_weight", quantizer)
            if not static:
                shared[key] = path
        else:
            path = shared[key]
        call = self.calls[site.name]
        w = call.args[site.w_index]
        assert isinstance(w, fx.Node)
        if not has_bias:
            new = self._call(call, path, (w,))
            call.update_arg(site.w_index, new)
        else:
            assert site.bias_index is not None
            b = call.args[site.bias_index]
            assert isinstance(b, fx.Node)
            new = self._call(call, path, (w, b))
            with self.graph.inserting_before(call):
                parts = [self.graph.call_function(getitem, (new, i)) for i in (0, 1)]
            call.update_arg(site.w_index, parts[0])
            call.update_arg(site.bias_index, parts[1])
        set_onnx_node(new, site.name)
        release(site.weight)


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def values(model: ir.Model) -> Iterator[ir.Value]:
    """The inputs and computed values of the main graph."""
    yield from model.graph.inputs
    for node in model.graph:
        yield from node.outputs


def quantized_weights(
    raised: fx.GraphModule,
) -> Iterator[tuple[str, WeightQuantizer, Tensor, Tensor | None]]:
    """Each site's name and quantizer, its weight and its bias."""
    for node in raised.graph.nodes:
        if node.op != "call_module":
            continue
        quantizer = raised.get_submodule(node.target)
        if isinstance(quantizer, WeightQuantizer):
            held = [_held(raised, argument) for argument in node.args]
            yield str(onnx_node(node)), quantizer, held[0], held[1] if len(held) > 1 else None


def _held(module: nn.Module, node: fx.Node) -> Tensor:
    """What a node stands for that reads a weight, transposed or not."""
    if node.op == "get_attr":
        weight = attrgetter(str(node.target))(module)
        assert isinstance(weight, Tensor)
        return weight
    assert node.target is torch.t
    assert isinstance(node.args[0], fx.Node)
    return _held(module, node.args[0]).t()
