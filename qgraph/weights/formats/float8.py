"""Floats of 8 bits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.graph.builder import Builder
from qgraph.graph.editing import add_constant
from qgraph.graph.sites import Site
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.reference import along
from qgraph.numerics.spec import FLOAT8, PerAxis, PerTensor, QuantSpec
from qgraph.weights.formats.format import COMPUTED_IN_FLOAT, Format, Reader, unknown_types
from qgraph.weights.formats.linear import quantize_in_slices


class Float8(Format):
    """Floats of 8 bits, one scale or one for each channel.

    ::

        W:float8e4m3fn ── Cast(float) ── Mul(scale) ── W

    No DequantizeLinear: onnxruntime would neither compute it once, when it loads the model, nor
    leave a product of two of them to float in every version. It stands first of all in the main
    graph.
    """

    even = False

    def owns(self, spec: QuantSpec) -> bool:
        return spec.dtype in FLOAT8 and isinstance(spec.granularity, PerTensor | PerAxis)

    def fits(self, spec: QuantSpec, site: Site, data: QuantSpec | None, version: int) -> str | None:
        return unknown_types(version, "float8")

    def quantize(self, w: np.ndarray, spec: QuantSpec) -> Quantized:
        axis = spec.granularity.axis if isinstance(spec.granularity, PerAxis) else None
        return Quantized(*quantize_in_slices(w, axis, spec), axis)

    def write(self, model: ir.Model, base: str, weight: Quantized, spec: QuantSpec) -> Reader:
        graph, shape = Builder(model, model.graph[0], f"{base}_"), weight.q.shape
        scale = (
            weight.scale if weight.axis is None else along(weight.scale, weight.axis, len(shape))
        )
        q = add_constant(model, f"{base}_q", weight.q)
        wide = graph.op("Cast", q, to=int(ir.DataType.FLOAT), shape=shape)
        computed = graph.op("Mul", wide, add_constant(model, f"{base}_scale", scale), shape=shape)
        return lambda _: computed

    def note(self, data: QuantSpec | None) -> str | None:
        return COMPUTED_IN_FLOAT

    def substitute(self, spec: QuantSpec, axis: int) -> QuantSpec | None:
        return None
