"""Weights rounded by what layers put out, layer by layer, as a start for training."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qgraph.backends.onnx import OnnxTarget
from qgraph.graph.annotation import IN, INTEGERS, annotated
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
            node.meta[IN] = {site.w_index: specs[site.w_index]} if site.w_index in specs else {}
    AdaRound(steps).run(model, Context(OnnxTarget(), feeds, progress=progress))
    sites = ((node, site_of(node)) for node, _ in annotated(model))
    return {
        node_name(node): site.weight.meta[INTEGERS][1]
        for node, site in sites
        if site is not None and INTEGERS in site.weight.meta
    }
