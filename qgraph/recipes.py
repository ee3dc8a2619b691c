"""Recipes: named pipelines. Each is a function whose keywords are its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Literal, get_args, get_type_hints

from qgraph.errors import QGraphError
from qgraph.pass_manager import Pass
from qgraph.passes.annotate import SMALL_INTEGERS, Annotate, Rule
from qgraph.passes.convert_opset import ConvertOpset
from qgraph.passes.fold_qdq import FoldQDQ
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.passes.lower import Lower
from qgraph.recipe import FLOAT_STAGE, Recipe, checked_group_size, int8_weight
from qgraph.recipes_4bit import (
    adaround,
    autoround,
    awq,
    checkpoint,
    few_bits,
    fp4,
    gptq,
    hqq,
    nf4,
    rtn,
)
from qgraph.recipes_8bit import dynamic, fp8, llm_int8, smoothquant, static, w8a8, zeroquant

__all__ = [
    "FLOAT_STAGE",
    "RECIPES",
    "Recipe",
    "adaround",
    "autoround",
    "awq",
    "checkpoint",
    "dynamic",
    "fp4",
    "fp8",
    "get_recipe",
    "gptq",
    "hqq",
    "llm_int8",
    "nf4",
    "qat",
    "rtn",
    "smoothquant",
    "static",
    "w8a8",
    "zeroquant",
]


TrainingScheme = Literal["static", "dynamic", "weights"]


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
    if checked_group_size(group_size) and scheme != "weights":
        raise QGraphError(f"group_size={group_size} is for scheme 'weights' alone")
    weight = int8_weight(bits).with_(observer="mse")
    if scheme == "static":
        annotate: tuple[Pass, ...] = (
            Annotate("static", rules=tuple(rules), weight=weight, act_bits=act_bits),
        )
    elif scheme == "dynamic":
        annotate = (Annotate("dynamic", rules=tuple(rules), weight=weight),)
    else:
        products = Rule(("matmul", "gemm"), few_bits(bits, group_size, True, "mse"))
        convolutions = Rule(("conv", "conv_transpose"), weight)
        rules = (*rules, products, convolutions)
        annotate = ConvertOpset(SMALL_INTEGERS), Annotate("dynamic", rules=rules, weight=weight)
    return Recipe("qat", (*FLOAT_STAGE, *annotate, InsertQDQ(), FoldQDQ(), Lower()), trains=True)


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
    "adaround": adaround,
    "autoround": autoround,
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
