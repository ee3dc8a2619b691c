"""The numerics, in plain numpy: the reference that every kernel is tested against."""

from qgraph.numerics.noise import relative_error, sqnr_db
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.reference import dequantize, quantize, quantize_weight, scale_zero_point
from qgraph.numerics.spec import PerAxis, PerBlock, PerTensor, PerToken, QuantSpec

__all__ = [
    "PerAxis",
    "PerBlock",
    "PerTensor",
    "PerToken",
    "QuantSpec",
    "Quantized",
    "dequantize",
    "quantize",
    "quantize_weight",
    "relative_error",
    "scale_zero_point",
    "sqnr_db",
]
