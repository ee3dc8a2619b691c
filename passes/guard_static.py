"""Take static quantization back where the calibrated ranges show that one scale cannot serve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qgraph.calibration.data import UNREACHED
from qgraph.graph.annotation import (
    Stage,
    annotated,
    annotated_weight_spec,
    commit_to,
    retract,
    retract_node,
    static_spec,
    stats_of,
    use_spec,
)
from qgraph.graph.reading import is_op, node_name
from qgraph.graph.sites import Site, site_of
from qgraph.numerics.reference import scale_zero_point
from qgraph.numerics.spec import PER_TOKEN, PerTensor, QuantSpec, describe
from qgraph.numerics.stats import Stats, find_range, token_sqnr_db
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass
from qgraph.weights.unfit import SMALLEST_SPAN


@dataclass(frozen=True)
class GuardStatic(Pass):
    """Take static quantization back where one calibrated scale cannot serve all the data.

    Two cases ruin models silently. A language model's first token can be thousands of times larger
    than the others: a scale that holds it rounds all others to zero. And Concat, Add or Where of
    values in different units (boxes in pixels, scores below one) leaves the small ones no levels::

        x:u8 static ── MatMul     median token 4 dB      x:u8 per-token ── MatMul
        boxes:u8 ─┐                                      boxes ─┐
        scores:u8 ┴ Concat:u8     ranges 1 : 640         scores ┴ Concat

    The first is measured as the signal-to-noise ratio of the median token under the static scale,
    or under the one scale that a run with such a token would get (DynamicQuantizeLinear); such a
    site computes its scales at run time, token by token, if the target runs that faster than
    float, and stays float otherwise. The second keeps the joining operator float.

    Attributes:
        min_sqnr: what the median token must keep, in dB.
        max_ratio: largest ratio of ranges that may share one scale.
    """

    name: ClassVar[str] = "guard-static"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.CALIBRATED})

    min_sqnr: float = 25.0
    max_ratio: float = 32.0

    def run(self, model: ir.Model, context: Context) -> bool:
        changed = False
        for node, specs in list(annotated(model)):
            site = site_of(node)
            spec = specs.get(site.x_index) if site is not None else None
            if site is None:
                changed |= self._guard_glue(node, context)
            elif spec is not None and isinstance(spec.granularity, PerTensor):
                changed |= self._guard_site(site, spec, context)
        return changed

    def _guard_site(self, site: Site, spec: QuantSpec, context: Context) -> bool:
        stats = stats_of(site.x) or Stats()
        weight = annotated_weight_spec(site)
        dynamic = spec.dynamic
        if not dynamic and not stats.count:
            retract(site)
            self.remark(context, site, "float", UNREACHED)
            return True
        if stats.token_power is None:
            if dynamic or not 0 < max(-stats.low, stats.high) < SMALLEST_SPAN:
                return False
            retract(site)
            self.remark(context, site, "float", _SMALL)
            return True
        # Others may have a say in a fixed scale too; a run is taken to hold the extremes of all.
        spec = spec.with_(observer="minmax") if dynamic else static_spec(site.x) or spec
        low, high = find_range(stats, spec)
        scale, _ = scale_zero_point(np.float32(low), np.float32(high), spec)
        sqnr = token_sqnr_db(stats, float(scale))
        if sqnr >= self.min_sqnr:
            return False
        retract(site)
        coarse = "one scale a run is" if dynamic else "static ones are"
        verdict = context.target.supports(site, PER_TOKEN, weight)
        if not verdict.ok:
            why = f"float activations: {coarse} too coarse for most tokens; {verdict.reason}"
            self.remark(context, site, "float", why, median_token_db=sqnr)
            return True
        commit_to(site, PER_TOKEN, weight)
        why = f"{describe(PER_TOKEN, weight)}: {coarse} too coarse for most tokens"
        self.remark(context, site, "quantized", why, median_token_db=sqnr)
        return True

    def _guard_glue(self, node: ir.Node, context: Context) -> bool:
        quantized = [v for i, v in enumerate(node.inputs) if v and use_spec(node, i) is not None]
        stats = [stats_of(value) or Stats() for value in quantized]
        why = f"kept float: {UNREACHED}"
        numbers: dict[str, float] = {}
        if all(s.count for s in stats):
            spans = [span for s in stats if (span := max(-s.low, s.high)) > 0]  # any scale holds 0
            ratio = max(spans, default=1.0) / min(spans, default=1.0)
            small = min(spans, default=1.0) < SMALLEST_SPAN
            joins = is_op(node, "Add", "Concat", "Where")
            if not small and (not joins or ratio <= self.max_ratio):
                return False
            why = _SMALL
            if not small:
                why = "kept float: its inputs have ranges too different for one scale"
                numbers = {"ratio": ratio}
        retract_node(node)
        context.remark("declined", self.name, node_name(node), node.op_type, why, **numbers)
        return True


_SMALL = f"kept float: its data stays below {SMALLEST_SPAN:.1g}, where scales lose their precision"
