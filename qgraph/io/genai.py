"""What the folder of a model says about it in its `genai_config.json`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qgraph.io.files import read_json
from qgraph.io.models import GENAI_CONFIG, source_files


@dataclass(frozen=True)
class Part:
    """One model of a folder.

    Attributes:
        file: where it lies.
        inputs: names of its inputs by role; `%d` in a name stands for the layer.
        outputs: the same of its outputs.
        heads: key/value heads of its attention, None where the folder does not say.
        head_size: width of a head.
    """

    file: Path
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    heads: int | None = None
    head_size: int | None = None

    def from_outputs(self, other: Part, names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
        """Those inputs that are outputs of `other`, or of this model in the run before.

        Args:
            names: the inputs that there are.

        Yields:
            name of the input, of the output, and role of the input.
        """
        known = list(names)
        for role, pattern in self.inputs.items():
            output = other.outputs.get(role.replace("past", "present"))
            numbered = re.compile(re.escape(pattern).replace("%d", r"(\d+)"))
            for name in known if output is not None else ():
                if (match := numbered.fullmatch(name)) is not None:
                    yield name, str(output).replace("%d", "".join(match.groups())), role


def parts(model: ir.Model) -> tuple[Part | None, Part | None]:
    """The decoder that `model` was loaded as, and the encoder that works for it, where there are.

    Source: onnxruntime-genai's reference of `genai_config.json`.
    """
    source = next(iter(source_files(model)), None)
    if source is None:
        return None, None
    sections = _parts(source.parent)
    decoder, encoder = sections.get("decoder"), sections.get("encoder")
    if decoder is None or decoder.file != source:
        return None, None
    return decoder, encoder if encoder is not None and encoder.file.is_file() else None


def _parts(folder: Path) -> dict[str, Part]:
    try:
        config = read_json(folder / GENAI_CONFIG)["model"]
        return {
            name: Part(
                folder / config[name]["filename"],
                _names(config[name].get("inputs")),
                _names(config[name].get("outputs")),
                _number(config[name].get("num_key_value_heads")),
                _number(config[name].get("head_size")),
            )
            for name in ("decoder", "encoder")
            if "filename" in config.get(name, ())
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # a model is no less a model without it


def _names(given: Any) -> dict[str, str]:
    pairs = given.items() if isinstance(given, dict) else ()
    return {role: name for role, name in pairs if isinstance(name, str)}


def _number(given: Any) -> int | None:
    return given if isinstance(given, int) and given > 0 else None
