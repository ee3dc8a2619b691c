"""What the command line reads and writes: parameters, sizes, files, tables."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from inspect import Parameter, getdoc, signature
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

from qgraph.errors import QGraphError

if TYPE_CHECKING:
    import onnx_ir as ir

    from qgraph.pipeline.pass_manager import Pass


def show(content: RenderableType) -> None:
    """Print; into a pipe with the width that the content needs."""
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(content, highlight=False)


def first_line(thing: object) -> str:
    """Of its documentation."""
    return (getdoc(thing) or "").partition("\n")[0]


def parameters(name: str) -> dict[str, Parameter]:
    """What can be set beside the recipe called `name`: its parameters that can be written as text
    (the others are for Python), and `optimize_for`, which targets have.

    Raises:
        QGraphError: there is no such recipe; the message lists those there are.
    """
    from qgraph.backends import get_target
    from qgraph.recipes import RECIPES, get_recipe

    if name not in RECIPES:
        get_recipe(name, {})
    declared = signature(RECIPES[name], eval_str=True).parameters.values()
    purpose = signature(get_target, eval_str=True).parameters["optimize_for"]
    plain = (bool, int, float, str, type(None))
    return {p.name: p for p in (*declared, purpose) if isinstance(p.default, plain)}


def pass_parameters(step: type[Pass]) -> list[str]:
    """The parameters of a pass with their defaults."""
    return [
        f.name if f.default is MISSING else f"{f.name}={f.default}" for f in fields(step) if f.init
    ]


def settings(name: str, pairs: list[str]) -> dict[str, Any]:
    """What `--set key=value` options beside the recipe called `name` mean.

    Raises:
        QGraphError: unknown recipe or parameter, or a value of another type.
    """
    from qgraph.pipeline.parse import convert

    known = parameters(name)
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
    return values


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
    from qgraph.io.models import source_files

    return sum(path.stat().st_size for path in source_files(model))
