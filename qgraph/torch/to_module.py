"""From the IR to a `torch.fx.GraphModule`: a module that runs, trains and prints as Python."""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass
from onnx_ir.tensor_adapters import TorchTensor

from qgraph.errors import ModelError
from qgraph.graph.names import numbered
from qgraph.graph.reading import constant, is_op, node_name

try:
    import torch
except ImportError:
    raise ModelError('torch.fx needs torch: pip install "qgraph-compiler[torch]"') from None

from torch import fx, nn

from qgraph.torch.coverage import operator_key, signature, uncovered
from qgraph.torch.ops import OPERATORS
from qgraph.torch.ops.control import branch, loop, scan
from qgraph.torch.ops.types import torch_dtype
from qgraph.torch.parameters import Parameters

NODE, VALUE, WEIGHTS = "qgraph.node", "qgraph.value", "qgraph.weights"
"""Keys in `meta` of fx nodes and modules, for the functions below alone."""

Layers = Mapping[tuple[str, str], Callable[[ir.Node], nn.Module]]
"""Operators (domain, name) that become modules: what makes one of a node. It holds the constants
among the node's inputs, and takes the others."""


def raise_model(model: ir.Model, layers: Layers | None = None) -> fx.GraphModule:
    """The model as a torch module.

    `forward` takes the model's inputs in their order, tensors of the types that the model states;
    inputs that have an initializer come last and may be left out.  It returns a tensor, or a tuple
    if the model has several outputs.  Autograd follows every operator on floats.

    Initializers (and Constant nodes) become parameters if they are floats that an optimizer may
    change, copied so that the IR keeps its own; single numbers, and what merely steers an operator
    (statistics, scales of quantization, limits), become buffers, as do integers.  They are called
    as the initializer is, which for traced models is their name in the original module; weights
    that the exporter turned around and gave a number get their name and shape back, so that
    `state_dict` fits the original module where the exporter has fused nothing.

    Shapes are computed as the model computes them, with integer tensors.  Control flow becomes
    calls of functions that take submodules.  Functions of the model are raised by their bodies.
    Integers of less than a byte are held in int8 and uint8.

    Args:
        model: of opset 11 or newer, left as it is.
        layers: operators that become modules, functions of the model among them.

    Raises:
        ModelError: torch has no counterpart for some operators; the message names all of them.
    """
    layers = layers or {}
    flat = _inlined(model, layers)
    if missing := uncovered(flat, layers):
        raise ModelError(
            f"torch cannot run {', '.join(missing)}: take these operators out of the model"
        )
    raised = _Translation(flat, flat.graph, None, layers).module()
    assert isinstance(raised, fx.GraphModule)
    return raised


def _inlined(model: ir.Model, layers: Layers) -> ir.Model:
    """A copy without calls of functions; weights are shared with the original."""
    copy, known = model.clone(), OPERATORS.keys() | layers.keys()
    if copy.functions:
        InlinePass(lambda function: (function.domain, function.name) not in known)(copy)
    return copy


def onnx_node(node: fx.Node) -> str | None:
    """The name of the ONNX node that an fx node stands for; None if it stands for none."""
    name: str | None = node.meta.get(NODE)
    return name


def set_onnx_node(node: fx.Node, name: str) -> None:
    """Make an fx node stand for the ONNX node of this name."""
    node.meta[NODE] = name


def onnx_value(node: fx.Node) -> str | None:
    """The name of the ONNX value that an fx node holds; None if it holds none with a name."""
    name: str | None = node.meta.get(VALUE)
    return name


def set_onnx_value(node: fx.Node, value: ir.Value) -> None:
    """Make an fx node hold this ONNX value."""
    node.meta[VALUE] = value.name


def weight_names(module: fx.GraphModule) -> dict[str, tuple[str, bool]]:
    """For each parameter and buffer of a raised module the name of the constant that it came from,
    and whether it is held transposed."""
    names: dict[str, tuple[str, bool]] = module.meta[WEIGHTS]
    return names


def write_back(module: fx.GraphModule, model: ir.Model) -> None:
    """Give `model` the values that the parameters of `module`, raised from it, have now.

    Raises:
        ModelError: `model` has no such constant.
    """
    constants = {str(v.name): v for graph in model.graphs() for v in _constants(graph)}
    for part in module.modules():
        weights = weight_names(part) if isinstance(part, fx.GraphModule) else {}
        for path, (name, turned) in weights.items():
            data = operator.attrgetter(path)(part)
            if not isinstance(data, nn.Parameter):
                continue
            if name not in constants:
                raise ModelError(f"the model has no weight '{name}': give the one that was raised")
            trained = TorchTensor((data.t() if turned else data).detach().clone().contiguous())
            _replace(constants[name], ir.tensor(trained.numpy(), name=name))


def _constants(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.initializers.values()
    yield from (node.outputs[0] for node in graph if is_op(node, "Constant"))


def _replace(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    producer = value.producer()
    if producer is not None:
        producer.attributes.clear()
        producer.attributes["value"] = ir.AttrTensor("value", tensor)
    value.const_value = tensor


class _Translation:
    """One graph, or one body of a control-flow operator, on its way to a module."""

    def __init__(
        self, model: ir.Model, source: ir.Graph, outer: _Translation | None, layers: Layers
    ) -> None:
        self.model, self.source, self.outer, self.layers = model, source, outer, layers
        self.graph, self.parameters = fx.Graph(), Parameters()
        self.nodes: dict[ir.Value, fx.Node] = {}
        self.captured: list[ir.Value] = []
        self.arguments: set[str] = set()

    def module(self) -> fx.GraphModule:
        """Raise everything; afterwards `captured` lists what comes from outside."""
        self._inputs()
        for node in self.source:
            self._node(node)
        results = tuple(self.value(output) for output in self.source.outputs)
        alone = self.outer is None and len(results) == 1
        self.graph.output(results[0] if alone else results)
        name = "Raised" if self.outer is None else "Body"
        raised = fx.GraphModule(self.parameters.root, self.graph, name)
        raised.meta[WEIGHTS] = self.parameters.origins
        return raised

    def value(self, value: ir.Value) -> fx.Node:
        """The fx node that holds `value`: computed here, a constant, or captured from outside."""
        if value not in self.nodes:
            self.nodes[value] = self._constant_or_captured(value)
        return self.nodes[value]

    def _constant_or_captured(self, value: ir.Value) -> fx.Node:
        tensor = constant(value)
        own = self.outer is None or _home(value) is self.source
        if tensor is not None and own:
            return self._weight(value, tensor)
        assert self.outer is not None, f"'{value.name}' comes from nowhere"
        self.captured.append(value)
        return self._placeholder(value)

    def _inputs(self) -> None:
        initialised = []
        for value in self.source.inputs:
            if value.is_initializer():
                initialised.append(value)
            else:
                self.nodes[value] = self._placeholder(value)
        for value in initialised:
            given = self.graph.placeholder(self._name(value), default_value=None)
            assert value.const_value is not None
            default = self._weight(value, value.const_value)
            self.nodes[value] = self.graph.call_function(given_or, (given, default))

    def _placeholder(self, value: ir.Value) -> fx.Node:
        """An argument of `forward`, behind those there are."""
        first = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
        if first is None:
            node = self.graph.placeholder(self._name(value))
        else:
            with self.graph.inserting_before(first):
                node = self.graph.placeholder(self._name(value))
        set_onnx_value(node, value)
        return node

    def _name(self, value: ir.Value) -> str:
        """A name for an argument of `forward`."""
        name = re.sub(r"\W", "_", value.name or "value")
        if name[:1].isdigit() or keyword.iskeyword(name) or name in ("self", "torch"):
            name = f"_{name}"
        return numbered(name, self.arguments)

    def _weight(self, value: ir.Value, tensor: ir.TensorProtocol) -> fx.Node:
        path = self.parameters.add(value, tensor)
        node = self.graph.get_attr(path)
        _, turned = self.parameters.origins[path]
        if turned:
            node = self.graph.call_function(torch.t, (node,))
        set_onnx_value(node, value)
        return node

    # --------------------------------------------------------------------------------- nodes

    def _node(self, node: ir.Node) -> None:
        if is_op(node, "Constant"):
            return  # translated where it is used
        if is_op(node, "Identity"):
            assert node.inputs[0] is not None
            self.nodes[node.outputs[0]] = self.value(node.inputs[0])
            return
        if is_op(node, "If", "Loop", "Scan"):
            call, several = self._control(node), True
        elif operator_key(node) in self.layers:
            call, several = self._layer(node), len(node.outputs) > 1
        else:
            call, several = self._call(node)
        set_onnx_node(call, node_name(node))
        # torch traces a pickled module anew, which must stay outside of our functions; of its own
        # functions, it finds none by the name that it would look for.
        call.meta["is_wrapped"] = str(getattr(call.target, "__module__", "")).startswith("qgraph")
        if not several:
            self._hold(node.outputs[0], call)
            return
        for index, output in enumerate(node.outputs):
            if output.uses() or output.is_graph_output():
                item = self.graph.create_node(
                    "call_function", operator.getitem, (call, index), name=output.name
                )
                self._hold(output, item)

    def _hold(self, value: ir.Value, node: fx.Node) -> None:
        set_onnx_value(node, value)
        self.nodes[value] = node

    def _call(self, node: ir.Node) -> tuple[fx.Node, bool]:
        function = OPERATORS[operator_key(node)]
        known = signature(function)
        steering = ["Ints" in str(parameter.annotation) for parameter in known.values()]
        arguments: list[Any] = []
        for index, value in enumerate(node.inputs):
            steers = index < len(steering) and steering[index]
            arguments.append(self._argument(value, steers))
        while arguments and arguments[-1] is None:
            arguments.pop()
        settings = {name: self._attribute(a) for name, a in node.attributes.items()}
        several = "outputs" in known
        if several:
            settings["outputs"] = len(node.outputs)
        if "opset" in known:
            settings["opset"] = self.model.opset_imports.get(node.domain, 1)
        if "types" in known:
            settings["types"] = [0 if v is None else int(v.dtype or 0) for v in node.inputs]
        return self._called(node, function, tuple(arguments), settings), several

    def _layer(self, node: ir.Node) -> fx.Node:
        path = self.parameters.add_layer(node, self.layers[operator_key(node)](node))
        given = [v for v in node.inputs if v is not None and constant(v) is None]
        return self.graph.call_module(path, tuple(map(self.value, given)))

    def _argument(self, value: ir.Value | None, steers: bool) -> Any:
        if value is None:
            return None
        tensor = constant(value) if steers else None
        if tensor is not None and np.ndim(tensor) <= 1 and tensor.dtype.is_integer():
            return np.atleast_1d(tensor.numpy()).astype(np.int64).tolist()
        return self.value(value)

    def _attribute(self, attribute: ir.Attr) -> Any:
        if attribute.type == ir.AttributeType.TENSOR:
            return self.graph.get_attr(self.parameters.add_attribute(attribute))
        if isinstance(attribute.value, Sequence) and not isinstance(attribute.value, str):
            return list(attribute.value)
        return attribute.value

    # -------------------------------------------------------------------------- control flow

    def _control(self, node: ir.Node) -> fx.Node:
        inputs = [None if v is None else self.value(v) for v in node.inputs]
        if node.op_type == "If":
            then, of_then = self._body(node, "then_branch")
            other, of_other = self._body(node, "else_branch")
            arguments: tuple[Any, ...] = (inputs[0], then, of_then, other, of_other)
            return self._called(node, branch, arguments, {})
        body, captured = self._body(node, "body")
        graph = node.attributes["body"].as_graph()
        if node.op_type == "Loop":
            kinds = [_kind(output) for output in graph.outputs[len(inputs) - 1 :]]
            return self._called(
                node, loop, (*inputs[:2], inputs[2:], body, captured), {"scanned": kinds}
            )
        count = node.attributes["num_scan_inputs"].as_int()
        state = len(inputs) - count
        slices = len(graph.outputs) - state
        settings = {
            "input_axes": _numbers(node, "scan_input_axes", count),
            "input_directions": _numbers(node, "scan_input_directions", count),
            "output_axes": _numbers(node, "scan_output_axes", slices),
            "output_directions": _numbers(node, "scan_output_directions", slices),
        }
        return self._called(node, scan, (inputs[:state], inputs[state:], body, captured), settings)

    def _called(
        self, node: ir.Node, function: Any, arguments: tuple[Any, ...], settings: dict[str, Any]
    ) -> fx.Node:
        return self.graph.create_node(
            "call_function", function, arguments, settings, name=node_name(node)
        )

    def _body(self, node: ir.Node, name: str) -> tuple[fx.Node, list[fx.Node]]:
        """A body as a submodule, and what it captures, as nodes here."""
        inner = _Translation(self.model, node.attributes[name].as_graph(), self, self.layers)
        module = inner.module()
        path = self.parameters.add_body(name, module)
        return self.graph.get_attr(path), [self.value(value) for value in inner.captured]


def _numbers(node: ir.Node, name: str, count: int) -> list[int]:
    numbers = node.attributes.get(name)
    return [0] * count if numbers is None else list(numbers.as_ints())


def _kind(value: ir.Value) -> tuple[torch.dtype, list[int]] | None:
    if value.dtype is None or value.shape is None:
        return None
    return torch_dtype(value.dtype), [d if isinstance(d, int) else 0 for d in value.shape]


def _home(value: ir.Value) -> ir.Graph | ir.Function | None:
    """The graph that defines a constant."""
    producer = value.producer()
    return value.graph if producer is None else producer.graph


def given_or(given: torch.Tensor | None, default: torch.Tensor) -> torch.Tensor:
    """An input that has an initializer."""
    return default if given is None else given
