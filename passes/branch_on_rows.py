"""Two bodies for a model whose prompts and single tokens want different kernels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qgraph.errors import PipelineError
from qgraph.graph.annotation import Stage
from qgraph.graph.attention import attend_in_float, keeps_integers
from qgraph.graph.branch import branch
from qgraph.graph.editing import remove_dead, shared_constant, typed
from qgraph.graph.functions import (
    DEQUANTIZE_PER_TOKEN,
    ROUND_IN_BLOCKS,
    is_call,
    round_in_blocks,
    round_per_token,
)
from qgraph.graph.names import fresh_name
from qgraph.graph.ops import lowest_value
from qgraph.graph.reading import array, attribute, computing, constant, input_of, is_op, producer
from qgraph.io.states import find_states
from qgraph.numerics.tokens import token_grid
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass
from qgraph.pipeline.target import BlockProduct, TwoSpeed

COARSE = 4
"""Bits of weights in blocks that int8 columns have room for."""
SIZES = (256, 128, 64, 32, 16)
"""Of blocks of activations, where the weight has none of its own: the largest that divides K, as
each takes a scale on disk, and what fills the last one is stored, too."""
PROMPT = 16
"""Tokens from which attention over a cache of integers is faster in float."""
SHORT = 8
"""Rows of the shortest run of a model that has no past, and so no single tokens."""


@dataclass(frozen=True)
class BranchOnRows(Pass):
    """Let the number of rows decide at run time between two bodies of the model.

    No kernel serves both ends: for a few tokens, reading weights of 4 bits in blocks is fastest;
    for a prompt, int8 columns are. Where the target knows a number of rows at which that turns, the
    model is put under an If::

        x ── RoundInBlocks ── MatMul ── y      x ── Size ── Less(rows) ── If ── y
               W:int4 ── DQ ──┘                 ├ then: RoundInBlocks ── MatMul
                                                └ else: QuantizePerToken ── DequantizePerToken ── MatMul

    Both bodies read the same weights, which a target stores once. In the second, activations are
    rounded with one scale for each token instead of one for each block of it, and the columns are
    of 8 bits: that is why the pass is lossy.

    Where activations have one scale for each token already, the first body gets the blocks. Models
    whose inputs have fixed sizes, or whose rows no input tells, keep one body, and so does every
    model on a target that has no second kernel. A model without a past has no single tokens: where
    the second kernel is faster from few rows on, it is the only one.

    Attributes:
        bodies: 1 keeps one body, for those who count memory: the second takes a byte for each
            weight of a product once it is loaded.
    """  # noqa: E501

    name: ClassVar[str] = "branch-on-rows"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.COMMITTED})

    bodies: int = 2

    def __post_init__(self) -> None:
        if self.bodies not in (1, 2):
            raise PipelineError(f"bodies={self.bodies} is out of range: use 1 or 2")

    def run(self, model: ir.Model, context: Context) -> bool:
        if self.bodies == 2 and self._branched(model, context):
            return True
        _tell_what_is_slow(context)
        return False

    def _branched(self, model: ir.Model, context: Context) -> bool:
        if not all(isinstance(value.type, ir.TensorType) for value in model.graph.outputs):
            return False  # an If returns no maps
        if len(list(model.graphs())) > 1:
            return False  # copies of bodies would go on reading what is outside of both
        products = {node: product for node in model.graph if (product := _product(node))}
        attention = [node for node in model.graph if keeps_integers(node)]
        counted = _counted_input(model.graph, products, attention)
        if counted is None:
            return False
        target, rows = context.target, None
        if isinstance(target, TwoSpeed) and products:
            rows = target.crossover(list(products.values()))
        if attention:
            self._branch_on_length(model, counted, products, rows, context)
            return True
        if rows is None:
            return False
        decodes = bool(find_states(model.graph.inputs, model.graph.outputs))
        if rows <= (1 if decodes else SHORT):
            if not _round_by_token(model, model.graph):
                return False
            remove_dead(model)
            why = f"products run as int8 columns, faster from {rows} rows on than blocks"
            context.remark("applied", self.name, "", "MatMul", why, rows=rows)
            return True
        few, many = branch(model, _fewer_rows(model, counted, rows))
        _round_in_blocks(model, few)
        _round_by_token(model, many)
        remove_dead(model)
        size = sum(p.k * p.n for p in products.values())
        context.remark(
            "applied", self.name, "", "If",
            f"two bodies: below {rows} rows products run in blocks, from {rows} rows on as int8 "
            f"columns, which take {size / 1e6:.1f} MB more memory; bodies=1 keeps one of them",
            rows=rows, bytes=size,
        )  # fmt: skip
        return True

    def _branch_on_length(
        self,
        model: ir.Model,
        counted: Counted,
        products: dict[ir.Node, BlockProduct],
        rows: int | None,
        context: Context,
    ) -> None:
        """Two bodies of which the second attends in float, and has the products of prompts."""
        length = max(rows or 0, PROMPT)
        few, many = branch(model, _shorter(model, counted, length))
        if rows is not None:
            _round_by_token(model, many)
            (_round_in_blocks if rows > 1 else _round_by_token)(model, few)
        for node in [node for node in many if keeps_integers(node)]:
            attend_in_float(model, node)
        remove_dead(model)
        size = sum(p.k * p.n for p in products.values()) if rows is not None and rows > 1 else 0
        context.remark(
            "applied", self.name, "", "If",
            f"two bodies: from {length} tokens on attention is float and only what is cached is "
            f"rounded; the second takes {size / 1e6:.1f} MB more memory; bodies=1 keeps the first",
            rows=length, bytes=size,
        )  # fmt: skip


def _tell_what_is_slow(context: Context) -> None:
    """Warn of products that are faster than float for single tokens, but slower for prompts."""
    slow = [
        r.numbers["slowest"] for r in context.remarks.verdicts().values() if "slowest" in r.numbers
    ]
    if slow:
        those = "1 product is" if len(slow) == 1 else f"{len(slow)} products are"
        context.remark(
            "warning", BranchOnRows.name, "", "",
            f"{those} slower than float for prompts, and faster for single tokens: "
            "optimize_for=prompt takes what is fastest for prompts",
            slowest=min(slow),
        )  # fmt: skip


def _product(node: ir.Node) -> BlockProduct | None:
    """A product of weights and activations that are rounded at run time, in blocks or by token, and
    can be so in the other way."""
    if not is_op(node, "MatMul", "Gemm"):
        return None
    data, dq = producer(node, 0), producer(node, 1)
    q = constant(dq.inputs[0]) if is_op(dq, "DequantizeLinear") else None
    if data is None or dq is None or q is None or len(q.shape) != 2:
        return None
    size, bits = int(attribute(dq, "block_size", 0)), q.dtype.bitwidth
    if size and bits > COARSE:
        return None
    if is_call(data, ROUND_IN_BLOCKS) and (block := array(data.inputs[1])) is not None:
        size = int(block[-1])
    elif not is_call(data, DEQUANTIZE_PER_TOKEN):
        return None
    k, n = q.shape.numpy()
    if attribute(node, "transB", 0):
        k, n = n, k
    whole = next((own for own in SIZES if k % own == 0), 32)
    return BlockProduct(int(k), int(n), bits, size or whole)


Counted = tuple[ir.Value, bool]
"""An input whose sizes tell the number of rows, and whether its last axis is of channels."""


def _counted_input(
    graph: ir.Graph, products: dict[ir.Node, BlockProduct], attention: list[ir.Node]
) -> Counted | None:
    """The input whose sizes tell the rows of most products, or else of attention; None where there
    is none, or where the number is fixed."""
    leads: Counter[tuple[str, ...]] = Counter()
    for node, product in products.items():
        leads[_lead(input_of(node, 0))] += product.k * product.n
    for node in attention:
        leads[_lead(input_of(node, 0))] += 1
    for lead, _ in leads.most_common(1):
        if not lead or all(d.isdigit() for d in lead):
            return None
        for value in graph.inputs:
            sizes = _sizes(value)
            if sizes in (lead, lead + sizes[-1:]):
                return value, sizes != lead
    return None


def _sizes(value: ir.Value) -> tuple[str, ...]:
    return () if value.shape is None else tuple(map(str, value.shape))


def _lead(value: ir.Value) -> tuple[str, ...]:
    """What counts the rows of a product's data: all its sizes but the last."""
    return _sizes(value)[:-1]


def _fewer_rows(model: ir.Model, counted: Counted, rows: int) -> ir.Value:
    """Whether a run has fewer rows than that, computed at the end of the graph."""
    value, channels = counted
    if not channels:
        return _less(model, _last(model, "Size", [value]), rows)
    sizes = _some_sizes(model, value, np.arange(len(value.shape or ()) - 1))
    return _less(model, _last(model, "ReduceProd", [sizes], keepdims=0), rows)


def _shorter(model: ir.Model, counted: Counted, length: int) -> ir.Value:
    """Whether the sequences of a run have fewer tokens than that."""
    value, channels = counted
    axis = np.int64(len(value.shape or ()) - (2 if channels else 1))
    return _less(model, _some_sizes(model, value, axis), length)


def _some_sizes(model: ir.Model, value: ir.Value, axes: np.ndarray | np.generic) -> ir.Value:
    shape = _last(model, "Shape", [value])
    name = f"qgraph/axes_{'_'.join(map(str, np.atleast_1d(axes)))}_{axes.ndim}"
    return _last(model, "Gather", [shape, shared_constant(model, name, axes)])


def _less(model: ir.Model, count: ir.Value, bound: int) -> ir.Value:
    limit = shared_constant(model, f"qgraph/rows_{bound}", np.int64(bound))
    less = _last(model, "Less", [count, limit])
    less.type = ir.TensorType(ir.DataType.BOOL)
    return less


def _last(model: ir.Model, op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
    """What a node at the end of the main graph computes: an int64, or several."""
    name = fresh_name(model, f"rows_{op_type}")
    node = ir.node(op_type, inputs, attributes=attributes, outputs=[ir.Value(name=name)], name=name)
    model.graph.append(node)
    return typed(node, ir.DataType.INT64, None)


def _round_by_token(model: ir.Model, body: ir.Graph) -> bool:
    """A scale for each token in the place of one for each block; whether there was any."""
    rounded: dict[ir.Value, ir.Value] = {}
    for node in [node for node in body if _product(node) is not None]:
        data = computing(node, 0)
        if is_call(data, ROUND_IN_BLOCKS):
            value = input_of(data, 0)
            if value not in rounded:
                grid = token_grid(lowest_value(value))
                rounded[value] = round_per_token(model, data, value, grid)
            node.replace_input_with(0, rounded[value])
    return bool(rounded)


def _round_in_blocks(model: ir.Model, body: ir.Graph) -> None:
    """A scale for each block of a token in the place of one for all of it."""
    rounded: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in [node for node in body if _product(node) is not None]:
        data = computing(node, 0)
        if is_call(data, DEQUANTIZE_PER_TOKEN):
            product, quantizer = _product(node), computing(data, 0)
            assert product is not None
            key = input_of(quantizer, 0), product.size
            if key not in rounded:
                rounded[key] = round_in_blocks(model, quantizer, *key)
            node.replace_input_with(0, rounded[key])
