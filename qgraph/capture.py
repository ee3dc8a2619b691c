"""A few tokens of some values in the float model, for methods that try candidates on real data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.context import Context
from qgraph.errors import CalibrationError, PipelineError
from qgraph.graph import dims, insert, opset, remove_dead, shared_constant
from qgraph.kv_cache import complete_feed
from qgraph.session import open_session

Rows = NDArray[np.float32]
FEEDS = 4
"""Calibration feeds that are run."""
BYTES = 96 << 20
"""About so much is held at once; more values are captured in several runs of the feeds."""


def captured(
    model: ir.Model, values: Sequence[ir.Value], context: Context, rows: int = 512
) -> Iterator[tuple[ir.Value, Rows]]:
    """Tokens of each value: vectors along its last axis, evenly spread over the first feeds.

    The first token of a feed is always among them: in language models it is unlike all others.
    They are picked in the graph itself, so that nothing else leaves the session. `model` may be
    rewritten meanwhile, as long as its values keep their names and what they compute.

    Args:
        values: computed floats of the main graph, of rank 1 or more.
        context: with calibration data that can be read again; `max_memory` holds four times what
            is captured at once.
        rows: about how many tokens of each value, at most.

    Yields:
        each value with an array (tokens, channels).

    Raises:
        CalibrationError: there is no calibration data.
        PipelineError: the model's opset is below 10.
    """
    if opset(model) < 10:
        raise PipelineError("activations are captured from opset 10 on: run convert-opset first")
    feeds = [complete_feed(model, feed) for feed in islice(context.calibration or (), FEEDS)]
    if not feeds:
        raise CalibrationError("this needs calibration data: give some typical inputs")
    each = -(-rows // len(feeds))
    for group in _groups(values, rows, min(BYTES, (context.max_memory or 4 * BYTES) // 4)):
        # A handful of runs: packed weights would take longer than they save, and their size again.
        session = open_session(_picking(model, group, each), prepack=False, arena=False)
        known = {i.name for i in session.get_inputs()}
        runs = [session.run(None, {k: v for k, v in f.items() if k in known}) for f in feeds]
        del session
        for value, parts in zip(group, zip(*runs, strict=True), strict=True):
            yield value, np.concatenate(parts)


def _groups(values: Sequence[ir.Value], rows: int, limit: int) -> Iterator[list[ir.Value]]:
    """Values whose tokens together stay within `limit` bytes."""
    group: list[ir.Value] = []
    held = 0
    for value in values:
        size = 4 * rows * ((dims(value) or [None])[-1] or 1024)
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(value)
        held += size
    if group:
        yield group


def _picking(model: ir.Model, values: Sequence[ir.Value], rows: int) -> ir.Model:
    """A copy of the model whose outputs are at most `rows` tokens of each of these values."""
    copy = model.clone()
    copy.graph.outputs.clear()
    made = {v.name: v for v in copy.graph.inputs}
    made |= {v.name: v for node in copy.graph for v in node.outputs}
    for value in values:
        copy.graph.outputs.append(_picked(copy, made[value.name], rows))
    remove_dead(copy)
    return copy


def _picked(model: ir.Model, x: ir.Value, rows: int) -> ir.Value:
    """At most `rows` tokens of x, one in every so many, as float32 (tokens, channels)."""

    def op(op_type: str, *inputs: ir.Value, dtype: ir.DataType, **attributes: int) -> ir.Value:
        node = insert(
            model, model.graph[-1], op_type, inputs,
            base=f"{x.name}/{op_type}", attributes=attributes, after=True,
        )  # fmt: skip
        node.outputs[0].type = ir.TensorType(dtype)
        return node.outputs[0]

    def number(value: int) -> ir.Value:
        return shared_constant(model, f"qgraph/number_{value}", np.array([value], np.int64))

    integer, real = ir.DataType.INT64, ir.DataType.FLOAT
    flat = op("Flatten", x, axis=len(dims(x)) - 1, dtype=x.dtype or real)
    if x.dtype != real:
        flat = op("Cast", flat, to=int(real), dtype=real)
    count = op("Gather", op("Shape", flat, dtype=integer), number(0), dtype=integer)
    step = op("Sub", count, number(1), dtype=integer)  # no division gives 0, not even of 0 tokens
    step = op("Add", op("Div", step, number(rows), dtype=integer), number(1), dtype=integer)
    return op("Slice", flat, number(0), number(2**62), number(0), step, dtype=real)
