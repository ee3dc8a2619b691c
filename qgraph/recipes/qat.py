"""The recipe of quantization-aware training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from qgraph.errors import QGraphError
from qgraph.graph.sites import CONVOLUTIONS, PRODUCTS
from qgraph.passes.annotate import Annotate, Rule
from qgraph.pipeline.pass_manager import Pass
from qgraph.recipes.recipe import FLOAT_STAGE, Recipe, commit, listed, small_integers
from qgraph.recipes.specs import checked_group_size, few_bits, int8_weight

TrainingScheme = Literal["static", "dynamic", "weights"]


@listed
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
        products = Rule(PRODUCTS, few_bits(bits, group_size, True, "mse"))
        convolutions = Rule(CONVOLUTIONS, weight)
        rules = (*rules, products, convolutions)
        annotate = small_integers(rules, weight)
    return Recipe("qat", (*FLOAT_STAGE, *annotate, *commit(tables=False)), trains=True)
