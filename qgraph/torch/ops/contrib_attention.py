"""Attention as `com.microsoft` has it: with a cache, rotary embedding, masks, projections."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qgraph.torch.ops.attention import (
    capped,
    causal_conv_with_state,
    heads,
    linear_attention,
    merged,
    probabilities,
    rotated,
    shared,
)
from qgraph.torch.ops.types import Ints, Operators, integer, pieces


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
        valid = place < mask[:batch, None]
        if mask.numel() == 2 * batch:
            valid = valid & (place >= mask[batch:, None])
        elif mask.numel() != batch:
            raise NotImplementedError("torch has no masks of packed sequences")
        mask = valid
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


MICROSOFT: Operators = {
    "Attention": attention,
    "CausalConvWithState": causal_conv_with_state,
    "GroupQueryAttention": group_query_attention,
    "LinearAttention": linear_attention,
    "MultiHeadAttention": multi_head_attention,
    "RotaryEmbedding": rotary_embedding,
}
