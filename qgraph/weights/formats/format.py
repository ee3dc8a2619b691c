"""What a format of weights is: how floats are rounded into it, and what a graph stores of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qgraph.graph.reading import dims
from qgraph.graph.sites import Site
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.reference import Float
from qgraph.numerics.spec import SMALL_INTEGERS, WEIGHT, PerAxis, PerBlock, QuantSpec

Reader = Callable[[ir.Node], ir.Value]
"""From a node to what it reads in place of its float weight. Branches of control flow do not see
into each other, so each node may get nodes of its own."""

COMPUTED_IN_FLOAT = (
    "small on disk and in what it can be exchanged with; CPUs dequantize it as they load the model "
    "and compute in float, no faster than before"
)


class Format(ABC):
    """A way to hold weights in fewer bits; instances have no state.

    Attributes:
        even: the levels are evenly spaced, so that passes can choose scales, zero points and
            integers themselves.
    """

    even: bool = True

    @abstractmethod
    def owns(self, spec: QuantSpec) -> bool:
        """Whether weights of this spec are held in this format."""

    @abstractmethod
    def fits(self, spec: QuantSpec, site: Site, data: QuantSpec | None, version: int) -> str | None:
        """Why the weight of `site` cannot be held like this; None if it can.

        Args:
            data: what the product's data is rounded to, None for float.
            version: opset of the model.
        """

    @abstractmethod
    def quantize(self, w: np.ndarray, spec: QuantSpec) -> Quantized:
        """Round to nearest a float weight of any size, memory-mapped or not."""

    def round_trip(self, w: np.ndarray, spec: QuantSpec) -> Float:
        """What the rounded weight stands for, float32 with the shape of `w`."""
        return self.quantize(w, spec).float()

    @abstractmethod
    def write(self, model: ir.Model, base: str, weight: Quantized, spec: QuantSpec) -> Reader:
        """Store a rounded weight: its initializers, and the nodes that make floats of them.

        Args:
            base: what to call the parts.
        """

    def beside(self, weight: Quantized, data: QuantSpec | None) -> Quantized:
        """The weight as kernels hold it that multiply it by such data."""
        return weight

    def note(self, data: QuantSpec | None) -> str | None:
        """What the user should know of a weight in this format beside such data."""
        return None

    def substitute(self, spec: QuantSpec, axis: int) -> QuantSpec | None:
        """What takes the place of a spec that does not fit: int8, a scale for each channel."""
        return WEIGHT.with_(granularity=PerAxis(axis))


def unfit_product(site: Site, data: QuantSpec | None, *, tables: bool) -> str | None:
    """Why neither blocks nor 4-bit integers serve here; None if they do.

    Args:
        tables: 2-D tables that a Gather looks up may have them, too.
    """
    table = tables and site.kind == "gather" and len(dims(site.weight)) == 2
    if not site.is_product and not table:
        return f"blocks and 4-bit integers are for products, not for {site.node.op_type}"
    if data is not None and not data.dynamic:
        return "no runtime multiplies blocks or 4-bit integers by data with a fixed scale"
    return None


def unknown_types(version: int, types: str) -> str | None:
    """Why an opset cannot express `types`, which all need that of small integers."""
    if version >= SMALL_INTEGERS:
        return None
    return f"opset {version} knows no {types}: convert-opset to {SMALL_INTEGERS} first"


def by_columns(data: QuantSpec | None) -> bool:
    """Whether the kernel for such data takes a weight with one scale for each column."""
    return data is not None and not isinstance(data.granularity, PerBlock)
