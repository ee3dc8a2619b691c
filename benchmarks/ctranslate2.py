"""Models in CTranslate2's binary format, and Whisper's among them under transformers' names."""

from __future__ import annotations

import io
import re
import struct
from typing import Any

import numpy as np

from benchmarks.zoo import Array

_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
_VERSION = 6


def read(content: bytes) -> dict[str, Array]:
    """The variables of a `model.bin` by name, aliases among them.

    Little-endian: version, name and revision of the model's kind, the number of variables; of each
    its name, rank, dimensions, dtype, number of bytes, and these bytes; then pairs of an alias and
    the variable it stands for. A string is its length and its bytes, a zero at the end counted.

    Raises:
        ValueError: it is of another version.
    """
    file = io.BytesIO(content)

    def number(code: str) -> Any:
        return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]

    def string() -> str:
        return file.read(number("H")).rstrip(b"\0").decode()

    version = number("I")
    if version != _VERSION:
        raise ValueError(f"CTranslate2 format {version}; only {_VERSION} is read here")
    string(), number("I")
    variables: dict[str, Array] = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        dtype = _DTYPES[number("B")]
        variables[name] = np.frombuffer(file.read(number("I")), dtype).reshape(shape)
    for _ in range(number("I")):
        alias, name = string(), string()
        variables[alias] = variables[name]
    return variables


_MODULES = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "ffn/layer_norm": ("final_layer_norm",),
    "conv1": ("conv1",),
    "conv2": ("conv2",),
    "embeddings": ("embed_tokens",),
    "position_encodings": ("embed_positions",),
    "layer_norm": ("layer_norm",),
}
"""What transformers calls a layer of CTranslate2; several names where it is cut up."""

_PARAMETERS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}
_WEIGHT = re.compile(r"(encoder|decoder)/(?:layer_(\d+)/)?(.+)/(\w+)")


def whisper_state(variables: dict[str, Array]) -> dict[str, Array]:
    """The float32 weights of transformers' `WhisperForConditionalGeneration`.

    Queries, keys and values are one weight in CTranslate2, and keys have a bias, of zeros.
    """
    state: dict[str, Array] = {}
    for name, value in variables.items():
        match = _WEIGHT.fullmatch(name)
        if match is None or match[3] not in _MODULES:
            continue
        side, layer, module, parameter = match.groups()
        prefix = f"model.{side}." + (f"layers.{layer}." if layer else "")
        modules = _MODULES[module]
        for part, piece in zip(modules, np.split(value, len(modules)), strict=True):
            state[f"{prefix}{part}.{_PARAMETERS.get(parameter, parameter)}"] = piece.astype("f4")
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return {name: value for name, value in state.items() if not name.endswith("k_proj.bias")}
