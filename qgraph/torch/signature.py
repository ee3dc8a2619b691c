"""Example inputs and free axes, in the form that torch.export wants them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qgraph.errors import ModelError

if TYPE_CHECKING:
    import torch

_PLAIN = inspect.Parameter.POSITIONAL_OR_KEYWORD
_STAR = inspect.Parameter.VAR_POSITIONAL
_STARS = inspect.Parameter.VAR_KEYWORD


def bind(module: torch.nn.Module, example_inputs: Any) -> inspect.BoundArguments:
    """The example as arguments of `forward`, in the order of its signature."""
    import torch

    def tensor(value: Any) -> Any:
        return torch.as_tensor(value) if isinstance(value, np.ndarray) else value

    signature = inspect.signature(module.forward)
    try:
        if isinstance(example_inputs, Mapping):
            return signature.bind(**{key: tensor(value) for key, value in example_inputs.items()})
        if not isinstance(example_inputs, tuple | list):
            example_inputs = (example_inputs,)
        return signature.bind(*map(tensor, example_inputs))
    except TypeError as error:
        raise ModelError(
            f"example_inputs do not fit {type(module).__name__}.forward{signature}: {error}"
        ) from None


def values_by_name(arguments: inspect.BoundArguments) -> dict[str, Any]:
    """Every argument by its name; those that `*args` takes are `args_0`, `args_1`, ..."""
    values: dict[str, Any] = {}
    for name, value in arguments.arguments.items():
        kind = arguments.signature.parameters[name].kind
        if kind == _STAR:
            values |= {f"{name}_{i}": part for i, part in enumerate(value)}
        else:
            values |= value if kind == _STARS else {name: value}
    return values


@contextlib.contextmanager
def replaced_forward(
    module: torch.nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """`module` with `wrap(forward)`, functions of the module and its arguments; then as it was.

    Its class becomes a subclass: with a forward of its own, torch.export cannot tell the layers.
    """
    kind = type(module)
    own = vars(module).pop("forward", None)
    forward = kind.forward if own is None else lambda _, *args, **kwargs: own(*args, **kwargs)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    module.__class__ = type(kind.__name__, (kind,), {"forward": wrap(forward), **names})
    try:
        yield
    finally:
        module.__class__ = kind
        if own is not None:
            vars(module)["forward"] = own


def with_names(
    forward: Callable[..., Any], arguments: inspect.BoundArguments, names: list[str]
) -> Callable[..., Any]:
    """`forward` with these parameters only: torch.export knows no free axes in `**kwargs`."""
    parameters = arguments.signature.parameters
    spread = any(parameters[name].kind == _STAR for name in arguments.arguments)
    positional = names[: len(arguments.args) if spread else 0]
    named = names[len(positional) :]

    def plain(module: torch.nn.Module, *args: Any) -> Any:
        values = dict(zip(names, args, strict=True))
        return forward(
            module, *[values[name] for name in positional], **{name: values[name] for name in named}
        )

    plain.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, _PLAIN) for name in ("self", *names)]
    )
    return plain


def all_shapes(
    arguments: inspect.BoundArguments, values: Mapping[str, Any], shapes: Any
) -> dict[str, Any] | None:
    """`dynamic_shapes` with an entry for each of `values`.

    What `forward` takes as `*args` or `**kwargs` may also be one entry, as torch.export has it: a
    tuple or a dict.

    Raises:
        ModelError: there are more entries than arguments, or one of another name.
    """
    if shapes is None:
        return None
    if not isinstance(shapes, Mapping):
        grouped = any(isinstance(axes, tuple) and _nested(axes) for axes in shapes)
        names = [*arguments.arguments] if grouped else [*values]
        if len(shapes) > len(names):
            raise ModelError(
                f"dynamic_shapes has {len(shapes)} entries for {len(names)} inputs: "
                "give one for each input, or a dict by input name"
            )
        shapes = dict(zip(names, shapes, strict=False))
    named: dict[str, Any] = {}
    for name, axes in shapes.items():
        kind = arguments.signature.parameters[name].kind if name in arguments.arguments else None
        if kind == _STAR:
            named |= {f"{name}_{i}": part for i, part in enumerate(axes)}
        else:
            named |= axes if kind == _STARS else {name: axes}
    if unknown := sorted(set(named) - set(values)):
        raise ModelError(
            f"dynamic_shapes names '{unknown[0]}', which is no input: use {', '.join(values)}"
        )
    return {name: _axes(name, named.get(name)) for name in values}


def _nested(axes: tuple[Any, ...]) -> bool:
    """Whether these are the axes of several inputs, not those of one."""
    return any(isinstance(part, tuple | list | dict) for part in axes)


def _axes(name: str, axes: Any) -> Any:
    """A list of axis numbers, and dimensions with a name, as torch's exporter wants them."""
    import torch

    if isinstance(axes, list) and all(isinstance(axis, int) for axis in axes):
        return {axis: f"{name}_{axis}" for axis in axes}
    if isinstance(axes, Mapping):
        # A name lets the exporter find how sizes depend on each other, where a Dim must be right.
        return {k: d.__name__ if type(d) is torch.export.Dim else d for k, d in axes.items()}
    return axes
