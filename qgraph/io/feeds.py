"""Inputs for a model: made up where nothing is given, or the user's calibration data, checked."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qgraph.errors import CalibrationError
from qgraph.io.arrays import as_array
from qgraph.io.kv_cache import Completer
from qgraph.io.npz import NpzFolder, NpzSamples
from qgraph.io.state_shapes import free_axes

Feed = Mapping[str, np.ndarray]
"""One run's inputs by name."""
MASK = "attention_mask"
"""The input that tells tokens from padding, where a model has one."""
_CASTS = {
    ("int32", "int64"),
    ("int64", "int32"),
    ("float64", "float32"),
    ("float32", "float16"),
    ("float64", "float16"),
}


def open_calibration(data: object, model: ir.Model, samples: int | None = None) -> Iterable[Feed]:
    """The feeds in `data`, checked against the inputs of `model` and completed for language models.

    The result can be iterated as often as the data can, reads one feed at a time and keeps none.
    The first feed is read at once, so that data that cannot fit fails before any work is done.

    Args:
        data: one of

            - an iterable of feeds, such as a list or a torch `DataLoader`. A feed is a mapping by
              input name, a list or tuple by position, or a single array for a model that needs only
              one. Values are numpy arrays, torch tensors or what `np.asarray` takes;
            - a function without arguments that returns such an iterable, called for each pass;
            - an iterator, such as a generator: good for one pass, while many recipes need more;
            - the path of an `.npz` file: one array per input, samples along the first axis, each
              sample a feed of batch size 1;
            - the path of a folder of `.npz` files: one feed each, in the order of their names.
        model: its inputs say what is expected. int32 and int64 are cast into each other and floats
            to narrower ones; every other difference of dtype is an error.
        samples: take only so many feeds.

    Raises:
        CalibrationError: here or while iterating: the data cannot be read, holds no feed, or a feed
            does not fit: unknown or missing names, rank, fixed dimensions, dtype, NaN or infinity
            (but -inf, as in masks).
    """
    if samples is not None and samples < 1:
        raise CalibrationError(f"samples={samples}: take at least one calibration sample")
    calibration = _Calibration(_source(data, model), model, samples)
    next(iter(calibration))
    return calibration


def _source(data: object, model: ir.Model) -> Iterable[object]:
    if isinstance(data, str | Path):
        return _files(Path(data), model)
    if isinstance(data, Mapping) or hasattr(data, "shape"):
        kind = "one feed" if isinstance(data, Mapping) else "one array"
        raise CalibrationError(f"calibration data is {kind}: give a list of feeds, [feed, ...]")
    if isinstance(data, Iterator):
        return _OnePass(data)
    if isinstance(data, Iterable):
        return data
    if callable(data):
        return _Function(data)
    raise CalibrationError(
        f"calibration data is a {type(data).__name__}: give feeds, an .npz file or a folder of them"
    )


def _files(path: Path, model: ir.Model) -> Iterable[object]:
    if not path.exists():
        raise CalibrationError(f"calibration data {path} does not exist: check the path")
    data = Completer(model).data
    values = data | {str(value.name): value for value in model.graph.inputs}
    if not path.is_dir():
        return NpzSamples(path, {name: len(value.shape or ()) for name, value in values.items()})
    if not any(path.glob("*.npz")):
        raise CalibrationError(
            f"calibration folder {path} holds no .npz file: put one feed in each"
        )
    return NpzFolder(path, list(values))


@dataclass
class _OnePass:
    """An iterator as an iterable. Its first item can be looked at without using it up."""

    rest: Iterator[object]
    head: list[object] = field(default_factory=list)
    started: bool = False

    def __iter__(self) -> Iterator[object]:
        if self.started:
            raise CalibrationError(
                "calibration data is a generator that one pass has used up, but this recipe needs"
                " several passes: give a list, or a function that returns a new generator"
            )
        self.head = self.head or list(islice(self.rest, 1))
        yield from self.head
        self.started, self.head = True, []
        yield from self.rest


@dataclass(frozen=True)
class _Function:
    """A function that returns an iterator, as an iterable."""

    function: Callable[[], Iterable[object]]

    def __iter__(self) -> Iterator[object]:
        return iter(self.function())


class _Calibration:
    """Feeds as the model wants them."""

    def __init__(self, source: Iterable[object], model: ir.Model, samples: int | None) -> None:
        self._source = source
        self._samples = samples
        self._limit = None if samples is None else min(samples, sys.maxsize)
        self._complete = Completer(model)
        data = self._complete.data
        self._inputs = {str(value.name): value for value in model.graph.inputs} | data
        self._positions = list(data)
        tokens = self._complete.tokens if self._complete.states else None
        self._single = tokens or next(iter(data), "")

    def __iter__(self) -> Iterator[Feed]:
        index = -1
        for index, item in enumerate(islice(self._source, self._limit)):
            yield self._feed(item, f"calibration feed {index}")
        if index < 0:
            raise CalibrationError("calibration data holds no feeds: give at least one")

    # Not __len__: a generator has none. operator.length_hint() asks, for progress bars.
    def __length_hint__(self) -> int:
        known = operator.length_hint(self._source, -1)
        if known < 0:
            raise TypeError("the number of feeds is unknown")
        return known if self._samples is None else min(known, self._samples)

    def _feed(self, item: object, where: str) -> dict[str, np.ndarray]:
        given = {}
        for name, content in self._by_name(item, where).items():
            if name not in self._inputs:
                known = ", ".join(self._positions)
                raise CalibrationError(f"{where}: the model has no input '{name}', only {known}")
            given[name] = _fit(_numpy(content, name, where), self._inputs[name], where)
        feed = self._complete(given)
        if (lacking := self._complete.lacking(feed, given)) is not None:
            raise CalibrationError(f"{where}: {lacking}")
        return feed

    def _by_name(self, item: object, where: str) -> dict[str, object]:
        if isinstance(item, Mapping):
            return {str(name): content for name, content in item.items()}
        if not isinstance(item, list | tuple):
            return {self._single: item}
        if len(item) > len(self._positions):
            known = ", ".join(self._positions)
            raise CalibrationError(
                f"{where}: {len(item)} values for the inputs {known}: drop the others"
            )
        return dict(zip(self._positions, item, strict=False))


def _numpy(content: Any, name: str, where: str) -> np.ndarray:
    try:
        return as_array(content)
    except ValueError as error:
        raise CalibrationError(f"{where}: input '{name}' is not an array: {error}") from error


def _fit(given: np.ndarray, value: ir.Value, where: str) -> np.ndarray:
    """`given` in the dtype of `value`.

    Raises:
        CalibrationError: it does not fit.
    """
    where = f"{where}: input '{value.name}'"
    if not isinstance(value.type, ir.TensorType):
        raise CalibrationError(
            f"{where} is no tensor: models with such inputs cannot be calibrated"
        )
    fitted = _cast(given, value.type.dtype, where)
    if value.shape is not None:
        free = free_axes(value)
        fits = given.ndim == len(value.shape) and all(
            axis in free or given.shape[axis] == dim for axis, dim in enumerate(value.shape)
        )
        if not fits:
            raise CalibrationError(f"{where} has shape {given.shape}, expected {value.shape}")
    if given.shape[:1] == (0,):
        raise CalibrationError(f"{where} is an empty batch of shape {given.shape}: leave it out")
    # Masks hold -inf, which is fine as long as nothing that is observed does.
    if fitted.dtype.kind == "f" and not (fitted < np.inf).all():
        raise CalibrationError(f"{where} holds NaN or infinity: clean the data")
    return fitted


def _cast(given: np.ndarray, expected: ir.DataType, where: str) -> np.ndarray:
    if expected == ir.DataType.STRING and given.dtype.kind in "OU":
        return given
    dtype = np.dtype(expected.numpy())
    if given.dtype == dtype:
        return given
    if (given.dtype.name, dtype.name) not in _CASTS:
        raise CalibrationError(f"{where} has dtype {given.dtype}, expected {expected.name.lower()}")
    with np.errstate(over="ignore"):
        cast = given.astype(dtype)
    if dtype.kind == "i" and not np.array_equal(cast, given):
        raise CalibrationError(f"{where} holds integers that do not fit {dtype}")
    return cast
