"""Factors for the channels of a value, moved into the weights that read it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qgraph.graph.annotation import stats_of
from qgraph.graph.editing import add_constant, derived
from qgraph.graph.reading import constant, constant_array, constant_tensor, is_op, release
from qgraph.graph.sites import Site
from qgraph.numerics.reference import along


def unscalable(x: ir.Value, readers: Sequence[Site]) -> str | None:
    """Why the weights that read `x` cannot take factors for its channels; None if they can, by
    :func:`scale_inputs`."""
    stats = stats_of(x)
    if stats is None or stats.channel_peak is None:
        return "its channels were not calibrated: set channel_ranges=true in insert-observers"
    tensors = [constant(site.weight) for site in readers]
    if any(t is None or t.dtype != ir.DataType.FLOAT for t in tensors):
        return "its weight is not float32"
    return None


def read_elsewhere(weight: ir.Value, readers: Sequence[Site]) -> bool:
    """Whether a product besides these readers has this weight too. The lookup of a tied embedding
    does not count: `balance-tables` finds the scaled weight again."""
    here = {site.node for site in readers}
    return any(n not in here and is_op(n, "MatMul", "Gemm") for n in weight.consumers())


def input_peaks(site: Site) -> np.ndarray:
    """Largest magnitude of the weights that each data channel meets: float32 (K,)."""
    w = constant_array(site.weight)
    peaks: np.ndarray = np.maximum(w.max(axis=site.axis), -w.min(axis=site.axis))
    release(site.weight)
    return peaks.astype(np.float32)


def scale_inputs(model: ir.Model, site: Site, factors: np.ndarray) -> None:
    """Multiply the weights that each data channel of a MatMul or Gemm meets by its factor.

    The product is made when the weight is read, and not kept; other readers keep the old weight.

    Args:
        factors: float32 (K,).
    """
    tensor = constant_tensor(site.weight)
    rows = along(factors, 1 - site.axis, 2)
    scaled = derived(tensor, lambda w: w * rows)
    value = add_constant(model, f"{site.weight.name}_scaled", scaled)
    site.node.replace_input_with(site.w_index, value)
