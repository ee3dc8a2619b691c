"""What a backend promises to the passes: which quantized operators run, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import onnx_ir as ir

    from qgraph.graph.sites import Site
    from qgraph.numerics.spec import QuantSpec
    from qgraph.pipeline.context import Context


@dataclass(frozen=True)
class Verdict:
    """A target's answer to "can you run this site quantized like this, and does it pay?".

    Attributes:
        ok: quantize it.
        reason: one sentence, for the remarks.
        speedup: float time / quantized time as measured, or 0.0 where nothing was measured.
        conversions: time of converting input and output, in units of the float time, where that
            is not part of `speedup`: neighbours in integers save it.
        slowest: the lowest speedup among the numbers of rows that count, where `speedup` is their
            mean; infinite where it tells nothing.
    """

    ok: bool
    reason: str
    speedup: float = 0.0
    conversions: float = 0.0
    slowest: float = float("inf")


class Target(Protocol):
    """A backend on a concrete machine.

    Attributes:
        name: as the user writes it: `cpu`, `cpu:avx2`, `onnx`, ...
        saturates: u8·s8 products are added in pairs in int16 (x86 without VNNI), so two large
            products can overflow; weights must be repaired where that can happen.
        measured: whether verdicts come from timing this machine.
    """

    @property
    def name(self) -> str: ...

    @property
    def saturates(self) -> bool: ...

    @property
    def measured(self) -> bool: ...

    def supports(
        self, site: Site, activation: QuantSpec | None, weight: QuantSpec, context: Context
    ) -> Verdict:
        """Whether to quantize `site` with these specs (`activation=None`: weight only)."""
        ...

    def supports_glue(self, node: ir.Node) -> bool:
        """Whether `node` (Add, Concat, pooling, ...) has an integer kernel worth having."""
        ...

    def legalize(self, model: ir.Model, context: Context) -> bool:
        """Make of committed quantization what the target runs fastest; True if that changed it."""
        ...
