"""Statistics computed by the graph itself: ONNX reductions where they serve, else raw values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import length_hint
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.calibration.data import not_finite
from qgraph.errors import CalibrationError
from qgraph.graph.annotation import forget
from qgraph.graph.builder import Builder
from qgraph.graph.editing import redirect, remove_dead
from qgraph.graph.functions import OBSERVER, is_call, undeclare_unused
from qgraph.graph.reading import input_of, opset
from qgraph.io.feeds import Feed
from qgraph.io.kv_cache import complete_feed
from qgraph.io.session import open_session
from qgraph.numerics.histogram import BitHistogram
from qgraph.numerics.stats import Stats, Wanted
from qgraph.pipeline.context import Context

RAW_BYTES = 256 << 20
"""Values whose histogram is wanted leave the session whole, at most this many bytes in one run."""


def reductions(model: ir.Model, wanted: Mapping[str, Wanted]) -> ir.Model:
    """A copy of `model` that computes only reductions of the observed values.

    Its outputs are named `<value>|<statistic>`; `<value>|raw` is the value itself.
    """
    probe = model.clone()
    graph = probe.graph
    graph.outputs.clear()
    for node in [n for n in graph if is_call(n, OBSERVER)]:
        value = input_of(node, 0)
        assert value.name
        for name, output in _reduce(probe, node, value, wanted[value.name]).items():
            output.name = f"{value.name}|{name}"
            graph.outputs.append(output)
        redirect(node.outputs[0], value, keep=[])
    for node in [n for n in graph if is_call(n, OBSERVER)]:
        graph.remove(node, safe=True)
    undeclare_unused(probe)
    remove_dead(probe)
    forget(probe)
    return probe


def _reduce(model: ir.Model, node: ir.Node, x: ir.Value, wanted: Wanted) -> dict[str, ir.Value]:
    graph, wide = Builder(model, node, f"{x.name}/"), x
    if x.dtype not in (ir.DataType.FLOAT, None):
        wide = graph.op("Cast", x, to=int(ir.DataType.FLOAT))
    results = {
        "low": graph.op("ReduceMin", wide, keepdims=0),
        "high": graph.op("ReduceMax", wide, keepdims=0),
        "sum": graph.op("ReduceSum", wide, keepdims=0),  # onnxruntime's extremes ignore NaN
        "size": graph.op("Size", wide, dtype=ir.DataType.INT64),
    }
    if wanted.token_power:
        results["power"] = _reduced(graph, "ReduceMean", graph.op("Mul", wide, wide), [-1])
    if (others := _other_axes(wanted.channel_mean_axis, x)) is not None:
        results["mean"] = _reduced(graph, "ReduceMean", wide, others)
    if (others := _other_axes(wanted.channel_range_axis, x)) is not None:
        results["channel_low"] = _reduced(graph, "ReduceMin", wide, others)
        results["channel_high"] = _reduced(graph, "ReduceMax", wide, others)
    if wanted.histogram:
        results["raw"] = graph.op("Identity", wide)
    return results


def _other_axes(axis: int | None, x: ir.Value) -> list[int] | None:
    rank = len(x.shape) if x.shape is not None else 0
    if axis is None or rank < 2:
        return None
    return [i for i in range(rank) if i != axis % rank]


def _reduced(graph: Builder, op_type: str, x: ir.Value, axes: list[int]) -> ir.Value:
    """A reduction over `axes`, which became an input in opset 18."""
    if opset(graph.model) < 18:
        return graph.op(op_type, x, axes=axes, keepdims=0)
    given = graph.op("Constant", value_ints=axes, dtype=ir.DataType.INT64)
    return graph.op(op_type, x, given, keepdims=0)


def collect(
    model: ir.Model, probe: ir.Model, wanted: Mapping[str, Wanted], context: Context
) -> dict[str, Stats]:
    """The statistics of the observed values on the calibration data.

    Args:
        model: completes the feeds.
        probe: what :func:`reductions` made of it.

    Raises:
        CalibrationError: there are no samples, the model does not run on one, or a value becomes
            NaN or infinite.
    """
    assert context.calibration is not None
    session = open_session(probe)
    outputs = [o.name for o in session.get_outputs()]
    inputs = {i.name for i in session.get_inputs()}
    stats = {name: Stats() for name in wanted}
    groups: list[list[str]] | None = None
    total = length_hint(context.calibration) or None
    seen = 0
    for index, feed in enumerate(context.progress(context.calibration, "calibrating", total)):
        complete = complete_feed(model, feed)
        given = {k: v for k, v in complete.items() if k in inputs}
        groups = groups or _groups(session, outputs, given, index, context.max_memory)
        for names in groups:
            _fold(stats, wanted, names, _run(session, names, given, index))
        seen += 1
    if not seen:
        raise CalibrationError("the calibration data holds no samples: give at least one")
    return stats


def _run(session: Any, names: list[str], feed: Feed, index: int) -> list[np.ndarray]:
    try:
        return list(session.run(names, feed))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise CalibrationError(
            f"the model does not run on calibration feed {index}: {reason}"
        ) from error


def _groups(
    session: Any, outputs: list[str], feed: Feed, index: int, max_memory: int | None
) -> list[list[str]]:
    """Sets of outputs to fetch together, so that raw values stay within bounds: `RAW_BYTES`, and
    a quarter of what the user allows."""
    limit = min(RAW_BYTES, (max_memory or 4 * RAW_BYTES) // 4)
    small = [name for name in outputs if not name.endswith("|raw")]
    if len(small) == len(outputs):
        return [outputs]
    sizes = dict(zip(small, _run(session, small, feed, index), strict=True))
    groups, held = [small], 0
    for name in (n for n in outputs if n.endswith("|raw")):
        held += 4 * int(sizes[name.removesuffix("raw") + "size"])
        if held > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
    return groups


def _fold(
    stats: dict[str, Stats],
    wanted: Mapping[str, Wanted],
    names: list[str],
    arrays: list[np.ndarray],
) -> None:
    """Merge one run's outputs into the statistics."""
    by_value: dict[str, dict[str, np.ndarray]] = {}
    for name, result in zip(names, arrays, strict=True):
        value, _, statistic = name.rpartition("|")
        by_value.setdefault(value, {})[statistic] = result
    for value, parts in by_value.items():
        if "size" in parts and not parts["size"]:
            continue
        if "size" in parts:
            new = Stats(int(parts["size"]), float(parts["low"]), float(parts["high"]))
            if not np.isfinite([new.low, new.high]).all() or np.isnan(parts["sum"]):
                raise not_finite(f"'{value}'")
            if "power" in parts:
                new = replace(new, token_power=BitHistogram.of(parts["power"]))
            if "mean" in parts:
                new = replace(new, channel_mean=parts["mean"].astype(np.float64))
            if "channel_low" in parts:
                low, high = (parts[f"channel_{end}"].astype(np.float64) for end in ("low", "high"))
                new = replace(new, channel_low=low, channel_high=high)
            if wanted[value].histogram:
                new = replace(new, histogram=BitHistogram())
            stats[value] = stats[value].merge(new)
        if "raw" in parts and parts["raw"].size:
            histogram = stats[value].histogram
            assert histogram is not None
            histogram.add(parts["raw"])
