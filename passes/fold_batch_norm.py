"""Fold batch normalization and constant scales and shifts into the linear operator before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qgraph.graph.annotation import Stage
from qgraph.graph.editing import add_constant, insert, remove_dead, replace
from qgraph.graph.reading import array, attribute, dims, is_op, node_name
from qgraph.graph.sites import Site, only_user, site_of
from qgraph.numerics.reference import along
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass

Affine = tuple[np.ndarray, np.ndarray]
"""Scale and shift of a map y_c = scale_c · x_c + shift_c of each channel c, float64 (C,)."""


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Make a linear operator and the per-channel affine map behind it one operator.

    The problem: a batch normalization at inference is y = γ (x - μ) / √(σ² + ε) + β, a scale and a
    shift of each channel. As an operator of its own it costs a pass over memory and puts a tensor
    that need not exist between the integer product and what follows.

    ::

        x -> Conv (w, b) -> BatchNormalization     x -> Conv (s·w, s·b + t)     s = γ / √(σ² + ε)
        x -> MatMul (w) -> Add (b) -> BatchNorm..  x -> MatMul (s·w) -> Add     t = β - s·μ
        x -> Conv -> Add (c) -> Mul (d)            x -> Conv

    Conv, ConvTranspose, Gemm and MatMul with constant weights, behind them BatchNormalization; and
    behind Conv, ConvTranspose and Gemm also Add, Sub, Mul, Div by a constant that has one value for
    the tensor or one for each channel. Only where nothing else reads what lies between, nor a
    weight has to be computed. A normalization before a Conv stays: padding zeros come after it.

    A channel with γ = 0 becomes one of zeros; σ² near zero gives a large but finite s. Where a
    folded weight would not be finite (σ² + ε ≤ 0, a float16 overflow) the node stays, and a remark
    says so.

    Parameters: none.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", section 3.2, equation 14 (https://arxiv.org/abs/1712.05877).
    """

    name: ClassVar[str] = "fold-batch-norm"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.CANONICAL})

    def run(self, model: ir.Model, context: Context) -> bool:
        changed = False
        for node in model.graph.all_nodes():
            # A chain of affine nodes folds in one visit: the site stays, what follows it changes.
            while self._fold(model, node, context):
                changed = True
        if changed:
            remove_dead(model)
        return changed

    def _fold(self, model: ir.Model, node: ir.Node, context: Context) -> bool:
        site = site_of(node)
        if site is None or not (site.is_product or site.is_convolution):
            return False
        add = _bias_add(site) if site.kind == "matmul" else None
        last = add or node
        follower = only_user(last.outputs[0])
        if follower is None or not follower.outputs[0].name:
            return False
        affine = affine_of(site, last, follower)
        if affine is None:
            return False
        weight, bias = array(site.weight), _bias(site, add)
        if weight is None or bias is None:
            return False
        scale, shift = affine
        groups = int(attribute(node, "group", 1)) if site.kind == "conv_transpose" else 1
        with np.errstate(over="ignore", invalid="ignore"):
            new_weight = scale_channels(weight, scale, site.axis, groups)
            new_bias = (bias.astype(np.float64) * scale + shift).astype(weight.dtype)
        if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):
            reason = "folding it would overflow the weights of the operator before it"
            context.remark("declined", self.name, node_name(follower), follower.op_type, reason)
            return False
        self._rewrite(model, site, add, follower, new_weight, new_bias)
        message = f"folded {follower.op_type} '{node_name(follower)}'"
        zeros = int((scale == 0).sum())
        self.remark(context, site, "applied", message, channels=scale.size, zero_channels=zeros)
        return True

    def _rewrite(
        self,
        model: ir.Model,
        site: Site,
        add: ir.Node | None,
        follower: ir.Node,
        weight: np.ndarray,
        bias: np.ndarray,
    ) -> None:
        node, old = site.node, site.weight
        dtype = old.dtype
        base = old.name or "weight"
        node.replace_input_with(site.w_index, add_constant(model, base, weight, dtype))
        bias_value = add_constant(model, f"{site.name}_bias", bias, dtype)
        last = node
        if site.bias_index is not None:
            node.resize_inputs(site.bias_index + 1)
            node.replace_input_with(site.bias_index, bias_value)
        elif add is not None:
            position = 1 if add.inputs[0] is node.outputs[0] else 0
            add.replace_input_with(position, bias_value)
            last = add
        else:
            inputs = [node.outputs[0], bias_value]
            last = insert(model, node, "Add", inputs, base=f"{site.name}_biased", after=True)
        replace(follower, last.outputs[0], takes_name=False)


def batch_norm_affine(
    gamma: np.ndarray, beta: np.ndarray, mean: np.ndarray, var: np.ndarray, epsilon: float
) -> Affine:
    """Scale γ / √(σ² + ε) and shift β - scale·μ, float64, shape (C,) as the arguments.

    Entries are not finite where σ² + ε <= 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = gamma.astype(np.float64) / np.sqrt(var.astype(np.float64) + epsilon)
        return scale, beta.astype(np.float64) - scale * mean.astype(np.float64)


def scale_channels(weight: np.ndarray, scale: np.ndarray, axis: int, groups: int = 1) -> np.ndarray:
    """Multiply each output channel of a weight by its factor, in float64, result in its dtype.

    Args:
        weight: any rank.
        scale: (C,), one factor for each output channel.
        axis: axis of the output channels.
        groups: of a ConvTranspose: `weight` is (I, C / groups, ...), and output channel
            g · C / groups + j belongs to the rows of group g and index j of `axis` 1.
    """
    if groups == 1:
        return np.asarray(weight * along(scale, axis, weight.ndim)).astype(weight.dtype)
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    factors = scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))
    return np.asarray(split * factors).astype(weight.dtype).reshape(weight.shape)


def affine_of(site: Site, last: ir.Node, follower: ir.Node) -> Affine | None:
    """What `follower` does to the channels of `site`, or None if it is no constant affine map.

    Args:
        last: the node whose output `follower` reads: the site's, or the Add of its bias.

    Returns:
        scale and shift, float64 (C,).
    """
    channels = _channels(site)
    if is_op(follower, "BatchNormalization"):
        return _batch_norm(site, last, follower, channels)
    if site.kind == "matmul" or not is_op(follower, "Add", "Sub", "Mul", "Div"):
        return None
    first = follower.inputs[0] is last.outputs[0]
    other = array(follower.inputs[1 if first else 0])
    rank = 2 if site.kind == "gemm" else len(dims(site.weight))
    if other is None or other.dtype.kind != "f" or not _per_channel(other.shape, channels, rank):
        return None
    values = np.broadcast_to(other.astype(np.float64).reshape(-1), channels)
    one, zero = np.ones(channels), np.zeros(channels)
    match follower.op_type:
        case "Add":
            return one, values
        case "Sub":
            return (one, -values) if first else (-one, values)
        case "Mul":
            return values, zero
        case _ if first and (values != 0).all():
            return 1 / values, zero
    return None


def _batch_norm(site: Site, last: ir.Node, follower: ir.Node, channels: int) -> Affine | None:
    if attribute(follower, "training_mode", 0) or not attribute(follower, "is_test", 1):
        return None
    if not attribute(follower, "spatial", 1):
        return None
    if any(v.uses() or v.is_graph_output() for v in follower.outputs[1:]):
        return None
    if follower.inputs[0] is not last.outputs[0]:
        return None
    # Channels are axis 1 of the input, which is the last axis of a product only if it is a matrix.
    if site.kind == "matmul" and len(dims(site.x)) != 2:
        return None
    params = [array(value) for value in follower.inputs[1:5]]
    gamma, beta, mean, var = params
    if gamma is None or beta is None or mean is None or var is None:
        return None
    if any(p is not None and p.shape != (channels,) for p in params):
        return None
    return batch_norm_affine(gamma, beta, mean, var, float(attribute(follower, "epsilon", 1e-5)))


def _per_channel(shape: tuple[int, ...], channels: int, rank: int) -> bool:
    """Whether a constant has one value, or one for each index of axis 1 of a tensor of `rank`."""
    if len(shape) > rank:
        return False
    padded = (1,) * (rank - len(shape)) + shape
    return padded in ((1,) * rank, (1, channels) + (1,) * (rank - 2))


def _one_each(constant: np.ndarray, channels: int) -> bool:
    """Whether a constant is a scalar or a row of one value for each channel."""
    return constant.size == 1 or (constant.size == channels and constant.shape[-1] == channels)


def _channels(site: Site) -> int:
    count = dims(site.weight)[site.axis] or 0
    return count * (int(attribute(site.node, "group", 1)) if site.kind == "conv_transpose" else 1)


def _bias(site: Site, add: ir.Node | None) -> np.ndarray | None:
    """The bias of each channel, zeros where there is none, None where it is computed."""
    channels = _channels(site)
    value = site.bias
    if add is not None:
        value = add.inputs[1 if add.inputs[0] is site.node.outputs[0] else 0]
    if site.kind == "gemm" and attribute(site.node, "beta", 1.0) != 1.0:
        return None
    if value is None:
        return np.zeros(channels)
    bias = array(value)
    if bias is None or not _one_each(bias, channels):
        return None
    return np.broadcast_to(bias.reshape(-1), channels)


def _bias_add(site: Site) -> ir.Node | None:
    """The Add of a constant vector that alone reads a MatMul, if there is one."""
    user = only_user(site.node.outputs[0])
    if not is_op(user, "Add"):
        return None
    other = array(user.inputs[1 if user.inputs[0] is site.node.outputs[0] else 0])
    if other is None or other.ndim > 2 or not _one_each(other, _channels(site)):
        return None
    return user
