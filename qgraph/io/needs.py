"""Which inputs of a model hold its tokens, and which its states."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from qgraph.graph.reading import MICROSOFT, dims, is_op
from qgraph.io.genai import Part
from qgraph.io.state_shapes import Shape, fixed_shape, state_shape
from qgraph.io.states import State, alike, find_states

_TOKENS = {"input_ids": 2, "inputs_embeds": 3}
"""Roles in `genai_config.json`, which exporters use as names, and their ranks."""
_PAST = re.compile(r"past.*(key|value|\d)", re.IGNORECASE)
_GROWING = re.compile(r"past_((key|value)_)?names")
"""Roles of states that grow with the positions."""


def find_tokens(inputs: Mapping[str, ir.Value], roles: Mapping[str, str]) -> ir.Value | None:
    """The input that holds tokens or their embeddings: by its name, else by the table it indexes.

    Args:
        inputs: by name.
        roles: names of those whose role is known.
    """
    for role, rank in _TOKENS.items():
        value = inputs.get(roles.get(role, role))
        if value is not None and value.shape is not None and len(value.shape) == rank:
            return value
    integers = (ir.DataType.INT32, ir.DataType.INT64)
    ids = (v for v in inputs.values() if v.dtype in integers and len(v.shape or ()) == 2)
    return next((value for value in ids if _looks_up_rows(value)), None)


def _looks_up_rows(value: ir.Value) -> bool:
    for node, index in value.uses():
        if is_op(node, "Cast") and _looks_up_rows(node.outputs[0]):
            return True
        table = is_op(node, "Gather") or is_op(node, "GatherBlockQuantized", domain=MICROSOFT)
        if table and index == 1 and len(dims(node.inputs[0])) == 2:
            return True
    return False


def find_shapes(
    candidates: Mapping[str, ir.Value],
    outputs: Sequence[ir.Value],
    tokens: ir.Value | None,
    decoder: Part | None,
) -> Iterator[tuple[str, Shape]]:
    """Shapes of the states among `candidates`, by name, as far as the model tells them.

    States are what `genai_config.json` says, and inputs that come back as outputs. Caches of old
    names (`past_key_values.0.key`) whose way through the graph cannot be followed count too, if
    there may be an output that they come back as.

    Args:
        candidates: inputs that are neither tokens nor masks nor positions.
        outputs: of the model.
        tokens: a model without them must have other inputs and outputs besides its states.
        decoder: what the model's folder says.
    """
    states = _said(candidates, outputs, decoder)
    taken = {state.input for state in states} | {state.output for state in states}
    free = [value for value in candidates.values() if value not in taken]
    left = [output for output in outputs if output not in taken]
    states += find_states(free, left, updates=tokens is not None)
    if tokens is None and len(states) in (len(candidates), len(outputs)):
        return
    batch = None if tokens is None or tokens.shape is None else str(tokens.shape[0])
    sizes = {1: decoder.heads, 3: decoder.head_size} if decoder is not None else {}
    for state in states:
        grows = state.grows and state_shape(state.input, state.output, batch, sizes)
        if (shape := grows or fixed_shape(state.input)) is not None:
            yield str(state.input.name), shape
    if tokens is None:
        return
    taken = {state.input for state in states} | {state.output for state in states}
    left = [output for output in outputs if output not in taken]
    for name, value in candidates.items():
        if value in taken or not _called_past(value):
            continue
        if states and not any(alike(value, output) for output in left):
            continue
        shape = state_shape(value, None, batch, sizes)
        if shape is not None and shape != fixed_shape(value):
            yield name, shape


def _said(
    candidates: Mapping[str, ir.Value], outputs: Sequence[ir.Value], decoder: Part | None
) -> list[State]:
    if decoder is None:
        return []
    known = {output.name: output for output in outputs}
    return [
        State(candidates[name], known[output], _GROWING.fullmatch(role) is not None)
        for name, output, role in decoder.from_outputs(decoder, candidates)
        if output in known
    ]


def _called_past(value: ir.Value) -> bool:
    floats = value.dtype is not None and value.dtype.is_floating_point()
    return floats and 3 <= len(value.shape or ()) <= 5 and bool(_PAST.match(str(value.name)))
