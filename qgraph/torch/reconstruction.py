"""Weights learned block by block, so that each block gives what it gives in the float model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.calibration.data import OUT_OF_SIGHT, UNREACHED, calibration_feeds, not_finite
from qgraph.calibration.resume import Resumable, Work
from qgraph.calibration.walk import Walk
from qgraph.errors import ModelError
from qgraph.graph.annotation import annotated, annotated_weight_spec
from qgraph.graph.cuts import Piece
from qgraph.graph.editing import remove_dead
from qgraph.graph.ops import FLOATS
from qgraph.graph.reading import constant_array, release
from qgraph.graph.sites import Site, nested, site_of
from qgraph.io.feeds import MASK, Feed
from qgraph.numerics.quantized import Arrays, Quantized, from_arrays, to_arrays
from qgraph.numerics.spec import QuantSpec
from qgraph.pipeline.context import Context
from qgraph.pipeline.remarks import Kind
from qgraph.torch.block import Block
from qgraph.torch.to_module import raise_model
from qgraph.weights.search import fixed_scales, unroundable
from qgraph.weights.site_weight import quantize_site, replace_weight


class Method(Work, Protocol):
    """How the weights of a block are learned: what passes have of their own."""

    def start(self, w: NDArray[Any], nearest: Quantized, spec: QuantSpec) -> Any:
        """What :meth:`learn` changes of the float weight `w`: one of the classes of
        :mod:`qgraph.torch.learned_rounding`."""
        ...

    def learn(self, block: Block, weights: Sequence[Any], plain: float, seed: int) -> None:
        """Learn what :meth:`start` gave for each weight; `plain` is the loss of `nearest`."""
        ...

    def remark(
        self, context: Context, site: Site, kind: Kind, message: str, **numbers: float
    ) -> None:
        """See :class:`qgraph.pipeline.pass_manager.Pass`."""
        ...


def learnable(
    model: ir.Model, method: Method, context: Context, *, scales: bool = False
) -> list[Site]:
    """The products and convolutions whose weights can be learned; remarks about the others.

    Args:
        scales: these are learned, too.
    """
    sites = []
    for node, specs in annotated(model):
        site = site_of(node)
        if site is None or not (site.is_product or site.is_convolution):
            continue
        if site.w_index not in specs:
            continue
        why = OUT_OF_SIGHT if nested(model, node) else unroundable(site, specs, context)
        if why is None and scales:
            why = fixed_scales(specs[site.w_index], specs.get(site.x_index))
        if why is not None:
            message = f"rounded to nearest: {why}"
            method.remark(context, site, "declined", message)
        else:
            sites.append(site)
    return sites


def reconstruct(
    model: ir.Model,
    sites: Sequence[Site],
    cuts: Sequence[ir.Value],
    context: Context,
    method: Method,
) -> None:
    """Learn the weights of `sites`, block by block between `cuts`, and give them their integers.

    Blocks come in the order of the graph. Each sees what the rounded blocks before it make of the
    calibration data, and is to give what the float model gives for float data. Where rounding to
    nearest serves it better, its sites keep that. With a cache folder in the context, what blocks
    learn is kept, and an interrupted run goes on there.

    Raises:
        CalibrationError: there is no calibration data, or it is not finite.
    """
    feeds = calibration_feeds(context)
    resumable = Resumable.of(method, model, feeds, context)
    stops = [str(value.name) for value in cuts]
    float_walk, walk = Walk(model.clone(), stops, feeds), Walk(model, stops, feeds)
    masks = [feed.get(MASK) for feed in feeds]

    def learn(numbered: tuple[int, list[Site]]) -> Arrays:
        at, inside = numbered
        float_walk.go_to(at)
        walk.go_to(at)
        block = _raised(walk.pieces[at], inside, walk, _outputs(float_walk), masks)
        return _settled(inside, block, context, method).to_arrays()

    blocks = [
        (at, inside)
        for at, piece in enumerate(walk.pieces)
        if (inside := [site for site in sites if site.node in piece.nodes])
    ]
    progress = context.progress(blocks, f"learning to round ({method.name})", len(blocks))
    for (_, inside), arrays in resumable.steps(progress, learn):
        _apply(model, inside, _Outcome.from_arrays(arrays), context, method)
    remove_dead(model)


def _outputs(walk: Walk) -> list[Feed]:
    """What the next piece of the walk gives for each feed, by name."""
    stop = str(walk.pieces[walk.at].stop.name)
    outputs = walk.advance()
    return [{**carried, stop: data} for carried, data in zip(walk.carried, outputs, strict=True)]


def _raised(
    piece: Piece,
    sites: Sequence[Site],
    walk: Walk,
    targets: Sequence[Feed],
    masks: Sequence[NDArray[Any] | None],
) -> Block | str:
    """The next piece as a block, or why it cannot be one."""
    try:
        module = raise_model(walk.extracted(piece, [site.weight for site in sites]))
    except ModelError as error:
        return str(error)
    reads = [str(value.name) for value in piece.inputs]
    reached = _reached(piece, sites)
    writes = [str(value.name) if value in reached else None for value in piece.outputs]
    return Block(
        module,
        [[carried[name] for name in reads] for carried in walk.carried],
        [[feed[name] if name else None for name in writes] for feed in targets],
        masks,
        all(site.is_product for site in sites),
    )


def _reached(piece: Piece, sites: Sequence[Site]) -> set[ir.Value]:
    """The floats of the piece that depend on its sites."""
    reached = {value for site in sites for value in site.node.outputs}
    stack = list(reached)
    while stack:
        for reader in stack.pop().consumers():
            fresh = [v for v in reader.outputs if reader in piece.nodes and v not in reached]
            reached.update(fresh)
            stack += fresh
    return {value for value in reached if value.dtype in (None, *FLOATS)}


def _settled(
    sites: Sequence[Site], block: Block | str, context: Context, method: Method
) -> _Outcome:
    """The integers that are learned for the sites of a block, or those of rounding to nearest."""
    nearest = [
        quantize_site(site, annotated_weight_spec(site), context.target.saturates) for site in sites
    ]
    if isinstance(block, str):
        return _Outcome(nearest, "declined", f"rounded to nearest: {block}")
    return _learned(sites, nearest, block, context, method)


def _apply(
    model: ir.Model, sites: Sequence[Site], outcome: _Outcome, context: Context, method: Method
) -> None:
    for site, weight in zip(sites, outcome.weights, strict=True):
        replace_weight(model, site, weight, method.name)
        method.remark(context, site, outcome.kind, outcome.message, **outcome.numbers)


@dataclass(frozen=True)
class _Outcome:
    """The weights of a block, and what is to be said of each."""

    weights: Sequence[Quantized]
    kind: Kind
    message: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        said = {"kind": np.array(self.kind), "message": np.array(self.message)}
        numbers = {f"number {name}": np.array(value) for name, value in self.numbers.items()}
        return {**to_arrays(self.weights), **said, **numbers}

    @staticmethod
    def from_arrays(arrays: Arrays) -> _Outcome:
        numbers = {
            key.removeprefix("number "): float(value)
            for key, value in arrays.items()
            if key.startswith("number ")
        }
        weights = [weight for weight in from_arrays(arrays) if weight is not None]
        return _Outcome(weights, arrays["kind"].item(), arrays["message"].item(), numbers)


def _learned(
    sites: Sequence[Site],
    nearest: Sequence[Quantized],
    block: Block,
    context: Context,
    method: Method,
) -> _Outcome:
    if not block.finite:
        raise not_finite(f"'{sites[0].x.name}', or what follows,")
    if not block.reached:
        return _Outcome(nearest, "declined", f"rounded to nearest: {UNREACHED}")
    weights = []
    for site, weight in zip(sites, nearest, strict=True):
        w = constant_array(site.weight)
        weights.append(method.start(w, weight, annotated_weight_spec(site)))
        release(site.weight)
    plain = block.error(nearest)
    if len(block.unpaired) == len(block.seen):
        why = "rounded data takes other ways through the model"
        return _Outcome(nearest, "declined", f"rounded to nearest: {why}")
    if plain:
        method.learn(block, weights, plain, context.seed)
    learned = [weight.integers() for weight in weights]
    noise = block.error(learned)
    numbers = {"noise": noise, "nearest": plain}
    if noise < plain:
        return _Outcome(learned, "applied", "rounding learned", numbers)
    why = "that serves the calibration data as well"
    return _Outcome(nearest, "declined", f"rounded to nearest: {why}", numbers)
