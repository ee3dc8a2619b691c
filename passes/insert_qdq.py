"""Commit the annotations: make every quantization explicit in the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qgraph.graph.annotation import (
    Stage,
    annotated,
    data_spec,
    forget,
    forget_use_spec,
    known_static_spec,
    set_stats,
    spec_of,
    static_spec,
    static_uses,
    stats_of,
    use_spec,
    weight_spec,
)
from qgraph.graph.builder import Builder
from qgraph.graph.editing import add_constant, insert, redirect, remove_dead, shared_constant, typed
from qgraph.graph.functions import round_in_blocks, round_per_token
from qgraph.graph.ops import MOVES, dilated_average, lowest_value
from qgraph.graph.reading import array, constant, input_of, is_op, producer, release
from qgraph.graph.sites import Site, only_user, output_value, site_of
from qgraph.numerics.reference import quantize_bias
from qgraph.numerics.spec import FLOAT8, NUMPY, PerBlock, PerToken, QuantSpec
from qgraph.numerics.tokens import token_grid
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass
from qgraph.weights import formats
from qgraph.weights.formats import Format, Reader
from qgraph.weights.site_weight import activation_scale, constant_bias, quantize_site


@dataclass(frozen=True)
class InsertQDQ(Pass):
    """Turn annotations into QuantizeLinear / DequantizeLinear pairs and integer weights.

    ::

        x ─────── Conv ── y      x ── Q ── DQ ─────── Conv ── Q ── DQ ── y
        W:f32 ──┘                W:int8 ───── DQ ──┘ │
        b:f32 ──┘                b:int32 ──── DQ ────┘     bias scale = x scale · W scale

    Activations with scales found at run time get DynamicQuantizeLinear (one scale) or the function
    `qgraph::QuantizePerToken`, whose zero point leaves no levels unused where an activation
    function bounds its output from below. Biases of static Conv and Gemm become int32 with scale
    x·w and zero point 0; where a tiny weight scale would overflow them, that channel's weight scale
    is raised. On targets whose u8·s8 products saturate in pairs, channels with a pair of weights
    that can overflow int16 for the activations that can occur, and only those, are requantized so
    that it cannot, at the least squared error.
    Specs and statistics are deleted: from here on, the graph is the only truth.

    Weights in blocks are behind a DequantizeLinear with `block_size`, each block with a scale, and
    a zero point if any is not 0.

    Weights whose codes are places in a table, and float8, are computed from what is stored by other
    nodes: each format in :mod:`qgraph.weights.formats` writes its own.

    Source: Jacob et al. 2018, eq. 1-7 (affine quantization, int32 bias); Yao et al. 2022,
    "ZeroQuant", section 4.1 (group-wise weights).
    """

    name: ClassVar[str] = "insert-qdq"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})
    provides: ClassVar[frozenset[Stage]] = frozenset({Stage.COMMITTED})
    invalidates: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED, Stage.CALIBRATED})

    def run(self, model: ir.Model, context: Context) -> bool:
        targeted = list(annotated(model))
        halves = _HalfFloats(model)
        for node, _ in targeted:
            halves.widen(node)
        sites = [s for node, _ in targeted if (s := site_of(node)) is not None]
        # A table takes the weight of a product that shares it as that one needs it.
        sites.sort(key=lambda site: site.kind == "gather")
        weights, data = _Weights(self, model, context), _Data(model)
        for site in context.progress(sites, "quantizing weights", len(sites)):
            weights.quantize(site)
        # All scales first: what moves data finds its own at its source, before that is rewritten.
        values = [(v, activation_scale(v)) for v in _static_values(model)]
        for value, (scale, zero) in values:
            data.quantize(value, scale, zero)
        for node, specs in targeted:
            for index, spec in specs.items():
                if spec.dynamic:
                    data.quantize_at_run_time(node, index, spec)
        forget(model)
        remove_dead(model)  # the float weights
        return bool(targeted)


@dataclass
class _HalfFloats:
    """Casts around nodes of half floats, each value cast once for all nodes of its graph."""

    model: ir.Model
    casts: dict[tuple[int, int], ir.Value] = field(default_factory=dict)

    def widen(self, node: ir.Node) -> None:
        """Integer kernels speak float32: surround a node of half floats, and the clamp behind it
        that its integers absorb, with casts."""
        if not any(v is not None and v.dtype in _HALF for v in node.inputs):
            return
        last = output_value(node)
        dtype, chain = last.dtype, [node]
        while chain[-1].outputs[0] is not last:
            clamp = only_user(chain[-1].outputs[0])
            assert clamp is not None
            chain.append(clamp)
        for link in chain:
            for index, value in enumerate(link.inputs):
                if value is None or value.dtype not in _HALF:
                    continue
                if constant(value) is None or use_spec(link, index) is None:
                    link.replace_input_with(index, self._widened(link, value))
            link.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        name = f"{last.name}_cast"
        to = {"to": int(dtype or ir.DataType.FLOAT16)}
        back = insert(self.model, chain[-1], "Cast", [last], base=name, attributes=to, after=True)
        narrow = typed(back, dtype or ir.DataType.FLOAT16, last.shape)
        redirect(last, narrow, keep=[back])

    def _widened(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """`value` as float32 for `node`; what was float32 before is taken from there."""
        tensor, producer = constant(value), value.producer()
        if tensor is not None:
            wide = tensor.numpy().astype(np.float32)
            return add_constant(self.model, f"{value.name}_f32", wide)
        if is_op(producer, "Cast"):
            source = producer.inputs[0]
            if source is not None and source.dtype == ir.DataType.FLOAT:
                return source
        key = (id(value), id(node.graph))
        if key not in self.casts:
            to = {"to": int(ir.DataType.FLOAT)}
            cast = insert(
                self.model, node, "Cast", [value], base=f"{value.name}_f32", attributes=to
            )
            self.casts[key] = typed(cast, ir.DataType.FLOAT, value.shape)
            if (stats := stats_of(value)) is not None:
                set_stats(self.casts[key], stats)
        return self.casts[key]


@dataclass
class _Weights:
    """Weights that were written, each once for all nodes that can share it."""

    asking: InsertQDQ
    model: ir.Model
    context: Context
    written: dict[tuple[int, QuantSpec, int], tuple[Reader, np.ndarray]] = field(
        default_factory=dict
    )

    def quantize(self, site: Site) -> None:
        """Put the site's weight, and the bias of static Conv and Gemm, in integers."""
        spec, data = weight_spec(site), data_spec(site)
        if spec is None or constant(site.weight) is None:
            return
        forget_use_spec(site.node, site.w_index)
        form, static = formats.of(spec), data is not None and not data.dynamic
        # Levels that are not even become integers beside integers.
        key = (id(site.weight), spec, 0 if form.even else int(data is None))
        if key not in self.written:
            self.written[key] = self._write(site, spec, form)
        reader, scale = self.written[key]
        bias = constant_bias(site) if static and form is formats.LINEAR else None
        if bias is not None:
            self._quantize_bias(site, bias, scale)
        site.node.replace_input_with(site.w_index, reader(site.node))
        if (note := form.note(data)) is not None:
            self.asking.remark(self.context, site, "note", note)

    def _write(self, site: Site, spec: QuantSpec, form: Format) -> tuple[Reader, np.ndarray]:
        weight = quantize_site(site, spec, self.context.target.saturates)
        release(site.weight)
        if weight.repaired:
            why = "channels requantized in which u8·s8 products could overflow int16"
            self.asking.remark(self.context, site, "applied", why, channels=weight.repaired)
        return form.write(self.model, str(site.weight.name), weight, spec), weight.scale

    def _quantize_bias(self, site: Site, bias: np.ndarray, w_scale: np.ndarray) -> None:
        assert site.bias is not None
        assert site.bias_index is not None
        q, scale = quantize_bias(bias, activation_scale(site.x)[0], w_scale)
        base = site.bias.name
        inputs = [
            add_constant(self.model, f"{base}_q", q),
            add_constant(self.model, f"{base}_scale", np.ascontiguousarray(scale)),
            add_constant(self.model, f"{base}_zero", np.zeros(scale.shape, np.int32)),
        ]
        dq = insert(
            self.model, site.node, "DequantizeLinear", inputs,
            base=f"{base}_dq", attributes={"axis": 0},
        )  # fmt: skip
        site.node.replace_input_with(site.bias_index, typed(dq, ir.DataType.FLOAT, inputs[0].shape))


@dataclass
class _Data:
    """Activations; scales at run time are computed once for all users in the same graph."""

    model: ir.Model
    runtime: dict[tuple[int, QuantSpec, int], ir.Value] = field(default_factory=dict)

    def quantize(self, value: ir.Value, scale: np.ndarray, zero: np.ndarray) -> None:
        """Q -> DQ behind `value`: for all its users if it has a spec, else for those with one."""
        spec, shared = known_static_spec(value), spec_of(value) is not None
        users = static_uses(value)
        anchor = value.producer()
        first = self.model.graph[0]
        inputs = [value, add_constant(self.model, f"{value.name}_scale", scale)]
        attributes = {}
        if spec.dtype in FLOAT8:
            # By its zero point, onnxruntime takes a float8 for an integer, and drops a Relu before
            # it (ReluQuantFusion) or refuses a Clip.
            attributes["output_dtype"] = int(spec.dtype)
        else:
            zeros = zero.astype(NUMPY[spec.dtype])
            inputs.append(add_constant(self.model, f"{value.name}_zero", zeros))
        q = insert(
            self.model, anchor or first, "QuantizeLinear", inputs,
            base=f"{value.name}_q", attributes=attributes, after=anchor is not None,
        )  # fmt: skip
        typed(q, spec.dtype, value.shape)
        if spec.dtype in FLOAT8:
            new = self._widened_float8(q, value, inputs[1])
        else:
            last = self._narrowed(q, value, spec)
            dq = insert(
                self.model, last, "DequantizeLinear", [last.outputs[0], *inputs[1:]],
                base=f"{value.name}_dq", after=True,
            )  # fmt: skip
            new = typed(dq, ir.DataType.FLOAT, value.shape)
        for node, index in users:
            own = self._for_pool(node, new) if dilated_average(node) else new
            node.replace_input_with(index, own)
        if shared and value.is_graph_output():
            redirect(value, new, keep=[q, *(u.node for u in value.uses())])

    def _for_pool(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """What a DequantizeLinear computes, by Cast, Sub and Mul: behind it onnxruntime makes an
        integer kernel of any AveragePool, which then refuses dilations."""
        dq = value.producer()
        if not is_op(dq, "DequantizeLinear"):
            return value
        q, scale, zero = (input_of(dq, i) for i in range(3))
        graph = Builder(self.model, node, f"{value.name}_")
        wide = graph.op("Cast", q, to=int(ir.DataType.FLOAT), shape=value.shape)
        offset = graph.op("Cast", zero, to=int(ir.DataType.FLOAT), shape=())
        centred = graph.op("Sub", wide, offset, shape=value.shape)
        return graph.op("Mul", centred, scale, shape=value.shape)

    def _widened_float8(self, q: ir.Node, value: ir.Value, scale: ir.Value) -> ir.Value:
        """Cast and Mul instead of DequantizeLinear, behind which onnxruntime rounds the weight of
        anything that it makes a Gemm of to int8 (WeightBiasQuantization)."""
        to, base = {"to": int(ir.DataType.FLOAT)}, f"{value.name}_wide"
        cast = insert(self.model, q, "Cast", [q.outputs[0]], base=base, attributes=to, after=True)
        factors = [typed(cast, ir.DataType.FLOAT, value.shape), scale]
        mul = insert(self.model, cast, "Mul", factors, base=f"{value.name}_dq", after=True)
        return typed(mul, ir.DataType.FLOAT, value.shape)

    def _narrowed(self, q: ir.Node, value: ir.Value, spec: QuantSpec) -> ir.Node:
        """Integers of fewer bits than their dtype has are clamped once more, unless they were."""
        if not spec.bits or _moves_clamped(q):
            return q
        dtype = NUMPY[spec.dtype]
        limits = (
            shared_constant(self.model, f"qgraph/limit_{number}", dtype(number))
            for number in (spec.qmin, spec.qmax)
        )
        base = f"{value.name}_clamped"
        clip = insert(self.model, q, "Clip", [q.outputs[0], *limits], base=base, after=True)
        typed(clip, q.outputs[0].dtype, value.shape)
        return clip

    def quantize_at_run_time(self, node: ir.Node, index: int, spec: QuantSpec) -> None:
        """Scales at run time for input `index`, computed once for all users in the same graph."""
        value = input_of(node, index)
        key = (id(value), spec, id(node.graph))
        if key not in self.runtime:
            self.runtime[key] = self._at_run_time(node, value, spec)
        node.replace_input_with(index, self.runtime[key])

    def _at_run_time(self, node: ir.Node, value: ir.Value, spec: QuantSpec) -> ir.Value:
        anchor = _first_user(node, value)
        if isinstance(spec.granularity, PerBlock):
            return round_in_blocks(self.model, anchor, value, spec.granularity.size)
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
            return typed(dq, ir.DataType.FLOAT, value.shape)
        return round_per_token(self.model, anchor, value, token_grid(lowest_value(value)))


_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _moves_clamped(q: ir.Node) -> bool:
    """Whether `q` gets back integers that were clamped, moved as floats of the same scale."""
    move = producer(q, 0)
    if not is_op(move, *MOVES):
        return False
    dq = producer(move, 0)
    if not is_op(dq, "DequantizeLinear"):
        return False
    clamped = is_op(producer(dq, 0), "Clip")
    return clamped and all(_equal(dq.inputs[i], q.inputs[i]) for i in (1, 2))


def _equal(a: ir.Value | None, b: ir.Value | None) -> bool:
    x, y = array(a), array(b)
    return x is not None and y is not None and np.array_equal(x, y)


def _first_user(node: ir.Node, value: ir.Value) -> ir.Node:
    """The first node of the same graph that uses `value`: what is computed before it serves all."""
    graph = node.graph
    assert graph is not None
    users = {use.node for use in value.uses()}
    return next((n for n in graph if n in users), node)


def _all_values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs


def _static_values(model: ir.Model) -> Iterator[ir.Value]:
    """Computed values of the main graph with a static spec, their own or a user's."""
    for value in list(_all_values(model)):
        if value.graph is model.graph and static_spec(value) is not None:
            yield value
