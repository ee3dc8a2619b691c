"""GPTQ: round the weights of a product one after the other, each making up for those before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qgraph.calibration.data import OUT_OF_SIGHT, UNREACHED, calibration_feeds, not_finite
from qgraph.calibration.resume import Resumable
from qgraph.calibration.walk import Walk
from qgraph.errors import QGraphError
from qgraph.graph.annotation import (
    Stage,
    annotated,
    annotated_weight_spec,
    product_groups,
    weight_spec,
)
from qgraph.graph.editing import remove_dead
from qgraph.graph.reading import constant_array, release
from qgraph.graph.sites import Site, site_of
from qgraph.io.feeds import MASK
from qgraph.numerics.quantized import Arrays, Quantized, from_arrays, to_arrays
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass
from qgraph.weights.gptq import Matrix, Rounded, gram_matrices, problem, round_weight
from qgraph.weights.search import unroundable
from qgraph.weights.site_weight import quantize_site, replace_weight


@dataclass(frozen=True)
class GPTQ(Pass):
    """Choose the integers of each product by what its data makes of their errors.

    The problem: rounding to nearest serves every single weight, but what counts is x · W, over
    channels that are neither equal nor independent: weights can make up for each other's errors.
    Rows of W are rounded one after the other, those of the strongest channels first. Each row's
    error moves the rows that are still to come, to where they best undo it on real data::

        x ── MatMul(W) ── y        W[i] ── round ── Q[i]
                                     └─ W[i] - Q[i] ─┬─ U[i, i+1] / U[i, i] ─── W[i+1] ── round ...
                                                     └─ U[i, i+2] / U[i, i] ─── W[i+2] ...

    where UᵀU is the inverse of the damped Gram matrix xᵀx. Scales are fixed before, so that each
    block has one in whatever order its rows come: those at which rounding to nearest would lose
    least, errors of row i weighted by 1 / U[i, i]², which is what they cost.

    Products are rounded in the order of the graph, and x is what the rounded products before make
    of the calibration data; the weights first move to where they best give what the float product
    gives for float data, so that errors of earlier layers are corrected too. Tokens count alike,
    whatever their magnitude: a language model's first token may be a thousand times larger than
    all others, and would have the weights to itself. Padding does not count.

    Columns that rounding to nearest serves better keep it, and so do products whose weight others
    read too, that sit in bodies of control flow, or that calibration never reaches. insert-qdq
    takes the integers as they are. With a cache folder in the context, what is done is kept, and an
    interrupted run goes on from there.

    Attributes:
        act_order: round the rows of the strongest channels first; else in the order they have.
        damping: weight of staying near the float weights, in units of the mean power of a data
            channel. More of it fits the calibration data less, and other data better. It is raised
            where the Gram matrix is singular in spite of it.

    Source: Frantar et al. 2022, "GPTQ", eq. 2-3 and algorithm 1; Li et al. 2025, "GPTAQ", for what
    is asked of the products (their eq. 5; :func:`qgraph.weights.gptq.correction` solves it whole).
    """

    name: ClassVar[str] = "gptq"
    version: ClassVar[int] = 1
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})

    act_order: bool = True
    damping: float = 0.1

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise QGraphError(f"damping={self.damping} is out of range: use 0 or more")

    def run(self, model: ir.Model, context: Context) -> bool:
        groups = self._groups(model, context)
        if not groups:
            return False
        feeds = calibration_feeds(context)
        resumable = Resumable.of(self, model, feeds, context)
        stops = [str(x.name) for x in groups]
        walks = Walk(model.clone(), stops, feeds), Walk(model, stops, feeds)
        masks = [feed.get(MASK) for feed in feeds]

        def round_group(numbered: tuple[int, list[Site]]) -> Arrays:
            step, sites = numbered
            if not walks[0].at:
                _resume(walks, resumable.state(), step)
            gram, cross, alone = _gram_matrices(walks, step, masks)
            if alone:
                message = "rounded data takes other ways in some feeds: taken as it is there"
                self.remark(context, sites, "note", message, feeds=alone)
            return _arrays(self._rounded(sites, gram, cross, context))

        numbered = list(enumerate(groups.values()))
        progress = context.progress(numbered, "rounding by GPTQ", len(groups))
        for (_, sites), arrays in resumable.steps(progress, round_group, partial(_state, walks)):
            for site, rounded in zip(sites, _restored(arrays), strict=True):
                weight = rounded.weight if rounded else _to_nearest(site, context)
                replace_weight(model, site, weight, "gptq")
                self._report(site, rounded, context)
        remove_dead(model)
        return True

    def _groups(self, model: ir.Model, context: Context) -> dict[ir.Value, list[Site]]:
        """The products to round, by the data that they share."""
        reached = {
            site.node for sites in product_groups(model, "weight").values() for site in sites
        }
        for node, specs in annotated(model):
            site = site_of(node)
            if site is None or not site.is_product or site.w_index not in specs:
                continue
            why = unroundable(site, specs, context) if node in reached else OUT_OF_SIGHT
            if why is not None:
                reached.discard(node)
                self.remark(context, site, "declined", f"rounded to nearest: {why}")
        groups = {
            x: [s for s in sites if s.node in reached and weight_spec(s) is not None]
            for x, sites in product_groups(model, "weight").items()
        }
        return {x: sites for x, sites in groups.items() if sites}

    def _rounded(
        self, sites: list[Site], gram: Matrix, cross: Matrix, context: Context
    ) -> list[Rounded | None]:
        """The weights of products that share their data; None where there was no data."""
        shared = problem(gram, cross, self.damping, self.act_order)
        if shared is None:
            return [None] * len(sites)
        rounded: list[Rounded | None] = []
        for site in sites:
            nearest = _to_nearest(site, context)
            w, spec = constant_array(site.weight), annotated_weight_spec(site)
            rounded.append(round_weight(w, site.axis, nearest, spec, shared))
            release(site.weight)
        return rounded

    def _report(self, site: Site, rounded: Rounded | None, context: Context) -> None:
        if rounded is None:
            message = f"rounded to nearest: {UNREACHED}"
            self.remark(context, site, "declined", message)
            return
        numbers = {"noise": rounded.noise, "nearest": rounded.nearest}
        if rounded.columns:
            numbers["columns_to_nearest"] = rounded.columns
        self.remark(context, site, "applied", "rounded by GPTQ", **numbers)
        if rounded.damping > self.damping:
            message = "damping raised: the Gram matrix of its data is singular"
            self.remark(context, site, "note", message, damping=rounded.damping)


def _gram_matrices(
    walks: Sequence[Walk], step: int, masks: Sequence[np.ndarray | None]
) -> tuple[Matrix, Matrix, int]:
    """Those of the data at a stop, in the float model and in the rounded one.

    Where data is sent different ways, such as to experts, rounded data may go another one: tokens
    are no pairs then, and count as if they were meant. Returns also how many feeds have such.

    Raises:
        CalibrationError: they are not finite.
    """
    for walk in walks:
        walk.go_to(step)
    meant, seen = (walk.advance() for walk in walks)
    paired = [a if a.shape == b.shape else b for a, b in zip(meant, seen, strict=True)]
    alone = sum(a.shape != b.shape for a, b in zip(meant, seen, strict=True))
    gram, cross = gram_matrices(paired, seen, masks)
    if not np.isfinite([gram, cross]).all():
        raise not_finite(f"'{walks[0].pieces[step].stop.name}'")
    return gram, cross, alone


def _to_nearest(site: Site, context: Context) -> Quantized:
    nearest = quantize_site(site, annotated_weight_spec(site), context.target.saturates)
    release(site.weight)
    return nearest


# --- what is kept of a run ------------------------------------------------------------------------


def _arrays(rounded: Sequence[Rounded | None]) -> dict[str, np.ndarray]:
    arrays = to_arrays([None if r is None else r.weight for r in rounded])
    for i, r in enumerate(rounded):
        if r is not None:
            arrays[f"{i}.numbers"] = np.array([r.noise, r.nearest, r.columns, r.damping])
    return arrays


def _restored(arrays: Arrays) -> list[Rounded | None]:
    rounded: list[Rounded | None] = []
    for i, weight in enumerate(from_arrays(arrays)):
        if weight is None:
            rounded.append(None)
            continue
        noise, plain, columns, damping = arrays[f"{i}.numbers"].tolist()
        rounded.append(Rounded(weight, noise, plain, int(columns), damping))
    return rounded


def _state(walks: Sequence[Walk]) -> dict[str, np.ndarray]:
    parts = [{f"{i}|{key}": v for key, v in walk.state().items()} for i, walk in enumerate(walks)]
    return {"at": np.array(walks[0].at), **parts[0], **parts[1]}


def _resume(walks: Sequence[Walk], state: Arrays | None, missing: int) -> None:
    """Go to where the state was taken, unless results before it are gone."""
    if state is None or state["at"] > missing:
        return
    for index, walk in enumerate(walks):
        own = {
            key.removeprefix(f"{index}|"): v
            for key, v in state.items()
            if key.startswith(f"{index}|")
        }
        walk.resume(int(state["at"]), own)
