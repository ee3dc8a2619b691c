"""What a model needs besides its data: states that are empty at first, masks and positions."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qgraph.io.encoder import Encoder
from qgraph.io.genai import Part, parts
from qgraph.io.needs import find_shapes, find_tokens

_FILLED = ("attention_mask", "position_ids", "cache_position", "use_cache_branch")
"""Roles in `genai_config.json`, which exporters use as names."""


def required_inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs that a caller must give: those without a default value, in the model's order."""
    return [value for value in model.graph.inputs if not value.is_initializer()]


class Completer:
    """Fills feeds in; stays valid while the model is rewritten.

    `genai_config.json` says what is what where the model lies beside one. Else tokens are found by
    name or by the table that they index, states by dataflow, masks and positions by name.

    Attributes:
        tokens: name of the input that holds tokens or their embeddings; None without such.
        states: shapes of the states, by name, those left out that the model says too little of.
        encoder: the model that makes some of the inputs; None where there is none.
    """

    def __init__(self, model: ir.Model) -> None:
        decoder, encoder = parts(model)
        roles = decoder.inputs if decoder is not None else {}
        self._inputs = {str(value.name): value for value in required_inputs(model)}
        self._filled = {roles.get(role, role): role for role in _FILLED}
        tokens = find_tokens(self._inputs, roles)
        self.tokens = None if tokens is None else str(tokens.name)
        self.encoder = _usable(encoder, decoder, self._inputs)
        encoded = self.encoder.makes if self.encoder is not None else {}
        known = {self.tokens, *self._filled, *encoded}
        rest = {name: value for name, value in self._inputs.items() if name not in known}
        self.states = dict(find_shapes(rest, model.graph.outputs, tokens, decoder))

    @property
    def data(self) -> dict[str, ir.Value]:
        """Inputs that the caller gives, in the model's order, then those of the encoder."""
        encoded = self.encoder.makes if self.encoder is not None else {}
        filled = self.states if self.tokens is not None else {}
        own = {n: v for n, v in self._inputs.items() if n not in filled and n not in encoded}
        return own if self.encoder is None else {**own, **self.encoder.inputs}

    def __call__(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`feed` with what is missing, as far as that is known.

        Raises:
            ModelError: the encoder does not run on its inputs.
        """
        full = dict(feed) if self.encoder is None else self.encoder.replace(feed)
        if self.states and self.tokens is None:
            batch = next((len(array) for array in full.values() if np.ndim(array)), 1)
            return self._started(full, batch, 0)
        if not self.states or self.tokens is None or self.tokens not in full:
            return full
        tokens, rank = full[self.tokens], len(self._inputs[self.tokens].shape or ())
        return self._masked(full, *tokens.shape[:2]) if np.ndim(tokens) == rank else full

    def _masked(
        self, full: dict[str, np.ndarray], batch: int, length: int
    ) -> dict[str, np.ndarray]:
        names = {role: name for name, role in self._filled.items()}
        given = next((n for n, shape in self.states.items() if n in full and -1 in shape), None)
        before = 0 if given is None else int(full[given].shape[self.states[given].index(-1)])
        full = self._started(full, batch, before)
        mask = full.get(names["attention_mask"], np.ones((batch, before + length), np.int64))
        count = np.cumsum(mask != 0, axis=-1)[..., -length:]
        contents = {
            "attention_mask": mask,
            "position_ids": np.maximum(count - 1, 0),
            "cache_position": np.arange(before, before + length),
            "use_cache_branch": np.array([before > 0]),
        }
        for role, content in contents.items():
            value = self._inputs.get(names[role])
            if value is None or value.name in full or value.dtype is None:
                continue
            if role == "position_ids":
                content = _for_each_kind(content, value)
            if len(value.shape or ()) == content.ndim:
                full[names[role]] = content.astype(value.dtype.numpy())
        return full

    def _started(
        self, full: dict[str, np.ndarray], batch: int, before: int
    ) -> dict[str, np.ndarray]:
        for name, shape in self.states.items():
            dtype = self._inputs[name].dtype
            if name not in full and dtype is not None:
                sizes = [batch if d is None else before if d == -1 else d for d in shape]
                full[name] = np.zeros(sizes, dtype.numpy())
        return full

    def lacking(self, feed: Mapping[str, np.ndarray], given: Mapping[str, object]) -> str | None:
        """Which inputs a completed feed still lacks, and what to give; None if it is whole.

        Args:
            given: the feed as it came.
        """
        missing = [name for name in self._inputs if name not in feed]
        if not missing:
            return None
        filled = {*self.states, *self._filled} if self.states and self.tokens else set()
        names = [name for name in missing if name not in filled] or missing
        rest = _listed({name: f"'{name}'" for name in names}).removeprefix(f"'{names[0]}'")
        also = f" (and {rest.lstrip(', ').removeprefix('and ')})" if rest else ""
        what = f"input '{names[0]}' is missing{also}, only {', '.join(given) or 'nothing'} given"
        if len(missing) == 1 and not filled and self.encoder is None:
            return what
        needed = {n: f"'{n}': {_words(v)}" for n, v in self.data.items() if n not in filled}
        return f"{what}: give {{{_listed(needed)}}}"


def _usable(
    encoder: Part | None, decoder: Part | None, inputs: Mapping[str, ir.Value]
) -> Encoder | None:
    """The encoder, if it makes inputs of the model and can be told apart from it in a feed."""
    if encoder is None or decoder is None:
        return None
    outputs = {name: output for name, output, _ in decoder.from_outputs(encoder, inputs)}
    usable = Encoder(encoder.file, outputs)
    return usable if outputs and not usable.inputs.keys() & inputs.keys() else None


def _for_each_kind(positions: np.ndarray, value: ir.Value) -> np.ndarray:
    """Positions in time, height and width are the same for text: (kinds, batch, sequence)."""
    kinds = value.shape[0] if value.shape is not None and len(value.shape) == 3 else None
    if not isinstance(kinds, int):
        return positions
    return np.broadcast_to(positions, (kinds, *positions.shape))


def _listed(words: Mapping[str, str]) -> str:
    """Comma-separated; names that differ in their numbers only are said once."""
    groups: dict[str, list[str]] = {}
    for name, word in words.items():
        groups.setdefault(re.sub(r"\d+", "#", name), []).append(word)
    return ", ".join(
        first if not others else f"{first} and {len(others)} like it"
        for first, *others in groups.values()
    )


def _words(value: ir.Value) -> str:
    dtype = "any" if value.dtype is None else str(np.dtype(value.dtype.numpy()))
    return f"{dtype} ({', '.join(map(str, value.shape or ()))})"


def complete_feed(model: ir.Model, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`feed` with what the model needs besides its data.

    Added where missing: states that are empty or zeros (`past_key_values.*` with a sequence axis of
    length 0), an `attention_mask` of ones (batch, past + sequence), `position_ids` (batch,
    sequence) that count the unmasked tokens, `use_cache_branch`, and what an encoder in the same
    folder makes of its own inputs. Any other model's feed comes back as it is.

    Raises:
        ModelError: the encoder does not run on its inputs.
    """
    if all(value.name in feed for value in required_inputs(model)):
        return dict(feed)
    return Completer(model)(feed)
