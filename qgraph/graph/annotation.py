"""Where quantization lives between `annotate` and `insert-qdq`: in the meta of values and nodes.

Passes annotate by the functions here; the keys are nobody else's business. What a function returns
is what was set, not a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Literal

import numpy as np
import onnx_ir as ir

from qgraph.errors import PipelineError
from qgraph.graph.names import forget_names
from qgraph.graph.reading import constant, graphs, initializers, nodes, view
from qgraph.graph.sites import Site, output_value, site_of
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.spec import QuantSpec
from qgraph.numerics.stats import Stats, Wanted

SPEC, IN, STATS = "qgraph.spec", "qgraph.in", "qgraph.stats"
SCALE, INTEGERS = "qgraph.scale", "qgraph.integers"
WANTED, STAGES_KEY = "qgraph.wanted", "qgraph.stages"
"""Keys in `meta`, for the functions below alone."""


# --- specs: how to quantize a value, for all its users or for one ---------------------------------


def spec_of(value: ir.Value) -> QuantSpec | None:
    """How `value` is to be quantized for all its users; None if it has no spec of its own."""
    spec: QuantSpec | None = value.meta.get(SPEC)
    return spec


def set_spec(value: ir.Value, spec: QuantSpec) -> None:
    """Quantize `value` by `spec`, for all its users."""
    value.meta[SPEC] = spec


def is_annotated(node: ir.Node) -> bool:
    """Whether something was settled about the inputs of `node`, be it that all stay float."""
    return IN in node.meta


def use_specs(node: ir.Node) -> Mapping[int, QuantSpec]:
    """The specs of the inputs that are to be quantized for `node`, by index."""
    specs: Mapping[int, QuantSpec] = node.meta.get(IN, {})
    return specs


def set_use_specs(node: ir.Node, specs: Mapping[int, QuantSpec]) -> None:
    """Quantize these inputs of `node`, and no others."""
    node.meta[IN] = dict(specs)


def use_spec(node: ir.Node, index: int) -> QuantSpec | None:
    """How input `index` is to be quantized for `node`; None if it stays float."""
    return use_specs(node).get(index)


def set_use_spec(node: ir.Node, index: int, spec: QuantSpec) -> None:
    """Quantize input `index` of `node` by `spec`; its other inputs keep theirs."""
    node.meta.setdefault(IN, {})[index] = spec


def forget_use_spec(node: ir.Node, index: int) -> None:
    """Leave input `index` of `node` as it is: it is quantized already."""
    node.meta[IN].pop(index, None)


def data_spec(site: Site) -> QuantSpec | None:
    """How the data of `site` is to be quantized; None if it stays float."""
    return use_spec(site.node, site.x_index)


def weight_spec(site: Site) -> QuantSpec | None:
    """How the weight of `site` is to be quantized; None if it stays float."""
    return use_spec(site.node, site.w_index)


def annotated_weight_spec(site: Site) -> QuantSpec:
    """How the weight of `site` is to be quantized, where it is known that it is.

    Raises:
        KeyError: the weight stays float.
    """
    return use_specs(site.node)[site.w_index]


def annotated(model: ir.Model) -> Iterator[tuple[ir.Node, Mapping[int, QuantSpec]]]:
    """Every node with specs on its inputs."""
    for node in nodes(model):
        if is_annotated(node):
            yield node, use_specs(node)


def commit_to(site: Site, activation: QuantSpec | None, weight: QuantSpec) -> None:
    """Record the specs of one site: per use on the node, and on the output of a static convolution,
    whose integer kernel writes integers."""
    specs = {site.w_index: weight}
    if activation is not None:
        specs[site.x_index] = activation
    set_use_specs(site.node, specs)
    if activation is not None and not activation.dynamic and site.kind == "conv":
        set_spec(output_value(site.node), activation)


def retract(site: Site) -> None:
    """Make the site float again."""
    retract_node(site.node)


def retract_node(node: ir.Node) -> None:
    """Make the inputs and the result of `node` float again, whether it is a site or not."""
    node.meta.pop(IN, None)
    output_value(node).meta.pop(SPEC, None)


def static_specs(value: ir.Value) -> list[QuantSpec]:
    """The fixed-scale specs of a computed value: its own, then what its users want."""
    if constant(value) is not None:
        return []
    specs = [spec_of(value), *(use_spec(use.node, use.idx) for use in value.uses())]
    return [spec for spec in specs if spec is not None and not spec.dynamic]


def static_spec(value: ir.Value) -> QuantSpec | None:
    """The spec that counts where users disagree, the first of :func:`static_specs`, or None."""
    return next(iter(static_specs(value)), None)


def known_static_spec(value: ir.Value) -> QuantSpec:
    """:func:`static_spec` of a value that is known to have one.

    Raises:
        ValueError: it stays float, or its scale is found at run time.
    """
    spec = static_spec(value)
    if spec is None:
        raise ValueError(f"'{value.name}' has no fixed scale")
    return spec


def static_uses(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """The nodes that read `value` rounded by a fixed scale, and as which input: all users if it has
    a spec, else those with one; but none that find a scale at run time."""
    uses = [(use.node, use.idx) for use in value.uses()]
    specs = [use_spec(*use) or spec_of(value) for use in uses]
    pairs = zip(uses, specs, strict=True)
    return [use for use, spec in pairs if spec is not None and not spec.dynamic]


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
    spec = data_spec if annotated == "data" else weight_spec
    return {x: sites for x, sites in groups.items() if any(map(spec, sites))}


# --- what was found: statistics, scales and integers ----------------------------------------------


def wanted_of(observer: ir.Node) -> Wanted:
    """What to collect of the value that an Observer node reads.

    Raises:
        PipelineError: it was read from a file, which cannot hold that.
    """
    if WANTED not in observer.meta:
        raise PipelineError(
            "observers that were saved have forgotten what to collect: "
            "run insert-observers and calibrate in one pipeline"
        )
    wanted: Wanted = observer.meta[WANTED]
    return wanted


def set_wanted(observer: ir.Node, wanted: Wanted) -> None:
    """Tell an Observer node what to collect."""
    observer.meta[WANTED] = wanted


def stats_of(value: ir.Value) -> Stats | None:
    """What calibration found of `value`; None if it was not observed."""
    stats: Stats | None = value.meta.get(STATS)
    return stats


def calibrated_stats(value: ir.Value) -> Stats:
    """What calibration found of `value`, where it is known that it was observed.

    Raises:
        KeyError: it was not.
    """
    stats: Stats = value.meta[STATS]
    return stats


def set_stats(value: ir.Value, stats: Stats) -> None:
    """Remember what calibration found of `value`."""
    value.meta[STATS] = stats


def forget_stats(value: ir.Value) -> None:
    """Forget what calibration found of `value`: it is another one now."""
    value.meta.pop(STATS, None)


def trained_scale(value: ir.Value) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale (float32) and zero point (int32) of `value` that training found, both 0-D; they count
    instead of statistics."""
    scale: tuple[np.ndarray, np.ndarray] | None = value.meta.get(SCALE)
    return scale


def set_trained_scale(value: ir.Value, scale: np.ndarray, zero: np.ndarray) -> None:
    """Give `value` the scale (float32) and zero point (int32) that training found, both 0-D."""
    value.meta[SCALE] = (scale, zero)


def integers_of(weight: ir.Value) -> tuple[QuantSpec, Quantized] | None:
    """The spec that a weight was rounded for, and what to; None if no pass has rounded it. A
    weight with integers holds nothing else any more."""
    integers: tuple[QuantSpec, Quantized] | None = weight.meta.get(INTEGERS)
    return integers


def set_integers(weight: ir.Value, spec: QuantSpec, integers: Quantized) -> None:
    """Make `insert-qdq` write these integers where `weight` is to be quantized by `spec`."""
    weight.meta[INTEGERS] = (spec, integers)


def settled(model: ir.Model) -> Iterator[tuple[str, np.ndarray]]:
    """Scales that training found and integers that weights were rounded to, with a name each."""
    for graph in graphs(model):
        constants = graph.initializers.values() if isinstance(graph, ir.Graph) else ()
        for value in (*graph.inputs, *constants, *(v for node in graph for v in node.outputs)):
            for part, array in zip(("scale", "zero"), trained_scale(value) or (), strict=False):
                yield f"{value.name}/{part}", array
            if (integers := integers_of(value)) is not None:
                yield f"{value.name}/{integers[0]}", integers[1].q
                yield f"{value.name}/scales", integers[1].scale
                yield f"{value.name}/zeros", integers[1].zero


# --- stages of a model ---------------------------------------------------------------------------


class Stage(StrEnum):
    """A fact about a model that passes require, provide or invalidate."""

    CANONICAL = "canonical"
    ANNOTATED = "annotated"
    OBSERVED = "observed"
    CALIBRATED = "calibrated"
    COMMITTED = "committed"
    LOWERED = "lowered"


def stages_of(model: ir.Model) -> set[Stage]:
    """The stages that hold for `model`; whoever changes the set changes them."""
    held: set[Stage] = model.meta.setdefault(STAGES_KEY, set())
    return held


# --- the annotations of a value or model as a whole -----------------------------------------------


def copy_annotations(old: ir.Value, new: ir.Value) -> None:
    """Give `new` all that is known of `old`, whose content it has."""
    new.meta.update(old.meta)


def move_annotations(old: ir.Value, new: ir.Value) -> None:
    """Give `new`, which users read instead of `old`, its spec and statistics; `old` loses them."""
    for key in (SPEC, STATS):
        if key in old.meta:
            new.meta[key] = old.meta.pop(key)


def annotations_at(node: ir.Node) -> list[str]:
    """Names of the specs and statistics on `node`, its inputs and outputs, for an error message."""
    left = [IN] if IN in node.meta else []
    for value in (*node.inputs, *node.outputs):
        if value is not None:
            left += [key for key in (SPEC, STATS) if key in value.meta]
    return left


def forget(model: ir.Model) -> None:
    """Drop all annotations: from here on, the graph itself says what is quantized."""
    for graph in graphs(model):
        initializers = graph.initializers.values() if isinstance(graph, ir.Graph) else ()
        computed = (value for node in graph for value in node.outputs)
        for value in (*graph.inputs, *initializers, *computed):
            for key in (SPEC, STATS, SCALE, INTEGERS):
                value.meta.pop(key, None)
        for node in graph:
            node.meta.pop(IN, None)


def copied(model: ir.Model) -> ir.Model:
    """A copy with stages and annotations of its own, which shares the data of its weights."""
    copy = model.clone()
    for value in initializers(copy):
        if value.const_value is not None:
            value.const_value = view(value.const_value)
    copy.meta.update(model.meta)
    copy.meta[STAGES_KEY] = set(model.meta.get(STAGES_KEY, ()))
    forget_names(copy)
    for node, specs in annotated(copy):
        set_use_specs(node, specs)
    return copy
