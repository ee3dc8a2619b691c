"""Recipes that round the weights, and data only where a kernel wants it."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qgraph.graph.sites import CONVOLUTIONS, PRODUCTS
from qgraph.numerics.spec import PER_TOKEN
from qgraph.passes.adaround import AdaRound
from qgraph.passes.annotate import Rule
from qgraph.passes.autoround import AutoRound
from qgraph.passes.awq import AWQ
from qgraph.passes.clip_weights import ClipWeights
from qgraph.passes.gptq import GPTQ
from qgraph.passes.hqq import HQQ
from qgraph.pipeline.pass_manager import Pass
from qgraph.recipes.recipe import FLOAT_STAGE, Recipe, commit, listed, small_integers
from qgraph.recipes.specs import (
    WeightRange,
    few_bits,
    int8_blocks,
    int8_weight,
)


@listed
def rtn(
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    observer: WeightRange = "absmax",
    embedding_bits: int = 8,
    bodies: int = 2,
    kv_bits: int = 0,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """Weights of 2 to 8 bits, rounded to nearest; needs no data.

    Args:
        bits: bits of the weights; 3 are stored and run as 4, which is all there is.
        group_size: input channels that share a scale, 0 = all of them (per channel).
        symmetric: without zero points; with them, 4 bits and fewer are some percent more exact.
        observer: `mse` shrinks ranges as far as the squared error gains by it, `absmax` does not.
        embedding_bits: bits of lookup tables. With those of the other weights, a table that is tied
            to the last product is stored once with it.
        bodies: 2 lets the number of rows of a run choose between two bodies of the model, where
            prompts and single tokens want different kernels; 1 keeps one, in less memory.
        kv_bits: 8 or 4 bits for the cache of attention, 0 = float; needs calibration data.
        rules: which sites to treat otherwise.
    """
    own = _weight_rules(bits, group_size, symmetric, observer, embedding_bits)
    annotate = small_integers((*rules, *own))
    return Recipe(
        "rtn",
        (*FLOAT_STAGE, *annotate, *commit(bodies=bodies, kv_bits=kv_bits)),
        calibrates=bool(kv_bits),
    )


@listed
def gptq(
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    act_order: bool = True,
    damping: float = 0.1,
    embedding_bits: int = 8,
    bodies: int = 2,
    kv_bits: int = 0,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """Weights of 2 to 8 bits that make up for each other's rounding errors on calibration data.

    Args:
        bits: bits of the weights; 3 are stored and run as 4, which is all there is.
        group_size: input channels that share a scale, 0 = all of them (per channel).
        symmetric: without zero points.
        act_order: round the weights of the strongest channels first.
        damping: weight of staying near the float weights; more of it fits calibration data less,
            and other data better.
        embedding_bits: of lookup tables, as in `rtn`; they are rounded to nearest, and so is a last
            product that is tied to one.
        bodies: 2 lets the number of rows of a run choose between two bodies of the model, where
            prompts and single tokens want different kernels; 1 keeps one, in less memory.
        kv_bits: 8 or 4 bits for the cache of attention, 0 = float; needs calibration data.
        rules: which sites to treat otherwise.
    """
    own = _weight_rules(bits, group_size, symmetric, "absmax", embedding_bits)
    annotate = small_integers((*rules, *own))
    steps = (
        *FLOAT_STAGE,
        *annotate,
        *commit(GPTQ(act_order, damping), bodies=bodies, kv_bits=kv_bits),
    )
    return Recipe("gptq", steps, calibrates=True)


@listed
def awq(
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    clip: bool = True,
    embedding_bits: int = 8,
    bodies: int = 2,
    kv_bits: int = 0,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """Weights of 2 to 8 bits, scaled and clipped by what their outputs lose on calibration data.

    Args:
        bits: bits of the weights; 3 are stored and run as 4, which is all there is.
        group_size: input channels that share a scale, 0 = all of them (per channel).
        symmetric: without zero points.
        clip: search the scale of each block, too; without it, weights are only multiplied.
        embedding_bits: of lookup tables, as in `rtn`; they are rounded to nearest, and so is a last
            product that is tied to one.
        bodies: 2 lets the number of rows of a run choose between two bodies of the model, where
            prompts and single tokens want different kernels; 1 keeps one, in less memory.
        kv_bits: 8 or 4 bits for the cache of attention, 0 = float; needs calibration data.
        rules: which sites to treat otherwise.
    """
    own = _weight_rules(bits, group_size, symmetric, "absmax", embedding_bits)
    annotate = small_integers((*rules, *own))
    clipped = (ClipWeights(),) if clip else ()
    steps = (*FLOAT_STAGE, *annotate, AWQ(), *commit(*clipped, bodies=bodies, kv_bits=kv_bits))
    return Recipe("awq", steps, calibrates=True)


@listed
def adaround(
    *,
    bits: int = 4,
    group_size: int = 0,
    symmetric: bool = True,
    steps: int = 200,
    bodies: int = 2,
    kv_bits: int = 0,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """Weights of 2 to 8 bits, each learned to be rounded up or down, layer by layer; needs torch.

    Args:
        bits: bits of the weights of products and convolutions.
        group_size: input channels of a product that share a scale, 0 = all of them (per channel).
        symmetric: without zero points.
        steps: of learning, for each layer.
        bodies: 2 lets the number of rows of a run choose between two bodies of the model, where
            prompts and single tokens want different kernels; 1 keeps one, in less memory.
        kv_bits: 8 or 4 bits for the cache of attention, 0 = float; needs calibration data.
        rules: which sites to treat otherwise.
    """
    return _learned(AdaRound(steps), bits, group_size, symmetric, bodies, kv_bits, rules)


@listed
def autoround(
    *,
    bits: int = 4,
    group_size: int = 0,
    symmetric: bool = True,
    steps: int = 200,
    bodies: int = 2,
    kv_bits: int = 0,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """Weights of 2 to 8 bits whose rounding and ranges are learned, block by block; needs torch.

    Args:
        bits: bits of the weights of products and convolutions.
        group_size: input channels of a product that share a scale, 0 = all of them (per channel).
        symmetric: without zero points.
        steps: of learning, for each block.
        bodies: 2 lets the number of rows of a run choose between two bodies of the model, where
            prompts and single tokens want different kernels; 1 keeps one, in less memory.
        kv_bits: 8 or 4 bits for the cache of attention, 0 = float; needs calibration data.
        rules: which sites to treat otherwise.
    """
    return _learned(AutoRound(steps), bits, group_size, symmetric, bodies, kv_bits, rules)


@listed
def hqq(
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = False,
    embedding_bits: int = 8,
    bodies: int = 2,
    kv_bits: int = 0,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """Weights of 2 to 8 bits, in ranges that suit most weights of a block; needs no data.

    Args:
        bits: bits of the weights; 3 are stored and run as 4, which is all there is.
        group_size: input channels that share a scale, 0 = all of them (per channel).
        symmetric: without zero points; they are integers, which is what fast kernels take.
        embedding_bits: of lookup tables, as in `rtn`; they are rounded to nearest, and so is a last
            product that is tied to one.
        bodies: 2 lets the number of rows of a run choose between two bodies of the model, where
            prompts and single tokens want different kernels; 1 keeps one, in less memory.
        kv_bits: 8 or 4 bits for the cache of attention, 0 = float; needs calibration data.
        rules: which sites to treat otherwise.
    """
    own = _weight_rules(bits, group_size, symmetric, "absmax", embedding_bits)
    annotate = small_integers((*rules, *own))
    return Recipe(
        "hqq",
        (*FLOAT_STAGE, *annotate, *commit(HQQ(), bodies=bodies, kv_bits=kv_bits)),
        calibrates=bool(kv_bits),
    )


def _learned(
    rounding: Pass,
    bits: int,
    group_size: int,
    symmetric: bool,
    bodies: int,
    kv_bits: int,
    rules: Sequence[Rule],
) -> Recipe:
    """What learns to round products and convolutions, for data that stays float."""
    own = _weight_rules(bits, group_size, symmetric, "mse")
    annotate = small_integers((*rules, *own, _convolutions(bits, symmetric)))
    steps = (*FLOAT_STAGE, *annotate, *commit(rounding, bodies=bodies, kv_bits=kv_bits))
    return Recipe(rounding.name, steps, calibrates=True)


def _weight_rules(
    bits: int, group_size: int, symmetric: bool, observer: WeightRange, embedding_bits: int = 8
) -> tuple[Rule, ...]:
    """Products of few bits for kernels that round activations in the same blocks, where there are
    such kernels, and for float activations elsewhere; and lookup tables, if not of 8 bits."""
    weight = few_bits(bits, group_size, symmetric, observer)
    blocks = (int8_blocks(size) for size in ((group_size,) if group_size else (128, 64, 32)))
    products = Rule(PRODUCTS, weight, (*blocks, PER_TOKEN, None), by_speed=True)
    if embedding_bits == 8:
        return (products,)
    table = few_bits(embedding_bits, group_size or 128, symmetric, observer)
    return Rule(("gather",), table), products


def _convolutions(bits: int, symmetric: bool) -> Rule:
    """Their weights in few bits, whose rounding is learned."""
    weight = int8_weight(bits).with_(observer="mse")
    if not symmetric:
        weight = weight.with_(dtype=ir.DataType.UINT8, symmetric=False)
    return Rule(CONVOLUTIONS, weight, (None,))
