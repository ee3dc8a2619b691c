"""Modules of torch for the functions of the target `cuda`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.backends.cuda.functions import INT8_LINEAR, INT8_LINEAR_WITH_BIAS
from qgraph.backends.cuda.launches import prepare
from qgraph.backends.cuda.packing import pad_columns, row_sums
from qgraph.errors import ModelError, QGraphError
from qgraph.graph.functions import DOMAIN, QUANTIZE_PER_TOKEN
from qgraph.graph.reading import array, constant_array, node_name, release

try:
    import torch
except ImportError:
    raise ModelError('modules need torch: pip install "qgraph-compiler[torch]"') from None

from torch import Tensor, fx, nn

import qgraph.backends.cuda.ops  # noqa: F401 - registers them

__all__ = ["Compiled", "Int8Linear", "QuantizePerToken", "QuantizedLinear", "layers"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What kernels read and write."""


class QuantizePerToken(nn.Module):
    """Tokens in int8, each relative to its largest magnitude.

    Args:
        step, zero, floor: see `qgraph.numerics.tokens.TokenGrid`.
        name: of the site, for errors.
    """

    def __init__(self, step: float, zero: int, floor: float, name: str = "") -> None:
        super().__init__()
        self.step, self.zero, self.floor, self.name = step, zero, floor, name

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., K) as int8 (..., K up to a multiple of 64) and float32 (..., 1)."""
        if x.dtype not in FLOATS:
            raise QGraphError(
                f"'{self.name}' got {x.dtype} data: give float32, float16 or bfloat16"
            )
        q, largest = torch.ops.qgraph.quantize_per_token(x, self.step, self.zero, self.floor)
        tokens = x.shape[:-1]
        return q.reshape(*tokens, q.shape[-1]), largest.reshape(*tokens, 1)

    def extra_repr(self) -> str:
        return f"zero={self.zero}"


class Int8Linear(nn.Module):
    """A product of int8 tokens with an int8 weight.

    What it holds keeps its type and its bits wherever the module goes: `.half()` and the like
    change only the type of the result.

    Args:
        weight: int8 (N, K).
        scale: float32 (N,), with the step of the tokens' grid in it.
        zero: zero point of the tokens in uint8.
        bias: float32 (N,).
        name: of the site, for errors.

    Attributes:
        weight: int8 (N, K up to a multiple of 64).
        sums: int32 (N,), of the weight's rows, where `zero` is not 128.
        dtype: of the result.
    """

    weight: Tensor
    scale: Tensor
    sums: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: np.ndarray,
        scale: np.ndarray,
        zero: int,
        bias: np.ndarray | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.channels, self.columns = weight.shape
        self.zero, self.name, self.dtype = zero, name, torch.float32
        held = {
            "weight": np.array(pad_columns(weight)),
            "scale": np.array(scale, np.float32),
            "sums": None if zero == 128 else row_sums(weight),
            "bias": None if bias is None else np.array(bias, np.float32),
        }
        for key, value in held.items():
            self.register_buffer(key, None if value is None else torch.from_numpy(value))

    def forward(self, q: Tensor, largest: Tensor) -> Tensor:
        """int8 (..., K up to a multiple of 64) and float32 (..., 1) to (..., N)."""
        weight = self.weight
        if q.shape[-1] != weight.shape[1] or q.device != weight.device:
            raise QGraphError(
                f"'{self.name}' has weights for {self.columns} columns on {weight.device} and got "
                f"{q.shape[-1]} on {q.device}: give inputs of that width, there"
            )
        y = torch.ops.qgraph.int8_linear(
            q.reshape(-1, q.shape[-1]), largest.reshape(-1), weight, self.scale, self.sums,
            self.bias, self.zero, self.dtype,
        )  # fmt: skip
        result: Tensor = y.reshape(*q.shape[:-1], self.channels)
        return result

    def extra_repr(self) -> str:
        return f"{self.columns}, {self.channels}, zero={self.zero}, dtype={self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `.to`, `.half`, `.cuda` and the like do: devices change, bits do not."""
        sample = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device))
        if sample.dtype in FLOATS:
            self.dtype = sample.dtype
        if sample.is_cuda:
            prepare(sample.get_device(), self.dtype)

        def moved(held: Tensor) -> Tensor:
            bits = held.view(torch.int32) if held.is_floating_point() else held
            new = fn(bits)
            return (new if new.dtype == bits.dtype else bits.to(new.device)).view(held.dtype)

        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]


class QuantizedLinear(nn.Module):
    """A linear layer with an int8 product, and what a recipe has put before and beside that.

    ::

        x ── Mul(factor) ─┬─ Mul(mask) ── quantize ── product ─ Add ── Add(bias) ── y
                          └─ columns ── rows ───────────────────┘

    Args:
        quantize, product: of the tokens, and with the weight.
        factor: float (K,), what no norm before it could absorb of a smoothing.
        columns, rows: int64 (outliers,) and float (outliers, N): channels multiplied in float.
        mask: float (K,), zeros at those channels.
        bias: float (N,), where the product does not add it.
    """

    factor: Tensor | None
    mask: Tensor | None
    columns: Tensor | None
    rows: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        quantize: QuantizePerToken,
        product: Int8Linear,
        factor: Tensor | None = None,
        mask: Tensor | None = None,
        columns: Tensor | None = None,
        rows: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.quantize, self.product = quantize, product
        self.in_features, self.out_features = product.columns, product.channels
        for name, value in (("factor", factor), ("mask", mask), ("columns", columns),
                            ("rows", rows), ("bias", bias)):  # fmt: skip
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N)."""
        if x.shape[-1] != self.in_features:
            raise QGraphError(
                f"'{self.product.name}' takes {self.in_features} columns and got {x.shape[-1]}"
            )
        if self.factor is not None:
            x = x * self.factor
        y: Tensor = self.product(*self.quantize(x if self.mask is None else x * self.mask))
        if self.columns is not None and self.rows is not None:
            y = y + x.index_select(-1, self.columns) @ self.rows
        return y if self.bias is None else y + self.bias


class Compiled(fx.GraphModule):
    """A lowered model: it asks a device before anything moves there, and runs in its precision.

    Args:
        root, graph: as for `fx.GraphModule`.
        precision: type of its float products, by `torch.autocast`; None: that of their operands.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, precision: torch.dtype | None) -> None:
        self.precision = precision
        super().__init__(root, graph, "Compiled")

    def recompile(self) -> Any:
        code = super().recompile()
        if (precision := self.precision) is not None:
            plain = type(self).forward

            @functools.wraps(plain)
            def forward(module: Compiled, *args: Any) -> Any:
                device = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
                with torch.autocast(device, precision):
                    return plain(module, *args)

            type(self).forward = forward
        return code

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if (sample := fn(torch.empty(0))).is_cuda:
            prepare(sample.get_device(), self.precision or torch.float32)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _deepcopy_init(self) -> Callable[..., None]:
        def init(copy: Compiled, root: nn.Module, graph: fx.Graph) -> None:
            Compiled.__init__(copy, root, graph, self.precision)

        return init

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (fx.GraphModule(self, self.graph), self.precision)


def _restored(plain: fx.GraphModule, precision: torch.dtype | None) -> Compiled:
    return Compiled(plain, plain.graph, precision)


def layers(precision: torch.dtype | None) -> dict[tuple[str, str], Callable[[ir.Node], nn.Module]]:
    """How calls in a lowered graph become modules; those with equal constants become one.

    Args:
        precision: of results; None: float32.
    """
    made: dict[tuple[ir.Value | None, ...], Int8Linear] = {}

    def linear(node: ir.Node) -> nn.Module:
        held = tuple(node.inputs[2:])
        if held not in made:
            made[held] = int8_linear(node)
            made[held].dtype = precision or torch.float32
        return made[held]

    return {
        (DOMAIN, QUANTIZE_PER_TOKEN): quantize_per_token,
        (DOMAIN, INT8_LINEAR): linear,
        (DOMAIN, INT8_LINEAR_WITH_BIAS): linear,
    }


def quantize_per_token(node: ir.Node) -> QuantizePerToken:
    """The module of a call."""
    step, zero, floor = (constant_array(value) for value in node.inputs[1:])
    return QuantizePerToken(float(step), int(zero), float(floor), node_name(node))


def int8_linear(node: ir.Node, rows: slice = slice(None)) -> Int8Linear:
    """The module of a call, or of some of its channels.

    Raises:
        ModelError: its constants are missing, of other sizes, or not finite.
    """
    name, held = node_name(node), [array(value) for value in node.inputs[2:]]
    damaged = f"layer '{name}' is damaged, {{}}: save the model again"
    if any(part is None for part in held):
        raise ModelError(damaged.format("a tensor is missing"))
    weight, scale, zero, *bias = (part for part in held if part is not None)
    if weight.ndim != 2 or any(part.shape != weight.shape[:1] for part in (scale, *bias)):
        raise ModelError(damaged.format("its tensors do not fit each other"))
    if not all(np.isfinite(part).all() for part in (scale, *bias)):
        raise ModelError(damaged.format("its scales or its bias are not finite"))
    shift = bias[0][rows] if bias else None
    made = Int8Linear(weight[rows], scale[rows], int(zero), shift, name)
    release(node.inputs[2])
    return made
