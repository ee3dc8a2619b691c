"""What the command line reads and writes: parameters, sizes, files, tables."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from inspect import Parameter, getdoc, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console, RenderableType

from qgraph.errors import QGraphError

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from qgraph.compiled import CompiledModel
    from qgraph.pass_manager import Pass

OPTIMIZE_FOR = Parameter(
    "optimize_for",
    Parameter.KEYWORD_ONLY,
    default="both",
    annotation=Literal["prompt", "decode", "both"],
)
"""A parameter that every recipe has: which runs of a language model decide between lowerings."""


LEARNING_RATE = 1e-3
"""Of Adam, where `--train` is given losses."""


def show(content: RenderableType) -> None:
    """Print; into a pipe with the width that the content needs."""
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(content, highlight=False)


def first_line(thing: object) -> str:
    """Of its documentation."""
    return (getdoc(thing) or "").partition("\n")[0]


def recipe_parameters(name: str) -> dict[str, Parameter]:
    """The parameters of a recipe that can be written as text; the others are for Python.

    Raises:
        QGraphError: there is no such recipe; the message lists those there are.
    """
    from qgraph.recipes import RECIPES, get_recipe

    if name not in RECIPES:
        get_recipe(name, {})
    declared = signature(RECIPES[name], eval_str=True).parameters.values()
    plain = (bool, int, float, str, type(None))
    return {p.name: p for p in (*declared, OPTIMIZE_FOR) if isinstance(p.default, plain)}


def pass_parameters(step: type[Pass]) -> list[str]:
    """The parameters of a pass with their defaults."""
    return [
        f.name if f.default is MISSING else f"{f.name}={f.default}" for f in fields(step) if f.init
    ]


def recipe_arguments(name: str, pairs: list[str]) -> dict[str, Any]:
    """What `--set key=value` options mean for the recipe called `name`.

    Raises:
        QGraphError: unknown recipe or parameter, or a value that it does not take.
    """
    from qgraph.pipeline import convert
    from qgraph.recipes import get_recipe

    known = recipe_parameters(name)
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise QGraphError(f"--set {pair}: write it as key=value")
        if key not in known:
            raise QGraphError(
                f"recipe '{name}' has no parameter '{key}': it has {', '.join(known)}"
            )
        try:
            values[key] = convert(known[key].annotation, text)
        except ValueError as error:
            raise QGraphError(f"--set {pair}: '{key}' {error}") from None
    own = {key: value for key, value in values.items() if key != OPTIMIZE_FOR.name}
    get_recipe(name, own)  # refuses values out of range
    return values


def train_and_compile(
    function: str,
    source: ir.Model,
    recipe: str,
    parameters: dict[str, Any],
    calibration: str | None,
    target: str,
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
    from qgraph.pipeline import imported
    from qgraph.progress import display

    steps = imported(function, "function")
    if not callable(steps):
        raise QGraphError(f"--train {function}: that is no function")
    parameters = {key: value for key, value in parameters.items() if key != OPTIMIZE_FOR.name}
    qmodel = qgraph.prepare_qat(source, recipe=recipe, seed=seed, **parameters)
    if calibration is not None:
        qmodel.calibrate(calibration, samples)
    import torch

    torch.manual_seed(seed)
    losses = steps(qmodel.train())
    if losses is not None:
        optimizer = torch.optim.Adam(qmodel.parameters(), LEARNING_RATE)
        for loss in display()(_losses(losses, function), "training"):
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return qgraph.compile(qmodel.eval(), target=target, verify=verify, progress=display())


def _losses(losses: Any, function: str) -> Iterator[torch.Tensor]:
    import torch

    if not isinstance(losses, Iterable):
        raise QGraphError(f"--train {function}: it returned no losses: yield one for each batch")
    for loss in losses:
        if not (isinstance(loss, torch.Tensor) and loss.requires_grad and loss.numel() == 1):
            raise QGraphError(f"--train {function}: a loss must be one number that depends on it")
        yield loss


def parse_size(text: str) -> int:
    """Bytes: `parse_size("2G") == 2 * 1024**3`.

    Raises:
        QGraphError: it is no size, or zero.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(?:i?[bB])?", text.strip())
    if found is None or float(found[1]) == 0:
        raise QGraphError(f"--max-memory {text}: write a size like 2G or 500M")
    return int(float(found[1]) * 1024 ** " kmgt".index(found[2].lower() or " "))


def size_on_disk(model: ir.Model) -> int:
    """Bytes of the files that `model` was loaded from."""
    from qgraph.model_io import DATA, SOURCE

    return sum(path.stat().st_size for path in (model.meta[SOURCE], *model.meta[DATA]))


def check_free(path: Path, others: set[Path | None]) -> None:
    """Fail now rather than after long work if `path` cannot be written.

    Raises:
        QGraphError: it is a folder or one of `others`, or its folder does not let us write.
    """
    if path.is_dir():
        raise QGraphError(f"{path} is a folder: name a file")
    if any(other is not None and other.resolve() == path.resolve() for other in others):
        raise QGraphError(f"{path} is named twice: give every output its own file")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise QGraphError(f"cannot write {path}: {error.strerror}") from None


def write(path: Path, text: str) -> None:
    """Write a file aside and rename it.

    Raises:
        QGraphError: that fails; nothing is left behind.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise QGraphError(f"cannot write {path}: {error.strerror}") from None
    finally:
        aside.unlink(missing_ok=True)
