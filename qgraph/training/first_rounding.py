"""Weights rounded by what layers put out, layer by layer, as a start for training."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qgraph.backends.onnx import OnnxTarget
from qgraph.graph.annotation import annotated, integers_of, set_use_specs
from qgraph.graph.reading import node_name
from qgraph.graph.sites import site_of
from qgraph.io.feeds import Feed
from qgraph.numerics.quantized import Quantized
from qgraph.passes.adaround import AdaRound
from qgraph.pipeline.context import Context
from qgraph.pipeline.progress import Progress


def adarounded(
    model: ir.Model, feeds: Sequence[Feed], steps: int, progress: Progress
) -> dict[str, Quantized]:
    """The weights of an annotated model by :class:`qgraph.passes.adaround.AdaRound`, by the name of
    the node that reads them; without those that it leaves alone. Rewrites the model."""
    for node, specs in list(annotated(model)):
        site = site_of(node)
        if site is not None:  # what scales of data do is left to training
            set_use_specs(node, {i: spec for i, spec in specs.items() if i == site.w_index})
    AdaRound(steps).run(model, Context(OnnxTarget(), feeds, progress=progress))
    rounded: dict[str, Quantized] = {}
    for node, _ in annotated(model):
        site = site_of(node)
        integers = integers_of(site.weight) if site is not None else None
        if integers is not None:
            _, rounded[node_name(node)] = integers
    return rounded
