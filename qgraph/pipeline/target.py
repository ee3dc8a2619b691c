"""What a backend promises to the passes: which quantized operators run, and how fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir
    import onnxruntime
    import torch

    from qgraph.graph.sites import Site
    from qgraph.numerics.spec import QuantSpec

TARGET = "qgraph.target"
"""Where models that run as torch modules name their target, in `metadata_props`."""

Purpose = Literal["prompt", "decode", "both"]
"""Which runs of a language model decide between lowerings: `optimize_for`."""


@dataclass(frozen=True)
class Verdict:
    """A target's answer to "can you run this site quantized like this, and does it pay?".

    Attributes:
        ok: quantize it.
        reason: one sentence, for the remarks.
        speedup: float time / quantized time as measured, or 0.0 where nothing was measured.
        conversions: time of converting input and output, in units of the float time, where that
            is not part of `speedup`: neighbours in integers save it.
        slowest: the lowest speedup among the numbers of rows that count, where several do and
            `speedup` is their mean; infinite elsewhere.
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

    def supports(self, site: Site, activation: QuantSpec | None, weight: QuantSpec) -> Verdict:
        """Whether to quantize `site` with these specs (`activation=None`: weight only)."""
        ...

    def supports_glue(self, node: ir.Node) -> bool:
        """Whether `node` (Add, Concat, pooling, ...) has an integer kernel worth having."""
        ...

    def legalize(self, model: ir.Model) -> bool:
        """Make of committed quantization what the target runs fastest; True if that changed it."""
        ...

    def open_session(
        self,
        model: ir.Model | Path,
        *,
        optimized: bool = True,
        threads: int = 0,
        prepack: bool = True,
        arena: bool = True,
    ) -> onnxruntime.InferenceSession:
        """A session on a model or a file of one, like :func:`qgraph.io.session.open_session`.

        Raises:
            ModelError: the runtime refuses the model; the message holds its reason.
        """
        ...


class TorchTarget(Target, Protocol):
    """A backend whose results run as torch modules, too.

    Attributes:
        half_floats: they may be moved to float16, whose smallest numbers are 6e-8: no factor may
            make values that count so small.
        largest: magnitude that values should not exceed for their floats; infinite for wide ones.
    """

    @property
    def half_floats(self) -> bool: ...

    @property
    def largest(self) -> float: ...

    def to_module(self, model: ir.Model) -> torch.nn.Module:
        """The lowered model as a module that takes its inputs in their order.

        Raises:
            ModelError: torch is missing or has no counterpart for an operator, or the model is
                damaged.
        """
        ...


def half_floats(target: Target) -> bool:
    """Whether results for this target may run in float16, see :class:`TorchTarget`."""
    return bool(getattr(target, "half_floats", False))


def largest_value(target: Target) -> float:
    """What values should not exceed on this target, see :class:`TorchTarget`."""
    return float(getattr(target, "largest", "inf"))


@dataclass(frozen=True)
class BlockProduct:
    """A product whose activations can be in blocks, as far as its speed is concerned.

    Attributes:
        k, n: length of the dot products, and number of output channels.
        bits: of its weights.
        size: of the blocks.
    """

    k: int
    n: int
    bits: int
    size: int


@runtime_checkable
class TwoSpeed(Protocol):
    """A target that has one kernel for a few rows of data and another one for many."""

    def crossover(self, products: Sequence[BlockProduct]) -> int | None:
        """The rows from which these products, all of a model, run faster as int8 columns than in
        blocks; None where they never do, or where only one kind of run counts."""
        ...
