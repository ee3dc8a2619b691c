"""Calls of our own functions, replaced by their bodies."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from qgraph.graph.editing import remove_dead
from qgraph.graph.functions import DOMAIN, undeclare_unused
from qgraph.graph.names import forget_names


def inline_functions(model: ir.Model, keep: frozenset[str] = frozenset()) -> bool:
    """Replace what calls of qgraph functions are left by their bodies.

    Args:
        keep: names of functions whose calls stay.
    """

    def inlined(function: ir.Function) -> bool:
        return function.domain == DOMAIN and function.name not in keep

    remove_dead(model)
    changed = bool(common.InlinePass(inlined)(model).modified)
    if changed:
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        common.DeduplicateInitializersPass()(model)
        forget_names(model)
    undeclare_unused(model)
    return changed
