"""Normalization layers, alone and with what comes before them, and the losses that ONNX has."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qgraph.torch.ops.types import Operators, torch_dtype


def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
    training_mode: int = 0,
    outputs: int,
) -> tuple[Tensor, ...]:
    """With the given statistics; in training mode with those of `x`, and the running ones moved."""
    if not training_mode:
        shape = [-1] + [1] * (x.ndim - 2)
        if x.dtype == scale.dtype == mean.dtype:
            return (F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon),)
        factor = scale / torch.sqrt(var + epsilon)
        y = x * factor.reshape(shape) + (bias - mean * factor).reshape(shape)
        return (y.to(x.dtype),)
    axes = [0, *range(2, x.ndim)]
    own_var, own_mean = torch.var_mean(x, axes, correction=0)
    y = F.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon)
    running = (
        mean * momentum + own_mean * (1 - momentum),
        var * momentum + own_var * (1 - momentum),
    )
    return (y, *running)


def instance_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5
) -> Tensor:
    return torch.group_norm(x, x.shape[1], scale, bias, epsilon)


def group_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    opset: int,
) -> Tensor:
    """Before opset 21 there is one scale and bias for each group, since then for each channel."""
    if opset < 21:
        repeats = x.shape[1] // num_groups
        scale, bias = scale.repeat_interleave(repeats), bias.repeat_interleave(repeats)
    data = x.to(torch_dtype(stash_type))
    normal = torch.group_norm(data, num_groups, None, None, epsilon).to(x.dtype)
    shape = [-1] + [1] * (x.ndim - 2)
    return normal * scale.reshape(shape) + bias.reshape(shape)


def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int,
) -> tuple[Tensor, ...]:
    """The result, the mean and the inverse standard deviation."""
    dims = list(range(axis % x.ndim, x.ndim))
    plain = scale.shape == x.shape[dims[0] :] and (bias is None or bias.shape == scale.shape)
    if outputs == 1 and plain and x.dtype == scale.dtype == torch.float32:
        return (F.layer_norm(x, scale.shape, scale, bias, epsilon),)
    data = x.to(torch_dtype(stash_type))
    var, mean = torch.var_mean(data, dims, correction=0, keepdim=True)
    inverse = torch.rsqrt(var + epsilon)
    y = ((data - mean) * inverse).to(x.dtype) * scale
    return y if bias is None else y + bias, mean, inverse


def rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    dims = list(range(axis % x.ndim, x.ndim))
    data = x.to(torch_dtype(stash_type))
    mean_square = torch.mean(data * data, dims, True)
    return (data * torch.rsqrt(mean_square + epsilon)).to(scale.dtype) * scale


def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    norm = torch.linalg.vector_norm(x, p, axis, True)
    return torch.where(norm == 0, 0, x / torch.where(norm == 0, 1, norm))


def mean_variance_normalization(x: Tensor, *, axes: list[int] | None = None) -> Tensor:
    dims = list(axes or (0, 2, 3))
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(var) + 1e-9)


def local_response_normalization(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    before = (size - 1) // 2
    edges = [0, 0] * (x.ndim - 2) + [before, size - 1 - before]
    sums = F.pad(x * x, edges).unfold(1, size, 1).sum(-1)
    return x / (bias + alpha / size * sums) ** beta


def _loss(
    log_probability: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int | None,
) -> Tensor:
    ignored = -100 if ignore_index is None else ignore_index
    return F.nll_loss(
        log_probability, target.to(torch.int64), weight, ignore_index=ignored, reduction=reduction
    )


def negative_log_likelihood_loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    return _loss(x, target, weight, reduction, ignore_index)


def softmax_cross_entropy_loss(
    scores: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    reduction: str = "mean",
    outputs: int,
) -> tuple[Tensor, Tensor]:
    log_probability = torch.log_softmax(scores, 1)
    return _loss(log_probability, labels, weights, reduction, ignore_index), log_probability


def simplified_layer_normalization(
    x: Tensor,
    scale: Tensor,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int,
) -> tuple[Tensor, Tensor]:
    """The result and the inverse root mean square."""
    dims = list(range(axis % x.ndim, x.ndim))
    data = x.to(torch.float32) if x.element_size() < 4 else x
    inverse = torch.rsqrt(torch.mean(data * data, dims, True) + epsilon)
    return (data * inverse).to(x.dtype) * scale, inverse


def skip_simplified_layer_normalization(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-5,
    outputs: int,
) -> tuple[Tensor | None, ...]:
    """The result, two statistics that nobody computes on CPU, and the sum that was normalized."""
    total = x + skip if bias is None else x + skip + bias
    y, inverse = simplified_layer_normalization(total, gamma, epsilon=epsilon, outputs=2)
    return y, None, inverse, total


def skip_layer_normalization(
    x: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-5,
    outputs: int,
) -> tuple[Tensor, ...]:
    """The result, the mean, the inverse standard deviation, and the sum that was normalized."""
    total = x + skip if bias is None else x + skip + bias
    y = F.layer_norm(total, gamma.shape, gamma, beta, epsilon)
    if outputs == 1:
        return (y,)
    var, mean = torch.var_mean(total, -1, correction=0, keepdim=True)
    return y, mean, torch.rsqrt(var + epsilon), total


def embed_layer_normalization(
    input_ids: Tensor,
    segment_ids: Tensor | None,
    word_embedding: Tensor,
    position_embedding: Tensor,
    segment_embedding: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 1,
    outputs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The embeddings normalized, how much of each sequence the mask keeps, and their sum."""
    length = input_ids.shape[1]
    places = torch.arange(length, device=input_ids.device) if position_ids is None else position_ids
    total = F.embedding(input_ids, word_embedding) + F.embedding(places, position_embedding)
    if segment_ids is not None and segment_embedding is not None:
        total = total + F.embedding(segment_ids, segment_embedding)
    lengths = input_ids.new_zeros(input_ids.shape[0]) if mask is None else mask.sum(1)
    y = F.layer_norm(total, total.shape[-1:], gamma, beta, epsilon)
    return y, lengths.to(torch.int32), total


OPERATORS: Operators = {
    "BatchNormalization": batch_normalization,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "LRN": local_response_normalization,
    "LayerNormalization": layer_normalization,
    "LpNormalization": lp_normalization,
    "MeanVarianceNormalization": mean_variance_normalization,
    "NegativeLogLikelihoodLoss": negative_log_likelihood_loss,
    "RMSNormalization": rms_normalization,
    # onnxruntime has it under the name of the standard, which does not know it
    "SimplifiedLayerNormalization": simplified_layer_normalization,
    "SoftmaxCrossEntropyLoss": softmax_cross_entropy_loss,
}
MICROSOFT: Operators = {
    "EmbedLayerNormalization": embed_layer_normalization,
    "SimplifiedLayerNormalization": simplified_layer_normalization,
    "SkipLayerNormalization": skip_layer_normalization,
    "SkipSimplifiedLayerNormalization": skip_simplified_layer_normalization,
}
