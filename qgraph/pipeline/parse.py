"""Pipelines of passes written as text: `canonicalize,smooth{alpha=0.7},my_module:MyPass{k=3}`.

A step is the name of a pass of qgraph, or `module:Class` for a pass of the user's own, which is
imported from the current directory or from anywhere on Python's path. Its parameters stand in
braces, separated by commas or semicolons; text with punctuation is quoted as in JSON. What
`str(PassManager(...))` prints is such a text.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from operator import attrgetter
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qgraph.errors import PipelineError, QGraphError
from qgraph.numerics.spec import QuantSpec
from qgraph.pipeline.pass_manager import Pass

_STRING = r'"(?:[^"\\]|\\.)*"'
_STEP = re.compile(
    rf"\s*(?P<name>[^\s,;{{}}=]+)\s*(?:\{{(?P<parameters>(?:[^{{}}\"]|{_STRING})*)\}}\s*)?(?:,|$)"
)
_PARAMETER = re.compile(rf"\s*(?P<key>\w+)\s*=\s*(?P<value>{_STRING}|[^,;\"]*?)\s*(?:[,;]|$)")


def parse(text: str, known: Mapping[str, type[Pass]]) -> list[Pass]:
    """The passes that `text` describes, in order.

    Args:
        known: the passes that a name alone stands for, see `qgraph.passes.all_passes`.

    Raises:
        PipelineError: the text is misspelt, a pass or module does not exist, or a parameter does
            not exist or does not take this value. The message says what there is instead.
    """
    steps: list[Pass] = []
    position = 0
    text = text.strip()
    while position < len(text):
        step = _STEP.match(text, position)
        if step is None:
            rest = text[position:]
            raise PipelineError(
                f"cannot read the pipeline at '{rest}': write it like 'first,second{{key=value}}'"
            )
        position = step.end()
        steps.append(_build(step["name"], step["parameters"] or "", known))
    return steps


def convert(kind: Any, text: str, *, quoted: bool = False) -> Any:
    """`text` as a value of the annotated type `kind`.

    Args:
        kind: bool, int, float, str, `QuantSpec`, a Literal, None, or a union of these.
        quoted: the text was in quotes: it is not `none`.

    Raises:
        ValueError: it is not one; the message says what is expected.
    """
    for option in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        try:
            return _convert(option, text, quoted)
        except (ValueError, KeyError, QGraphError):
            continue
    raise ValueError(f"must be {_expected(kind)}, not '{text}'")


def _convert(kind: Any, text: str, quoted: bool) -> Any:
    if kind is NoneType and not quoted:
        return {"none": None}[text.lower()]
    if get_origin(kind) is Literal:
        return {str(choice): choice for choice in get_args(kind)}[text]
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind is QuantSpec:
        return QuantSpec.parse(text)
    if kind in (int, float, str):
        return kind(text)
    raise ValueError


def _expected(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_expected, get_args(kind)))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    known = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    known |= {NoneType: "none", QuantSpec: f"a quantization like '{QuantSpec()}'"}
    return known.get(kind, "given in Python")


def _build(name: str, parameters: str, passes: Mapping[str, type[Pass]]) -> Pass:
    step = _import(name) if ":" in name else _known(name, passes)
    kinds = get_type_hints(step)
    accepted = {f.name: f for f in fields(step) if f.init}
    values: dict[str, object] = {}
    position = 0
    while position < len(parameters.rstrip()):
        parameter = _PARAMETER.match(parameters, position)
        if parameter is None:
            rest = parameters[position:].strip()
            raise PipelineError(
                f"pass '{name}': cannot read '{rest}': write parameters as key=value"
            )
        position = parameter.end()
        key, value = parameter["key"], parameter["value"]
        if key not in accepted:
            raise PipelineError(
                f"pass '{name}' has no parameter '{key}': {_parameters(key, accepted)}"
            )
        if key in values:
            raise PipelineError(f"pass '{name}': parameter '{key}' is given twice")
        quoted = value.startswith('"')
        try:
            values[key] = convert(kinds[key], json.loads(value) if quoted else value, quoted=quoted)
        except ValueError as error:
            raise PipelineError(f"pass '{name}': parameter '{key}' {error}") from error
    if missing := [key for key, f in accepted.items() if _required(f) and key not in values]:
        raise PipelineError(
            f"pass '{name}' needs a value for '{missing[0]}': {name}{{{missing[0]}=...}}"
        )
    try:
        return step(**values)
    except ValueError as error:
        raise PipelineError(f"pass '{name}': {error}") from error


def _required(parameter: Field[Any]) -> bool:
    return parameter.default is MISSING and parameter.default_factory is MISSING


def _parameters(key: str, accepted: Iterable[str]) -> str:
    if not accepted:
        return "it takes none"
    return f"it has {', '.join(accepted)}{_did_you_mean(key, accepted)}"


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), 1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _known(name: str, passes: Mapping[str, type[Pass]]) -> type[Pass]:
    if name not in passes:
        hint = _did_you_mean(name, passes)
        raise PipelineError(
            f"there is no pass '{name}'{hint}: 'qgraph passes' lists them, "
            "a pass of your own is written module:Class"
        )
    return passes[name]


def _import(name: str) -> type[Pass]:
    kind = imported(name, "class")
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise PipelineError(f"'{name}' is not a subclass of qgraph.Pass")
    if absent := [a for a in ("name", "contract") if not hasattr(kind, a)]:
        raise PipelineError(f"pass '{name}' has no {absent[0]}: give its class one, see Pass")
    return kind


def imported(name: str, kind: str) -> Any:
    """What `module:name` stands for, in the current directory or installed.

    Args:
        name: the part behind the colon may have dots.
        kind: what it should be, for the message.

    Raises:
        PipelineError: there is no such module, importing it fails, or it has nothing of that name.
    """
    module_name, _, inner = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise PipelineError(f"cannot import '{module_name}': {error}") from error
        raise PipelineError(
            f"there is no module '{module_name}': put {module_name}.py into the current directory "
            "or install it"
        ) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PipelineError(f"cannot import '{module_name}': {reason}") from error
    try:
        return attrgetter(inner)(module)
    except AttributeError:
        hint = _did_you_mean(inner, vars(module))
        raise PipelineError(f"module '{module_name}' has no {kind} '{inner}'{hint}") from None
