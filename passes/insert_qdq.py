"""Commit the annotations: make every quantization explicit in the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qgraph.analysis import Site, site_of
from qgraph.annotation import IN, MOVES, SPEC, STATS, annotated, static_use
from qgraph.context import Context
from qgraph.errors import PipelineError
from qgraph.functions import DEQUANTIZE_PER_TOKEN, QUANTIZE_PER_TOKEN, declare
from qgraph.graph import (
    add_constant,
    array,
    constant,
    insert,
    is_op,
    redirect,
    release,
)
from qgraph.numerics import quantize_bias
from qgraph.pass_manager import Contract, Pass, Stage
from qgraph.spec import PerToken, QuantSpec
from qgraph.weights import NUMPY, Quantized, activation_scale, quantize_site


@dataclass(frozen=True)
class InsertQDQ(Pass):
    """Turn annotations into QuantizeLinear / DequantizeLinear pairs and integer weights.

    ::

        x ─────── Conv ── y      x ── Q ── DQ ─────── Conv ── Q ── DQ ── y
        W:f32 ──┘                W:int8 ───── DQ ──┘ │
        b:f32 ──┘                b:int32 ──── DQ ────┘     bias scale = x scale · W scale

    Activations with scales found at run time get DynamicQuantizeLinear (one scale) or the function
    `qgraph::QuantizePerToken`. Biases of static Conv and Gemm become int32 with scale x·w and zero
    point 0; where a tiny weight scale would overflow them, that channel's weight scale is raised.
    On targets whose u8·s8 products saturate in pairs, channels with a pair of weights that can
    overflow int16 for the activations that can occur, and only those, are requantized so that it
    cannot, at the least squared error.
    Specs and statistics are deleted: from here on, the graph is the only truth.

    Source: Jacob et al. 2018, eq. 1-7 (affine quantization, int32 bias).
    """

    name: ClassVar[str] = "insert-qdq"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})
    provides: ClassVar[frozenset[Stage]] = frozenset({Stage.COMMITTED})
    invalidates: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED, Stage.CALIBRATED})

    def run(self, model: ir.Model, context: Context) -> bool:
        work = _Commit(model, context)
        wanted = list(annotated(model))
        for node, _ in wanted:
            _to_float32(model, node)
        for node, specs in context.progress(wanted, "quantizing weights", len(wanted)):  # type: ignore[misc, attr-defined]
            if (site := site_of(node)) is not None:
                work.weight(site, specs)
        # All scales first: what moves data looks its own up at its source, before that is rewritten.
        values = [(v, work.scale_of(v)) for v in _static_values(model)]
        for value, (scale, zero) in values:
            work.activation(value, scale, zero)
        for node, specs in wanted:
            for index, spec in specs.items():
                if spec.observer == "dynamic":
                    work.dynamic(node, index, spec)
        for value in _all_values(model):
            value.meta.pop(SPEC, None)
            value.meta.pop(STATS, None)
        for node, _ in wanted:
            node.meta.pop(IN, None)
        return bool(wanted)


@dataclass
class _Commit:
    """One run of the pass: what has been quantized already, so that shared values are done once."""

    model: ir.Model
    context: Context
    weights: dict[tuple[int, QuantSpec, int], ir.Value] = field(default_factory=dict)
    runtime: dict[tuple[int, QuantSpec, int], ir.Value] = field(default_factory=dict)

    def weight(self, site: Site, specs: dict[int, QuantSpec]) -> None:
        """Replace the site's weight (and the bias of static Conv and Gemm) by integers behind DQ."""
        if site.w_index not in specs or constant(site.weight) is None:
            return
        spec, data = specs.pop(site.w_index), specs.get(site.x_index)
        static = data if data is not None and data.observer != "dynamic" else None
        key = (id(site.weight), spec, id(site.node) if static else 0)
        if key not in self.weights:
            pairs = self.context.target.saturates and data is not None
            self.weights[key] = self._dequantized(site, quantize_site(site, spec, static, pairs))
            release(site.weight)
        new = self.weights[key]
        site.node.replace_input_with(site.w_index, new)
        if static is not None and site.kind in ("conv", "gemm"):
            self._bias(site, self._scale(site.x, static)[0], array(new.producer().inputs[1]))  # type: ignore[union-attr]

    def _dequantized(self, site: Site, weight: Quantized) -> ir.Value:
        base = site.weight.name or "weight"
        inputs = [
            add_constant(self.model, f"{base}_q", weight.q),
            add_constant(self.model, f"{base}_scale", weight.scale),
            add_constant(self.model, f"{base}_zero", weight.zero.astype(weight.q.dtype)),
        ]
        attributes = {} if weight.axis is None else {"axis": weight.axis}
        name = f"{base}_dq"
        node = insert(
            self.model, site.node, "DequantizeLinear", inputs, base=name, attributes=attributes
        )
        if weight.repaired:
            why = "channels requantized in which u8·s8 products could overflow int16"
            self.context.remark(
                "applied",
                InsertQDQ.name,
                site.name,
                site.node.op_type,
                why,
                channels=weight.repaired,
            )
        return _typed(node, site.weight)

    def _bias(self, site: Site, x_scale: np.ndarray, w_scale: np.ndarray | None) -> None:
        bias = array(site.bias) if site.bias is not None else None
        if bias is None or bias.ndim != 1 or w_scale is None:
            return
        assert site.bias is not None
        assert site.bias_index is not None
        q, scale = quantize_bias(bias.astype(np.float32), x_scale, w_scale)
        base = site.bias.name or "bias"
        inputs = [
            add_constant(self.model, f"{base}_q", q),
            add_constant(self.model, f"{base}_scale", np.ascontiguousarray(scale)),
            add_constant(self.model, f"{base}_zero", np.zeros(scale.shape, np.int32)),
        ]
        axis = {"axis": 0}
        node = insert(
            self.model, site.node, "DequantizeLinear", inputs, base=f"{base}_dq", attributes=axis
        )
        site.node.replace_input_with(site.bias_index, _typed(node, site.bias))

    def _scale(self, value: ir.Value, spec: QuantSpec) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point of a value with calibrated statistics."""
        producer = value.producer()
        if is_op(producer, *MOVES) and producer is not None and IN in producer.meta:
            # What only moves data keeps its scale, so that it can move the integers instead.
            source = producer.inputs[0]
            assert source is not None
            return self._scale(source, spec)
        found = activation_scale(value, spec)
        if found is None:
            raise PipelineError(
                f"'{value.name}' is to be quantized statically but was not calibrated: "
                "put insert-observers,calibrate before insert-qdq"
            )
        return found

    def scale_of(self, value: ir.Value) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero point of a value with a static spec, its own or a user's."""
        spec = value.meta.get(SPEC) or static_use(value)
        assert spec is not None
        return self._scale(value, spec)

    def activation(self, value: ir.Value, scale: np.ndarray, zero: np.ndarray) -> None:
        """Q -> DQ behind `value`, for all users if the value itself is annotated, else for those that are."""
        spec = value.meta.get(SPEC)
        shared = spec is not None
        spec = spec or static_use(value)
        assert spec is not None
        users = [u for u in value.uses() if shared or u.idx in u.node.meta.get(IN, {})]
        users = [u for u in users if u.node.meta.get(IN, {}).get(u.idx, spec).observer != "dynamic"]
        anchor = value.producer()
        first = self.model.graph[0]
        inputs = [
            value,
            add_constant(self.model, f"{value.name}_scale", scale),
            add_constant(self.model, f"{value.name}_zero", zero.astype(NUMPY[spec.dtype])),
        ]
        q = insert(
            self.model, anchor or first, "QuantizeLinear", inputs,
            base=f"{value.name}_q", after=anchor is not None,
        )  # fmt: skip
        q.outputs[0].type, q.outputs[0].shape = ir.TensorType(spec.dtype), value.shape
        dq = insert(
            self.model, q, "DequantizeLinear", [q.outputs[0], *inputs[1:]],
            base=f"{value.name}_dq", after=True,
        )  # fmt: skip
        new = _typed(dq, value)
        for use in users:
            use.node.replace_input_with(use.idx, new)
        if shared and value.is_graph_output():
            redirect(value, new, keep=[q, *(u.node for u in value.uses())])

    def dynamic(self, node: ir.Node, index: int, spec: QuantSpec) -> None:
        """Scales at run time for input `index`, computed once for all users in the same graph."""
        value = node.inputs[index]
        assert value is not None
        key = (id(value), spec, id(node.graph))
        if key not in self.runtime:
            self.runtime[key] = self._at_run_time(node, value, spec)
        node.replace_input_with(index, self.runtime[key])

    def _at_run_time(self, node: ir.Node, value: ir.Value, spec: QuantSpec) -> ir.Value:
        anchor = _first_user(node, value)
        if not isinstance(spec.granularity, PerToken):
            q = insert(
                self.model,
                anchor,
                "DynamicQuantizeLinear",
                [value],
                base=f"{value.name}_q",
                outputs=3,
            )
            dq = insert(self.model, anchor, "DequantizeLinear", q.outputs, base=f"{value.name}_dq")
            return _typed(dq, value)
        declare(self.model, QUANTIZE_PER_TOKEN)
        declare(self.model, DEQUANTIZE_PER_TOKEN)
        q = insert(
            self.model, anchor, QUANTIZE_PER_TOKEN, [value],
            base=f"{value.name}_q", domain="qgraph", outputs=2,
        )  # fmt: skip
        q.outputs[0].type, q.outputs[0].shape = ir.TensorType(spec.dtype), value.shape
        q.outputs[1].type = ir.TensorType(ir.DataType.FLOAT)
        dq = insert(
            self.model, anchor, DEQUANTIZE_PER_TOKEN, q.outputs,
            base=f"{value.name}_dq", domain="qgraph",
        )  # fmt: skip
        return _typed(dq, value)


def _to_float32(model: ir.Model, node: ir.Node) -> None:
    """Integer kernels speak float32: surround a node of another float type with casts."""
    kinds = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    dtype = next((v.dtype for v in node.inputs if v is not None and v.dtype in kinds), None)
    if dtype is None:
        return
    for index, value in enumerate(node.inputs):
        if value is None or value.dtype != dtype:
            continue
        tensor = constant(value)
        if tensor is not None:
            if index not in node.meta[IN]:
                wide = tensor.numpy().astype(np.float32)
                node.replace_input_with(index, add_constant(model, f"{value.name}_f32", wide))
            continue
        cast = insert(
            model,
            node,
            "Cast",
            [value],
            base=f"{value.name}_f32",
            attributes={"to": int(ir.DataType.FLOAT)},
        )
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), value.shape
        if STATS in value.meta:
            cast.outputs[0].meta[STATS] = value.meta[STATS]
        node.replace_input_with(index, cast.outputs[0])
    output = node.outputs[0]
    back = insert(
        model,
        node,
        "Cast",
        [output],
        base=f"{output.name}_cast",
        attributes={"to": int(dtype)},
        after=True,
    )
    back.outputs[0].shape = output.shape
    redirect(output, back.outputs[0], keep=[back])
    output.type, back.outputs[0].type = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(dtype)


def _first_user(node: ir.Node, value: ir.Value) -> ir.Node:
    """The first node of the same graph that uses `value`: what is computed before it serves all."""
    graph = node.graph
    assert graph is not None
    users = {use.node for use in value.uses()}
    return next((n for n in graph if n in users), node)


def _typed(node: ir.Node, like: ir.Value) -> ir.Value:
    """The node's output as float32 with the shape of `like`."""
    output = node.outputs[0]
    output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), like.shape
    return output


def _all_values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs


def _static_values(model: ir.Model) -> Iterator[ir.Value]:
    """Computed values of the main graph with a static spec, their own or a user's."""
    for value in list(_all_values(model)):
        if value.graph is model.graph and (SPEC in value.meta or static_use(value) is not None):
            yield value
