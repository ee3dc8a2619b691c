"""Training from the command line: `--train MODULE:FUNCTION`."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from qgraph.errors import QGraphError

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from qgraph.compiled import CompiledModel
    from qgraph.pipeline.target import Target
    from qgraph.recipes.recipe import Recipe


LEARNING_RATE = 1e-3
"""Of Adam, where `--train` is given losses."""


def train_and_compile(
    function: str,
    source: ir.Model,
    recipe: Recipe,
    calibration: str | None,
    target: Target,
    samples: int | None,
    seed: int,
    verify: bool,
) -> CompiledModel:
    """What `--train module:function` does.

    The function is called with the module that `prepare_qat` gives. It either trains that module
    itself and returns None, or returns an iterable of losses, such as a generator: each is
    minimized with one step of Adam before the next one is asked for.

    Raises:
        QGraphError: the function cannot be imported, or gives something else.
    """
    import qgraph
    from qgraph.cli.progress import display
    from qgraph.pipeline.parse import imported

    steps = imported(function, "function")
    if not callable(steps):
        raise QGraphError(f"--train {function}: that is no function")
    qmodel = qgraph.prepare_qat(source, recipe=recipe, seed=seed)
    if calibration is not None:
        qmodel.calibrate(calibration, samples)
    import torch

    torch.manual_seed(seed)
    losses = _called(steps, qmodel.train(), function)
    if losses is not None:
        optimizer = torch.optim.Adam(qmodel.parameters(), LEARNING_RATE)
        for loss in display()(_losses(losses, function), "training"):
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return qgraph.compile(qmodel.eval(), target=target, verify=verify, progress=display())


def _called(steps: Callable[[Any], Any], qmodel: Any, function: str) -> Any:
    try:
        return steps(qmodel)
    except Exception as error:
        raise _failed(error, function) from error


def _followed(losses: Iterable[Any], function: str) -> Iterator[Any]:
    try:
        yield from losses
    except Exception as error:
        raise _failed(error, function) from error


def _failed(error: Exception, function: str) -> QGraphError:
    """The line for an error in the user's own function, after its traceback."""
    if isinstance(error, QGraphError):
        return error
    traceback.print_exception(error)
    return QGraphError(f"--train {function}: it failed: {type(error).__name__}: {error}")


def _losses(losses: Any, function: str) -> Iterator[torch.Tensor]:
    import torch

    if not isinstance(losses, Iterable):
        raise QGraphError(f"--train {function}: it returned no losses: yield one for each batch")
    for loss in _followed(losses, function):
        if not (isinstance(loss, torch.Tensor) and loss.requires_grad and loss.numel() == 1):
            raise QGraphError(f"--train {function}: a loss must be one number that depends on it")
        yield loss
