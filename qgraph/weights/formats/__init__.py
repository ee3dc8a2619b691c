"""What a product computes once it is quantized, in plain numpy: for passes that try candidates."""

from __future__ import annotations

from qgraph.numerics.quantized import Quantized
from qgraph.numerics.reference import Float
from qgraph.numerics.spec import PerAxis, PerBlock, QuantSpec
from qgraph.weights.formats.blocks import quantize_in_groups
from qgraph.weights.formats.codebook import quantize_in_codebook
from qgraph.weights.formats.linear import quantize_in_slices


def rounded_weight(w: Float, spec: QuantSpec) -> Float:
    """A weight, quantized and back; products that could saturate are not looked for."""
    if isinstance(spec.granularity, PerBlock):
        if spec.codebook:
            return quantize_in_codebook(w, spec.granularity, spec).float()
        return quantize_in_groups(w, spec.granularity, spec).float()
    axis = spec.granularity.axis if isinstance(spec.granularity, PerAxis) else None
    return Quantized(*quantize_in_slices(w, axis, spec), axis).float()
