"""Recipes for weights of other types than integers, and for those that a checkpoint brings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import onnx_ir as ir

from qgraph.errors import QGraphError
from qgraph.graph.annotation import integers_of
from qgraph.graph.sites import CONVOLUTIONS, PRODUCTS, Site
from qgraph.numerics.spec import WEIGHT, Codebook, PerAxis, PerBlock, QuantSpec
from qgraph.passes.annotate import Rule
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.load_checkpoint import LoadCheckpoint
from qgraph.passes.use_bnb4 import UseBnb4
from qgraph.pipeline.pass_manager import Pass
from qgraph.recipes.recipe import FLOAT_STAGE, Recipe, commit, listed, small_integers
from qgraph.recipes.specs import WeightRange, checked_group_size, int8_blocks, int8_weight

CodebookKernel = Literal["int8", "bnb4"]
Float8 = Literal["e4m3", "e5m2"]


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
