"""Decide, site by site, what is to be quantized and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import ClassVar, Literal, get_args

import onnx_ir as ir

from qgraph.errors import PipelineError
from qgraph.graph.annotation import (
    Stage,
    commit_to,
    integers_of,
    is_annotated,
    retract,
    retract_node,
    set_spec,
    set_use_specs,
    spec_of,
    static_spec,
    use_spec,
)
from qgraph.graph.einsum import product_of
from qgraph.graph.fused_products import why_fused
from qgraph.graph.islands import Cost, gains, settle, size
from qgraph.graph.ops import LINEAR
from qgraph.graph.reading import attribute, constant, is_op, node_name, nodes, opset
from qgraph.graph.sites import (
    CONVOLUTIONS,
    PRODUCTS,
    Site,
    SiteKind,
    nested,
    output_value,
    site_of,
    sites,
)
from qgraph.numerics.spec import (
    PER_RUN,
    PER_TOKEN,
    WEIGHT,
    PerTensor,
    QuantSpec,
    RangeMethod,
    describe,
    with_channels,
    words,
)
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass
from qgraph.pipeline.target import Verdict
from qgraph.weights import formats
from qgraph.weights.unfit import infinite_bias, too_old, unfit

Scheme = Literal["static", "dynamic"]
_USUAL: tuple[RangeMethod, RangeMethod] = ("mse", "minmax")
OBSERVERS = ("auto", "minmax", "percentile", "entropy", "mse")
"""How calibration can find the range of an activation."""


@dataclass(frozen=True)
class Rule:
    """Sites of these kinds whose names match get these specs; the first rule that fits counts.

    Attributes:
        kinds: kinds of site.
        weight: how to quantize the weight (`PerAxis` means the site's own output-channel axis,
            `PerBlock` its other one), or None to keep the site float. Weights that cannot be in
            blocks or 4-bit integers get 8 bits and a scale for each channel.
        activations: how to quantize the data, best first: the first that the target runs faster
            than float is taken. None, or nothing at all: only the weight is quantized.
        layers: glob on the site's name.
        where: which of these sites, by what surrounds them (:func:`qgraph.graph.mlp.in_mlp`);
            None: all.
        why: reason given for a site kept float.
        by_speed: the activations are as good as each other, so that for `optimize_for=prompt` or
            `decode` the fastest of them is taken.
    """

    kinds: tuple[SiteKind, ...]
    weight: QuantSpec | None
    activations: tuple[QuantSpec | None, ...] = ()
    layers: str = "*"
    where: Callable[[Site], bool] | None = None
    why: str = "kept float by a rule of the recipe"
    by_speed: bool = False

    def fits(self, site: Site) -> bool:
        """Whether this rule speaks about `site`."""
        named = site.kind in self.kinds and fnmatchcase(site.name, self.layers)
        return named and (self.where is None or self.where(site))


def dynamic_rules(weight: QuantSpec = WEIGHT) -> tuple[Rule, ...]:
    """Weights quantized once, activations at run time: needs no data."""
    return (
        Rule(PRODUCTS, weight, (PER_TOKEN, PER_RUN)),
        Rule(CONVOLUTIONS, weight, (PER_RUN,)),
        Rule(("gather",), weight),
        Rule(("activations",), None, why=_ATTENTION),
        Rule(("rnn",), None, why=_RECURRENT),
    )


def static_rules(
    image: QuantSpec, token: QuantSpec, weight: QuantSpec = WEIGHT
) -> tuple[Rule, ...]:
    """Weights and activation scales fixed at compile time, from calibration.

    Args:
        image: for the data of convolutions.
        token: for the data of matrix products.
    """
    return (
        Rule(CONVOLUTIONS, weight, (image,)),
        Rule(PRODUCTS, weight, (token,)),
        *dynamic_rules(weight)[2:],
    )


_ATTENTION = "both operands are computed: quantizing them costs more than the product saves"
_BATCHED = "its weight is a batch of matrices, which no integer kernel multiplies"
_TRANSPOSED = "its data is transposed (transA), which no integer kernel multiplies"
_RECURRENT = (
    "recurrent: errors of its weights add up over time steps, and the target has no faster kernel"
)


@dataclass(frozen=True)
class Annotate(Pass):
    """Mark what to quantize, and how; nothing is rewritten yet.

    The rules say what is wanted, the target says what it can run and whether that is faster than
    float. Around quantized convolutions, operators with integer kernels (Add, pooling, Concat, ...)
    join in, so that data stays in integers between them instead of being converted twice::

        x ── Conv ── Relu ── Add ── ...        x:u8 ── Conv ── Relu ── :u8 ── Add ── :u8 ...
                              ╲ W                         ╲ W:s8 per-axis(0)

    Every MatMul, Gemm, Conv, ConvTranspose, Einsum, Gather on weights, recurrent operator and fused
    operator with weights in it gets a remark: quantized how, or float and why.

    Attributes:
        scheme: `dynamic` computes activation scales at run time, `static` takes them from
            calibration; sites in bodies of If, Loop and Scan, where calibration cannot look, are
            dynamic in both.
        observer: how static ranges are found; `auto` is mse around convolutions and minmax for the
            data of matrix products, whose rare large tokens must not be clipped.
        rules: further rules, tried before those of the scheme.
        weight: how weights are quantized.
        act_bits: bits of static activations, 2 to 8.

    Source: Jacob et al. 2018 (integer-only inference), Krishnamoorthi 2018 (per-channel weights),
    Yao et al. 2022 (token-wise activations).
    """

    name: ClassVar[str] = "annotate"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.CANONICAL})
    provides: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})

    scheme: Scheme = "dynamic"
    observer: RangeMethod | Literal["auto"] = "auto"
    rules: tuple[Rule, ...] = ()
    weight: QuantSpec = WEIGHT
    act_bits: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.act_bits <= 8:
            raise PipelineError(f"act_bits={self.act_bits} is out of range: use 2 to 8")
        for name, value, known in (
            ("scheme", self.scheme, get_args(Scheme)),
            ("observer", self.observer, OBSERVERS),
        ):
            if value not in known:
                raise PipelineError(f"{name} '{value}' is unknown: use one of {', '.join(known)}")

    def run(self, model: ir.Model, context: Context) -> bool:
        image, token = (
            QuantSpec(
                ir.DataType.UINT8,
                PerTensor(),
                symmetric=False,
                observer=usual if self.observer == "auto" else self.observer,
                bits=self.act_bits % 8,
            )
            for usual in _USUAL
        )
        fixed = self.rules + static_rules(image, token, self.weight)
        at_run_time = self.rules + dynamic_rules(self.weight)
        for site in sites(model):
            inside = nested(model, site.node)
            rules = fixed if self.scheme == "static" and not inside else at_run_time
            self._annotate(site, rules, opset(model), inside, context)
        for node in nodes(model):
            if is_op(node, *LINEAR) and site_of(node) is None:
                why = "its weight is computed or not floating-point"
                if attribute(node, "transA", 0) and constant(node.inputs[1]) is not None:
                    why = _TRANSPOSED
                context.remark("float", self.name, node_name(node), node.op_type, why)
            elif (reason := why_fused(node) or _why_no_product(node)) is not None:
                context.remark("float", self.name, node_name(node), node.op_type, reason)
        if self.scheme == "static":
            _weigh_convolutions(self, model, context)
            for node in model.graph:
                if context.target.supports_glue(node):
                    _join(node, image)
            _drop_lonely_glue(model)
        return False

    def _annotate(
        self, site: Site, rules: tuple[Rule, ...], version: int, inside: bool, context: Context
    ) -> None:
        rule = next((r for r in rules if r.fits(site)), None)
        if rule is None or rule.weight is None:
            why = rule.why if rule else "no rule of the recipe covers it"
            if site.kind == "activations" and constant(site.weight) is not None:
                why = _BATCHED
            self.remark(context, site, "float", why)
            return
        if reason := unfit(site):
            self.remark(context, site, "float", reason)
            return
        reasons: dict[QuantSpec, str] = {}
        choices: list[tuple[QuantSpec, QuantSpec | None, Verdict]] = []
        for weight, activation in product(_own(rule.weight, site), rule.activations or (None,)):
            if choices and (
                not rule.by_speed or _is_mean(choices[0][2]) or weight != choices[0][0]
            ):
                break
            if inside and activation is not None and not activation.dynamic:
                verdict = Verdict(False, "calibration cannot look into bodies of control flow")
            elif (
                lacking := too_old(site, activation, version) or infinite_bias(site, activation)
            ) or (lacking := formats.of(weight).fits(weight, site, activation, version)):
                verdict = Verdict(False, lacking)
            else:
                verdict = context.target.supports(site, activation, weight)
            if verdict.ok:
                choices.append((weight, activation, verdict))
            else:
                reasons.setdefault(weight, verdict.reason)
        if not choices:
            self.remark(context, site, "float", next(iter(reasons.values())))
            return
        weight, activation, verdict = max(choices, key=lambda choice: choice[2].speedup)
        asked, why = next(iter(reasons.items()), (weight, ""))
        if asked != weight:
            message = f"weights are not {words(asked)}: {why}"
            self.remark(context, site, "declined", message)
        commit_to(site, activation, weight)
        measured = {"speedup": verdict.speedup, "conversions": verdict.conversions}
        if verdict.slowest < 1:
            measured["slowest"] = verdict.slowest
        numbers = {name: value for name, value in measured.items() if value}
        self.remark(context, site, "quantized", describe(activation, weight), **numbers)


def _why_no_product(node: ir.Node) -> str | None:
    """Why an Einsum stays what it is; None for other operators."""
    product = product_of(node) if is_op(node, "Einsum") and len(node.inputs) > 1 else None
    return product if isinstance(product, str) else None


def _is_mean(verdict: Verdict) -> bool:
    """Whether its speedup is that of prompts and of single tokens in one: such do not compare."""
    return verdict.slowest < float("inf")


def _own(weight: QuantSpec, site: Site) -> Iterator[QuantSpec]:
    """`weight` with the axis that it has at this site, then what replaces it where it cannot be.

    A weight that came with integers, as from a checkpoint, has no other spec than theirs.
    """
    rounded = integers_of(site.weight)
    if rounded is not None:
        yield rounded[0]
        return
    yield with_channels(weight, site.axis)
    substitute = formats.of(weight).substitute(weight, site.axis)
    if substitute is not None:
        yield substitute


def _weigh_convolutions(asking: Annotate, model: ir.Model, context: Context) -> None:
    """Make convolutions float again where conversions around them cost more than integers save."""
    verdicts = context.remarks.verdicts()
    convolutions, costs = [], {}
    for site in sites(model):
        remark = verdicts.get(site.name)
        if site.kind != "conv" or remark is None or not remark.numbers.get("speedup"):
            continue
        if remark.kind == "quantized":
            numbers = remark.numbers
            costs[site.node] = Cost(
                1 / numbers["speedup"], numbers.get("conversions", 0.0), size(site)
            )
            convolutions.append(site)
    settled = settle(convolutions, costs, context.target.supports_glue)
    gained = gains(convolutions, costs, settled, context.target.supports_glue)
    for site in convolutions:
        if site.node in settled:
            continue
        retract(site)
        why = "int8 here would cost more in conversions around it than its kernel saves"
        numbers = {**verdicts[site.name].numbers, "gain": gained[site.node]}
        asking.remark(context, site, "float", why, **numbers)


def _join(node: ir.Node, activation: QuantSpec) -> None:
    """Quantize a glue operator if all its data is quantized already on its way in."""
    data = [v for i, v in enumerate(node.inputs) if v is not None and _is_data(node, i)]
    if not data or not all(static_spec(v) is not None for v in data):
        return
    set_use_specs(node, {i: activation for i, _ in enumerate(node.inputs) if _is_data(node, i)})
    set_spec(output_value(node), activation)


def _is_data(node: ir.Node, index: int) -> bool:
    value = node.inputs[index]
    if value is None or value.dtype not in (ir.DataType.FLOAT, None):
        return False
    return index == 0 or is_op(node, "Add", "Mul", "Concat")


def _drop_lonely_glue(model: ir.Model) -> None:
    """A glue operator none of whose users takes integers would only add conversions: undo it."""
    for node in reversed(list(model.graph)):
        if not is_annotated(node) or spec_of(output_value(node)) is None:
            continue
        if is_op(node, *LINEAR):
            continue
        if all(use_spec(u.node, u.idx) is None for u in output_value(node).uses()):
            retract_node(node)
