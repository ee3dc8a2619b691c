"""The float model on a feed: whether it runs at all, and what a result is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.errors import ModelError
from qgraph.graph.annotation import copied
from qgraph.graph.reading import MAIN_DOMAINS, MICROSOFT, initializers, nodes
from qgraph.io.session import OpenSession, run

LARGEST_BYTES = 256 << 20
"""Weights of the largest model that is run for this."""
KNOWN_DOMAINS = (*MAIN_DOMAINS, MICROSOFT, "ai.onnx.ml", "ai.onnx.training", "qgraph")


def foreign_domains(model: ir.Model) -> list[str]:
    """The domains of operators that stock onnxruntime does not have."""
    own = {key[0] for key in model.functions}
    return sorted({n.domain for n in nodes(model)} - own - set(KNOWN_DOMAINS))


def check_runs(model: ir.Model, open_session: OpenSession) -> None:
    """Whether onnxruntime takes a float model, to be asked before long work.

    Raises:
        ModelError: it does not, with and without optimizations.
    """
    model = copied(model)  # with memory maps of its own
    try:
        open_session(model, optimized=False, prepack=False)
    except ModelError:
        try:
            open_session(model, prepack=False)
        except ModelError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            domains = ", ".join(foreign_domains(model))
            hint = f": give the library of '{domains}' as --custom-ops" if domains else ""
            raise ModelError(f"onnxruntime cannot run the float model{hint}: {reason}") from error


class Trial:
    """What the float model gives for a feed.

    Args:
        source: the float model.
        feed: typical, or random; None: the result is loaded, but not run.
    """

    def __init__(
        self, source: ir.Model, feed: Mapping[str, np.ndarray] | None, open_session: OpenSession
    ) -> None:
        self.outputs: list[Any] | None = None
        self.feed = feed
        size = sum(v.const_value.nbytes for v in initializers(source) if v.const_value)
        if feed is None or size > LARGEST_BYTES:
            return
        try:
            self.outputs = run(open_session(copied(source), optimized=False, prepack=False), feed)
        except Exception:  # a random feed may not fit the model
            self.outputs = None

    def examine(self, session: Any) -> None:
        """Run a result on the same feed.

        Raises:
            ModelError: it does not run, or gives NaN, infinities or another rank where the float
                model gives none.
        """
        if self.outputs is None or self.feed is None:
            return
        try:
            results = run(session, self.feed)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"the result does not run where float does: {reason}") from error
        names = [output.name for output in session.get_outputs()]
        for name, ideal, found in zip(names, self.outputs, results, strict=True):
            if not isinstance(ideal, np.ndarray) or ideal.dtype.kind != "f":
                continue
            if ideal.ndim != found.ndim or ideal.dtype != found.dtype:
                raise ModelError(f"output '{name}' of the result has another rank or type")
            if np.isfinite(ideal).all() and not np.isfinite(found).all():
                raise ModelError(f"output '{name}' of the result is not finite, in float it is")
