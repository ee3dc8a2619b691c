"""Mixtures of experts of transformers, expert by expert.

transformers computes all experts in one grouped product, which ONNX lacks; its eager form loops
over the experts that were hit, which depends on the data; and its batched form gathers a weight for
each token. While a module is traced, each expert is a product with a weight of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qgraph.torch.signature import replaced_forward

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def expert_by_expert(module: torch.nn.Module) -> Iterator[None]:
    """Every mixture inside `module` with a forward that can be captured; then as it was."""
    with contextlib.ExitStack() as restored:
        for part in module.modules():
            if _is_mixture(part):
                restored.enter_context(replaced_forward(part, lambda _: _each_expert))
        yield


def _is_mixture(part: Any) -> bool:
    """Whether transformers' `use_experts_implementation` made the class of `part`."""
    marks = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj")
    return all(hasattr(part, mark) for mark in marks)


def _each_expert(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What transformers' experts compute, with as many products as there are experts.

    Args:
        hidden_states: (tokens, channels).
        top_k_index: the experts of each token, (tokens, k).
        top_k_weights: their weights, (tokens, k).
    """
    import torch

    first = "gate_up_proj" if experts.has_gate else "up_proj"
    activate = experts._apply_gate if experts.has_gate else experts.act_fn
    result = torch.zeros_like(hidden_states)
    for expert in range(experts.num_experts):
        token, choice = torch.where(top_k_index == expert)
        inner = activate(_product(experts, first, expert, hidden_states[token]))
        outer = _product(experts, "down_proj", expert, inner)
        if getattr(experts, "has_post_expert_norm", False):
            outer = experts.post_expert_norm(outer)
        outer = outer * top_k_weights[token, choice, None]
        result = result.index_put((token,), outer.to(result.dtype), accumulate=True)
    return result


def _product(experts: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    weight: torch.Tensor = getattr(experts, name)[expert]
    y = x @ (weight if experts.is_transposed else weight.T)
    return y + getattr(experts, f"{name}_bias")[expert] if experts.has_bias else y
