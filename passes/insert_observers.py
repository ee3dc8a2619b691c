"""Put an observer on every value whose range calibration must find."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qgraph.graph.annotation import (
    Stage,
    copy_annotations,
    data_spec,
    product_groups,
    set_wanted,
    static_specs,
    use_spec,
)
from qgraph.graph.editing import insert, typed
from qgraph.graph.functions import OBSERVER, declare
from qgraph.graph.sites import Site, site_of
from qgraph.numerics.spec import PerTensor, QuantSpec
from qgraph.numerics.stats import Wanted
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass


@dataclass(frozen=True)
class InsertObservers(Pass):
    """Put a `qgraph::Observer` on every value that is to be quantized with a fixed scale.

    ::

        x ── Conv ── Relu ── Conv        x ── Observer ── Conv ── Relu ── Observer ── Conv

    An observer is an identity; `calibrate` compiles it into reductions. It collects what the specs
    of the value need and no more: minimum and maximum always, a histogram for percentile, entropy
    and MSE ranges, the power of each token where all tokens of a MatMul or Gemm share a scale, the
    mean of each channel for bias correction, its extremes where the target needs to know which
    products can saturate.

    Attributes:
        channel_means: also collect the mean of each input channel of linear sites.
        channel_ranges: also observe the data of annotated MatMul and Gemm whose scales are found at
            run time, and collect the extremes of each of their input channels, for `smooth` and
            `split-outliers`.
    """

    name: ClassVar[str] = "insert-observers"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})
    provides: ClassVar[frozenset[Stage]] = frozenset({Stage.OBSERVED})

    channel_means: bool = False
    channel_ranges: bool = False

    def run(self, model: ir.Model, context: Context) -> bool:
        ranged = product_groups(model) if self.channel_ranges else {}
        values = [v for v in _values(model.graph) if v in ranged or static_specs(v)]
        observed = [(v, static_specs(v)) for v in values]
        for value, specs in observed:
            declare(model, OBSERVER)
            self._observe(model, value, self._wanted(value, specs, context.target.saturates))
        return bool(observed)

    def _observe(self, model: ir.Model, value: ir.Value, wanted: Wanted) -> None:
        producer = value.producer()
        node = insert(
            model, producer or model.graph[0], OBSERVER, [value],
            base=f"{value.name}/observer", domain="qgraph", after=producer is not None,
        )  # fmt: skip
        set_wanted(node, wanted)
        observed = typed(node, value.dtype, value.shape)
        copy_annotations(value, observed)
        for use in [u for u in value.uses() if u.node is not node]:
            use.node.replace_input_with(use.idx, observed)

    def _wanted(self, value: ir.Value, specs: list[QuantSpec], saturates: bool) -> Wanted:
        wanting = [use for use in value.uses() if use_spec(use.node, use.idx) is not None]
        users = [s for u in wanting if (s := site_of(u.node)) and s.x_index == u.idx]
        linear = any(s.is_product for s in users)
        axes = {-1 if s.is_product else 1 for s in users}
        axis = axes.pop() if len(axes) == 1 else None  # readers that disagree get neither
        return Wanted(
            histogram=any(s.observer in ("percentile", "entropy", "mse") for s in specs),
            channel_mean_axis=axis if self.channel_means else None,
            token_power=linear and (bool(specs) or any(map(_per_run, users))),
            channel_range_axis=axis if saturates or (self.channel_ranges and linear) else None,
        )


def _per_run(site: Site) -> bool:
    """Whether one scale, found at run time, is to serve all tokens of the site's data."""
    spec = data_spec(site)
    return spec is not None and isinstance(spec.granularity, PerTensor)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from list(graph.inputs)
    for node in list(graph):
        yield from node.outputs
