"""Recipes: named pipelines. Each is a function whose keywords are its parameters."""

from __future__ import annotations

import inspect
from typing import get_type_hints

from qgraph.errors import QGraphError

# In the order in which users see the recipes: each module lists its own when it is loaded.
from qgraph.recipes.eight_bits import dynamic, static
from qgraph.recipes.qat import qat
from qgraph.recipes.recipe import RECIPES, Recipe
from qgraph.recipes.transformers import llm_int8, smoothquant, w8a8, zeroquant
from qgraph.recipes.weight_only import adaround, autoround, awq, gptq, hqq, rtn
from qgraph.recipes.weight_types import checkpoint, fp4, fp8, nf4

__all__ = [
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
