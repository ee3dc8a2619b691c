"""What a language model with past key/value inputs needs besides its tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from qgraph.graph.reading import MICROSOFT, dims, is_op

TOKENS = "input_ids"
_PAST = re.compile(r"past.*(key|value|\d)", re.IGNORECASE)
_SEQUENCE = re.compile(r"past|seq", re.IGNORECASE)

Shape = tuple[int | None, ...]
"""None stands for the batch, -1 for the sequence."""


def required_inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs that a caller must give: those without a default value, in the model's order."""
    return [value for value in model.graph.inputs if not value.is_initializer()]


def free_axes(value: ir.Value) -> list[int]:
    """The axes whose size the model leaves open (old exporters write -1 for them)."""
    return [a for a, d in enumerate(value.shape or ()) if not isinstance(d, int) or d < 0]


def past_shapes(model: ir.Model) -> dict[str, Shape]:
    """Shapes of the past key/value inputs of a language model that takes `input_ids`, by name.

    An input is one if it is called so and its shape fits: floats of rank 3 to 5 in which one open
    dimension besides the batch is the sequence; a further open one must be the head size of a
    GroupQueryAttention. Empty for any other model.
    """
    values = required_inputs(model)
    tokens = next((value for value in values if value.name == TOKENS), None)
    if tokens is None or tokens.shape is None or len(tokens.shape) != 2:
        return {}
    batch = str(tokens.shape[0])
    shapes = {str(v.name): _past_shape(v, batch) for v in values if _PAST.match(str(v.name))}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _past_shape(value: ir.Value, batch: str) -> Shape | None:
    free = free_axes(value)
    if value.shape is None or not free or not 3 <= len(value.shape) <= 5:
        return None
    if value.dtype is None or not value.dtype.is_floating_point():
        return None
    shape: list[int | None] = list(dims(value))
    symbols = {axis: str(value.shape[axis]) for axis in free}
    # A fixed batch leaves only the sequence open; else the batch has its symbol, or comes first.
    if len(free) > 1:
        first = next((a for a in free if symbols[a] == batch), free[0])
        free.remove(first)
        shape[first] = None
    sequence = next((a for a in free if _SEQUENCE.search(symbols[a])), free[0])
    free.remove(sequence)
    shape[sequence] = -1
    if not free:
        return tuple(shape)
    shape[free[0]] = _head_size(value)
    return tuple(shape) if len(free) == 1 and shape[free[0]] else None


def _head_size(value: ir.Value) -> int | None:
    """The width of a head of the attention that reads this cache, as its output's shape tells it.

    onnxruntime-genai's model builder leaves that dimension of the cache open.
    """
    for node in value.consumers():
        if is_op(node, "GroupQueryAttention", domain=MICROSOFT):
            width = dims(node.outputs[0])[-1:]
            if width and width[0]:
                return width[0] // node.attributes["num_heads"].as_int()
    return None


def completer(model: ir.Model) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """:func:`complete_feed` for many feeds; stays valid while `model` is rewritten."""
    past = past_shapes(model)
    ranks = {str(v.name): len(v.shape or ()) for v in required_inputs(model)}
    dtypes = {str(v.name): v.dtype.numpy() for v in required_inputs(model) if v.dtype is not None}

    def complete(feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        full = dict(feed)
        if not past or np.ndim(full.get(TOKENS, 0)) != 2:
            return full
        batch, length = full[TOKENS].shape
        given = next((name for name in past if name in full), None)
        before = 0 if given is None else int(full[given].shape[past[given].index(-1)])
        for name in [name for name in past if name not in full]:
            sizes = [batch if d is None else before if d == -1 else d for d in past[name]]
            full[name] = np.zeros(sizes, dtypes[name])
        mask = full.get("attention_mask", np.ones((batch, before + length), np.int64))
        count = np.cumsum(mask != 0, axis=-1)[..., -length:]
        extras = {
            "attention_mask": mask,
            "position_ids": np.maximum(count - 1, 0),
            "use_cache_branch": np.array([before > 0]),
        }
        for name, content in extras.items():
            if name not in full and ranks.get(name) == content.ndim:
                full[name] = content.astype(dtypes[name])
        return full

    return complete


def complete_feed(model: ir.Model, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`feed` with what a language model with past key/value inputs needs besides `input_ids`.

    Added where missing: an empty cache (`past_key_values.*` with a sequence axis of length 0), an
    `attention_mask` of ones (batch, past + sequence), `position_ids` (batch, sequence) that count
    the unmasked tokens, and `use_cache_branch`. Any other model's feed comes back as it is.
    """
    return completer(model)(feed)
