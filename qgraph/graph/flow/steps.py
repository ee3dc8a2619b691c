"""What must be divided for the output of an operator to be divided by a factor for each channel.

Each operator answers with parts: inputs, each with the array of channels that stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qgraph.graph.flow.channels import Channels, Part, Size, met, reshaped, trimmed
from qgraph.graph.ops import FLOATS, HOMOGENEOUS, NORMS, RESHAPES
from qgraph.graph.reading import MAIN_DOMAINS, MICROSOFT, array, attribute, constant, dims

Parts = Iterator[tuple[Part, ...]]
"""The ways to divide an output, best first: each a set of inputs to divide."""

Step = Callable[[ir.Node, ir.Value, Channels], Parts]
"""What an operator answers: its node, the output in question, the channels beside that."""


def ways(value: ir.Value, channels: Channels) -> Parts:
    """The ways to divide the computed `value`; none for operators that pass no scale on."""
    node = value.producer()
    if node is None:
        return
    step = _STEPS.get(("" if node.domain in MAIN_DOMAINS else node.domain, node.op_type))
    if step is not None and (value is node.outputs[0] or step is _split):
        yield from step(node, value, trimmed(channels))


# ---------------------------------------------------------------------------- what is asked often


def _sizes(value: ir.Value | None) -> list[Size]:
    """The dimensions; an unknown one gets a name that no other has."""
    shape = value.shape if value is not None and value.shape is not None else ()
    return [
        d if isinstance(d, int) else d.value or f"axis {i} of {id(value)}"
        for i, d in enumerate(shape)
    ]


def _at(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _carries(value: ir.Value | None, channels: Channels) -> bool:
    """Whether `value` has an element of its own for each of `channels`."""
    sizes = dims(value)[::-1]
    varying = [axis for axis, n in enumerate(channels.shape[::-1]) if n != 1]
    return all(a < len(sizes) and sizes[a] == channels.shape[-1 - a] for a in varying)


def _all(parts: Iterable[Part | None]) -> Parts:
    """The one way that takes all of `parts`, if there are all."""
    results = tuple(parts)
    known = tuple(part for part in results if part is not None)
    if known and len(known) == len(results):
        yield known


# -------------------------------------------------------------------- elementwise operators, norms


def _same(node: ir.Node, value: ir.Value, channels: Channels) -> Parts:
    """f(x / s) = f(x) / s for s > 0."""
    yield (Part(0, channels),)


def _cast(node: ir.Node, value: ir.Value, channels: Channels) -> Parts:
    if node.inputs[0] is not None and {node.inputs[0].dtype, value.dtype} <= {*FLOATS}:
        yield (Part(0, channels),)


def _factors(node: ir.Node, value: ir.Value, channels: Channels) -> Parts:
    """One factor is enough, a constant by preference.

    A constant of one element stays as it is: it may belong to the formula of an activation (0.5 in
    a Gelu written out), which runtimes fuse only as long as it is one number.
    """
    able = [i for i in (0, 1) if _carries(node.inputs[i], channels)]
    for index in sorted(able, key=lambda i: constant(node.inputs[i]) is None):
        yield (Part(index, channels),)


def _numerator(node: ir.Node, value: ir.Value, channels: Channels) -> Parts:
    if _carries(node.inputs[0], channels):
        yield (Part(0, channels),)


def _term(node: ir.Node, index: int, channels: Channels) -> Part | None:
    """A constant term can grow to the size of the channels, any other must have it."""
    value = node.inputs[index]
    able = constant(value) is not None or _carries(value, channels)
    return Part(index, channels) if able else None


def _terms(node: ir.Node, value: ir.Value, channels: Channels) -> Parts:
    yield from _all(_term(node, i, channels) for i in (0, 1))


def _norm(*indices: int) -> Step:
    """Scale and shift of a normalization, at these inputs; what it normalizes does not matter."""

    def step(node: ir.Node, value: ir.Value, channels: Channels) -> Parts:
        present = [i for i in indices if _at(node, i) is not None]
        yield from _all(met(i, channels, dims(node.inputs[i])) for i in present)

    return step


# ------------------------------------------------------------------------------- matrix products


def _matmul(node: ir.Node, value: ir.Value, channels: Channels) -> Parts:
    """Columns and batches of the second operand; rows are of the first."""
    left, right = dims(node.inputs[0]), dims(node.inputs[1])
    rows = channels.ndim > 1 and (len(left) < 2 or channels.shape[-2] != 1)
    if len(right) >= 2 and not rows:
        yield from _all([met(1, channels, right)])


def _gemm(node: ir.Node, value: ir.Value, channels: Channels) -> Parts:
    if channels.ndim > 1:
        return
    columns = channels[:, np.newaxis] if attribute(node, "transB", 0) else channels
    weight = met(1, columns, dims(node.inputs[1]))
    bias = [] if _at(node, 2) is None else [_term(node, 2, channels)]
    yield from _all([weight, *bias])


# ------------------------------------------------------------------------------- moving elements


def _reshape(node: ir.Node, value: ir.Value, channels: Channels) -> Parts:
    moved = reshaped(channels, _sizes(value), _sizes(node.inputs[0]))
    if moved is not None:
        yield (Part(0, moved),)


def _transpose(node: ir.Node, value: ir.Value, channels: Channels) -> Parts:
    perm = node.attributes.get("perm")
    order = range(len(dims(value)))[::-1] if perm is None else perm.as_ints()
    if channels.ndim <= len(order):
        padded = channels.reshape((1,) * (len(order) - channels.ndim) + channels.shape)
        yield (Part(0, padded.transpose(np.argsort(order))),)


def _expand(node: ir.Node, value: ir.Value, channels: Channels) -> Parts:
    yield from _all([met(0, channels, dims(node.inputs[0]))])


def _pick(node: ir.Node, value: ir.Value, channels: Channels) -> Parts:
    """Gather and Slice of axes in front of the channels, such as the last token."""
    gather = node.op_type == "Gather"
    axes = np.asarray(attribute(node, "axis", 0)) if gather else array(_at(node, 3))
    rank = len(dims(node.inputs[0]))
    if rank and axes is not None and (axes % rank < rank - channels.ndim).all():
        yield (Part(0, channels),)


def _split(node: ir.Node, value: ir.Value, channels: Channels) -> Parts:
    """One output of several along the axis of the channels; the others stay as they are."""
    axis = int(attribute(node, "axis", 0))
    axis -= len(dims(value)) if axis >= 0 else 0
    if not -channels.ndim <= axis < 0 or channels.shape[axis] == 1:
        return
    pieces = []
    for output in node.outputs:
        size = dims(output)[axis] if dims(output) else None
        if size is None:
            return
        none = np.full_like(channels.take([0], axis), -1).repeat(size, axis)
        pieces.append(channels if output is value else none)
    yield (Part(0, np.concatenate(pieces, axis)),)


# ------------------------------------------------------------------------------------- attention


def _kept(node: ir.Node, past: int, present: int) -> bool:
    """Whether the values come from a cache or go into one: then they must stay as they are."""
    if _at(node, past) is not None:
        return True
    cache = node.outputs[present] if present < len(node.outputs) else None
    return cache is not None and (bool(cache.uses()) or cache.is_graph_output())


def _shared_heads(index: int, channels: Channels, heads: int, kv_heads: int) -> Part | None:
    """The values (kv_heads · width,) of which each head serves several of the `heads` in a row."""
    if not kv_heads or heads % kv_heads or channels.size % heads:
        return None
    grouped = channels.reshape(kv_heads, heads // kv_heads, -1)
    part = met(index, grouped, (kv_heads, 1, grouped.shape[2]))
    return None if part is None else replace(part, channels=part.channels.ravel())


def _packed(node: ir.Node, part: Part | None) -> Part | None:
    """Queries and keys stand in front of the values, in one input."""
    if part is None or (total := (dims(_at(node, part.index)) or [None])[-1]) is None:
        return None
    front = np.full(total - part.channels.size, -1)
    return replace(part, channels=np.concatenate([front, part.channels]))


def _group_query_attention(node: ir.Node, value: ir.Value, channels: Channels) -> Parts:
    if channels.ndim > 1 or _kept(node, 4, 2):
        return
    heads = int(attribute(node, "num_heads", 1)), int(attribute(node, "kv_num_heads", 1))
    if _at(node, 2) is None:
        yield from _all([_packed(node, _shared_heads(0, channels, *heads))])
    else:
        yield from _all([_shared_heads(2, channels, *heads)])


def _multi_head_attention(node: ir.Node, value: ir.Value, channels: Channels) -> Parts:
    """com.microsoft: values (batch, time, width); a bias for queries, keys and values."""
    if channels.ndim > 1 or _kept(node, 7, 2) or len(dims(_at(node, 2))) != 3:
        return
    bias = [] if _at(node, 3) is None else [_packed(node, Part(3, channels))]
    yield from _all([Part(2, channels), *bias])


def _attention_of_microsoft(node: ir.Node, value: ir.Value, channels: Channels) -> Parts:
    """It holds the projections: weight (in, queries + keys + values) and a bias for its columns."""
    if channels.ndim > 1 or _kept(node, 4, 1):
        return
    present = [i for i in (1, 2) if _at(node, i) is not None]
    yield from _all(_packed(node, Part(i, channels)) for i in present)


def _attention(node: ir.Node, value: ir.Value, channels: Channels) -> Parts:
    """ONNX: values (batch, time, heads · width) or (batch, heads, time, width)."""
    if _kept(node, 5, 2):
        return
    values = dims(node.inputs[2])
    if len(values) == 3 and channels.ndim == 1:
        heads = int(attribute(node, "q_num_heads", 1)), int(attribute(node, "kv_num_heads", 1))
        yield from _all([_shared_heads(2, channels, *heads)])
    elif len(values) == 4 and channels.ndim == 1:
        yield (Part(2, channels),)
    elif len(values) == 4 and channels.ndim == 3 and channels.shape[1] == 1 and values[1]:
        part = _shared_heads(2, channels, channels.shape[0], values[1])
        if part is not None:
            yield (replace(part, channels=part.channels.reshape(values[1], 1, -1)),)


_STEPS: dict[tuple[str, str], Step] = {
    **{("", op): _same for op in HOMOGENEOUS | {"Dropout", "Identity", "Neg"}},
    ("", "Cast"): _cast,
    ("", "Mul"): _factors,
    ("", "Div"): _numerator,
    ("", "Add"): _terms,
    ("", "Sub"): _terms,
    **{(domain, op): _norm(*NORMS[op]) for op in NORMS for domain in ("", MICROSOFT)},
    ("", "MatMul"): _matmul,
    ("", "Gemm"): _gemm,
    **{("", op): _reshape for op in RESHAPES},
    ("", "Transpose"): _transpose,
    ("", "Expand"): _expand,
    ("", "Gather"): _pick,
    ("", "Slice"): _pick,
    ("", "Split"): _split,
    ("", "Attention"): _attention,
    (MICROSOFT, "Attention"): _attention_of_microsoft,
    (MICROSOFT, "MultiHeadAttention"): _multi_head_attention,
    (MICROSOFT, "GroupQueryAttention"): _group_query_attention,
}
