"""Hugging Face checkpoints that GPTQ, AWQ or bitsandbytes have quantized.

A folder with `config.json` and one or more safetensors files, as those tools and transformers
write them; see :mod:`qgraph.io.checkpoints.packed_layers` for what is in the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qgraph.errors import ModelError
from qgraph.io.checkpoints.packed_layers import Layer, awq_layer, bnb_layer, gptq_layer
from qgraph.io.files import read_json
from qgraph.numerics.reference import Float

Array = NDArray[Any]

_FORMATS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
"""Versions of their layouts that are read."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder of quantized weights; tensors are read when they are asked for.

    Attributes:
        method: `gptq`, `awq` or `bitsandbytes`.
        settings: its `quantization_config`.
        model_type: family of the model, as its configuration calls it.
        files: where each tensor lies.
        modules: the names of each module's own tensors, without the module's.
    """

    method: str
    settings: Mapping[str, Any]
    model_type: str
    files: Mapping[str, Path]
    modules: Mapping[str, frozenset[str]]

    @staticmethod
    def open(folder: str | Path) -> Checkpoint:
        """Read the configuration and the list of tensors.

        Raises:
            ModelError: there is no such folder, a file is missing or damaged, or the weights are
                not quantized in a way that is known here.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ModelError(f"checkpoint {folder} is not a folder: give one with config.json")
        settings, model_type = _settings(folder)
        method = str(settings["quant_method"]).lower()
        if method not in (*_FORMATS, "bitsandbytes"):
            raise ModelError(
                f"{folder}: quant_method '{method}' is unknown: "
                "use a checkpoint of gptq, awq or bitsandbytes"
            )
        version = _format(settings, method)
        if method in _FORMATS and version not in _FORMATS[method]:
            known = ", ".join(_FORMATS[method])
            raise ModelError(f"{folder}: {method} format '{version}' is not read: only {known}")
        files = _files(folder)
        modules: dict[str, set[str]] = {}
        for name in files:
            module, parameter = _split(name)
            modules.setdefault(module, set()).add(parameter)
        own = {module: frozenset(names) for module, names in modules.items()}
        return Checkpoint(method, settings, model_type, files, own)

    def tensor(self, name: str) -> Array:
        """The array of that name, in the dtype that it is stored in; bfloat16 of ml_dtypes.

        Raises:
            ModelError: there is none, or the file cannot be read.
        """
        with _opened(self._file(name)) as file:
            array: Array = file.get_tensor(name)
        return array

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read.

        Raises:
            ModelError: there is none, or the file cannot be read.
        """
        with _opened(self._file(name)) as file:
            return tuple(file.get_slice(name).get_shape())

    def _file(self, name: str) -> Path:
        if name not in self.files:
            raise ModelError(f"the checkpoint has no tensor '{name}': download it again")
        return self.files[name]

    def is_quantized(self, module: str) -> bool:
        """Whether the weight of `module` is packed integers."""
        return not self.modules[module].isdisjoint(("qweight", "weight.absmax"))

    def layer(self, module: str) -> Layer:
        """The quantized weight of `module`.

        Raises:
            ModelError: a tensor is missing, or their shapes do not fit each other.
        """
        try:
            return self._layer(module)
        except KeyError as error:
            raise ModelError(
                f"checkpoint layer '{module}' has no {error}: download it again"
            ) from None
        except (ValueError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
            raise ModelError(
                f"checkpoint layer '{module}' does not fit its format ({self.method}): {error}"
            ) from None

    def matrix(self, module: str) -> Float:
        """The weight of a linear layer, quantized or float, as float32 (K, N)."""
        if self.is_quantized(module):
            return self.layer(module).float()
        return self.tensor(f"{module}.weight").astype(np.float32).T

    def side_by_side(self, modules: Sequence[str], axis: int) -> Float:
        """The weights of linear layers that have the same data, their outputs along `axis`."""
        whole = np.concatenate([self.matrix(module) for module in modules], axis=1)
        return whole if axis == 1 else whole.T

    def _layer(self, module: str) -> Layer:
        def read(parameter: str) -> Array:
            if parameter not in self.modules[module]:
                raise KeyError(parameter)
            return self.tensor(f"{module}.{parameter}")

        if self.method == "bitsandbytes":
            names = sorted(self.modules[module])
            state = next((n for n in names if n.startswith("weight.quant_state.")), "quant_state")
            nested = ("weight.nested_absmax", "weight.nested_quant_map")
            return bnb_layer(
                read("weight"),
                read("weight.absmax"),
                read("weight.quant_map"),
                json.loads(read(state).tobytes()),
                [read(name) for name in nested] if nested[0] in names else (),
            )
        packed = read("qweight"), read("qzeros"), read("scales")
        if self.method == "awq":
            return awq_layer(*packed)
        g_idx = read("g_idx") if "g_idx" in self.modules[module] else None
        v2 = _format(self.settings, "gptq") == "gptq_v2"
        return gptq_layer(*packed, g_idx, int(self.settings.get("bits", 4)), v2=v2)


def _split(name: str) -> tuple[str, str]:
    """Module and parameter; what bitsandbytes has beside a weight belongs to its module."""
    module, weight, rest = name.partition(".weight.")
    if weight:
        return module, f"weight.{rest}"
    module, _, parameter = name.rpartition(".")
    return module, parameter


def _settings(folder: Path) -> tuple[dict[str, Any], str]:
    """What the configuration says of quantization, and the model's type."""
    config = _json(folder / "config.json")
    settings = config.get("quantization_config")
    settings = (
        settings or _json(folder / "quantize_config.json") or _json(folder / "quant_config.json")
    )
    if not isinstance(settings, dict) or not settings:
        raise ModelError(
            f"{folder} is not a quantized checkpoint: its config.json has no quantization_config"
        )
    # AutoAWQ's own file says w_bit, and not whose it is.
    usual = "awq" if "w_bit" in settings else "gptq"
    return {"quant_method": usual, **settings}, str(config.get("model_type", ""))


def _json(file: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        return dict(read_json(file))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from None


def _format(settings: Mapping[str, Any], method: str) -> str:
    usual = {"gptq": "gptq", "awq": "gemm"}.get(method, "")
    keys = ("checkpoint_format", "format") if method == "gptq" else ("version", "format")
    return str(next((settings[key] for key in keys if settings.get(key)), usual)).lower()


def _files(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if not indexes:
        shards = sorted(folder.glob("*.safetensors"))
        if not shards:
            raise ModelError(
                f"{folder} holds no *.safetensors file: convert or download the weights"
            )
        return {name: file for file in shards for name in _names(file)}
    try:
        listed = read_json(indexes[0])["weight_map"]
        files = {str(name): folder / Path(file).name for name, file in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{indexes[0]} has no weight_map: download it again") from error
    for file in sorted(set(files.values())):
        if not file.is_file():
            raise ModelError(f"{file} is missing, but {indexes[0].name} names it: download it")
        if absent := {n for n, f in files.items() if f == file} - _names(file):
            raise ModelError(f"{file} has no tensor '{min(absent)}': download it again")
    return files


def _names(file: Path) -> set[str]:
    with _opened(file) as opened:
        return set(opened.keys())


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        import ml_dtypes  # noqa: F401  numpy then knows the name bfloat16
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ModelError(
            'checkpoints need safetensors: pip install "qgraph-compiler[checkpoints]"'
        ) from None
    try:
        with safe_open(file, "numpy") as opened:
            yield opened
    except (OSError, SafetensorError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{file} is no safetensors file, or is truncated: {error}") from None
