"""Whether a weight of a checkpoint is a weight of the graph, and by what factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.errors import ModelError
from qgraph.graph.reading import constant_array
from qgraph.graph.sites import Site
from qgraph.io.checkpoints.packed_layers import Layer
from qgraph.numerics.reference import Float

UNLIKE = 0.75
"""Relative distance from the graph's weights at which a layer must be another one, or misread.
Two bits come to 0.6, matrices that have nothing in common to 1."""
SHIFTED = 0.5
"""Steps by which weights may differ on average; zero points read wrongly come to 1."""
SAME = 0.02
"""Relative distance at which tensors that are not quantized are the same but for rounding."""


def near(loaded: NDArray[Any], old: NDArray[Any] | None) -> bool:
    """Whether they are the same but for rounding."""
    assert old is not None
    size = np.linalg.norm(old.astype(np.float32))
    rest = loaded.astype(np.float32).reshape(old.shape) - old
    return bool(np.linalg.norm(rest) <= SAME * size)


def tied(table: ir.Value, site: Site) -> bool:
    """Whether the rows of a lookup table are the columns of the site's weight."""
    rows, w = constant_array(table), constant_array(site.weight)
    return np.array_equal(rows, w if site.axis == 0 else w.T)


def unlike(part: str, site: Site, apart: float | None = None) -> ModelError:
    """The error for a layer of the checkpoint that is not the one which the graph has there."""
    measured = "" if apart is None else f" (distance {apart:.2f})"
    return ModelError(
        f"layer '{part}' of the checkpoint does not resemble '{site.name}' of the graph{measured}: "
        "give its float model, or check=false if the weights of the graph are random"
    )


def fitted(given: Float, goal: Float) -> Float:
    """`given` with its rows, then its columns, each times the factor that brings it nearest to
    `goal`, by least squares.

    Args:
        given, goal: (K, N).
    """
    for axis in (1, 0):
        power = np.square(given).sum(axis=axis, keepdims=True)
        product = (given * goal).sum(axis=axis, keepdims=True)
        given = given * (product / np.where(power > 0, power, 1))
    return given


def distance(given: Float, loaded: Float) -> tuple[float, Float]:
    """How far a loaded weight is from the graph's, factors of rows and columns apart.

    Args:
        given, loaded: (K, N).

    Returns:
        the norm of their difference relative to that of `loaded`, and the difference, (K, N).
    """
    rest = loaded - fitted(given, loaded)
    size = float(np.linalg.norm(loaded))
    return (float(np.linalg.norm(rest)) / size if size else 0.0), rest


def check_alike(part: str, site: Site, given: Float, loaded: Float, layer: Layer | None) -> None:
    """Hold a loaded weight against the one that the graph has.

    Args:
        part: its name in the checkpoint.
        given, loaded: the graph's and the loaded one, (K, N).
        layer: its integers; None where it is not quantized.

    Raises:
        ModelError: it is another layer, or was misread.
    """
    apart, rest = distance(given, loaded)
    if not apart < UNLIKE:  # nor NaN
        raise unlike(part, site, apart)
    if layer is None or layer.table is not None:
        return
    steps = layer.quantized(1)[1].steps()
    shift = float(((rest if layer.order is None else rest[layer.order]) / steps).mean())
    if abs(shift) > SHIFTED:
        raise ModelError(
            f"zero points of layer '{part}' of the checkpoint are {shift:+.2f} steps off: "
            "its checkpoint_format must be another one"
        )


def misfit(part: str, loaded: tuple[int, ...], site: Site, given: tuple[int, ...]) -> ModelError:
    """What is said of a layer that has another shape than its site."""
    have, want = ("x".join(map(str, shape)) for shape in (loaded, given))
    return ModelError(
        f"layer '{part}' of the checkpoint is {have}, but '{site.name}' of the graph is {want}: "
        "give a graph of the same model"
    )
