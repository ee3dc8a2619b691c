"""The caches of keys and values that language models return: inputs and outputs, or left out.

torch.export knows tensors, not the `DynamicCache` of transformers. What stands here wraps `forward`
for the time of a trace, so that it takes and gives tensors in the place of caches.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qgraph.errors import ModelError
from qgraph.io.feeds import MASK

if TYPE_CHECKING:
    import torch

PAST = "past_key_values"
_PARTS = ("key", "value")
EXAMPLE = 5
"""Tokens in the example of a past: neither 0 nor 1, which torch.export takes for constants."""


def without_caches(forward: Callable[..., Any], left_out: list[str]) -> Callable[..., Any]:
    """`forward` with None for each cache in its result; the kinds of caches go to `left_out`."""

    def plain(*args: Any, **kwargs: Any) -> Any:
        return _emptied(forward(*args, **kwargs), left_out)

    return plain


def _emptied(result: Any, left_out: list[str]) -> Any:
    if _is_cache(result):
        left_out.append(type(result).__name__)
        return None
    if not _holds_cache(result):
        return result
    if isinstance(result, Mapping):
        parts = {key: _emptied(part, left_out) for key, part in result.items()}
        return parts if type(result) is dict else type(result)(**parts)
    return type(result)(_emptied(part, left_out) for part in result)


def _holds_cache(result: Any) -> bool:
    parts = result.values() if isinstance(result, Mapping) else result
    plain = isinstance(result, Mapping) or type(result) in (tuple, list)
    return plain and any(_is_cache(part) or _holds_cache(part) for part in parts)


def with_past(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` that takes ((key, value), ...) and gives `present.0.key`, ... beside its result."""

    def plain(*args: Any, **kwargs: Any) -> Any:
        from transformers import DynamicCache

        # Without a config, layers with a sliding window keep everything: their mask hides the rest.
        past: Any = DynamicCache(kwargs.pop(PAST))
        result = forward(*args, **{**kwargs, PAST: past, "use_cache": True})
        named = result if isinstance(result, Mapping) else dict(enumerate(result))
        outputs = {
            key if isinstance(key, str) else f"output_{key}": value
            for key, value in named.items()
            if not _is_cache(value)
        }
        for index, layer in enumerate(past.layers):
            states = zip(_PARTS, (layer.keys, layer.values), strict=True)
            outputs |= {f"present.{index}.{part}": state for part, state in states}
        return outputs

    return plain


def add_past(
    module: torch.nn.Module, values: Mapping[str, Any], shapes: Mapping[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Example and free axes with keys and values of earlier tokens, and a mask that covers them.

    Raises:
        ModelError: `forward` takes no cache, or returns none of keys and values alone.
    """
    import torch

    given, free = dict(values), dict(shapes or {})
    given[PAST] = _example_past(module, values)
    batch = next((axes[0] for axes in free.values() if isinstance(axes, dict) and 0 in axes), None)
    axes = {2: "past_length"} if batch is None else {0: batch, 2: "past_length"}
    free[PAST] = tuple((axes, axes) for _ in given[PAST])
    if isinstance(mask := given.get(MASK), torch.Tensor):
        given[MASK] = torch.cat([mask.new_ones((mask.shape[0], EXAMPLE)), mask], dim=1)
        free[MASK] = {**(free.get(MASK) or {}), 1: "total_length"}
    return given, {name: free.get(name) for name in given}


def _example_past(module: torch.nn.Module, values: Mapping[str, Any]) -> Any:
    """Keys and values of zeros, in the shapes that `module` itself makes."""
    name = type(module).__name__
    if PAST not in inspect.signature(module.forward).parameters:
        raise ModelError(f"cache=True is for modules whose forward takes {PAST}: {name} does not")
    result = module(**{**values, "use_cache": True})
    parts = result.values() if isinstance(result, Mapping) else result
    cache = next((part for part in parts if _is_cache(part)), None)
    if cache is None or not _keeps_tokens(cache):
        states = "no cache" if cache is None else f"a {type(cache).__name__} with other states"
        raise ModelError(
            f"cache=True needs one key and one value for each layer, {name} returns {states}: "
            "trace it without, or write a forward that takes and returns its states as tensors"
        )
    return tuple((_example(layer.keys), _example(layer.values)) for layer in cache.layers)


def _keeps_tokens(cache: Any) -> bool:
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    kinds = (DynamicLayer, DynamicSlidingWindowLayer)  # no subclasses: they have other states too
    layers: list[Any] = getattr(cache, "layers", [])
    return isinstance(cache, DynamicCache) and all(
        type(layer) in kinds and layer.keys is not None and layer.keys.ndim == 4 for layer in layers
    )


def _example(state: torch.Tensor) -> torch.Tensor:
    batch, heads, _, size = state.shape
    return state.new_zeros((batch, heads, EXAMPLE, size))


def past_names(inputs: list[str]) -> list[str]:
    """Names of captured inputs, those of a past as language models in ONNX call them."""
    past = [name for name in inputs if name.startswith(f"{PAST}_")]
    names = {name: f"{PAST}.{i // 2}.{_PARTS[i % 2]}" for i, name in enumerate(past)}
    return [names.get(name, name) for name in inputs]


def _is_cache(value: Any) -> bool:
    caches = sys.modules.get("transformers.cache_utils")
    return caches is not None and isinstance(value, caches.Cache)
