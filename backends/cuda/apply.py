"""The layers of a compiled model put into the torch module that it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qgraph.backends.cuda.functions import INT8_LINEAR, INT8_LINEAR_WITH_BIAS
from qgraph.errors import ModelError, QGraphError
from qgraph.graph.functions import is_call
from qgraph.graph.ops import NORMS
from qgraph.graph.provenance import Path, modules
from qgraph.graph.reading import (
    array,
    constant,
    constant_array,
    input_of,
    is_op,
    node_name,
    producer,
)
from qgraph.graph.sites import only_user
from qgraph.io.checkpoints.names import aligned, parts_of

try:
    import torch
except ImportError:
    raise ModelError('modules need torch: pip install "qgraph-compiler[torch]"') from None

from torch import Tensor, nn

from qgraph.backends.cuda.modules import QuantizedLinear, int8_linear, quantize_per_token

Nodes = Mapping[Path, list[ir.Node]]
"""Of a graph, by module."""
PACKED = "Conv1D"
"""The linear layer of GPT-2 in transformers, whose weight is (K, N)."""


@dataclass(frozen=True)
class Applied:
    """What :func:`apply` did.

    Attributes:
        layers: names of the layers that are quantized now.
        parameters: names of float parameters that the recipe had changed, and that were copied.
    """

    layers: tuple[str, ...]
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        return f"{len(self.layers)} layers quantized, {len(self.parameters)} parameters copied"


@dataclass(frozen=True)
class _Site:
    """A call in the lowered graph, with what belongs to the same layer.

    Attributes:
        call, quantizer: the product, and what makes its tokens.
        factor, mask: constants that the data is multiplied with before, see `QuantizedLinear`.
        columns, rows: of the outliers.
        bias: constant that is added behind those.
    """

    call: ir.Node
    quantizer: ir.Node
    factor: np.ndarray | None = None
    mask: np.ndarray | None = None
    columns: np.ndarray | None = None
    rows: np.ndarray | None = None
    bias: np.ndarray | None = None


@dataclass(frozen=True)
class _Change:
    """A parameter that gets another value."""

    name: str
    parameter: nn.Parameter
    value: np.ndarray


def apply(model: ir.Model, source: ir.Model, module: nn.Module) -> Applied:
    """Replace linear layers of `module` by those that `model` has for them.

    Args:
        model: lowered.
        source: the float model that it was compiled from.
        module: that `source` was traced or built from; it is changed in place, or not at all.

    Raises:
        QGraphError: it has been applied before, or is another model; the message names the layer.
    """
    if any(isinstance(part, QuantizedLinear) for part in module.modules()):
        raise QGraphError("the module has quantized layers already: give it as it was loaded")
    lowered, floats = modules(model), modules(source)
    calls = {path: found for path in lowered if (found := [*filter(_is_product, lowered[path])])}
    placed = {node for nodes in calls.values() for node in nodes}
    owners = [name for name, part in module.named_modules() if _has_parameters(part) and name]
    names = aligned(owners, lowered)
    replaced: dict[str, tuple[_Site, slice]] = {}
    for node in filter(_is_product, model.graph.all_nodes()):
        if node not in placed:
            raise _no_counterpart(node)
    for path, nodes in calls.items():
        parts = [names[part] for part in parts_of(path, names)]
        if not parts or not all(_is_linear(module.get_submodule(part)) for part in parts):
            raise _no_counterpart(nodes[0])
        site = _site(nodes[0])
        for name, rows in _shares(nodes, {part: module.get_submodule(part) for part in parts}):
            _check_bias(name, module.get_submodule(name), site)
            replaced[name] = site, rows
    changes = [
        change
        for path, name in names.items()
        if name not in replaced
        for change in _changes(name, module.get_submodule(name), lowered, floats, path)
    ]
    for name, (site, rows) in replaced.items():
        _swap(module, name, _layer(site, rows, module.get_submodule(name)))
    for change in changes:
        with torch.no_grad():
            change.parameter.copy_(torch.from_numpy(np.array(change.value)))
    return Applied(tuple(replaced), tuple(change.name for change in changes))


def _has_parameters(part: nn.Module) -> bool:
    return next(part.parameters(recurse=False), None) is not None


def _is_linear(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) or type(part).__name__ == PACKED


def _is_product(node: ir.Node) -> bool:
    return is_call(node, INT8_LINEAR) or is_call(node, INT8_LINEAR_WITH_BIAS)


def _no_counterpart(node: ir.Node) -> QGraphError:
    return QGraphError(
        f"the module has no linear layer for '{node_name(node)}': give the module that the "
        "compiled model was traced from"
    )


def _check_bias(name: str, part: nn.Module, site: _Site) -> None:
    """Refuse a layer that adds what the graph does not."""
    own, shifts = part.bias, site.bias is not None or is_call(site.call, INT8_LINEAR_WITH_BIAS)
    if isinstance(own, Tensor) and not shifts and own.any():
        raise QGraphError(
            f"layer '{name}' has a bias and '{node_name(site.call)}' has none: give the module "
            "that the compiled model was traced from"
        )


def _shares(nodes: list[ir.Node], parts: dict[str, nn.Module]) -> Iterator[tuple[str, slice]]:
    """Which channels of the product belong to each layer.

    Raises:
        QGraphError: sizes differ, or the layer computes different products.
    """
    (first, *others), leading = nodes, next(iter(parts))
    if any(node.inputs[2:] != first.inputs[2:] for node in others):
        raise QGraphError(f"'{leading}' serves products with different integers")
    weight, start = input_of(first, 2), 0
    channels, columns = (int(d) for d in weight.shape.numpy())  # type: ignore[union-attr]
    sizes = [_sizes(part) for part in parts.values()]
    if sum(n for n, _ in sizes) != channels or any(k != columns for _, k in sizes):
        raise QGraphError(
            f"layer '{leading}' has other sizes than '{node_name(first)}', {channels} x "
            f"{columns}: give the module that the compiled model was traced from"
        )
    for name, (n, _) in zip(parts, sizes, strict=True):
        yield name, slice(start, start + n)
        start += n


def _sizes(part: nn.Module) -> tuple[int, int]:
    """(N, K) of a linear layer."""
    weight = part.weight
    assert isinstance(weight, Tensor)
    n, k = weight.shape if isinstance(part, nn.Linear) else weight.shape[::-1]
    return n, k


# ------------------------------------------------------------------------------ reading sites


def _site(call: ir.Node) -> _Site:
    """The layer around a call: nodes that passes have inserted remember no module."""
    quantizer = producer(call, 0)
    assert quantizer is not None
    x, mask, factor = input_of(quantizer, 0), None, None
    columns = rows = bias = None
    end = call
    user = only_user(call.outputs[0])
    product = _other(user, call) if is_op(user, "Add") and _is_ours(user) else None
    if is_op(product, "MatMul") and user is not None:
        taken = producer(product, 0)
        assert taken is not None
        columns, rows, end = array(taken.inputs[1]), array(product.inputs[1]), user
        if (source := producer(quantizer, 0)) is not None and _is_factor(source):
            mask, x = _constant_of(source), _data_of(source)
    if (source := x.producer()) is not None and _is_factor(source):
        factor = _constant_of(source)
    if end is not call and (user := only_user(end.outputs[0])) is not None and is_op(user, "Add"):
        shifts = [array(v) for v in user.inputs if constant(v) is not None]
        n = input_of(call, 3).shape
        if shifts and n is not None and shifts[0] is not None and shifts[0].shape == (n[0],):
            bias = shifts[0]
    return _Site(call, quantizer, factor, mask, columns, rows, bias)


def _is_ours(node: ir.Node) -> bool:
    """Whether a pass has inserted it, and it was not traced."""
    return not any(key.startswith("pkg.torch") for key in node.metadata_props) and not (
        node.name or ""
    ).startswith("/")


def _is_factor(node: ir.Node) -> bool:
    vectors = [v for v in node.inputs if constant(v) is not None and len(v.shape or ()) == 1]  # type: ignore[union-attr]
    return is_op(node, "Mul") and _is_ours(node) and len(vectors) == 1


def _constant_of(node: ir.Node) -> np.ndarray:
    return next(constant_array(v) for v in node.inputs if constant(v) is not None)


def _data_of(node: ir.Node) -> ir.Value:
    return next(v for v in node.inputs if v is not None and constant(v) is None)


def _other(node: ir.Node, known: ir.Node) -> ir.Node | None:
    """The node behind the other input of a sum."""
    sources = (producer(node, 0), producer(node, 1))
    return next((source for source in sources if source is not known), None)


# ----------------------------------------------------------------------------- making layers


def _layer(site: _Site, rows: slice, old: nn.Module) -> QuantizedLinear:
    weight = old.weight
    assert isinstance(weight, Tensor)
    dtype = weight.dtype

    def tensor(data: np.ndarray | None, cut: slice | None = None) -> Tensor | None:
        if data is None:
            return None
        made = torch.from_numpy(np.array(data if cut is None else data[..., cut]))
        return made.to(dtype) if made.is_floating_point() else made

    product = int8_linear(site.call, rows)
    layer = QuantizedLinear(
        quantize_per_token(site.quantizer),
        product,
        tensor(site.factor),
        tensor(site.mask),
        tensor(site.columns),
        tensor(site.rows, rows),
        tensor(site.bias, rows),
    )
    return layer.to(weight.device, dtype).train(old.training)


def _swap(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, layer)


# ----------------------------------------------------------------------- parameters that changed


def _changes(
    name: str,
    part: nn.Module,
    lowered: Nodes,
    floats: Nodes,
    path: Path,
) -> Iterator[_Change]:
    """Parameters of a module that have another value in the compiled model.

    Raises:
        QGraphError: the module's own value is not that of the float model.
    """
    for role, parameter in part.named_parameters(recurse=False):
        before, after = (
            _constant(nodes.get(path, []), role, parameter) for nodes in (floats, lowered)
        )
        if before is None or after is None or np.array_equal(before, after):
            continue
        value = _changed(parameter.detach().float().cpu().numpy(), before, after)
        if value is None:
            raise QGraphError(
                f"'{name}.{role}' is not what the compiled model was made from: give that module"
            )
        yield _Change(f"{name}.{role}", parameter, value)


def _changed(own: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray | None:
    """What becomes of a parameter when the graph's constant for it changes.

    Graphs hold some matrices turned, and norms that multiply by one more than their weight as one.
    """
    for turned in (False, True):
        seen = own.T if turned else own
        for offset in (np.float32(0), np.float32(1)):
            if seen.size == before.size and np.allclose(
                seen.reshape(before.shape) + offset, before, rtol=2**-7, atol=1e-6
            ):
                new = (after - offset).reshape(seen.shape)
                return new.T if turned else new
    return None


def _constant(nodes: Sequence[ir.Node], role: str, parameter: nn.Parameter) -> np.ndarray | None:
    """The constant that plays this part in the nodes of a module, None if there is none."""
    for node in nodes:
        for index in _places(node, role):
            value = array(node.inputs[index]) if index < len(node.inputs) else None
            if value is None or value.size != parameter.numel():
                continue
            if value.ndim == parameter.ndim or 1 in value.shape:
                return np.asarray(value, np.float32)
    return None


def _places(node: ir.Node, role: str) -> tuple[int, ...]:
    """Where a node takes its scale or its shift."""
    if node.op_type in NORMS:
        inputs = NORMS[node.op_type]
        return inputs[:1] if role == "weight" else inputs[1:]
    if role == "weight":
        return {"Mul": (0, 1), "MatMul": (1,), "Gemm": (1,)}.get(node.op_type, ())
    return {"Add": (0, 1), "Gemm": (2,)}.get(node.op_type, ())
