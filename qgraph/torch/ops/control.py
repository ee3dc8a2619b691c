"""If, Loop and Scan over bodies that are modules.

A body takes its own inputs, then what it captures from around it, and returns a tuple.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Body = Callable[..., tuple[Tensor, ...]]
Values = Sequence[Tensor]


def branch(
    condition: Tensor,
    then_branch: Body,
    then_captured: Values,
    else_branch: Body,
    else_captured: Values,
) -> tuple[Tensor, ...]:
    """One of two bodies; only that one runs."""
    if bool(condition):
        return then_branch(*then_captured)
    return else_branch(*else_captured)


def loop(
    trip_count: Tensor | None,
    condition: Tensor | None,
    state: Values,
    body: Body,
    captured: Values,
    scanned: Sequence[tuple[torch.dtype, Sequence[int]] | None],
) -> tuple[Tensor, ...]:
    """Run `body(iteration, condition, *state, *captured) -> (condition, *state, *slices)`.

    Args:
        scanned: for each of the body's slices, which are stacked, the type and shape that it has
            where the body does not run at all; None where the model does not say.

    Returns:
        the last state, then the stacked slices.
    """
    carried = list(state)
    slices: list[list[Tensor]] = [[] for _ in scanned]
    device = next((t.device for t in (*carried, *captured)), None)
    going = condition is None or bool(condition)
    number = 0
    while going and (trip_count is None or number < int(trip_count)):
        iteration = torch.tensor(number, device=device)
        still = torch.tensor(True, device=device)
        again, *results = body(iteration, still, *carried, *captured)
        carried = results[: len(carried)]
        for stack, value in zip(slices, results[len(carried) :], strict=True):
            stack.append(value)
        going = bool(again)
        number += 1
    stacked = [
        torch.stack(stack) if stack else _nothing(kind, device)
        for stack, kind in zip(slices, scanned, strict=True)
    ]
    return (*carried, *stacked)


def _nothing(kind: tuple[torch.dtype, Sequence[int]] | None, device: torch.device | None) -> Tensor:
    if kind is None:
        raise RuntimeError("a Loop that never runs gives slices of a type that nothing states")
    dtype, shape = kind
    return torch.empty((0, *shape), dtype=dtype, device=device)


def scan(
    state: Values,
    sequences: Values,
    body: Body,
    captured: Values,
    input_axes: Sequence[int],
    input_directions: Sequence[int],
    output_axes: Sequence[int],
    output_directions: Sequence[int],
) -> tuple[Tensor, ...]:
    """Run `body(*state, *elements, *captured) -> (*state, *slices)` along sequences.

    Returns:
        the last state, then the slices stacked along `output_axes`; a direction of 1 is backward.
    """
    carried = list(state)
    count = sequences[0].shape[input_axes[0]]
    slices: list[list[Tensor]] = []
    for step in range(count):
        elements = [
            sequence.select(axis, count - 1 - step if backward else step)
            for sequence, axis, backward in zip(
                sequences, input_axes, input_directions, strict=True
            )
        ]
        results = body(*carried, *elements, *captured)
        carried = list(results[: len(carried)])
        slices.append(list(results[len(carried) :]))
    stacked = [
        torch.stack(parts[::-1] if backward else parts, axis)
        for parts, axis, backward in zip(
            zip(*slices, strict=True), output_axes, output_directions, strict=True
        )
    ]
    return (*carried, *stacked)
