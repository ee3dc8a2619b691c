"""Recipes that round the weights, and data only where a kernel wants it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import onnx_ir as ir

from qgraph.errors import QGraphError
from qgraph.graph.annotation import integers_of
from qgraph.graph.sites import CONVOLUTIONS, PRODUCTS, Site
from qgraph.numerics.spec import PER_TOKEN, WEIGHT, Codebook, PerAxis, PerBlock, QuantSpec
from qgraph.passes.adaround import AdaRound
from qgraph.passes.annotate import Rule
from qgraph.passes.autoround import AutoRound
from qgraph.passes.awq import AWQ
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.clip_weights import ClipWeights
from qgraph.passes.gptq import GPTQ
from qgraph.passes.hqq import HQQ
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.load_checkpoint import LoadCheckpoint
from qgraph.passes.use_bnb4 import UseBnb4
from qgraph.pipeline.pass_manager import Pass
from qgraph.recipes.recipe import FLOAT_STAGE, Recipe, commit, listed, small_integers
from qgraph.recipes.specs import (
    WeightRange,
    checked_group_size,
    few_bits,
    int8_blocks,
    int8_weight,
)

CodebookKernel = Literal["int8", "bnb4"]
Float8 = Literal["e4m3", "e5m2"]


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


@listed
def nf4(
    *,
    group_size: int = 64,
    double_quant: bool = True,
    observer: WeightRange = "mse",
    kernel: CodebookKernel = "int8",
    kv_bits: int = 0,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """Weights of 4 bits at the quantiles of the normal distribution (QLoRA); needs no data.

    Args:
        group_size: input channels that share a scale, from 16.
        double_quant: scales in 8 bits each, as QLoRA has them, instead of 32.
        observer: `mse` seeks each block's scale, of either sign, for the least squared error, in
            which large weights count more; `absmax` is the largest magnitude, as bitsandbytes has
            it.
        kernel: `int8` is fast, its levels rounded to 127ths; `bnb4` keeps them exact in MatMulBnb4,
            which other tools know, and which on CPUs is five times slower than float.
        kv_bits: 8 or 4 bits for the cache of attention, 0 = float; needs calibration data.
        rules: which sites to treat otherwise.
    """
    products = _codebook("nf4", group_size, double_quant, observer, kernel)
    annotate = small_integers((*rules, products))
    return Recipe(
        "nf4",
        (*FLOAT_STAGE, *annotate, *commit(rewrites=_exchange(kernel), bodies=2, kv_bits=kv_bits)),
        calibrates=bool(kv_bits),
    )


@listed
def fp4(
    *,
    group_size: int = 64,
    double_quant: bool = True,
    observer: WeightRange = "mse",
    kernel: CodebookKernel = "int8",
    kv_bits: int = 0,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """Weights of 4 bits as floats, the older format of bitsandbytes; needs no data.

    Args:
        group_size: input channels that share a scale, from 16.
        double_quant: scales in 8 bits each, instead of 32.
        observer: as in `nf4`.
        kernel: as in `nf4`.
        kv_bits: 8 or 4 bits for the cache of attention, 0 = float; needs calibration data.
        rules: which sites to treat otherwise.
    """
    products = _codebook("fp4", group_size, double_quant, observer, kernel)
    annotate = small_integers((*rules, products))
    return Recipe(
        "fp4",
        (*FLOAT_STAGE, *annotate, *commit(rewrites=_exchange(kernel), bodies=2, kv_bits=kv_bits)),
        calibrates=bool(kv_bits),
    )


@listed
def fp8(*, dtype: Float8 = "e4m3", activations: bool = False, rules: Sequence[Rule] = ()) -> Recipe:
    """Weights, and data if wanted, as floats of 8 bits, for GPUs; on CPUs no faster than float.

    Args:
        dtype: `e4m3` has three bits of mantissa and reaches 448, `e5m2` two, and 57,344.
        activations: also the data of products, with fixed scales; needs calibration.
        rules: which sites to treat otherwise.
    """
    if dtype not in get_args(Float8):
        raise QGraphError(f"dtype '{dtype}' is unknown: use one of e4m3, e5m2")
    kind = ir.DataType.FLOAT8E4M3FN if dtype == "e4m3" else ir.DataType.FLOAT8E5M2
    weight, data = QuantSpec(kind, PerAxis(0), observer="absmax"), QuantSpec(kind)
    products = Rule(PRODUCTS, weight, (data, None) if activations else (None,))
    others = Rule(CONVOLUTIONS, weight)
    annotate = small_integers((*rules, products, others))
    calibrate = (InsertObservers(), Calibrate()) if activations else ()
    steps = (*FLOAT_STAGE, *annotate, *calibrate, *commit())
    return Recipe("fp8", steps, calibrates=activations)


@listed
def checkpoint(
    *,
    path: str = "",
    check: bool = True,
    bits: int = 0,
    kernel: CodebookKernel = "int8",
    kv_bits: int = 0,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """Weights that GPTQ, AWQ or bitsandbytes have quantized, from a Hugging Face checkpoint.

    The integers and scales stay what they are; no data is needed.

    Args:
        path: the folder with `config.json` and safetensors files.
        check: the graph holds the float weights of the same model, and the checkpoint's must
            resemble them; false for a graph whose weights are random.
        bits: bits of what the checkpoint has in float, mostly lookup tables and the last product,
            as in `dynamic`; 0 leaves it in float.
        kernel: of bitsandbytes' weights, as in `nf4`.
        kv_bits: 8 or 4 bits for the cache of attention, 0 = float; needs calibration data.
        rules: how to treat layers that are float in the checkpoint.
    """
    if kernel not in get_args(CodebookKernel):
        raise QGraphError(f"kernel '{kernel}' is unknown: use one of int8, bnb4")
    blocks = (int8_blocks(size) for size in (128, 64, 32, 16, 256))
    codes = Rule(PRODUCTS, WEIGHT, (None,), where=lambda site: _brought(site, codebook=True))
    own = Rule(PRODUCTS, WEIGHT, (*blocks, None), where=_brought)
    others = Rule((*PRODUCTS, *CONVOLUTIONS, "gather"), None, why="float in checkpoint")
    first, last = (codes,) if kernel == "bnb4" else (), () if bits else (others,)
    annotate = small_integers((*first, own, *rules, *last), int8_weight(bits or 8))
    steps = (
        *FLOAT_STAGE,
        *annotate,
        *commit(rewrites=_exchange(kernel), bodies=1, kv_bits=kv_bits),
    )
    recipe = Recipe("checkpoint", steps, calibrates=bool(kv_bits))
    return recipe.insert(LoadCheckpoint(path, check), before="fold-batch-norm")


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


def _codebook(
    name: Codebook,
    group_size: int,
    double: bool,
    observer: WeightRange,
    kernel: CodebookKernel,
) -> Rule:
    """Weights of 4 bits that are looked up."""
    size = checked_group_size(group_size)
    if not size:
        raise QGraphError(f"group_size=0 is not for {name}, which has blocks: use 16 and more")
    for value, known in ((observer, get_args(WeightRange)), (kernel, get_args(CodebookKernel))):
        if value not in known:
            raise QGraphError(f"'{value}' is unknown for {name}: use one of {', '.join(known)}")
    weight = QuantSpec(
        ir.DataType.UINT4, PerBlock(0, size), observer=observer, codebook=name, double=double
    )
    data = (None,) if kernel == "bnb4" else (int8_blocks(size), None)
    return Rule(PRODUCTS, weight, data)


def _exchange(kernel: CodebookKernel) -> tuple[Pass, ...]:
    return (UseBnb4(),) if kernel == "bnb4" else ()


def _brought(site: Site, codebook: bool = False) -> bool:
    """Whether the site's weight came as integers, or as codes."""
    brought = integers_of(site.weight)
    return brought is not None and (not codebook or brought[0].codebook is not None)
