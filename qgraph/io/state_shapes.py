"""Which axis of a state is the batch, which the positions seen so far."""

from __future__ import annotations

import re

import onnx_ir as ir

from qgraph.graph.reading import MICROSOFT, attribute, dims, is_op

_SEQUENCE = re.compile(r"past|seq", re.IGNORECASE)

Shape = tuple[int | None, ...]
"""None stands for the batch, -1 for the positions seen so far."""


def free_axes(value: ir.Value) -> list[int]:
    """The axes whose size the model leaves open (old exporters write -1 for them)."""
    return [a for a, d in enumerate(value.shape or ()) if not isinstance(d, int) or d < 0]


def state_shape(
    value: ir.Value, output: ir.Value | None, batch: str | None, sizes: dict[int, int | None]
) -> Shape | None:
    """The shape of a growing state, or None where the model leaves too much open.

    One open axis besides the batch is that of the positions: the one whose name differs from the
    output's, else the one whose name says so, else the first. A further one has the size that the
    attention tells which reads it, or that of `sizes`.

    Args:
        value: an input.
        output: what it comes back as, if known.
        batch: name of the batch in other inputs.
        sizes: of axes that onnxruntime-genai's model builder leaves open.
    """
    free = free_axes(value)
    if value.shape is None or not free:
        return None
    shape: list[int | None] = list(dims(value))
    names = {axis: str(value.shape[axis]) for axis in free}
    longer = _renamed(value, output)
    if [names[axis] for axis in free] == [batch] and not longer and _named(value, free[0]):
        return fixed_shape(value)
    # A fixed batch leaves only the positions open; else the batch has its name, or comes first.
    if len(free) > 1:
        rest = [a for a in free if a not in longer] or free
        first = next((a for a in free if names[a] == batch), rest[0])
        free.remove(first)
        shape[first] = None
    named = (a for a in free if _SEQUENCE.search(names[a]))
    positions = next((a for a in free if a in longer), next(named, free[0]))
    free.remove(positions)
    shape[positions] = _window(value) or -1
    for axis in free:
        shape[axis] = _attention_sizes(value).get(axis) or sizes.get(axis)
    return tuple(shape) if all(shape[axis] for axis in free) else None


def fixed_shape(value: ir.Value) -> Shape | None:
    """The shape of a state that does not grow: only the batch may be open."""
    if value.shape is None or len(free_axes(value)) > 1:
        return None
    return tuple(None if a in free_axes(value) else d for a, d in enumerate(dims(value)))


def _named(value: ir.Value, axis: int) -> bool:
    return value.shape is not None and getattr(value.shape[axis], "value", None) is not None


def _renamed(value: ir.Value, output: ir.Value | None) -> list[int]:
    """Axes that have one name in `value` and another in `output`."""
    if value.shape is None or output is None or output.shape is None:
        return []
    pairs = enumerate(zip(value.shape, output.shape, strict=True))
    return [
        axis
        for axis, (a, b) in pairs
        if isinstance(a, ir.SymbolicDim) and isinstance(b, ir.SymbolicDim) and a.value != b.value
    ]


def _attention(value: ir.Value) -> ir.Node | None:
    for node in value.consumers():
        if is_op(node, "GroupQueryAttention", domain=MICROSOFT):
            return node
    return None


def _attention_sizes(value: ir.Value) -> dict[int, int]:
    """Heads and width of a head of the attention that reads this cache (batch, heads, _, width)."""
    node = _attention(value)
    width = dims(node.outputs[0])[-1:] if node is not None else []
    if node is None or not width or not width[0]:
        return {}
    heads = int(attribute(node, "num_heads", 1))
    return {1: int(attribute(node, "kv_num_heads", heads)), 3: width[0] // heads}


def _window(value: ir.Value) -> int | None:
    """Positions of a cache that keeps only the last ones: even when empty it has their room."""
    node = _attention(value)
    if node is None or not attribute(node, "sliding_window_cache", 0):
        return None
    return max(int(attribute(node, "local_window_size", -1)), 0) or None
