"""Run the calibration data and turn observers into statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qgraph.annotation import STATS
from qgraph.context import Context, Feed
from qgraph.errors import CalibrationError
from qgraph.functions import OBSERVER, is_call, undeclare_unused
from qgraph.graph import insert, opset, redirect, remove_dead
from qgraph.kv_cache import complete_feed
from qgraph.observers import BitHistogram, Stats, Wanted
from qgraph.pass_manager import Contract, Pass, Stage
from qgraph.session import open_session

RAW_BYTES = 256 << 20
"""Values whose histogram is wanted leave the session whole, at most this many bytes in one run."""


@dataclass(frozen=True)
class Calibrate(Pass):
    """Replace every observer by what it would have seen in the calibration data.

    The observers are compiled into the graph: reductions whose small results are its only outputs,
    so that activations never leave the session and whatever feeds no observer (often the largest
    layer, the output projection) is not computed at all::

        x ── Observer ── Conv ── y         x ── Conv ── y, ReduceMin(x), ReduceMax(x), Size(x)

    Histograms, which ONNX cannot reduce to, are folded in feed by feed. Memory does not grow with
    the number of samples, and neither their order nor their batching changes the result. With a
    cache folder in the context, statistics are kept by the content of weights, graph and data.

    Source: design after "calibration is a graph rewrite"; histogram bins are float32 bit patterns,
    see :class:`qgraph.observers.BitHistogram`.
    """

    name: ClassVar[str] = "calibrate"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.OBSERVED})
    provides: ClassVar[frozenset[Stage]] = frozenset({Stage.CALIBRATED})
    invalidates: ClassVar[frozenset[Stage]] = frozenset({Stage.OBSERVED})

    def run(self, model: ir.Model, context: Context) -> bool:
        observers = [node for node in model.graph if is_call(node, OBSERVER)]
        if not observers:
            return False
        if context.calibration is None:
            raise CalibrationError(
                "static quantization needs calibration data: give some typical inputs "
                "(calibration=..., or -c on the command line), or use the recipe 'dynamic'"
            )
        names = [_observed(node) for node in observers]
        wanted: dict[str, Wanted] = {
            _observed(node): node.meta["qgraph.wanted"] for node in observers
        }
        stats = None
        key = _cache_file(model, context, wanted)
        if key is not None and key.exists():
            stats = _read(key)
        if stats is None:
            stats = _collect(model, wanted, context)
            if key is not None:
                _write(key, stats)
        for node, name in zip(observers, names, strict=True):
            value = node.inputs[0]
            assert value is not None
            value.meta[STATS] = stats[name]
            if not stats[name].count:
                context.remark("warning", self.name, name, "", "calibration data never reached it")
            redirect(node.outputs[0], value)
            model.graph.remove(node, safe=True)
        undeclare_unused(model)
        return True


def _observed(node: ir.Node) -> str:
    value = node.inputs[0]
    assert value is not None and value.name
    return value.name


def reductions(model: ir.Model, wanted: Mapping[str, Wanted]) -> ir.Model:
    """A copy of `model` that computes only reductions of the observed values.

    Its outputs are named `<value>|<statistic>`; `<value>|raw` is the value itself.
    """
    probe = model.clone()
    graph = probe.graph
    graph.outputs.clear()
    last = None
    for node in [n for n in graph if is_call(n, OBSERVER)]:
        value = node.inputs[0]
        assert value is not None and value.name
        last = node
        for name, output in _reduce(probe, node, value, wanted[value.name]).items():
            output.name = f"{value.name}|{name}"
            graph.outputs.append(output)
        redirect(node.outputs[0], value, keep=[])
    for node in [n for n in graph if is_call(n, OBSERVER)]:
        graph.remove(node, safe=True)
    undeclare_unused(probe)
    assert last is not None
    remove_dead(probe)
    return probe


def _reduce(model: ir.Model, node: ir.Node, x: ir.Value, wanted: Wanted) -> dict[str, ir.Value]:
    def op(
        op_type: str, *inputs: ir.Value, dtype: ir.DataType = ir.DataType.FLOAT, **attributes: Any
    ) -> ir.Value:
        made = insert(
            model, node, op_type, inputs, base=f"{x.name}/{op_type}", attributes=attributes
        )
        made.outputs[0].type = ir.TensorType(dtype)
        return made.outputs[0]

    wide = x
    if x.dtype not in (ir.DataType.FLOAT, None):
        wide = op("Cast", x, to=int(ir.DataType.FLOAT))
    found = {
        "low": op("ReduceMin", wide, keepdims=0),
        "high": op("ReduceMax", wide, keepdims=0),
        "size": op("Size", wide, dtype=ir.DataType.INT64),
    }
    if wanted.token_power:
        found["power"] = _reduced(model, op, "ReduceMean", op("Mul", wide, wide), [-1])
    if (others := _other_axes(wanted.channel_mean_axis, x)) is not None:
        found["mean"] = _reduced(model, op, "ReduceMean", wide, others)
    if (others := _other_axes(wanted.channel_range_axis, x)) is not None:
        found["channel_low"] = _reduced(model, op, "ReduceMin", wide, others)
        found["channel_high"] = _reduced(model, op, "ReduceMax", wide, others)
    if wanted.histogram:
        found["raw"] = op("Identity", wide)
    return found


def _other_axes(axis: int | None, x: ir.Value) -> list[int] | None:
    rank = len(x.shape) if x.shape is not None else 0
    if axis is None or rank < 2:
        return None
    return [i for i in range(rank) if i != axis % rank]


def _reduced(model: ir.Model, op: Any, op_type: str, x: ir.Value, axes: list[int]) -> ir.Value:
    """A reduction over `axes`, which became an input in opset 18."""
    if opset(model) < 18:
        return op(op_type, x, axes=axes, keepdims=0)  # type: ignore[no-any-return]
    given = op("Constant", value_ints=axes, dtype=ir.DataType.INT64)
    return op(op_type, x, given, keepdims=0)  # type: ignore[no-any-return]


def _collect(model: ir.Model, wanted: Mapping[str, Wanted], context: Context) -> dict[str, Stats]:
    assert context.calibration is not None
    session = open_session(reductions(model, wanted))
    outputs = [o.name for o in session.get_outputs()]
    inputs = {i.name for i in session.get_inputs()}
    stats = {name: Stats() for name in wanted}
    groups: list[list[str]] | None = None
    total = len(context.calibration) if hasattr(context.calibration, "__len__") else None
    seen = 0
    for index, feed in enumerate(context.progress(context.calibration, "calibrating", total)):
        complete = complete_feed(model, feed)  # type: ignore[arg-type]
        given = {k: v for k, v in complete.items() if k in inputs}
        groups = groups or _groups(session, outputs, given)
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


def _groups(session: Any, outputs: list[str], feed: Feed) -> list[list[str]]:
    """Sets of outputs to fetch together, so that raw values stay within `RAW_BYTES` a run."""
    small = [name for name in outputs if not name.endswith("|raw")]
    sizes = dict(zip(small, session.run(small, feed), strict=True))
    groups, held = [small], 0
    for name in (n for n in outputs if n.endswith("|raw")):
        held += 4 * int(sizes[name.removesuffix("raw") + "size"])
        if held > RAW_BYTES:
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
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, result in zip(names, arrays, strict=True):
        value, _, statistic = name.rpartition("|")
        found.setdefault(value, {})[statistic] = result
    for value, parts in found.items():
        if "size" in parts and not parts["size"]:
            continue
        if "size" in parts:
            new = Stats(int(parts["size"]), float(parts["low"]), float(parts["high"]))
            if not (np.isfinite(new.low) and np.isfinite(new.high)):
                raise CalibrationError(
                    f"'{value}' becomes NaN or infinite on the calibration data: "
                    "check the data, and that the float model is sound on it"
                )
            if "power" in parts:
                new = replace(new, token_power=_histogram(parts["power"]))
            if "mean" in parts:
                new = replace(new, channel_mean=parts["mean"].astype(np.float64))
            if "channel_low" in parts:
                low, high = (parts[f"channel_{end}"].astype(np.float64) for end in ("low", "high"))
                new = replace(new, channel_low=low, channel_high=high)
            if wanted[value].histogram:
                new = replace(new, histogram=BitHistogram())
            stats[value] = stats[value].merge(new)
        if "raw" in parts:
            histogram = stats[value].histogram
            assert histogram is not None
            histogram.add(parts["raw"])


def _histogram(x: np.ndarray) -> BitHistogram:
    histogram = BitHistogram()
    histogram.add(x)
    return histogram


def _cache_file(model: ir.Model, context: Context, wanted: Mapping[str, Wanted]) -> Path | None:
    """Where the statistics of exactly this graph, these weights and this data are kept."""
    if context.cache is None or context.calibration is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.graph.initializers.items()):
        if value.const_value is not None:
            digest.update(name.encode() + value.const_value.tobytes())
    for node in model.graph.all_nodes():
        digest.update(f"{node.domain}{node.op_type}{[v and v.name for v in node.inputs]}".encode())
        digest.update(str([str(a) for a in node.attributes.values()]).encode())
    digest.update(repr(sorted(wanted.items())).encode())
    feeds: Iterable[Feed] = context.calibration
    for feed in feeds:
        for name in sorted(feed):
            digest.update(name.encode() + np.ascontiguousarray(feed[name]).tobytes())
    return Path(context.cache) / f"calibration-{digest.hexdigest()}.npz"


def _write(path: Path, stats: Mapping[str, Stats]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"{name}|{k}": v for name, s in stats.items() for k, v in s.to_arrays().items()}
    aside = path.with_suffix(".part.npz")
    np.savez(aside, **arrays)  # type: ignore[arg-type]
    aside.replace(path)


def _read(path: Path) -> dict[str, Stats]:
    parts: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path) as stored:
        for key in stored.files:
            name, _, part = key.rpartition("|")
            parts.setdefault(name, {})[part] = stored[key]
    return {name: Stats.from_arrays(arrays) for name, arrays in parts.items()}
