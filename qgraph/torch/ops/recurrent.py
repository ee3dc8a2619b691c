"""LSTM, GRU and RNN, step by step: (sequence, batch, features), or batch first with layout 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qgraph.torch.ops.types import Operators

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State], State]
Function = Callable[[Tensor], Tensor]

_DEFAULT_ALPHA = {"leakyrelu": 0.01, "elu": 1.0, "thresholdedrelu": 1.0, "hardsigmoid": 0.2}


def _activation(name: str, alpha: float | None, beta: float | None) -> Function:
    kind = name.lower()
    a = _DEFAULT_ALPHA.get(kind, 1.0) if alpha is None else alpha
    b = 0.5 if beta is None else beta
    known: dict[str, Function] = {
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "softsign": F.softsign,
        "softplus": F.softplus,
        "elu": lambda x: F.elu(x, a),
        "leakyrelu": lambda x: F.leaky_relu(x, a),
        "thresholdedrelu": lambda x: torch.where(x > a, x, 0),
        "hardsigmoid": lambda x: torch.clamp(a * x + b, 0, 1),
        "affine": lambda x: a * x + (0.0 if beta is None else beta),
        "scaledtanh": lambda x: a * torch.tanh((1.0 if beta is None else beta) * x),
    }
    return known[kind]


def _functions(
    names: Sequence[str],
    alphas: Sequence[float] | None,
    betas: Sequence[float] | None,
    clip: float | None,
) -> list[Function]:
    """The activations of all directions; alphas and betas go to those that take one."""
    takes_alpha = {*_DEFAULT_ALPHA, "affine", "scaledtanh"}
    takes_beta = {"hardsigmoid", "affine", "scaledtanh"}
    left, right = iter(alphas or ()), iter(betas or ())
    functions = []
    for name in names:
        alpha = next(left, None) if name.lower() in takes_alpha else None
        beta = next(right, None) if name.lower() in takes_beta else None
        functions.append(_clipped(_activation(name, alpha, beta), clip))
    return functions


def _clipped(function: Function, clip: float | None) -> Function:
    return function if clip is None else lambda x: function(x.clamp(-clip, clip))


def _unrolled(
    inputs: Tensor, state: State, step: Step, lengths: Tensor | None, backward: bool
) -> tuple[Tensor, State]:
    """All hidden states and the last state; sequences that have ended keep theirs, and give 0."""
    count = inputs.shape[0]
    results: list[Tensor] = [inputs] * count
    for time in reversed(range(count)) if backward else range(count):
        new = step(inputs[time], state)
        if lengths is None:
            state, results[time] = new, new[0]
            continue
        alive = (time < lengths).unsqueeze(-1)
        state = tuple(torch.where(alive, n, s) for n, s in zip(new, state, strict=True))
        results[time] = torch.where(alive, new[0], 0)
    return torch.stack(results), state


def _directions(
    x: Tensor,
    weight: Tensor,
    lengths: Tensor | None,
    states: Sequence[Tensor | None],
    direction: str,
    hidden: int,
    layout: int,
    steps: Callable[[int], tuple[Callable[[Tensor], Tensor], Step]],
) -> tuple[Tensor, ...]:
    """Run each direction; `steps` gives what is done to all inputs at once, and the step."""
    if layout:
        x = x.transpose(0, 1)
        states = [None if s is None else s.transpose(0, 1) for s in states]
    count = weight.shape[0]
    zeros = x.new_zeros(count, x.shape[1], hidden)
    starts = [zeros if s is None else s for s in states]
    results, lasts = [], []
    for d in range(count):
        project, step = steps(d)
        backward = direction == "reverse" or d == 1
        result, last = _unrolled(project(x), tuple(s[d] for s in starts), step, lengths, backward)
        results.append(result)
        lasts.append(last)
    y = torch.stack(results, 1)
    finals = [torch.stack(parts) for parts in zip(*lasts, strict=True)]
    if layout:
        return (y.permute(2, 0, 1, 3), *(f.transpose(0, 1) for f in finals))
    return (y, *finals)


def _halves(bias: Tensor | None, d: int) -> tuple[Tensor | None, Tensor | None]:
    if bias is None:
        return None, None
    of_input, of_state = bias[d].chunk(2)
    return of_input, of_state


def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    p: Tensor | None = None,
    *,
    hidden_size: int | None = None,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    activations: list[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    input_forget: int = 0,
    layout: int = 0,
    outputs: int,
) -> tuple[Tensor, ...]:
    """All hidden states, the last hidden state, the last cell; gates in the order i, o, f, c."""
    names = activations or ["Sigmoid", "Tanh", "Tanh"] * w.shape[0]
    functions = _functions(names, activation_alpha, activation_beta, clip)

    def steps(d: int) -> tuple[Function, Step]:
        gate, candidate, out = functions[3 * d : 3 * d + 3]
        of_input, of_state = _halves(b, d)
        peep = p[d].chunk(3) if p is not None else None

        def step(projected: Tensor, state: State) -> State:
            h, c = state
            i, o, f, g = (projected + F.linear(h, r[d], of_state)).chunk(4, -1)
            if peep is not None:
                i, f = i + peep[0] * c, f + peep[2] * c
            i = gate(i)
            c = (1 - i if input_forget else gate(f)) * c + i * candidate(g)
            if peep is not None:
                o = o + peep[1] * c
            return gate(o) * out(c), c

        return lambda inputs: F.linear(inputs, w[d], of_input), step

    return _directions(
        x, w, sequence_lens, [initial_h, initial_c], direction, r.shape[-1], layout, steps
    )


def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    hidden_size: int | None = None,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    activations: list[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    layout: int = 0,
    linear_before_reset: int = 0,
    outputs: int,
) -> tuple[Tensor, ...]:
    """All hidden states and the last one; gates in the order z, r, h."""
    names = activations or ["Sigmoid", "Tanh"] * w.shape[0]
    functions = _functions(names, activation_alpha, activation_beta, clip)
    hidden = r.shape[-1]

    def steps(d: int) -> tuple[Function, Step]:
        gate, candidate = functions[2 * d : 2 * d + 2]
        of_input, of_state = _halves(b, d)
        gates_r, hidden_r = r[d][: 2 * hidden], r[d][2 * hidden :]
        gates_b = None if of_state is None else of_state[: 2 * hidden]
        hidden_b = None if of_state is None else of_state[2 * hidden :]

        def step(projected: Tensor, state: State) -> State:
            (h,) = state
            own = F.linear(h, gates_r, gates_b)
            z, reset = gate(projected[..., : 2 * hidden] + own).chunk(2, -1)
            if linear_before_reset:
                inner = reset * F.linear(h, hidden_r, hidden_b)
            else:
                inner = F.linear(reset * h, hidden_r, hidden_b)
            new = candidate(projected[..., 2 * hidden :] + inner)
            return ((1 - z) * new + z * h,)

        return lambda inputs: F.linear(inputs, w[d], of_input), step

    return _directions(x, w, sequence_lens, [initial_h], direction, hidden, layout, steps)


def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    hidden_size: int | None = None,
    activation_alpha: list[float] | None = None,
    activation_beta: list[float] | None = None,
    activations: list[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    layout: int = 0,
    outputs: int,
) -> tuple[Tensor, ...]:
    """All hidden states and the last one."""
    names = activations or ["Tanh"] * w.shape[0]
    functions = _functions(names, activation_alpha, activation_beta, clip)

    def steps(d: int) -> tuple[Function, Step]:
        of_input, of_state = _halves(b, d)

        def step(projected: Tensor, state: State) -> State:
            return (functions[d](projected + F.linear(state[0], r[d], of_state)),)

        return lambda inputs: F.linear(inputs, w[d], of_input), step

    return _directions(x, w, sequence_lens, [initial_h], direction, r.shape[-1], layout, steps)


OPERATORS: Operators = {"GRU": gru, "LSTM": lstm, "RNN": rnn}
