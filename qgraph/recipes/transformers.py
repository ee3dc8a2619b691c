"""Recipes for transformers, whose activations have channels with outliers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from qgraph.errors import QGraphError
from qgraph.graph.mlp import ends_mlp, in_mlp
from qgraph.graph.sites import PRODUCTS
from qgraph.numerics.spec import PER_RUN, PER_TOKEN, WEIGHT, PerBlock
from qgraph.passes.annotate import Annotate, Rule
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.distill import Distill
from qgraph.passes.guard_static import GuardStatic
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.smooth import Smooth
from qgraph.passes.split_outliers import SplitOutliers
from qgraph.pipeline.pass_manager import Pass
from qgraph.recipes.recipe import FLOAT_STAGE, Recipe, commit, listed, small_integers
from qgraph.recipes.specs import checked_group_size, in_groups, int8_blocks, int8_weight

Level = Literal["O1", "O2", "O3"]


@listed
def llm_int8(
    *,
    threshold: float = 6.0,
    share: float = 0.02,
    bits: int = 8,
    bodies: int = 2,
    kv_bits: int = 0,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """INT8 transformers in which channels with outliers stay in float.

    Args:
        threshold: channels that exceed this magnitude in calibration are outliers; 0 = none do.
        share: also this share of each site's channels, the largest ones, if they stand out; 0 is
            the paper's plain method.
        bits: bits of the weights, 2 to 8.
        bodies: 2 lets the number of rows of a run choose between two bodies of the model, where
            prompts and single tokens want different kernels; 1 keeps one, in less memory.
        kv_bits: 8 or 4 bits for the cache of attention, 0 = float; needs calibration data.
        rules: which sites to treat otherwise.
    """
    annotate = Annotate("dynamic", rules=tuple(rules), weight=int8_weight(bits))
    steps = (annotate, *_RANGES, SplitOutliers(threshold, share))
    return Recipe(
        "llm-int8", (*FLOAT_STAGE, *steps, *commit(bodies=bodies, kv_bits=kv_bits)), calibrates=True
    )


@listed
def smoothquant(
    *,
    level: Level = "O1",
    alpha: float | Literal["search", "auto"] = "auto",
    lkd: bool = True,
    bits: int = 8,
    min_sqnr: float = 25.0,
    bodies: int = 2,
    kv_bits: int = 0,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """INT8 transformers whose large activation channels were moved into the weights.

    Args:
        level: how activations get their scales: O1 token by token at run time, O2 one for each run,
            O3 fixed by calibration. Faster and coarser from O1 to O3.
        alpha: share of the magnitude that moves into the weights, or `search` for the best one of
            each input. The paper has one for the model, 0.5 mostly. `auto`: searched for O1; 0.5
            for the others, whose shared scales suit other texts worse after a search.
        lkd: choose integers that imitate the float layers on calibration data (not in the paper).
        bits: bits of the weights, 2 to 8.
        min_sqnr: with O2 and O3, sites whose median token would keep less than this many dB get
            scales token by token.
        bodies: 2 lets the number of rows of a run choose between two bodies of the model, where
            prompts and single tokens want different kernels; 1 keeps one, in less memory.
        kv_bits: 8 or 4 bits for the cache of attention, 0 = float; needs calibration data.
        rules: which sites to treat otherwise.
    """
    if level not in get_args(Level):
        raise QGraphError(f"level '{level}' is unknown: use one of {', '.join(get_args(Level))}")
    weight = int8_weight(bits)
    if alpha == "auto":
        alpha = "search" if level == "O1" else 0.5
    per_run = Rule(PRODUCTS, weight, (PER_RUN, PER_TOKEN))
    annotate = {
        "O1": Annotate("dynamic", rules=tuple(rules), weight=weight),
        "O2": Annotate("dynamic", rules=(*rules, per_run), weight=weight),
        "O3": Annotate("static", rules=tuple(rules), weight=weight),
    }[level]
    steps: tuple[Pass, ...] = (annotate, *_RANGES, Smooth(alpha), _OUTPUT_SPLIT)
    if level != "O1":  # smoothing has changed what one scale must serve
        steps = (*steps, *_RANGES, GuardStatic(min_sqnr=min_sqnr))
    return Recipe(
        "smoothquant",
        (*FLOAT_STAGE, *steps, *commit(*_distill(lkd), bodies=bodies, kv_bits=kv_bits)),
        calibrates=True,
    )


@listed
def zeroquant(
    *,
    bits: int = 8,
    mlp_bits: int = 0,
    group_size: int | Literal["auto"] = "auto",
    lkd: bool = False,
    alpha: float | Literal["search"] = 0.5,
    bodies: int = 2,
    kv_bits: int = 0,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """Transformers with weights of 8 bits, or 4 in MLPs, and activation scales token by token.

    With `alpha=0`, and without `lkd`, it needs no data. Lookup tables keep 8 bits.

    Args:
        bits: bits of the weights, 2 to 8.
        mlp_bits: bits of the weights in MLPs (4 for the paper's W4/8), 0 = as the others.
        group_size: input channels that share a scale, 0 = all of them (per channel). `auto`: 64 for
            weights of fewer than 8 bits, whose few levels must follow the weights closely, 0 else.
        lkd: choose integers that imitate the float layers on calibration data.
        alpha: share of the magnitude that moves into the weights first (SmoothQuant), or `search`;
            0 = none, the paper's plain method.
        bodies: 2 lets the number of rows of a run choose between two bodies of the model, where
            prompts and single tokens want different kernels; 1 keeps one, in less memory.
        kv_bits: 8 or 4 bits for the cache of attention, 0 = float; needs calibration data.
        rules: which sites to treat otherwise.
    """
    weight, mlp = in_groups(bits, group_size), in_groups(mlp_bits or bits, group_size)
    products = Rule(PRODUCTS, mlp, (PER_TOKEN, PER_RUN), where=in_mlp)
    others = () if mlp == weight else (products,)
    annotate = small_integers((*rules, *others), weight)
    smooth = (*_RANGES, Smooth(alpha)) if alpha else ()
    steps = (
        *FLOAT_STAGE,
        *annotate,
        *smooth,
        *commit(*_distill(lkd), bodies=bodies, kv_bits=kv_bits),
    )
    return Recipe("zeroquant", steps, calibrates=bool(alpha or kv_bits) or lkd)


@listed
def w8a8(
    *,
    alpha: float | Literal["search"] = 0.5,
    share: float = 0.03,
    group_size: int = 128,
    bodies: int = 2,
    kv_bits: int = 0,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """INT8 transformers at the least loss: smoothed, in groups where that counts, outliers float.

    The last product of an MLP, whose data is the hardest of all, gets a scale for each group of
    input channels, of the weights and of each token, where the target is fast enough at that.

    Args:
        alpha: share of the magnitude that moves into the weights, or `search` for the best one of
            each input.
        share: largest share of a site's channels that stay in float.
        group_size: input channels of the last product of an MLP that share a scale, 0 = all.
        bodies: 2 lets the number of rows of a run choose between two bodies of the model, where
            prompts and single tokens want different kernels; 1 keeps one, in less memory.
        kv_bits: 8 or 4 bits for the cache of attention, 0 = float; needs calibration data.
        rules: which sites to treat otherwise.
    """
    grouped = (_grouped(group_size),) if checked_group_size(group_size) else ()
    annotate = small_integers((*rules, *grouped))
    steps = (*annotate, *_RANGES, Smooth(alpha), SplitOutliers(0.0, share))
    return Recipe(
        "w8a8", (*FLOAT_STAGE, *steps, *commit(bodies=bodies, kv_bits=kv_bits)), calibrates=True
    )


_RANGES = InsertObservers(channel_ranges=True), Calibrate()
"""The largest magnitude of each channel, by which outliers are known."""
_OUTPUT_SPLIT = SplitOutliers(0.0, share=0.02, outputs=True)
"""A language model's last product is its most sensitive one, and smoothing leaves outliers."""


def _grouped(size: int) -> Rule:
    """8 bits in groups of input channels, of the weights and of each token."""
    weight = WEIGHT.with_(granularity=PerBlock(0, size))
    return Rule(PRODUCTS, weight, (int8_blocks(size), PER_TOKEN), where=ends_mlp)


def _distill(distill: bool) -> tuple[Pass, ...]:
    return (Distill(),) if distill else ()
