"""Why a module cannot be captured, in one line that names the layer and says what to do."""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    PathOf = Callable[[torch.fx.Node], str | None]

_FIXED = re.compile(r"static shape of (\d+) for dimension inputs\['(\w+)'\]\S*\.shape\[(\d+)\]")
_CAUSAL = "_detect_is_causal_mask"
"""What torch's transformers call to look into a mask, where they are not told what is in it."""


def explain(error: BaseException, module: torch.nn.Module, path_of: PathOf) -> str:
    """One line: the layer that was being captured, the reason, and what to do about it."""
    chain = _chain(error)
    name = f"module {type(module).__name__}"
    if fixed := _FIXED.search(str(chain[0])):
        size, value, axis = fixed.groups()
        return f"cannot trace {name} {fixed_axis(value, int(axis), int(size))}"
    layer = next((path for cause in chain if (path := _layer_of(cause, module, path_of))), None)
    text = " ".join(str(chain[0]).split("\n\n")[0].split()) or type(chain[0]).__name__
    advice = ""
    if "data-dependent" in text:
        text = text.split(" (unhinted")[0]
        advice = f"; its control flow depends on values{_where(chain)}"
    where = f"layer '{layer}'" if layer else name
    return f"cannot trace {where}: {text[:300].removesuffix('.')}{advice}"


def fixed_axis(name: str, axis: int, size: int) -> str:
    """What follows "cannot trace ..." where an axis that should be free is not."""
    return (
        f"with axis {axis} of '{name}' free: its code fixes it to the {size} of the example, as a "
        f"loop over it does; leave that axis out of dynamic_shapes and give inputs of this length"
    )


def axes_not_free(model: ir.Model, shapes: Mapping[str, Any] | None) -> Iterator[str]:
    """What became fixed without an error although `shapes` asks for it to be free."""
    import torch

    free = shapes or {}
    for value in model.graph.inputs:
        axes = free.get(value.name or "")
        for axis, dim in axes.items() if isinstance(axes, Mapping) else ():
            size = None if value.shape is None else value.shape[axis]
            if isinstance(dim, str | torch.export.Dim) and isinstance(size, int):
                yield fixed_axis(str(value.name), axis, size)


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, the first cause first."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    return chain[::-1]


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames that `error` came through with their lines, outermost first."""
    step = error.__traceback__
    while step is not None:
        yield step.tb_frame, step.tb_lineno
        step = step.tb_next


def _where(chain: list[BaseException]) -> str:
    """The innermost line of a module's code, and what to do there."""
    import torch

    inside = Path(torch.__file__).parent
    own = Path(__file__).parent
    innermost = None
    for error in chain:
        for frame, line in _frames(error):
            file = Path(frame.f_code.co_filename)
            machinery = file.is_relative_to(inside) and not file.is_relative_to(inside / "nn")
            if not machinery and not file.is_relative_to(own):
                innermost = frame.f_code, line
        if innermost:
            break
    advice = "use torch.where or torch.cond there, or decide it by numbers of Python"
    if innermost is None:
        return f", {advice}"
    code, line = innermost
    if code.co_name == _CAUSAL:
        advice = "give is_causal (tgt_is_causal, ...) together with the mask"
    text = linecache.getline(code.co_filename, line).strip()
    return f" at {Path(code.co_filename).name}:{line} ({text}), {advice}"


def _layer_of(error: BaseException, module: torch.nn.Module, path_of: PathOf) -> str | None:
    """The innermost submodule whose code, or whose captured node, was at work when `error` rose."""
    import torch

    paths = {id(part): path for path, part in module.named_modules()}
    innermost = None
    for frame, _ in _frames(error):
        for local in frame.f_locals.values():
            if isinstance(local, torch.fx.Node):
                innermost = path_of(local) or innermost
        part = frame.f_locals.get("self")
        if isinstance(part, torch.nn.Module) and paths.get(id(part)):
            innermost = paths[id(part)]
    return innermost
