"""Run the calibration data and turn observers into statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from qgraph.calibration.collect import collect, reductions
from qgraph.calibration.data import NEEDED_OR_DYNAMIC, UNREACHED
from qgraph.calibration.resume import ANEW, DamagedError, key, read_stats, write_stats
from qgraph.errors import CalibrationError
from qgraph.graph.annotation import Stage, set_stats, wanted_of
from qgraph.graph.editing import redirect
from qgraph.graph.functions import OBSERVER, is_call, undeclare_unused
from qgraph.graph.reading import input_of
from qgraph.numerics.stats import Stats, Wanted
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass
from qgraph.pipeline.target import largest_value


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

    Source: Krishnamoorthi 2018, section 3.1 (calibration); histogram bins are float32 bit patterns,
    see :class:`qgraph.numerics.histogram.BitHistogram`.
    """

    name: ClassVar[str] = "calibrate"
    version: ClassVar[int] = 1
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.OBSERVED})
    provides: ClassVar[frozenset[Stage]] = frozenset({Stage.CALIBRATED})
    invalidates: ClassVar[frozenset[Stage]] = frozenset({Stage.OBSERVED})

    def run(self, model: ir.Model, context: Context) -> bool:
        observers = [node for node in model.graph if is_call(node, OBSERVER)]
        if not observers:
            return False
        if context.calibration is None:
            raise CalibrationError(f"this {NEEDED_OR_DYNAMIC}")
        wanted = {_observed(node): wanted_of(node) for node in observers}
        stats = self._stats(model, wanted, context)
        for node, name in zip(observers, wanted, strict=True):
            value = input_of(node, 0)
            set_stats(value, stats[name])
            if not stats[name].count:
                context.remark("warning", self.name, name, "", UNREACHED)
            redirect(node.outputs[0], value)
            model.graph.remove(node, safe=True)
        undeclare_unused(model)
        _warn_of_large_values(stats, context)
        return True

    def _stats(
        self, model: ir.Model, wanted: dict[str, Wanted], context: Context
    ) -> dict[str, Stats]:
        """The statistics of the observed values, from the cache if it has them."""
        probe = reductions(model, wanted)
        if context.cache is None:
            return collect(model, probe, wanted, context)
        name = key(self, probe, context.calibration or ())
        file = Path(context.cache) / f"calibration-{name}.npz"
        try:
            kept = read_stats(file, wanted)
        except DamagedError as error:
            context.remark("warning", self.name, "", "", f"{error}: {ANEW}")
            kept = None
        if kept is not None:
            return kept
        stats = collect(model, probe, wanted, context)
        try:
            write_stats(file, stats)
        except OSError as error:
            why = f"the statistics cannot be kept in {file.parent}: {error.strerror}"
            context.remark("warning", self.name, "", "", why)
        return stats


def _warn_of_large_values(stats: Mapping[str, Stats], context: Context) -> None:
    """Values that come near the end of the target's floats."""
    limit = largest_value(context.target)
    for name, found in stats.items():
        peak = max(abs(found.low), abs(found.high)) if found.count else 0.0
        if peak > limit:
            why = (
                f"values reach beyond {limit:g}, near the end of float16: use a target of bfloat16"
            )
            context.remark("warning", Calibrate.name, name, "", why, peak=peak)


def _observed(node: ir.Node) -> str:
    value = input_of(node, 0)
    assert value.name
    return value.name
