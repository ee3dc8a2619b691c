"""Attention, rotary embedding and the recurrences that stand in for attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qgraph.torch.ops.types import Operators, torch_dtype


def heads(x: Tensor, count: int) -> Tensor:
    """(batch, sequence, heads * size) as (batch, heads, sequence, size)."""
    return x.reshape(x.shape[0], x.shape[1], count, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """The inverse of :func:`heads`."""
    return x.transpose(1, 2).flatten(2)


def shared(x: Tensor, count: int) -> Tensor:
    """Heads of keys or values, each repeated for the query heads that share it."""
    return x if x.shape[1] == count else x.repeat_interleave(count // x.shape[1], 1)


def probabilities(scores: Tensor, sink: Tensor | None = None) -> Tensor:
    """Softmax over the last axis; a row that is -inf all over gives zeros.

    Args:
        sink: a score for each head, (heads,), that takes its share and is dropped.
    """
    if sink is not None:
        column = sink.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    blocked = (scores == -math.inf).all(-1, keepdim=True)
    return torch.where(blocked, 0, torch.softmax(torch.where(blocked, 0, scores), -1))


def capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    outputs: int,
) -> tuple[Tensor, ...]:
    """The result, both caches, and the scores at the stage asked for."""
    flat = q.ndim == 3
    if flat:
        assert q_num_heads is not None
        assert kv_num_heads is not None
        q, k, v = heads(q, q_num_heads), heads(k, kv_num_heads), heads(v, kv_num_heads)
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    root = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    raw = torch.matmul(q * root, shared(k * root, q.shape[1]).transpose(-1, -2))
    soft = capped(raw, softcap)
    scores = soft
    if attn_mask is not None:
        missing = k.shape[2] - attn_mask.shape[-1]
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~F.pad(attn_mask, [0, missing], value=False), -math.inf)
        else:
            scores = scores + F.pad(attn_mask, [0, missing], value=-math.inf)
    allowed = _allowed(
        q.shape[2],
        k.shape[2],
        0 if past_key is None else past_key.shape[2],
        nonpad_kv_seqlen,
        bool(is_causal),
        left_window_size,
        right_window_size,
        q.device,
    )
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    exact = scores if softmax_precision is None else scores.to(torch_dtype(softmax_precision))
    shares = probabilities(exact).to(q.dtype)
    y = torch.matmul(shares, shared(v, q.shape[1]))
    stages = (raw, soft, scores, shares)
    return merged(y) if flat else y, k, v, stages[qk_matmul_output_mode]


def _allowed(
    queries: int,
    keys: int,
    past: int,
    filled: Tensor | None,
    causal: bool,
    left: int,
    right: int,
    device: torch.device,
) -> Tensor | None:
    """Which keys each query may see, (batch or 1, 1, queries, keys), or None for all."""
    key = torch.arange(keys, device=device)
    query = torch.arange(queries, device=device)[:, None]
    if filled is None:
        place = (query + past)[None, None]
    else:
        place = query + (filled - queries).reshape(-1, 1, 1, 1)
    bounds = []
    if filled is not None:
        bounds.append(key < filled.reshape(-1, 1, 1, 1))
    if causal:
        bounds.append(key <= place)
    if left >= 0:
        bounds.append(key >= place - left)
    if right >= 0:
        bounds.append(key <= place + right)
    if not bounds:
        return None
    allowed = bounds[0]
    for bound in bounds[1:]:
        allowed = allowed & bound
    return allowed


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate pairs of features: x is (batch, heads, sequence, size), cos and sin (batch or 1,
    sequence, half); features beyond twice the half stay."""
    half = cos.shape[-1]
    turning, still = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack([cos * a - sin * b, sin * a + cos * b], -1).flatten(-2)
    else:
        a, b = turning[..., :half], turning[..., half:]
        turned = torch.cat([cos * a - sin * b, sin * a + cos * b], -1)
    return torch.cat([turned, still], -1)


def rotary_embedding(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    if position_ids is not None:
        cos_cache, sin_cache = cos_cache[position_ids], sin_cache[position_ids]
    if x.ndim == 3:
        return merged(rotated(heads(x, num_heads), cos_cache, sin_cache, bool(interleaved)))
    return rotated(x, cos_cache, sin_cache, bool(interleaved))


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_state: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    chunk_size: int = 64,
    kv_num_heads: int,
    q_num_heads: int,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
    outputs: int,
) -> tuple[Tensor, Tensor]:
    """One token after another: the state is an outer product of keys and values, (B, H, dk, dv)."""
    dtype = query.dtype
    q = heads(query, q_num_heads).to(torch.float32)
    k, v = heads(key, kv_num_heads).to(torch.float32), heads(value, kv_num_heads).to(torch.float32)
    factor = scale or 1 / math.sqrt(q.shape[-1])
    state = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    if past_state is not None:
        state = past_state.to(torch.float32)
    fade = None if decay is None else heads(decay.to(torch.float32), kv_num_heads).exp()
    rate = None if beta is None else beta.to(torch.float32).transpose(1, 2)  # (B, H or 1, T)
    results = []
    for t in range(q.shape[2]):
        if update_rule in ("gated", "gated_delta") and fade is not None:
            state = state * fade[:, :, t, :, None]
        new = v[:, :, t]
        if update_rule in ("delta", "gated_delta"):
            new = new - torch.einsum("bhkv,bhk->bhv", state, k[:, :, t])
            new = new if rate is None else new * rate[:, :, t, None]
        state = state + k[:, :, t, :, None] * new[:, :, None, :]
        own = shared(state, q_num_heads)
        results.append(factor * torch.einsum("bhkv,bhk->bhv", own, q[:, :, t]))
    y = torch.stack(results, 2)
    return merged(y).to(dtype), state.to(dtype if past_state is None else past_state.dtype)


def causal_conv_with_state(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past_state: Tensor | None = None,
    *,
    activation: str = "none",
    outputs: int,
) -> tuple[Tensor, Tensor]:
    """A depthwise convolution that sees the present and the past, and the past for the next run."""
    before = weight.shape[-1] - 1
    past = x.new_zeros(*x.shape[:2], before) if past_state is None else past_state
    whole = torch.cat([past, x], -1)
    y = F.conv1d(whole, weight, bias, groups=x.shape[1])
    state = whole[..., whole.shape[-1] - before :]
    return y if activation == "none" else F.silu(y), state


OPERATORS: Operators = {
    "Attention": attention,
    "CausalConvWithState": causal_conv_with_state,
    "LinearAttention": linear_attention,
    "RotaryEmbedding": rotary_embedding,
}
