"""Errors that a user can act on.

Every error that qgraph raises on purpose is a :class:`QGraphError`; its message is one line that
says what is wrong and what to do. The command line prints that line and exits with status 2;
any other exception is a bug in qgraph.
"""

from __future__ import annotations


class QGraphError(Exception):
    """Something the user gave cannot be used; the message says what, and what to do."""


class ModelError(QGraphError):
    """A model cannot be read, written or understood."""


class CalibrationError(QGraphError):
    """Calibration data is missing or does not fit the model."""


class PipelineError(QGraphError):
    """A pipeline of passes is misspelt or in an order that cannot work."""


class VerificationError(QGraphError):
    """A pass broke its contract; the message names the pass, the node and the size of the error."""


def check_counts(**counts: int) -> None:
    """Refuse parameters of which there has to be one at least.

    Raises:
        QGraphError: a count is below 1; the message names all that were given.
    """
    if min(counts.values()) < 1:
        given = ", ".join(f"{name}={count}" for name, count in counts.items())
        raise QGraphError(f"{given} is out of range: use 1 or more")
