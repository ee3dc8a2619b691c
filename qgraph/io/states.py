"""What a model remembers between runs: inputs that come back as outputs, found by dataflow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qgraph.graph.reading import MAIN_DOMAINS, MICROSOFT, attribute, dims, is_op

_CACHES: dict[tuple[str, str], dict[int, int]] = {
    ("", "Attention"): {4: 1, 5: 2},
    (MICROSOFT, "Attention"): {4: 1},
    (MICROSOFT, "DecoderMaskedMultiHeadAttention"): {5: 1, 6: 2},
    (MICROSOFT, "DecoderMaskedSelfAttention"): {4: 1},
    (MICROSOFT, "GroupQueryAttention"): {3: 1, 4: 2},
    (MICROSOFT, "MultiHeadAttention"): {6: 1, 7: 2},
    (MICROSOFT, "SparseAttention"): {3: 1, 4: 2},
}
"""Operators that append to what an input holds: the output that is the longer one."""
_MEMORIES: dict[tuple[str, str], dict[int, int]] = {
    ("", "LSTM"): {5: 1, 6: 2},
    ("", "GRU"): {5: 1},
    ("", "RNN"): {5: 1},
    (MICROSOFT, "CausalConvWithState"): {3: 1},
    (MICROSOFT, "LinearAttention"): {3: 1},
}
"""Operators that write a new state of the same size."""
_MOVES = (
    *("Identity", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"),
    *("Slice", "Split", "Gather"),
)
_WRITES = ("ScatterND", "ScatterElements", "TensorScatter")
_UPDATES = ("Add", "Sub", "Mul", "Where")


@dataclass(frozen=True)
class State:
    """An input and the output that it comes back as.

    Attributes:
        input: what the next run is given.
        output: what this run leaves behind.
        grows: whether the output holds more positions than the input.
    """

    input: ir.Value
    output: ir.Value
    grows: bool


def find_states(
    inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], updates: bool = False
) -> list[State]:
    """Which of the inputs come back as which of the outputs.

    An input does if it is carried to an output of its dtype, rank and fixed axes, and something
    happens to it on the way: it is appended to (Concat, the caches of attention), written into, or
    rewritten as the state of a recurrent operator. Of two inputs that would fit an output, the one
    that stands first in Concat is the past.

    Args:
        updates: follow additions and products of elements too, by which states decay and grow, but
            images and hidden values as well.
    """
    by_output: dict[ir.Value, list[State]] = {output: [] for output in outputs}
    inner = dict(_inner_outputs(outputs))
    for value in inputs:
        for carried, way in _carried(value, updates).items():
            output = inner.get(carried, carried)
            if output in by_output and way.changes and alike(value, output):
                state = State(value, output, way.grows)
                by_output[output].insert(0 if way.first else len(by_output[output]), state)
    taken: set[ir.Value] = set()
    states = []
    for output in outputs:
        free = [state for state in by_output[output] if state.input not in taken]
        if free:
            taken.add(free[0].input)
            states.append(free[0])
    return states


def _inner_outputs(outputs: Sequence[ir.Value]) -> Iterator[tuple[ir.Value, ir.Value]]:
    """What the bodies of an If compute for each of the outputs, with that output."""
    for output in outputs:
        node, index = output.producer(), output.index()
        if is_op(node, "If") and index is not None:
            for body in node.attributes.values():
                yield body.as_graph().outputs[index], output


@dataclass(frozen=True)
class _Way:
    """What happens to a value on its way: something, positions are added, always behind it."""

    changes: bool = False
    grows: bool = False
    first: bool = True

    def then(self, step: _Way) -> _Way:
        return _Way(
            self.changes or step.changes, self.grows or step.grows, self.first and step.first
        )


def _carried(value: ir.Value, updates: bool) -> dict[ir.Value, _Way]:
    """All values that `value` is carried to."""
    seen = {value: _Way()}
    todo = [value]
    while todo:
        at = todo.pop()
        for node, index in at.uses():
            for output, step in _next(node, index, updates):
                if output not in seen:
                    seen[output] = seen[at].then(step)
                    todo.append(output)
    return seen


def _next(node: ir.Node, index: int, updates: bool) -> Iterator[tuple[ir.Value, _Way]]:
    """Outputs of `node` that carry on its input."""
    operator = "" if node.domain in MAIN_DOMAINS else node.domain, node.op_type
    changed = _Way(changes=True)
    if (slot := _CACHES.get(operator, {}).get(index, 0)) and slot < len(node.outputs):
        yield node.outputs[slot], _Way(changes=True, grows=True)
    elif (slot := _MEMORIES.get(operator, {}).get(index, 0)) and slot < len(node.outputs):
        yield node.outputs[slot], changed
    elif is_op(node, "Concat"):
        shape = dims(node.inputs[index])
        grows = not shape or shape[int(attribute(node, "axis", 0))] is None
        yield node.outputs[0], _Way(True, grows, first=index == 0 or not grows)
    elif is_op(node, *_MOVES) and index == 0:
        yield from ((output, _Way()) for output in node.outputs)
    elif (is_op(node, *_WRITES) and index == 0) or (updates and is_op(node, *_UPDATES)):
        yield node.outputs[0], changed
    elif is_op(node, "Loop") and index >= 2:
        yield node.outputs[index - 2], changed
    elif is_op(node, "Scan"):
        states = len(node.inputs) - int(attribute(node, "num_scan_inputs", 0))
        if index < states:
            yield node.outputs[index], changed


def alike(value: ir.Value, output: ir.Value) -> bool:
    """Whether `output` could be given as `value`: dtype, rank and fixed axes agree."""
    if None not in (value.dtype, output.dtype) and value.dtype != output.dtype:
        return False
    if value.shape is None or output.shape is None:
        return value.shape is not None
    if len(value.shape) != len(output.shape):
        return False
    pairs = zip(value.shape, output.shape, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
