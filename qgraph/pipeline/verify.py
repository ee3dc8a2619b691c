"""The verifier: small structural rules, and probe inputs that hold passes to their contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from qgraph.errors import ModelError
from qgraph.graph.annotation import Stage, annotations_at, stages_of
from qgraph.graph.reading import (
    MAIN_DOMAINS,
    MICROSOFT,
    array,
    attribute,
    dims,
    input_of,
    is_op,
    node_name,
    nodes,
    producer,
)
from qgraph.io.random_feed import first_feed
from qgraph.io.session import run
from qgraph.numerics.noise import relative_error

if TYPE_CHECKING:
    from qgraph.pipeline.context import Context


Rule = Callable[[ir.Model, ir.Node], str | None]
EQUIVALENT_TOLERANCE = 1e-4
"""Largest error of an equivalent pass, relative to the largest output."""
EXACT_TOLERANCE = 1e-3
"""Exact passes keep every integer of a site; float32 rounding of the sums around it can flip a step
of the next one, and in a deep model such flips grow, at most to the size of the quantization error
itself. So an exact pass may move outputs by this much, or by twice as much as quantization has."""


def _is_qdq(node: ir.Node | None, *op_types: str) -> bool:
    """QuantizeLinear or DequantizeLinear, of ONNX or onnxruntime (more types in old opsets)."""
    op_types = op_types or ("QuantizeLinear", "DequantizeLinear")
    return is_op(node, *op_types) or is_op(node, *op_types, domain=MICROSOFT)


def _scales_are_positive(model: ir.Model, node: ir.Node) -> str | None:
    if not _is_qdq(node):
        return None
    scale = array(node.inputs[1])
    if scale is None:
        return None
    if attribute(node, "block_size", 0):  # where the sign lets a block use its lowest integer
        scale = np.abs(scale)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        return "its scale is not finite and positive everywhere"
    return None


def _axis_fits_scale(model: ir.Model, node: ir.Node) -> str | None:
    if not _is_qdq(node):
        return None
    shape, scale = dims(node.inputs[0]), dims(node.inputs[1])
    if not shape or not scale or scale == [1]:
        return None
    axis, block = int(attribute(node, "axis", 1)), int(attribute(node, "block_size", 0))
    if not -len(shape) <= axis < len(shape):
        return f"axis {axis} is outside rank {len(shape)}"
    if block:
        return _blocks_fit(shape, scale, axis % len(shape), block)
    if len(scale) != 1:
        return f"a scale of rank {len(scale)} needs a block_size"
    if shape[axis] is not None and scale[0] is not None and shape[axis] != scale[0]:
        return f"{scale[0]} scales for {shape[axis]} channels on axis {axis}"
    return None


def _blocks_fit(
    shape: Sequence[int | None], scale: Sequence[int | None], axis: int, block: int
) -> str | None:
    if len(shape) != len(scale):
        return f"blocks need a scale of rank {len(shape)}, not {len(scale)}"
    for i, (size, count) in enumerate(zip(shape, scale, strict=True)):
        if size is None or count is None:
            continue
        needed = -(-size // block) if i == axis else size
        if count != needed:
            return f"{count} scales on axis {i}, blocks of {block} along axis {axis} need {needed}"
    return None


def _zero_point_fits(model: ir.Model, node: ir.Node) -> str | None:
    if not _is_qdq(node) or len(node.inputs) < 3:
        return None
    data, scale, zero = node.inputs[:3]
    if zero is None or scale is None or data is None:
        return None
    integers = data if node.op_type == "DequantizeLinear" else node.outputs[0]
    if zero.dtype is not None and integers.dtype is not None and zero.dtype != integers.dtype:
        return f"zero point is {zero.dtype.name}, the integers are {integers.dtype.name}"
    if zero.shape is None or scale.shape is None:
        return None
    if zero.shape.is_static() and scale.shape.is_static() and zero.shape != scale.shape:
        return f"zero point has shape {zero.shape}, scale {scale.shape}"
    return None


def _int32_has_no_zero_point(model: ir.Model, node: ir.Node) -> str | None:
    if not _is_qdq(node, "DequantizeLinear") or node.inputs[0] is None:
        return None
    if node.inputs[0].dtype != ir.DataType.INT32 or len(node.inputs) < 3:
        return None
    zero = array(node.inputs[2])
    return "an int32 bias must have zero point 0" if zero is not None and zero.any() else None


def _bias_scale_is_product(model: ir.Model, node: ir.Node) -> str | None:
    """onnxruntime's integer kernels ignore the bias scale and assume x·w (onnxruntime #24711)."""
    if not is_op(node, "Conv", "Gemm") or len(node.inputs) < 3:
        return None
    scales = []
    for dq in (producer(node, index) for index in range(3)):
        if dq is None or not _is_qdq(dq, "DequantizeLinear"):
            return None
        scale = array(dq.inputs[1])
        if scale is None or scale.ndim > 1:
            return None
        scales.append(scale.astype(np.float64).reshape(-1))
    x, w, bias = scales
    of_bias = producer(node, 2)
    if x.size != 1 or of_bias is None or input_of(of_bias, 0).dtype != ir.DataType.INT32:
        return None
    product = x * w
    if is_op(node, "Gemm"):
        product = product * attribute(node, "alpha", 1.0) / attribute(node, "beta", 1.0)
    if bias.size not in (1, product.size) and product.size != 1:
        return f"{bias.size} bias scales for {product.size} weight scales"
    if not np.allclose(bias, product, rtol=1e-5, atol=0):
        return "its bias scale is not input scale times weight scale"
    return None


def _domain_is_imported(model: ir.Model, node: ir.Node) -> str | None:
    imports = [model.opset_imports, *(f.opset_imports for f in model.functions.values())]
    names = MAIN_DOMAINS if node.domain in MAIN_DOMAINS else (node.domain,)
    if any(name in known for name in names for known in imports):
        return None
    return f"the model imports no version of its domain '{node.domain}'"


def _one_truth(model: ir.Model, node: ir.Node) -> str | None:
    """Once quantization is explicit, nothing else may speak of it: it would go stale unnoticed."""
    if Stage.COMMITTED not in stages_of(model):
        return None
    left = annotations_at(node)
    return f"'{left[0]}' is left in its meta though the model is committed" if left else None


RULES: tuple[Rule, ...] = (
    _domain_is_imported,
    _scales_are_positive,
    _axis_fits_scale,
    _zero_point_fits,
    _int32_has_no_zero_point,
    _bias_scale_is_product,
    _one_truth,
)


def check_structure(model: ir.Model) -> list[str]:
    """What the rules find wrong, one line each; empty for a sound model."""
    problems = list(undefined(model))
    for root in _roots(model):
        problems += _duplicates(root, set())
    for node in nodes(model):
        problems += [
            f"{_title(node)}: {problem}" for rule in RULES if (problem := rule(model, node))
        ]
    return problems


def undefined(model: ir.Model) -> Iterator[str]:
    """Values that are used where nothing in sight has computed them yet, one line each."""
    for root in _roots(model):
        yield from _undefined(root, [])


def _roots(model: ir.Model) -> list[ir.Graph | ir.Function]:
    return [model.graph, *model.functions.values()]


def _title(node: ir.Node) -> str:
    return f"{node.op_type} '{node_name(node)}'"


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for entry in node.attributes.values():
        if entry.type == ir.AttributeType.GRAPH and not entry.is_ref():
            yield entry.as_graph()
        elif entry.type == ir.AttributeType.GRAPHS and not entry.is_ref():
            yield from entry.as_graphs()


def _undefined(graph: ir.Graph | ir.Function, outer: list[set[ir.Value]]) -> Iterator[str]:
    seen = set(graph.inputs)
    if isinstance(graph, ir.Graph):
        seen |= set(graph.initializers.values())
    scopes = [*outer, seen]
    for node in graph:
        for value in node.inputs:
            if value is not None and not any(value in scope for scope in scopes):
                yield f"{_title(node)}: its input '{value.name}' {_why_undefined(value)}"
        for body in _subgraphs(node):
            yield from _undefined(body, scopes)
        seen |= set(node.outputs)
    for value in graph.outputs:
        if not any(value in scope for scope in scopes):
            yield f"output '{value.name}' {_why_undefined(value)}"


def _why_undefined(value: ir.Value) -> str:
    node = value.producer()
    if node is None:
        return "comes from nowhere"
    if node.graph is None:
        return f"comes from {_title(node)}, which was removed"
    return f"comes from {_title(node)}, which runs later or out of sight"


def _duplicates(graph: ir.Graph | ir.Function, outer: set[str]) -> Iterator[str]:
    """Names that two values in sight of each other share: ONNX knows values by name alone."""
    first: list[ir.Value] = list(graph.inputs)
    if isinstance(graph, ir.Graph):
        first += [v for v in graph.initializers.values() if not v.is_graph_input()]
    taken = set(outer)
    for value in first:
        if value.name in taken:
            yield f"value name '{value.name}' is taken"
        taken.add(value.name or "")
    for node in graph:
        for body in _subgraphs(node):
            yield from _duplicates(body, taken)
        for output in node.outputs:
            if output.name and output.name in taken:
                yield f"{_title(node)}: value name '{output.name}' is taken"
            taken.add(output.name or "")


class NumericProbe:
    """Runs one feed through the model before and after each pass, optimizations off.

    The feed is the first of the calibration data, or random where there is none. A model that
    onnxruntime could not run before the first pass (an operator it does not know) is not probed.
    """

    def __init__(self, model: ir.Model, context: Context) -> None:
        self._open_session = context.target.open_session
        self._feed: Mapping[str, np.ndarray] | None = None
        self._float: list[Any] = []
        self._last: list[Any] | None = None
        self._names = [str(value.name) for value in model.graph.outputs]
        try:
            self._feed = first_feed(model, context.calibration, context.seed)
            self._last = self._float = self._outputs(model)
        except ModelError as error:
            context.remark("note", "verify", "", "", f"numeric checks are off: {error}")

    def _outputs(self, model: ir.Model) -> list[Any]:
        assert self._feed is not None
        session = self._open_session(model, optimized=False)
        try:
            return run(session, self._feed)
        except Exception as error:
            raise ModelError(str(error).splitlines()[0]) from error

    def compare(self, model: ir.Model, contract: str) -> str | None:
        """Run `model` and compare with the run before. Returns what is wrong, or None."""
        if self._last is None:
            return None
        try:
            outputs = self._outputs(model)
        except ModelError as error:
            return f"the model no longer runs: {error}"
        before, self._last = self._last, outputs
        names, self._names = self._names, [str(value.name) for value in model.graph.outputs]
        if self._names != names:
            return f"outputs were {', '.join(names)} and are now {', '.join(self._names)}"
        for name, ideal, old, new in zip(names, self._float, before, outputs, strict=True):
            if not isinstance(old, np.ndarray):
                continue
            if old.dtype != new.dtype or old.shape != new.shape:
                was, now = (f"{a.dtype}{list(a.shape)}" for a in (old, new))
                return f"output '{name}' was {was} and is now {now}"
            if old.dtype.kind == "f" and np.isfinite(old).all() and not np.isfinite(new).all():
                return f"output '{name}' is no longer finite"
            tolerance = EQUIVALENT_TOLERANCE
            if contract == "exact":
                tolerance = max(EXACT_TOLERANCE, relative_error(ideal, old))
            if contract != "lossy" and (size := relative_error(old, new)) > tolerance:
                return f"output '{name}' moved by {size:.2g} of its largest value"
        return None
