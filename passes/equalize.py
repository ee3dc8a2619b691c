"""Cross-layer equalization: consecutive layers get the same range in every channel between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.graph.annotation import Stage
from qgraph.graph.editing import add_constant, remove_dead
from qgraph.graph.ops import HOMOGENEOUS, POOLS
from qgraph.graph.reading import array, constant_array, input_of, is_op, node_name, release
from qgraph.graph.sites import Site, bias_use, by_input_channel, only_user, site_of
from qgraph.numerics.reference import along
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass

Double = NDArray[np.float64]
Use = tuple[ir.Node, int]

_CONVERGED = 1e-3
_DEAD = 1e-4
"""Channels whose weights are this much smaller than the layer's largest count as zero: balancing
them would blow up their biases, and with them the range of the activations."""


@dataclass(frozen=True)
class Equalize(Pass):
    """Rescale the channels between two linear operators so that both have the same range in each.

    The problem: one scale for a whole weight, or for a whole activation, suits only the largest
    channel. After batch norm folding the channels of mobile nets differ by a factor of 100, and
    the small ones round to zero. Since f(s·x) = s·f(x) for s > 0 and f = Relu, what the first
    operator loses per channel the second can give back::

        Conv (W1, b1) ─ Relu ─ Conv (W2, b2)     Conv (W1/s, b1/s) ─ Relu ─ Conv (s·W2, b2)

    with s_i = sqrt(r1_i / r2_i), where r1_i is the largest |W1| of output channel i and r2_i the
    largest |W2| of input channel i: both become sqrt(r1_i · r2_i). Chains (pointwise, depthwise,
    pointwise) are swept until nothing moves. The float function stays the same.

    It helps per-tensor weights and per-tensor activations. Weights with a scale for each output
    channel do not need it on the W1 side; what then remains is the evening out of activations,
    paid for by more uneven input channels of W2.

    Pairs: Conv, Conv or MatMul/Gemm, MatMul/Gemm with constant weights, between them Relu,
    LeakyRelu, PRelu, pooling, or the Add of a MatMul's bias, each read only by the next. A Clip
    (Relu6) is not homogeneous: the paper replaces it by Relu, which changes the function, so here
    the pair is declined, as it is at every other operator. Channels of zeros are skipped.

    Parameters:
        iterations: most sweeps over all pairs.

    Source: Nagel et al. 2019, "Data-Free Quantization through Weight Equalization and Bias
    Correction", section 4.1, eq. 9-11.
    """

    name: ClassVar[str] = "equalize"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.CANONICAL})
    invalidates: ClassVar[frozenset[Stage]] = frozenset({Stage.CALIBRATED})

    iterations: int = 20

    def run(self, model: ir.Model, context: Context) -> bool:
        pairs = list(self._pairs(model, context))
        work = _Weights()
        for pair in pairs:
            work.load(pair)
        before = [work.spread(pair) for pair in pairs]
        for _ in range(self.iterations):
            moved = [work.balance(pair) for pair in pairs]
            if max(moved, default=0.0) < _CONVERGED:
                break
        changed = work.store(model)
        for pair, spread in zip(pairs, before, strict=True):
            message = f"shares the ranges of its channels with '{pair.second.name}'"
            numbers = {"spread_before": spread, "spread_after": work.spread(pair)}
            self.remark(context, pair.first, "applied", message, **numbers)
        return changed

    def _pairs(self, model: ir.Model, context: Context) -> Iterator[_Pair]:
        for node in model.graph.all_nodes():
            site = site_of(node)
            if site is None or not (site.is_product or site.kind == "conv"):
                continue
            pair = _pair(site)
            if isinstance(pair, _Pair):
                yield pair
            else:
                self.remark(context, site, "declined", pair)


@dataclass(frozen=True, eq=False)
class _Pair:
    first: Site
    second: Site
    bias: Use | None


def _pair(site: Site) -> _Pair | str:
    """The pair that begins at `site`, or why there is none."""
    bias = bias_use(site)
    if bias is not None:
        node, index = bias
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            bias = None
        elif array(value) is None:
            return "its bias is computed"
    last = bias[0] if bias is not None else site.node
    passed = HOMOGENEOUS | {"Identity"} | (POOLS if site.kind == "conv" else set())
    while True:
        value = last.outputs[0]
        user = only_user(value)
        if user is None:
            return f"'{value.name}' has several readers or is an output"
        follower = site_of(user)
        if follower is not None and follower.x is value and follower.kind != "activations":
            break
        if not is_op(user, *passed) or user.inputs[0] is not value or len(user.outputs) > 1:
            return f"{user.op_type} '{node_name(user)}' does not pass a scale on"
        last = user
    convolutions = site.kind == follower.kind == "conv"
    if not convolutions and not (site.is_product and follower.is_product):
        return f"{user.op_type} '{follower.name}' has other channels"
    return _Pair(site, follower, bias)


class _Weights:
    """Weights and biases of all pairs while they are balanced, float64, by where they are read."""

    def __init__(self) -> None:
        self.arrays: dict[Use, Double] = {}
        self.moved: set[Use] = set()

    def load(self, pair: _Pair) -> None:
        """Read what the pair needs."""
        for use in (_weight(pair.first), _weight(pair.second), pair.bias):
            if use is not None and use not in self.arrays:
                value = use[0].inputs[use[1]]
                data = constant_array(value)
                self.arrays[use] = np.array(data, np.float64)
                release(value)

    def _ranges(self, pair: _Pair) -> tuple[Double, Double]:
        first, second = self.arrays[_weight(pair.first)], self.arrays[_weight(pair.second)]
        others = tuple(i for i in range(first.ndim) if i != pair.first.axis)
        incoming = by_input_channel(pair.second, np.abs(second)).max(axis=(1, 3))
        return np.abs(first).max(axis=others), incoming.reshape(-1)

    def spread(self, pair: _Pair) -> float:
        """Largest over smallest range of the channels of the first weight that live."""
        r1, _ = self._ranges(pair)
        alive = r1[r1 > _DEAD * r1.max()]
        return float(alive.max() / alive.min()) if alive.size else 1.0

    def balance(self, pair: _Pair) -> float:
        """One step of equation 11. Returns how far the scales are from 1, as |log s|."""
        s = equalizing_scales(*self._ranges(pair))
        first, second = self.arrays[_weight(pair.first)], self.arrays[_weight(pair.second)]
        first /= along(s, pair.first.axis, first.ndim)
        view = by_input_channel(pair.second, second)
        view *= s.reshape(view.shape[0], 1, view.shape[2], 1)
        uses = [_weight(pair.first), _weight(pair.second)]
        if pair.bias is not None:
            self.arrays[pair.bias] = self.arrays[pair.bias] / s
            uses.append(pair.bias)
        if (s != 1).any():
            self.moved.update(uses)
        return float(np.abs(np.log(s)).max(initial=0.0))

    def store(self, model: ir.Model) -> bool:
        """Write back what moved, as new constants: others may read the old ones."""
        for node, index in sorted(self.moved, key=lambda use: (node_name(use[0]), use[1])):
            value = input_of(node, index)
            assert value.dtype is not None
            data = self.arrays[node, index].astype(value.dtype.numpy())
            node.replace_input_with(index, add_constant(model, f"{value.name}_equal", data))
        if self.moved:
            remove_dead(model)
        return bool(self.moved)


def _weight(site: Site) -> Use:
    return site.node, site.w_index


def equalizing_scales(r1: NDArray[Any], r2: NDArray[Any]) -> Double:
    """s_i = sqrt(r1_i / r2_i), by which W1 is divided and W2 multiplied (eq. 11).

    Args:
        r1: largest magnitude of each output channel of the first weight, 1-D.
        r2: largest magnitude of each input channel of the second weight, 1-D.

    Returns:
        float64, 1-D, > 0; 1 for channels that are (nearly) zero on either side.
    """
    a, b = np.asarray(r1, np.float64), np.asarray(r2, np.float64)
    alive = (a > _DEAD * a.max(initial=0.0)) & (b > _DEAD * b.max(initial=0.0))
    return np.sqrt(np.divide(a, b, out=np.ones_like(a), where=alive))
