"""Whose fault an unforeseen error is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir

from qgraph.errors import ModelError, QGraphError
from qgraph.io.random_feed import first_feed
from qgraph.io.session import run
from qgraph.pipeline.context import Context


@contextmanager
def blaming(model: ir.Model, context: Context) -> Iterator[None]:
    """Say so where an unforeseen error comes from a model that does not run before compilation
    either: damaged ones go wrong anywhere.

    Args:
        model: as it was given; looked at after an error only.

    Raises:
        ModelError: in place of the error, if onnxruntime does not run the model.
    """
    try:
        yield
    except (QGraphError, OSError, MemoryError):
        raise
    except Exception as error:
        if (reason := _refusal(model, context)) is None:
            raise
        raise ModelError(f"onnxruntime does not run this model: {reason}") from error


def _refusal(model: ir.Model, context: Context) -> str | None:
    try:
        session = context.target.open_session(model, optimized=False, prepack=False)
        run(session, first_feed(model, context.calibration, context.seed))
    except Exception as error:
        return str(error).partition("\n")[0].removeprefix("onnxruntime cannot run this model: ")
    return None
