"""Where quantization lives between `annotate` and `insert-qdq`: in the meta of values and nodes."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Literal

import onnx_ir as ir

from qgraph.graph.ops import CLAMPS
from qgraph.graph.reading import constant, is_op, nodes
from qgraph.graph.sites import Site, only_user, site_of
from qgraph.numerics.spec import PerAxis, PerBlock, QuantSpec

SPEC = "qgraph.spec"
"""Key in `value.meta`: quantize this value, for all its users."""
IN = "qgraph.in"
"""Key in `node.meta`: quantize input `index` of this node as `spec`, `{index: spec}`."""

STATS = "qgraph.stats"
"""Key in `value.meta`: what calibration found, a :class:`qgraph.numerics.stats.Stats`."""

SCALE = "qgraph.scale"
"""Key in `value.meta`: scale (float32) and zero point (int32) that training found, both 0-D; they
count instead of statistics."""

INTEGERS = "qgraph.integers"
"""Key in `value.meta` of a weight that a pass has rounded, and holds nothing else any more: the
spec it was rounded for, and what to, a :class:`qgraph.numerics.quantized.Quantized`."""


def describe(activation: QuantSpec | None, weight: QuantSpec) -> str:
    """How a site is quantized, in words for a remark."""
    data = "float activations" if activation is None else f"activations {words(activation)}"
    return f"weights {words(weight)}, {data}"


def words(spec: QuantSpec) -> str:
    """A spec in words for a remark; axes are the site's own, which its name tells."""
    granularity = "per-channel" if isinstance(spec.granularity, PerAxis) else str(spec.granularity)
    if isinstance(spec.granularity, PerBlock):
        granularity = f"in blocks of {spec.granularity.size}"
    when = "dynamic " if spec.dynamic else ""
    return f"{when}{spec.codebook or spec.dtype.name.lower()} {granularity}"


def commit_to(site: Site, activation: QuantSpec | None, weight: QuantSpec) -> None:
    """Record the specs of one site: per use on the node, and on the output of a static convolution,
    whose integer kernel writes integers."""
    wanted = {site.w_index: weight}
    if activation is not None:
        wanted[site.x_index] = activation
    site.node.meta[IN] = wanted
    if activation is not None and not activation.dynamic and site.kind == "conv":
        output_value(site.node).meta[SPEC] = activation


def retract(site: Site) -> None:
    """Make the site float again."""
    site.node.meta.pop(IN, None)
    output_value(site.node).meta.pop(SPEC, None)


def output_value(node: ir.Node) -> ir.Value:
    """Where the node's result is quantized: behind an activation that integer clamps absorb."""
    value = node.outputs[0]
    while (user := only_user(value)) is not None and is_op(user, *CLAMPS):
        if user.inputs[0] is not value:
            break
        value = user.outputs[0]
    return value


def static_specs(value: ir.Value) -> list[QuantSpec]:
    """The fixed-scale specs of a computed value: its own, then what its users want."""
    if constant(value) is not None:
        return []
    wanted = [value.meta.get(SPEC)]
    wanted += [use.node.meta.get(IN, {}).get(use.idx) for use in value.uses()]
    return [spec for spec in wanted if spec is not None and not spec.dynamic]


def static_spec(value: ir.Value) -> QuantSpec | None:
    """The spec that counts where users disagree, the first of :func:`static_specs`, or None."""
    return next(iter(static_specs(value)), None)


def product_groups(
    model: ir.Model, annotated: Literal["data", "weight"] = "data"
) -> dict[ir.Value, list[Site]]:
    """The MatMul and Gemm of the main graph by the data that they share.

    Only groups in which at least one is annotated to quantize its data, or its weight; the others
    are there too, since whoever changes the data must see all of its readers.
    """
    groups: dict[ir.Value, list[Site]] = {}
    for node in model.graph:
        site = site_of(node)
        if site is not None and site.is_product and constant(site.x) is None:
            groups.setdefault(site.x, []).append(site)
    return {
        x: found
        for x, found in groups.items()
        if any(
            (site.x_index if annotated == "data" else site.w_index) in site.node.meta.get(IN, {})
            for site in found
        )
    }


def annotated(model: ir.Model) -> Iterator[tuple[ir.Node, dict[int, QuantSpec]]]:
    """Every node with specs on its inputs."""
    for node in nodes(model):
        if IN in node.meta:
            yield node, node.meta[IN]


class Stage(StrEnum):
    """A fact about a model that passes require, provide or invalidate."""

    CANONICAL = "canonical"
    ANNOTATED = "annotated"
    OBSERVED = "observed"
    CALIBRATED = "calibrated"
    COMMITTED = "committed"
    LOWERED = "lowered"


STAGES_KEY = "qgraph.stages"
"""Where a model remembers its stages, in `model.meta`."""


def stages(model: ir.Model) -> set[Stage]:
    """The stages that hold for `model`."""
    found: set[Stage] = model.meta.setdefault(STAGES_KEY, set())
    return found


WANTED = "qgraph.wanted"
"""Key in the meta of an Observer node: what to collect, a :class:`qgraph.numerics.stats.Wanted`."""
