"""The formats that weights are held in, one file each."""

from __future__ import annotations

import numpy as np

from qgraph.errors import PipelineError
from qgraph.numerics.reference import Float
from qgraph.numerics.spec import QuantSpec
from qgraph.weights.formats.blocks import Blocks
from qgraph.weights.formats.codebook import Codebook
from qgraph.weights.formats.float8 import Float8
from qgraph.weights.formats.format import Format, Reader
from qgraph.weights.formats.linear import Linear

__all__ = ["FORMATS", "LINEAR", "Format", "Reader", "of", "rounded_weight", "unwritable"]

LINEAR = Linear()
FORMATS: list[Format] = [Codebook(), Float8(), Blocks(), LINEAR]
"""Whichever first owns a spec holds its weights; put one of your own in front."""


def of(spec: QuantSpec) -> Format:
    """The format of weights of this spec.

    Raises:
        PipelineError: there is none.
    """
    for form in FORMATS:
        if form.owns(spec):
            return form
    raise unwritable(spec)


def rounded_weight(w: np.ndarray, spec: QuantSpec) -> Float:
    """A weight, quantized and back; products that could saturate are not looked for."""
    return of(spec).round_trip(w, spec)


def unwritable(spec: QuantSpec) -> PipelineError:
    """What is said of a spec that no graph can hold."""
    return PipelineError(
        f"insert-qdq cannot write '{spec}': weights are integers of 4 or 8 bits, per-tensor, "
        "per-axis or in blocks of a matrix, static activations int8 or uint8, per-tensor"
    )
