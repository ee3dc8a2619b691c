"""The model that makes some of a decoder's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.errors import ModelError
from qgraph.io.models import load
from qgraph.io.session import open_session


@dataclass(frozen=True)
class Encoder:
    """An encoder of a folder; nothing is loaded before it is asked for.

    Attributes:
        file: the model.
        makes: its output for each input of the decoder that it makes.
    """

    file: Path
    makes: Mapping[str, str]

    @cached_property
    def inputs(self) -> dict[str, ir.Value]:
        """What it takes, by name."""
        values = load(self.file).graph.inputs
        return {str(value.name): value for value in values if not value.is_initializer()}

    def replace(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`feed` with what is made of the encoder's inputs in their place, unless it is given.

        Raises:
            ModelError: onnxruntime cannot run the encoder on them.
        """
        rest = {name: array for name, array in feed.items() if name not in self.inputs}
        if self.makes.keys() <= rest.keys() or not self.inputs.keys() <= feed.keys():
            return rest
        given = {name: feed[name] for name in self.inputs}
        try:
            states = self._session.run(list(self.makes.values()), given)
        except Exception as error:
            reason = " ".join(str(error).split())
            names = ", ".join(given)
            raise ModelError(f"{self.file.name} does not run on {names}: {reason}") from error
        return {**dict(zip(self.makes, states, strict=True)), **rest}

    @cached_property
    def _session(self) -> Any:
        return open_session(load(self.file))
