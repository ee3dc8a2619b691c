"""Operators of `com.microsoft`, as language models and quantized models use them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qgraph.torch.ops.attention import OPERATORS as STANDARD
from qgraph.torch.ops.attention import capped, heads, merged, probabilities, rotated, shared
from qgraph.torch.ops.types import NARROW, Ints, Operators, integer, pieces

# ------------------------------------------------------------------------------- normalization


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
    kept = input_ids.new_zeros(input_ids.shape[0]) if mask is None else mask.sum(1)
    y = F.layer_norm(total, total.shape[-1:], gamma, beta, epsilon)
    return y, kept.to(torch.int32), total


# --------------------------------------------------------------------------------- activations


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    return x * torch.sigmoid(alpha * x)


# ------------------------------------------------------------------------------------ products


def fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
    transBatchA: int = 0,  # noqa: N803
    transBatchB: int = 0,  # noqa: N803
) -> Tensor:
    left, right = _turned(a, transA, transBatchA), _turned(b, transB, transBatchB)
    return alpha * torch.matmul(left, right)


def _turned(x: Tensor, matrix: int, batch: int) -> Tensor:
    if batch:  # the first axis becomes the one before the last
        x = x.movedim(0, -2)
    return x.transpose(-1, -2) if matrix and x.ndim > 1 else x


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """The unsigned integers in bytes, those in the low bits first, along the last axis."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def matmul_nbits(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,  # noqa: N803
    N: int,  # noqa: N803
    bits: int = 4,
    block_size: int,
    accuracy_level: int = 0,
    weight_prepacked: int = 0,
) -> Tensor:
    """`a` times a packed weight, (N, blocks, bytes), with a scale for each block.

    Accuracy level 4 lets a runtime round `a` to 8 bits, block by block; this does, and gradients
    pass it as if it did not.
    """
    count = -(-K // block_size)
    q = unpacked(b.reshape(N, count, -1), bits).to(scales.dtype)  # (N, count, block_size)
    if zero_points is None:
        zero = torch.full((N, count), 1 << (bits - 1), dtype=scales.dtype, device=b.device)
    elif zero_points.dtype == torch.uint8:
        zero = unpacked(zero_points.reshape(N, -1), bits)[:, :count].to(scales.dtype)
    else:
        zero = zero_points.reshape(N, count)
    step = scales.reshape(N, count)
    if g_idx is None:
        weight = ((q - zero[..., None]) * step[..., None]).reshape(N, -1)[:, :K]
    else:
        group = g_idx[:K].to(torch.int64)
        weight = (q.reshape(N, -1)[:, :K] - zero[:, group]) * step[:, group]
    if accuracy_level == 4 and block_size in (16, 32, 64, 128, 256) and g_idx is None:
        a = a + (_rounded(a.detach(), block_size) - a.detach())
    return F.linear(a, weight.to(a.dtype), bias)


def _rounded(x: Tensor, block_size: int) -> Tensor:
    """Each block of the last axis rounded to multiples of a 127th of its largest magnitude."""
    length = x.shape[-1]
    blocks = F.pad(x, [0, -length % block_size])
    blocks = blocks.reshape(*x.shape[:-1], -1, block_size)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale == 0, 0, 1 / scale)
    rounded: Tensor = torch.round(blocks * inverse) * scale
    return rounded.flatten(-2)[..., :length]


_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.005208333, 0.6666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)


def matmul_bnb4(
    a: Tensor,
    b: Tensor,
    absmax: Tensor,
    *,
    K: int,  # noqa: N803
    N: int,  # noqa: N803
    block_size: int,
    quant_type: int,
    training_mode: int = 0,
    transB: int = 1,  # noqa: N803
) -> Tensor:
    """`a` times a weight of bitsandbytes: NF4 (type 1) or FP4 (0), the high half of bytes first."""
    book = _NF4 if quant_type == 1 else (*_FP4, *(-v for v in _FP4))
    table = torch.tensor(book, dtype=absmax.dtype, device=b.device)
    codes = torch.stack([b >> 4, b & 15], -1).flatten()[: N * K]
    step = absmax.repeat_interleave(block_size)[: N * K]
    weight = (table[codes.to(torch.int64)] * step).reshape((N, K) if transB else (K, N))
    return torch.matmul(a, (weight.t() if transB else weight).to(a.dtype))


def gather_block_quantized(
    data: Tensor,
    indices: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    *,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    quantize_axis: int = 1,
    types: list[int],
) -> Tensor:
    """Rows of a quantized table as floats; bytes hold several unsigned integers each."""
    rows = (slice(None),) * (gather_axis % data.ndim) + (indices.to(torch.int64),)
    if types[0] in NARROW:
        default = 0
        q, zero = data, zero_points
    else:
        default = 1 << (bits - 1)
        q = unpacked(data, bits)
        zero = None if zero_points is None else unpacked(zero_points, bits)
    axis = quantize_axis % data.ndim
    length = scales.shape[axis]

    def whole(blocks: Tensor) -> Tensor:
        every = blocks.narrow(axis, 0, length).repeat_interleave(block_size, axis)
        return every.narrow(axis, 0, q.shape[axis])

    number = q[rows].to(scales.dtype)
    offset = default if zero is None else whole(zero)[rows].to(scales.dtype)
    return (number - offset) * whole(scales)[rows]


# ----------------------------------------------------------------------------------- attention


def rotary_embedding(
    x: Tensor,
    position_ids: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    *,
    interleaved: int = 0,
    is_packed_batching: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """`position_ids` holds a position for each token, or one for the first."""
    length = x.shape[-2]
    if position_ids.numel() == 1:
        position_ids = position_ids.reshape(1, 1) + torch.arange(length, device=x.device)
    cos, sin = cos_cache[position_ids], sin_cache[position_ids]
    if x.ndim == 4:
        return rotated(x, cos, sin, bool(interleaved))
    count = num_heads or x.shape[-1] // (2 * cos_cache.shape[-1])
    return merged(rotated(heads(x, count), cos, sin, bool(interleaved)))


def group_query_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    seqlens_k: Tensor,
    total_sequence_length: Ints,
    cos_cache: Tensor | None = None,
    sin_cache: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_bias: Tensor | None = None,
    head_sink: Tensor | None = None,
    *,
    do_rotary: int = 0,
    kv_num_heads: int,
    local_window_size: int = -1,
    num_heads: int,
    rotary_interleaved: int = 0,
    scale: float = 0.0,
    smooth_softmax: int = 0,
    softcap: float = 0.0,
    outputs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention over a cache; the result and both caches, (batch, heads, length, size).

    `seqlens_k` is, for each sequence, how many tokens there are with the new ones, less one.  Where
    sequences differ in length, new tokens stand right behind the old ones of their sequence.
    """
    if key is None or value is None:
        size = query.shape[-1] // (num_heads + 2 * kv_num_heads)
        query, key, value = pieces(
            query, [num_heads * size, kv_num_heads * size, kv_num_heads * size], -1
        )
    q, k, v = heads(query, num_heads), heads(key, kv_num_heads), heads(value, kv_num_heads)
    batch, length = query.shape[:2]
    total = seqlens_k.reshape(batch, 1).to(torch.int64) + 1
    first = length == integer(total_sequence_length)
    past = torch.zeros_like(total) if first else total - length
    place = past + torch.arange(length, device=query.device)  # (batch, length)
    if do_rotary:
        assert cos_cache is not None
        assert sin_cache is not None
        turns = place if position_ids is None else position_ids
        turns = turns.clamp(max=cos_cache.shape[0] - 1)
        cos, sin = cos_cache[turns], sin_cache[turns]
        q = rotated(q, cos, sin, bool(rotary_interleaved))
        k = rotated(k, cos, sin, bool(rotary_interleaved))
    k, v = _appended(past_key, k, past), _appended(past_value, v, past)
    present = _kept(k, past_key, total_sequence_length), _kept(v, past_value, total_sequence_length)
    factor = scale or 1 / math.sqrt(q.shape[-1])
    scores = factor * torch.matmul(q, shared(k, num_heads).transpose(-1, -2))
    scores = capped(scores, softcap)
    if attention_bias is not None:
        scores = scores + attention_bias[..., : scores.shape[-1]]
    seen = torch.arange(k.shape[2], device=query.device) - place[..., None]
    hidden = seen > 0
    if local_window_size > 0:
        hidden = hidden | (seen <= -local_window_size)
    scores = scores.masked_fill(hidden[:, None], -math.inf)
    sink = head_sink
    if sink is None and smooth_softmax:
        sink = scores.new_zeros(num_heads)
    y = torch.matmul(probabilities(scores, sink), shared(v, num_heads))
    return merged(y), *present


def _appended(past: Tensor | None, new: Tensor, start: Tensor) -> Tensor:
    """New tokens behind the first `start`, (batch, 1), of the past ones."""
    if past is None or past.shape[2] == 0:
        return new
    if bool((start == past.shape[2]).all()):
        return torch.cat([past, new], 2)
    room = max(past.shape[2], int(start.max()) + new.shape[2])
    whole = F.pad(past, [0, 0, 0, room - past.shape[2]])
    place = start + torch.arange(new.shape[2], device=new.device)
    return torch.scatter(whole, 2, place[:, None, :, None].expand(new.shape), new)


def _kept(whole: Tensor, past: Tensor | None, total: Ints) -> Tensor:
    """The cache as long as it has to be."""
    room = max(integer(total), 0 if past is None else past.shape[2])
    return whole if whole.shape[2] == room else F.pad(whole, [0, 0, 0, room - whole.shape[2]])


def _mask_of(
    mask: Tensor | None,
    batch: int,
    queries: int,
    keys: int,
    filter_value: float,
    dtype: torch.dtype,
) -> Tensor | None:
    """What a padding mask adds to scores, (batch, 1, queries or 1, keys)."""
    if mask is None:
        return None
    if mask.ndim == 1:
        place = torch.arange(keys, device=mask.device)
        kept = place < mask[:batch, None]
        if mask.numel() == 2 * batch:
            kept = kept & (place >= mask[batch:, None])
        elif mask.numel() != batch:
            raise NotImplementedError("torch has no masks of packed sequences")
        mask = kept
    mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
    if mask.shape[-1] != keys or mask.shape[-2] not in (1, queries):
        raise NotImplementedError("torch has no masks of this shape")
    return torch.where(mask.to(torch.bool), 0.0, filter_value).to(dtype)


def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: float | None,
    filter_value: float,
    unidirectional: int,
) -> tuple[Tensor, Tensor]:
    """The result and the scores."""
    factor = scale or 1 / math.sqrt(q.shape[-1])
    scores = factor * torch.matmul(q, k.transpose(-1, -2))
    queries, keys = scores.shape[-2:]
    added = _mask_of(mask, q.shape[0], queries, keys, filter_value, q.dtype)
    scores = scores if added is None else scores + added
    if unidirectional:
        later = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(later.triu(keys - queries + 1), filter_value)
    scores = scores if bias is None else scores + bias
    return merged(torch.matmul(torch.softmax(scores, -1), v)), scores


def multi_head_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    scale: float | None = None,
    unidirectional: int = 0,
    outputs: int,
) -> tuple[Tensor, ...]:
    """The result, both caches, the scores."""
    if query.ndim == 5:
        query, key, value = (part.flatten(2) for part in query.unbind(3))
    elif key is not None and key.ndim == 5:
        key, value = (part.flatten(2) for part in key.unbind(3))
    assert key is not None
    assert value is not None
    if bias is not None:
        sizes = [query.shape[-1], bias.numel() - query.shape[-1] - value.shape[-1]]
        of_q, of_k, of_v = pieces(bias, [*sizes, bias.numel() - sum(sizes)], -1)
        query = query + of_q
        if key.ndim == 3:
            key, value = key + of_k, value + of_v
    q = heads(query, num_heads)
    k, v = (heads(x, num_heads) if x.ndim == 3 else x for x in (key, value))
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    y, scores = _attended(
        q, k, v, key_padding_mask, attention_bias, scale, mask_filter_value, unidirectional
    )
    return y, k, v, scores


def attention(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    mask_index: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    *,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    qkv_hidden_sizes: list[int] | None = None,
    scale: float | None = None,
    unidirectional: int = 0,
    outputs: int,
) -> tuple[Tensor, ...]:
    """Attention with the projections in it: the result and the cache, keys then values."""
    projected = torch.matmul(x, weights)
    projected = projected if bias is None else projected + bias
    sizes = qkv_hidden_sizes or [weights.shape[-1] // 3] * 3
    q, k, v = (heads(part, num_heads) for part in pieces(projected, sizes, -1))
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    y, _ = _attended(q, k, v, mask_index, attention_bias, scale, mask_filter_value, unidirectional)
    return (y, torch.stack([k, v])) if outputs > 1 else (y,)


STANDARD_DOMAIN: Operators = {"SimplifiedLayerNormalization": simplified_layer_normalization}
"""What onnxruntime has under the name of the standard, which does not know it."""
MICROSOFT: Operators = {
    "Attention": attention,
    "BiasGelu": bias_gelu,
    "CausalConvWithState": STANDARD["CausalConvWithState"],
    "EmbedLayerNormalization": embed_layer_normalization,
    "FastGelu": fast_gelu,
    "FusedMatMul": fused_matmul,
    "GatherBlockQuantized": gather_block_quantized,
    "Gelu": gelu,
    "GroupQueryAttention": group_query_attention,
    "LinearAttention": STANDARD["LinearAttention"],
    "MatMulBnb4": matmul_bnb4,
    "MatMulNBits": matmul_nbits,
    "MultiHeadAttention": multi_head_attention,
    "QuickGelu": quick_gelu,
    "RotaryEmbedding": rotary_embedding,
    "SimplifiedLayerNormalization": simplified_layer_normalization,
    "SkipLayerNormalization": skip_layer_normalization,
    "SkipSimplifiedLayerNormalization": skip_simplified_layer_normalization,
}
