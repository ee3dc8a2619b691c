"""What the command line reads and writes: parameters, sizes, files, tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, fields, replace
from inspect import Parameter, getdoc, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType

from qgraph.errors import QGraphError
from qgraph.io.files import check_free

if TYPE_CHECKING:
    import onnx_ir as ir

    from qgraph.pipeline.pass_manager import Pass
    from qgraph.pipeline.target import Target


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
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(?:i?[bB])?", text.strip())
    if size is None or float(size[1]) == 0:
        raise QGraphError(f"--max-memory {text}: write a size like 2G or 500M")
    return int(float(size[1]) * 1024 ** " kmgt".index(size[2].lower() or " "))


def deciding_by(file: Path, target: Target) -> Target:
    """`target` with its measured figures in a file.

    Raises:
        QGraphError: it measures nothing, or the file is something else.
    """
    from qgraph.backends.cpu import CpuTarget, Decisions

    if not isinstance(target, CpuTarget) or not target.measured:
        raise QGraphError(f"--decisions {file}: target '{target.name}' measures nothing")
    Decisions(file).figures()
    return replace(target, decisions=file)


def check_pages(
    pages: Sequence[Path], source: ir.Model, output: Path, given: Iterable[object]
) -> None:
    """Fail now rather than after long work if a report cannot be written.

    Args:
        pages: the reports.
        given: other arguments; those that are paths are read.

    Raises:
        QGraphError: one of them cannot be written, or is a file that is read or written anyway.
    """
    from qgraph.io.models import files_read, files_written

    taken = [*files_read(source), *(file for path in given for file in _files_at(path))]
    written = files_written(source, output)
    for page in pages:
        check_free(page, [*taken, page] if written(page) else taken)
        taken.append(page)


def _files_at(given: object) -> Iterator[Path]:
    """The file, or the files below the folder, that an argument names, if it does."""
    path = Path(given) if isinstance(given, str) and given else None
    if path is None or not path.exists():
        return
    if path.is_dir():
        yield from (file for file in path.rglob("*") if file.is_file())
    else:
        yield path


def size_on_disk(model: ir.Model) -> int:
    """Bytes of the files that `model` was loaded from."""
    from qgraph.io.models import source_files

    return sum(path.stat().st_size for path in source_files(model))
