"""Calibration data in `.npz` files, read sample by sample."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from qgraph.errors import CalibrationError


@dataclass(frozen=True)
class NpzSamples:
    """One file whose arrays have the samples along their first axis; never held whole.

    Attributes:
        path: the file.
        ranks: rank of each of the model's inputs. A sample of an input that has the array's rank
            keeps a first axis of 1: it is a batch of one.
    """

    path: Path
    ranks: Mapping[str, int]

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        with _arrays(self.path) as arrays:
            counts = {name: len(stored) for name, stored in arrays.items()}
            if len(set(counts.values())) > 1:
                listed = ", ".join(f"{name} {count}" for name, count in counts.items())
                raise CalibrationError(f"{self.path}: arrays of unlike sample counts: {listed}")
            names = _input_names(list(counts), list(self.ranks))
            for sample in zip(*arrays.values(), strict=True):
                yield {
                    name: row[None] if self.ranks.get(name) == row.ndim + 1 else row
                    for name, row in zip(names, sample, strict=True)
                }

    def __len__(self) -> int:
        with _arrays(self.path) as arrays:
            return max(map(len, arrays.values()), default=0)


@dataclass(frozen=True)
class NpzFolder:
    """A folder of files, in the order of their names; each is one feed.

    Attributes:
        path: the folder.
        inputs: names of the model's inputs, for arrays that were saved without names.
    """

    path: Path
    inputs: Sequence[str]

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for path in sorted(self.path.glob("*.npz")):
            with _arrays(path) as arrays:
                names = _input_names(list(arrays), self.inputs)
                whole = [stored.whole() for stored in arrays.values()]
            yield dict(zip(names, whole, strict=True))

    def __len__(self) -> int:
        return sum(1 for _ in self.path.glob("*.npz"))


class _Stored:
    """An array in an archive, read row by row."""

    def __init__(self, stream: IO[bytes]) -> None:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        self._stream = stream
        self._shape, self._fortran, self._dtype = read(stream)
        if self._dtype.hasobject:
            raise ValueError("it holds Python objects instead of arrays of numbers")

    def __len__(self) -> int:
        if not self._shape:
            raise ValueError("an array has no axis of samples")
        return int(self._shape[0])

    def whole(self) -> np.ndarray:
        content = np.frombuffer(self._stream.read(), self._dtype)
        return content.reshape(self._shape, order="F" if self._fortran else "C")

    def __iter__(self) -> Iterator[np.ndarray]:
        if self._fortran:
            yield from self.whole()
            return
        size = self._dtype.itemsize * prod(self._shape[1:])
        for _ in range(len(self)):
            yield np.frombuffer(self._stream.read(size), self._dtype).reshape(self._shape[1:])


@contextmanager
def _arrays(path: Path) -> Iterator[dict[str, _Stored]]:
    with _reading(path), ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(path))
        streams = {name: stack.enter_context(archive.open(name)) for name in archive.namelist()}
        yield {name.removesuffix(".npy"): _Stored(stream) for name, stream in streams.items()}


def _input_names(stored: Sequence[str], inputs: Sequence[str]) -> list[str]:
    """What the arrays are called; by position where numpy named them (`np.savez(path, x, y)`)."""
    numbered = all(re.fullmatch(r"arr_\d+", name) for name in stored)
    if not numbered or set(stored) & set(inputs) or len(stored) > len(inputs):
        return list(stored)
    return list(inputs[: len(stored)])


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        if not path.is_file():  # pipes and devices would be waited for
            raise ValueError("it is not a file")
        yield
    except CalibrationError:
        raise
    except Exception as error:  # the readers raise whatever the damage leads to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(f"{path} cannot be read as an .npz file: {reason}") from error
