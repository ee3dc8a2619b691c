"""Recipes: named pipelines. Each function here is one; its keywords are its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args, get_type_hints

import onnx_ir as ir

from qgraph.analysis import Site, SiteKind
from qgraph.annotation import INTEGERS
from qgraph.errors import QGraphError
from qgraph.mlp import ends_mlp, in_mlp
from qgraph.pass_manager import Pass
from qgraph.passes.annotate import (
    PER_RUN,
    PER_TOKEN,
    SMALL_INTEGERS,
    WEIGHT,
    Annotate,
    Rule,
)
from qgraph.passes.awq import AWQ
from qgraph.passes.balance_tables import BalanceTables
from qgraph.passes.bias_correction import BiasCorrection
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.clip_weights import ClipWeights
from qgraph.passes.convert_opset import ConvertOpset
from qgraph.passes.distill import Distill
from qgraph.passes.equalize import Equalize
from qgraph.passes.fold_batch_norm import FoldBatchNorm
from qgraph.passes.fold_qdq import FoldQDQ
from qgraph.passes.fuse import Fuse
from qgraph.passes.gptq import GPTQ
from qgraph.passes.guard_static import GuardStatic
from qgraph.passes.hqq import HQQ
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.passes.load_checkpoint import LoadCheckpoint
from qgraph.passes.lower import Lower
from qgraph.passes.smooth import Smooth
from qgraph.passes.split_outliers import SplitOutliers
from qgraph.passes.use_bnb4 import UseBnb4
from qgraph.spec import Codebook, PerAxis, PerBlock, QuantSpec, RangeMethod


@dataclass(frozen=True)
class Recipe:
    """A pipeline with a name.

    Attributes:
        name: as the user writes it.
        passes: in order; the last one lowers to the target.
        calibrates: whether it needs calibration data.
        trains: whether it is for training, see :func:`qgraph.prepare_qat`.
    """

    name: str
    passes: tuple[Pass, ...]
    calibrates: bool = False
    trains: bool = False

    def insert(self, new: Pass, *, before: str) -> Recipe:
        """The recipe with one more pass, just before the first pass called `before`.

        Raises:
            QGraphError: the recipe has no such pass.
        """
        names = [p.name for p in self.passes]
        if before not in names:
            raise QGraphError(
                f"recipe '{self.name}' has no pass '{before}': it has {', '.join(names)}"
            )
        at = names.index(before)
        return replace(self, passes=(*self.passes[:at], new, *self.passes[at:]))


FLOAT_STAGE: tuple[Pass, ...] = (Canonicalize(), FoldBatchNorm(), Fuse(), ConvertOpset(13))
"""What every recipe starts with: the graph made uniform, still float."""


def static(
    *,
    observer: RangeMethod | Literal["auto"] = "auto",
    bits: int = 8,
    min_sqnr: float = 25.0,
    equalize: bool = False,
    bias_correction: bool = True,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """INT8 weights and activations, scales fixed by calibration; fastest for convolutional nets.

    Args:
        observer: how activation ranges are found: minmax, percentile, entropy, mse, or auto (mse
            around convolutions, minmax for the data of matrix products).
        bits: bits of the weights, 2 to 8.
        min_sqnr: sites whose median token would keep less than this many dB become dynamic.
        equalize: move ranges between consecutive layers first (Nagel et al. 2019).
        bias_correction: correct the mean shift that rounding the weights causes (same paper).
        rules: which sites to treat otherwise.
    """
    calibrated: tuple[Pass, ...] = (
        Annotate("static", observer, tuple(rules), _weight(bits)),
        InsertObservers(channel_means=bias_correction),
        Calibrate(),
        GuardStatic(min_sqnr=min_sqnr),
        *((BiasCorrection(),) if bias_correction else ()),
        BalanceTables(),
    )
    before = (*FLOAT_STAGE, *((Equalize(),) if equalize else ()))
    return Recipe(
        "static", (*before, *calibrated, InsertQDQ(), FoldQDQ(), Lower()), calibrates=True
    )


def dynamic(*, bits: int = 8, rules: Sequence[Rule] = ()) -> Recipe:
    """INT8 weights, activation scales computed at run time, token by token; needs no data.

    Args:
        bits: bits of the weights, 2 to 8.
        rules: which sites to treat otherwise.
    """
    annotate = Annotate("dynamic", rules=tuple(rules), weight=_weight(bits))
    return Recipe(
        "dynamic", (*FLOAT_STAGE, annotate, BalanceTables(), InsertQDQ(), FoldQDQ(), Lower())
    )


Level = Literal["O1", "O2", "O3"]


def smoothquant(
    *,
    level: Level = "O1",
    alpha: float | Literal["search", "auto"] = "auto",
    lkd: bool = True,
    bits: int = 8,
    min_sqnr: float = 25.0,
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
        rules: which sites to treat otherwise.
    """
    if level not in get_args(Level):
        raise QGraphError(f"level '{level}' is unknown: use one of {', '.join(get_args(Level))}")
    weight = _weight(bits)
    if alpha == "auto":
        alpha = "search" if level == "O1" else 0.5
    per_run = Rule(("matmul", "gemm"), weight, (PER_RUN, PER_TOKEN))
    annotate = {
        "O1": Annotate("dynamic", rules=tuple(rules), weight=weight),
        "O2": Annotate("dynamic", rules=(*rules, per_run), weight=weight),
        "O3": Annotate("static", rules=tuple(rules), weight=weight),
    }[level]
    observe = InsertObservers(channel_ranges=True), Calibrate()
    steps: tuple[Pass, ...] = (annotate, *observe, Smooth(alpha), _OUTPUT_SPLIT)
    if level != "O1":  # smoothing has changed what one scale must serve
        steps = (*steps, *observe, GuardStatic(min_sqnr=min_sqnr))
    return Recipe("smoothquant", (*FLOAT_STAGE, *steps, *_distilled(lkd)), calibrates=True)


def llm_int8(
    *, threshold: float = 6.0, share: float = 0.02, bits: int = 8, rules: Sequence[Rule] = ()
) -> Recipe:
    """INT8 transformers in which channels with outliers stay in float.

    Args:
        threshold: channels that exceed this magnitude in calibration are outliers; 0 = none do.
        share: also this share of each site's channels, the largest ones, if they stand out; 0 is
            the paper's plain method.
        bits: bits of the weights, 2 to 8.
        rules: which sites to treat otherwise.
    """
    steps = (*_dynamic(bits, rules), SplitOutliers(threshold, share))
    return Recipe("llm-int8", (*FLOAT_STAGE, *steps, *_commit()), calibrates=True)


def w8a8(
    *,
    alpha: float | Literal["search"] = 0.5,
    share: float = 0.03,
    group_size: int = 128,
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
        rules: which sites to treat otherwise.
    """
    grouped = (_grouped(group_size),) if _checked(group_size) else ()
    annotate = Annotate("dynamic", rules=(*rules, *grouped))
    steps: tuple[Pass, ...] = (annotate, InsertObservers(channel_ranges=True), Calibrate())
    steps = (ConvertOpset(SMALL_INTEGERS), *steps, Smooth(alpha), SplitOutliers(0.0, share))
    return Recipe("w8a8", (*FLOAT_STAGE, *steps, *_commit()), calibrates=True)


def _grouped(size: int) -> Rule:
    """8 bits in groups of input channels, of the weights and of each token."""
    groups = QuantSpec(ir.DataType.INT8, PerBlock(-1, size), observer="dynamic")
    weight = WEIGHT.with_(granularity=PerBlock(0, size))
    return Rule(("matmul", "gemm"), weight, (groups, PER_TOKEN), where=ends_mlp)


def zeroquant(
    *,
    bits: int = 8,
    mlp_bits: int = 0,
    group_size: int | Literal["auto"] = "auto",
    lkd: bool = False,
    alpha: float | Literal["search"] = 0.5,
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
        rules: which sites to treat otherwise.
    """
    weight, mlp = _in_groups(bits, group_size), _in_groups(mlp_bits or bits, group_size)
    products = Rule(("matmul", "gemm"), mlp, (PER_TOKEN, PER_RUN), where=in_mlp)
    others = () if mlp == weight else (products,)
    annotate = Annotate("dynamic", rules=(*rules, *others), weight=weight)
    smooth = (InsertObservers(channel_ranges=True), Calibrate(), Smooth(alpha)) if alpha else ()
    steps = (ConvertOpset(SMALL_INTEGERS), annotate, *smooth, *_distilled(lkd))
    return Recipe("zeroquant", (*FLOAT_STAGE, *steps), calibrates=bool(alpha) or lkd)


def _in_groups(bits: int, group_size: int | Literal["auto"]) -> QuantSpec:
    weight = _weight(bits)
    if bits < 8:
        dtype = ir.DataType.INT4 if bits <= 4 else ir.DataType.INT8
        weight = weight.with_(dtype=dtype, bits=0 if bits == 4 else bits, observer="absmax")
    size = (64 if bits < 8 else 0) if group_size == "auto" else _checked(group_size)
    return weight.with_(granularity=PerBlock(0, size)) if size else weight


def rtn(
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    observer: WeightRange = "absmax",
    embedding_bits: int = 8,
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
        rules: which sites to treat otherwise.
    """
    tables = _tables(embedding_bits, group_size, symmetric, observer)
    steps = _weight_only(bits, group_size, symmetric, observer, (*rules, *tables))
    return Recipe("rtn", (*FLOAT_STAGE, *steps, *_commit()))


def awq(
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    clip: bool = True,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """Weights of 2 to 8 bits, scaled and clipped by what their outputs lose on calibration data.

    Args:
        bits: bits of the weights; 3 are stored and run as 4, which is all there is.
        group_size: input channels that share a scale, 0 = all of them (per channel).
        symmetric: without zero points.
        clip: search the scale of each block, too; without it, weights are only multiplied.
        rules: which sites to treat otherwise.
    """
    annotate = _weight_only(bits, group_size, symmetric, "absmax", rules)
    clipped = (ClipWeights(),) if clip else ()
    steps = (*annotate, AWQ(), *_commit(*clipped))
    return Recipe("awq", (*FLOAT_STAGE, *steps), calibrates=True)


def gptq(
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    act_order: bool = True,
    damping: float = 0.1,
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
        rules: which sites to treat otherwise.
    """
    annotate = _weight_only(bits, group_size, symmetric, "absmax", rules)
    steps = (*annotate, *_commit(GPTQ(act_order, damping)))
    return Recipe("gptq", (*FLOAT_STAGE, *steps), calibrates=True)


def hqq(
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = False,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """Weights of 2 to 8 bits, in ranges that suit most weights of a block; needs no data.

    Args:
        bits: bits of the weights; 3 are stored and run as 4, which is all there is.
        group_size: input channels that share a scale, 0 = all of them (per channel).
        symmetric: without zero points; they are integers, which is what fast kernels take.
        rules: which sites to treat otherwise.
    """
    annotate = _weight_only(bits, group_size, symmetric, "absmax", rules)
    steps = (*annotate, *_commit(HQQ()))
    return Recipe("hqq", (*FLOAT_STAGE, *steps))


def nf4(
    *,
    group_size: int = 64,
    double_quant: bool = True,
    observer: WeightRange = "absmax",
    kernel: CodebookKernel = "int8",
    rules: Sequence[Rule] = (),
) -> Recipe:
    """Weights of 4 bits at the quantiles of the normal distribution (QLoRA); needs no data.

    Args:
        group_size: input channels that share a scale, from 16.
        double_quant: scales in 8 bits each, as QLoRA has them, instead of 32.
        observer: `absmax` as in bitsandbytes; `mse` seeks each block's scale, of either sign, for
            the least squared error.
        kernel: `int8` is fast, its levels rounded to 127ths; `bnb4` keeps them exact in MatMulBnb4,
            which other tools know, and which on CPUs is five times slower than float.
        rules: which sites to treat otherwise.
    """
    return Recipe("nf4", _codebook("nf4", group_size, double_quant, observer, kernel, rules))


def fp4(
    *,
    group_size: int = 64,
    double_quant: bool = True,
    observer: WeightRange = "absmax",
    kernel: CodebookKernel = "int8",
    rules: Sequence[Rule] = (),
) -> Recipe:
    """Weights of 4 bits as floats, the older format of bitsandbytes; needs no data.

    Args:
        group_size: input channels that share a scale, from 16.
        double_quant: scales in 8 bits each, instead of 32.
        observer: as in `nf4`.
        kernel: as in `nf4`.
        rules: which sites to treat otherwise.
    """
    return Recipe("fp4", _codebook("fp4", group_size, double_quant, observer, kernel, rules))


def qat(
    *,
    bits: int = 4,
    act_bits: int = 8,
    scheme: TrainingScheme = "static",
    group_size: int = 0,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """Weights and activation scales found by training, see `prepare_qat`; from 2 bits on.

    Args:
        bits: bits of the weights, 2 to 8.
        act_bits: bits of activations with a fixed scale, 2 to 8.
        scheme: `static` activations have fixed scales, that are learned; `dynamic` ones have scales
            found at run time, token by token; `weights`: activations stay float.
        group_size: with `weights`, input channels of a product that share a scale, 0 = all of them.
        rules: which sites to treat otherwise.
    """
    if scheme not in get_args(TrainingScheme):
        known = ", ".join(get_args(TrainingScheme))
        raise QGraphError(f"scheme '{scheme}' is unknown: use one of {known}")
    if not 2 <= act_bits <= 8 or (act_bits < 8 and scheme != "static"):
        raise QGraphError(f"act_bits={act_bits} is out of range: use 2 to 8 with scheme 'static'")
    if _checked(group_size) and scheme != "weights":
        raise QGraphError(f"group_size={group_size} is for scheme 'weights' alone")
    weight = _weight(bits).with_(observer="mse")
    if scheme == "static":
        annotate: tuple[Pass, ...] = (
            Annotate("static", rules=tuple(rules), weight=weight, act_bits=act_bits),
        )
    elif scheme == "dynamic":
        annotate = (Annotate("dynamic", rules=tuple(rules), weight=weight),)
    else:
        products = Rule(("matmul", "gemm"), _few_bits(bits, group_size, True, "mse"))
        convolutions = Rule(("conv", "conv_transpose"), weight)
        rules = (*rules, products, convolutions)
        annotate = ConvertOpset(SMALL_INTEGERS), Annotate("dynamic", rules=rules, weight=weight)
    return Recipe("qat", (*FLOAT_STAGE, *annotate, InsertQDQ(), FoldQDQ(), Lower()), trains=True)


TrainingScheme = Literal["static", "dynamic", "weights"]
CodebookKernel = Literal["int8", "bnb4"]


def _codebook(
    name: Codebook,
    group_size: int,
    double: bool,
    observer: WeightRange,
    kernel: CodebookKernel,
    rules: Sequence[Rule],
) -> tuple[Pass, ...]:
    size = _checked(group_size)
    if not size:
        raise QGraphError(f"group_size=0 is not for {name}, which has blocks: use 16 and more")
    for value, known in ((observer, get_args(WeightRange)), (kernel, get_args(CodebookKernel))):
        if value not in known:
            raise QGraphError(f"'{value}' is unknown for {name}: use one of {', '.join(known)}")
    weight = QuantSpec(
        ir.DataType.UINT4, PerBlock(0, size), observer=observer, codebook=name, double=double
    )
    blocks = QuantSpec(ir.DataType.INT8, PerBlock(-1, size), observer="dynamic")
    for_exchange = kernel == "bnb4"
    products = Rule(("matmul", "gemm"), weight, (None,) if for_exchange else (blocks, None))
    annotate = ConvertOpset(SMALL_INTEGERS), Annotate("dynamic", rules=(*rules, products))
    bnb4 = (UseBnb4(),) if for_exchange else ()
    return *FLOAT_STAGE, *annotate, BalanceTables(), InsertQDQ(), FoldQDQ(), *bnb4, Lower()


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
    products = Rule(("matmul", "gemm"), weight, (data, None) if activations else (None,))
    others = Rule(("conv", "conv_transpose"), weight)
    annotate = Annotate("dynamic", rules=(*rules, products, others))
    calibrate = (InsertObservers(), Calibrate()) if activations else ()
    steps = (ConvertOpset(SMALL_INTEGERS), annotate, *calibrate, *_commit())
    return Recipe("fp8", (*FLOAT_STAGE, *steps), calibrates=activations)


Float8 = Literal["e4m3", "e5m2"]


def checkpoint(
    *,
    path: str = "",
    check: bool = True,
    bits: int = 0,
    kernel: CodebookKernel = "int8",
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
        rules: how to treat layers that are float in the checkpoint.
    """
    if kernel not in get_args(CodebookKernel):
        raise QGraphError(f"kernel '{kernel}' is unknown: use one of int8, bnb4")
    sizes = (128, 64, 32, 16, 256)
    blocks = (QuantSpec(ir.DataType.INT8, PerBlock(-1, s), observer="dynamic") for s in sizes)
    products: tuple[SiteKind, ...] = ("matmul", "gemm")
    codes = Rule(products, WEIGHT, (None,), where=lambda site: _brought(site, codebook=True))
    own = Rule(products, WEIGHT, (*blocks, None), where=_brought)
    others = Rule((*products, "conv", "conv_transpose", "gather"), None, why="float in checkpoint")
    for_exchange = kernel == "bnb4"
    chosen = (*((codes,) if for_exchange else ()), own, *rules, *(() if bits else (others,)))
    canonicalize, *fuse = FLOAT_STAGE
    steps = (
        canonicalize,
        LoadCheckpoint(path, check),
        *fuse,
        ConvertOpset(SMALL_INTEGERS),
        Annotate("dynamic", rules=chosen, weight=_weight(bits or 8)),
        BalanceTables(),
        InsertQDQ(),
        FoldQDQ(),
        *((UseBnb4(),) if for_exchange else ()),
        Lower(),
    )
    return Recipe("checkpoint", steps)


def _brought(site: Site, codebook: bool = False) -> bool:
    """Whether the site's weight came as integers, or as codes."""
    spec, _ = site.weight.meta.get(INTEGERS, (None, None))
    return spec is not None and (not codebook or spec.codebook is not None)


WeightRange = Literal["mse", "absmax"]


def _weight_only(
    bits: int, group_size: int, symmetric: bool, observer: WeightRange, rules: Sequence[Rule]
) -> tuple[Pass, ...]:
    """Weights of few bits for kernels that round activations in the same blocks, where there are
    such kernels, and for float activations elsewhere."""
    weight = _few_bits(bits, group_size, symmetric, observer)
    sizes = (group_size,) if group_size else (128, 64, 32)
    blocks = (QuantSpec(ir.DataType.INT8, PerBlock(-1, s), observer="dynamic") for s in sizes)
    products = Rule(("matmul", "gemm"), weight, (*blocks, PER_TOKEN, None), by_speed=True)
    return ConvertOpset(SMALL_INTEGERS), Annotate("dynamic", rules=(*rules, products))


def _tables(bits: int, group_size: int, symmetric: bool, observer: WeightRange) -> tuple[Rule, ...]:
    """A rule for lookup tables of fewer than 8 bits, which are in blocks."""
    if bits == 8:
        return ()
    return (Rule(("gather",), _few_bits(bits, group_size or 128, symmetric, observer)),)


def _few_bits(bits: int, group_size: int, symmetric: bool, observer: WeightRange) -> QuantSpec:
    _weight(bits)  # refuses what is out of range
    if observer not in get_args(WeightRange):
        known = ", ".join(get_args(WeightRange))
        raise QGraphError(f"observer '{observer}' is unknown for weights: use one of {known}")
    signed, unsigned = ir.DataType.INT8, ir.DataType.UINT8
    if bits <= 4:
        signed, unsigned = ir.DataType.INT4, ir.DataType.UINT4
    size = _checked(group_size)
    return QuantSpec(
        signed if symmetric else unsigned,
        PerBlock(0, size) if size else PerAxis(0),
        symmetric,
        observer,
        bits=0 if bits in (4, 8) else bits,
    )


_OUTPUT_SPLIT = SplitOutliers(0.0, share=0.02, outputs=True)
"""A language model's last product is its most sensitive one, and smoothing leaves outliers."""


def _checked(group_size: int) -> int:
    if not isinstance(group_size, int) or (group_size and group_size < 16):
        raise QGraphError(
            f"group_size={group_size} is out of range: use 0 (per channel), or 16 and more"
        )
    return group_size


def _commit(*rounding: Pass) -> tuple[Pass, ...]:
    """From annotations to the target, through passes that round weights themselves. A table tied
    to a product must be found before they do."""
    return BalanceTables(), *rounding, InsertQDQ(), FoldQDQ(), Lower()


def _distilled(lkd: bool) -> tuple[Pass, ...]:
    return _commit(*((Distill(),) if lkd else ()))


def _dynamic(bits: int, rules: Sequence[Rule]) -> tuple[Pass, ...]:
    """Scales token by token, and calibration of the channels whose range those are to follow."""
    annotate = Annotate("dynamic", rules=tuple(rules), weight=_weight(bits))
    return annotate, InsertObservers(channel_ranges=True), Calibrate()


def _weight(bits: int) -> QuantSpec:
    if not 2 <= bits <= 8:
        raise QGraphError(f"bits={bits} is out of range: use 2 to 8")
    return WEIGHT if bits == 8 else WEIGHT.with_(bits=bits)


RECIPES: dict[str, Callable[..., Recipe]] = {
    "static": static,
    "dynamic": dynamic,
    "qat": qat,
    "llm-int8": llm_int8,
    "smoothquant": smoothquant,
    "zeroquant": zeroquant,
    "w8a8": w8a8,
    "rtn": rtn,
    "gptq": gptq,
    "awq": awq,
    "hqq": hqq,
    "nf4": nf4,
    "fp4": fp4,
    "fp8": fp8,
    "checkpoint": checkpoint,
}


def get_recipe(name: str, parameters: dict[str, object]) -> Recipe:
    """The recipe called `name` with these parameters.

    Raises:
        QGraphError: unknown recipe or parameter; the message lists the known ones.
    """
    if name not in RECIPES:
        raise QGraphError(f"unknown recipe '{name}': use one of {', '.join(RECIPES)}")
    known, kinds = inspect.signature(RECIPES[name]).parameters, get_type_hints(RECIPES[name])
    if unknown := sorted(set(parameters) - set(known)):
        raise QGraphError(
            f"recipe '{name}' has no parameter '{unknown[0]}': it has {', '.join(known)}"
        )
    for key, value in parameters.items():
        kind = kinds[key]
        accepted = (int, float) if kind is float else kind
        if kind in (int, float, bool) and not isinstance(value, accepted):
            raise QGraphError(f"recipe '{name}': {key}={value!r} is no {kind.__name__}")
    return RECIPES[name](**parameters)
