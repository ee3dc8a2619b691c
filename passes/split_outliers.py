"""LLM.int8(): channels with outliers stay in float, the rest becomes INT8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.errors import QGraphError
from qgraph.graph.annotation import (
    Stage,
    calibrated_stats,
    data_spec,
    move_annotations,
    product_groups,
    set_stats,
    spec_of,
    use_spec,
)
from qgraph.graph.editing import add_constant, insert, redirect, remove_dead, typed
from qgraph.graph.flow.absorption import Absorption, absorption, divide, merge
from qgraph.graph.flow.scaling import input_peaks, read_elsewhere, scale_inputs, unscalable
from qgraph.graph.reading import attribute, constant_array, is_op, release
from qgraph.graph.sites import Site, only_user
from qgraph.numerics.spec import PerTensor
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass
from qgraph.pipeline.target import half_floats

Indices = NDArray[np.int64]
HUSH = np.float32(2.0**24)
"""Outlier channels are divided by this: a power of two, so that nothing is rounded, and so large
that whatever is left of them rounds to zero beside the others."""
DISTINCT = 2.0
"""Channels that are largest are no outliers unless they are this many times the median channel."""


@dataclass(frozen=True)
class SplitOutliers(Pass):
    """Multiply the few input channels with outliers in float, beside the integer product.

    The problem: in a transformer a few feature channels are tens of times larger than the others.
    They set every token's scale, and the other channels round to almost nothing. They are the same
    channels for all tokens, so calibration finds them, and a small float product takes them::

        x ── MatMul(W) ── y        x ─┬─ hush o ── MatMul(W, rows o = 0) ── Add ── y
                                      └─ Gather(o) ── MatMul(W[o]) ─────────┘

    Hushing means dividing by 2^24, absorbed in the constants that make x (norm weights, the columns
    of the product before: :mod:`qgraph.graph.flow.absorption`), which the small product multiplies
    back; where no constant can take it, or the target may compute in float16, x is multiplied by a
    mask of zeros and ones.

    Outliers in channels that were quiet in calibration are not lost: the token's own scale grows
    with them, as it does without this pass. That costs the precision of that token, no more.

    Attributes:
        threshold: channels whose calibrated magnitude exceeds this are outliers; 0 = none do.
        share: also the channels that are largest, this share of them, 0 to 1, as far as they stand
            out: twice the median channel or more.
        most: never more than this share of a site's channels, the largest of them.
        outputs: only products whose result leaves the model: nothing behind them evens noise out.

    Source: Dettmers et al. 2022, "LLM.int8()", section 3.2 (mixed-precision decomposition,
    threshold 6.0), eq. 8. There outliers are found in every run; here in calibration.
    """

    name: ClassVar[str] = "split-outliers"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED, Stage.CALIBRATED})

    threshold: float = 6.0
    share: float = 0.0
    most: float = 0.05
    outputs: bool = False

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise QGraphError(f"threshold={self.threshold} is negative: use 0 for none")
        for key in ("share", "most"):
            if not 0 <= getattr(self, key) <= 1:
                raise QGraphError(f"{key}={getattr(self, key)} is out of range: use 0 to 1")

    def run(self, model: ir.Model, context: Context) -> bool:
        groups = list(product_groups(model).values())
        if self.outputs:
            groups = [sites for sites in groups if any(map(_leaves, sites))]
        changed = False
        for sites in context.progress(groups, "splitting outliers", len(groups)):
            changed |= self._split(model, sites, context)
        if changed:
            remove_dead(model)
        return changed

    def _split(self, model: ir.Model, sites: list[Site], context: Context) -> bool:
        x = sites[0].x  # as it is now: an earlier split may have put its sum there
        quantized = [site for site in sites if data_spec(site) is not None]
        if why := unscalable(x, sites):
            self.remark(context, quantized, "declined", f"not split: {why}")
            return False
        stats = calibrated_stats(x)
        peaks = stats.channel_peak
        assert peaks is not None
        channels = outliers(peaks, self.threshold, self.share, self.most)
        if not channels.size:
            why = "not split: no channel has outliers"
            self.remark(context, quantized, "declined", why, largest=peaks.max())
            return False

        hush = np.ones(peaks.size, np.float32)
        hush[channels] = HUSH
        taken = _take(model, x, channels, quantized[0].node)
        route = absorption(x, [taken, *(site.node for site in sites)])
        if half_floats(context.target):  # there, what is hushed is lost
            route = None
        if route is not None and _carries(route, hush):
            divide(model, route, hush)
            hushed, rows_gain = x, HUSH
            for site in sites:
                if site not in quantized:
                    scale_inputs(model, site, hush)
        else:
            hushed, rows_gain = _masked(model, x, channels, quantized), np.float32(1)
        set_stats(hushed, stats.divided(hush))
        for site in quantized:
            rows = _rows(site, channels) * rows_gain
            if not read_elsewhere(site.weight, sites):
                scale_inputs(model, site, row_factors(input_peaks(site), channels))
            _add(model, site, taken.outputs[0], rows)
        numbers = {"channels": channels.size, "of": peaks.size}
        self.remark(
            context, quantized, "applied", "channels with outliers stay in float", **numbers
        )
        return True


def _take(model: ir.Model, x: ir.Value, channels: Indices, before: ir.Node) -> ir.Node:
    chosen = add_constant(model, f"{x.name}_outliers", channels)
    taken = insert(
        model, before, "Gather", [x, chosen], base=f"{x.name}_outlying", attributes={"axis": -1}
    )
    shape = None if x.shape is None else ir.Shape([*x.shape[:-1], channels.size])
    typed(taken, x.dtype, shape)
    return taken


def _carries(route: Absorption, hush: NDArray[np.float32]) -> bool:
    """Whether hushed channels can come this way: tied ones all or none, nothing rounds them off."""
    specs = [spec_of(value) for value in route.values]
    specs += [use_spec(edit.node, edit.index) for edit in route.edits]
    rounded = any(spec is not None and isinstance(spec.granularity, PerTensor) for spec in specs)
    return not rounded and np.array_equal(merge(route.ties, hush), hush)


def _masked(model: ir.Model, x: ir.Value, channels: Indices, sites: list[Site]) -> ir.Value:
    """x with zeros for the outliers, for these sites."""
    keep = np.ones(sites[0].kn[0], np.float32)
    keep[channels] = 0
    mask = add_constant(model, f"{x.name}_mask", keep)
    product = insert(model, sites[0].node, "Mul", [x, mask], base=f"{x.name}_masked")
    masked = typed(product, x.dtype, x.shape)
    for site in sites:
        site.node.replace_input_with(site.x_index, masked)
    return masked


def _rows(site: Site, channels: Indices) -> NDArray[np.float32]:
    """The weights that the outliers meet: (outliers, N)."""
    w = constant_array(site.weight)
    rows: NDArray[np.float32] = w.take(channels, 1 - site.axis)
    release(site.weight)
    alpha = np.float32(attribute(site.node, "alpha", 1.0))
    return np.ascontiguousarray(rows.T if site.axis == 0 else rows) * alpha


def _add(model: ir.Model, site: Site, taken: ir.Value, rows: NDArray[np.float32]) -> None:
    """y + taken · rows, for all readers of the site's result y."""
    y = site.node.outputs[0]
    weight = add_constant(model, f"{site.weight.name}_outliers", rows)
    product = insert(
        model, site.node, "MatMul", [taken, weight], base=f"{site.name}/outliers", after=True
    )
    operands = [y, typed(product, y.dtype, y.shape)]
    add = insert(model, product, "Add", operands, base=f"{y.name}_split", after=True)
    total = typed(add, y.dtype, y.shape)
    redirect(y, total, keep=[add])
    move_annotations(y, total)


def row_factors(peaks: NDArray[Any], channels: Indices) -> NDArray[np.float32]:
    """Factors that take the rows of the outliers out of the way of the integers' scales.

    They meet nothing any more and could as well be zeros. But a row that was only made smaller is
    still there for an embedding table that is tied to this weight (see `balance-tables`).

    Args:
        peaks: (K,), largest magnitude of the weights that each channel meets.
        channels: the outliers.

    Returns:
        (K,), 1 except for outliers with larger weights than the median channel.
    """
    typical = np.median(peaks)
    factors = np.ones(peaks.size, np.float32)
    factors[channels] = typical / np.maximum(peaks[channels], typical) if typical > 0 else 1
    return factors


def _leaves(site: Site) -> bool:
    """Whether the site's result is an output of the model, a bias added or not."""
    value = site.node.outputs[0]
    while not value.is_graph_output():
        user = only_user(value)
        if user is None or not is_op(user, "Add", "Cast", "Identity", "Reshape"):
            return False
        value = user.outputs[0]
    return True


def outliers(peaks: NDArray[Any], threshold: float, share: float, most: float) -> Indices:
    """The channels to keep in float, ascending.

    Args:
        peaks: (K,), largest magnitude of each channel.
        threshold: beyond it a channel is an outlier; 0 = none is.
        share: of all channels, the largest ones, if they are `DISTINCT` times the median or more.
        most: at most this share.

    Returns:
        int64 (n,).
    """
    count = int((peaks > threshold).sum()) if threshold else 0
    distinct = int((peaks > DISTINCT * np.median(peaks)).sum())
    count = min(max(count, min(round(share * peaks.size), distinct)), int(most * peaks.size))
    return np.sort(np.argsort(-peaks, kind="stable")[:count]).astype(np.int64)
