"""A feed for a model of which nothing but its graph is known."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from qgraph.errors import ModelError
from qgraph.graph.ops import RESHAPES
from qgraph.graph.reading import array, dims, is_op
from qgraph.io.feeds import Feed
from qgraph.io.kv_cache import Completer, required_inputs
from qgraph.io.state_shapes import free_axes

_KEEP_INDICES = RESHAPES | {"Cast", "Identity"}


def first_feed(
    model: ir.Model, calibration: Iterable[Feed] | None, seed: int
) -> dict[str, np.ndarray]:
    """The first calibration feed, or a random one where there is no calibration data.

    A random feed has small sizes for symbolic dimensions (the same size for the same symbol),
    floats from N(0, 1), integers that stay inside the tables they index, masks of ones.

    Raises:
        ModelError: an input has a type that cannot be made up: a sequence, an optional, a string,
            a float that numpy does not have, or a tensor of unknown rank.
    """
    complete = Completer(model)
    for given in calibration or ():
        return complete(given)
    rng = np.random.default_rng(seed)
    values = required_inputs(model)
    feed: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    if complete.states:
        first = [v for v in values if v.name == complete.tokens]
        first = first or [v for v in values if v.name not in complete.states]
        feed = complete({str(value.name): _random(value, sizes, rng) for value in first})
    for value in values:
        if value.name not in feed:
            feed[str(value.name)] = _random(value, sizes, rng)
    return feed


def _random(value: ir.Value, sizes: dict[str, int], rng: np.random.Generator) -> np.ndarray:
    dtype = _numpy_type(value)
    shape = [_size(value, axis, sizes) for axis in range(len(value.shape or ()))]
    if dtype.kind == "b" or "mask" in str(value.name).lower():
        return np.ones(shape, dtype)
    if dtype.kind == "f":
        return np.asarray(rng.standard_normal(shape), dtype)
    if not any(d != 1 for d in shape) and (code := _code_compared(value)) is not None:
        return np.full(shape, code, dtype)
    if (rows := _rows_indexed(value)) is not None:
        return np.asarray(rng.integers(0, min(rows, 1000), shape), dtype)
    # Nothing says what the integers mean: bytes are likely pixels, the rest counts or small codes.
    low, high = (0, 128) if dtype.itemsize == 1 else (1, 4)
    return np.asarray(rng.integers(low, high, shape), dtype)


def _numpy_type(value: ir.Value) -> np.dtype:
    advice = "give calibration data"
    if not isinstance(value.type, ir.TensorType):
        raise ModelError(f"cannot make up input '{value.name}', which is no tensor: {advice}")
    if value.shape is None:
        raise ModelError(f"cannot make up input '{value.name}' of unknown rank: {advice}")
    name = value.type.dtype.name.lower()
    if np.dtype(value.type.dtype.numpy()).kind not in "fiub":
        raise ModelError(f"cannot make up input '{value.name}' of type {name}: {advice}")
    return np.dtype(value.type.dtype.numpy())


def _size(value: ir.Value, axis: int, sizes: dict[str, int]) -> int:
    """The dimension if it is fixed, else a size that convolutions and windows can work with."""
    shape, free = value.shape, free_axes(value)
    assert shape is not None
    dim = shape[axis]
    if isinstance(dim, int) and axis not in free:
        return dim
    # The state of a recurrent layer is (layers, batch, width): the batch is not always first.
    if axis == 0 or (axis == free[0] and shape[0] != 1):
        size = 1
    elif len(shape) >= 4:
        size = 64
    else:
        size = 512 if _is_float(value) and len(shape) == 2 else 8
    symbol = None if isinstance(dim, int) else dim.value
    return size if symbol is None else sizes.setdefault(symbol, size)


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _code_compared(value: ir.Value) -> np.ndarray | None:
    """A constant that `value` is compared with (a sampling rate, a mode), or None."""
    for node, index in value.uses():
        if is_op(node, "Equal") and (code := array(node.inputs[1 - index])) is not None:
            return code.reshape(-1)[0] if code.size == 1 else None
    return None


def _rows_indexed(value: ir.Value) -> int | None:
    """Length of the shortest table that `value` indexes (Gather, OneHot), or None."""
    limits: list[int | None] = []
    for node, index in value.uses():
        if is_op(node, *_KEEP_INDICES) and index == 0:
            limits.append(_rows_indexed(node.outputs[0]))
        elif is_op(node, "Gather") and index == 1 and (shape := dims(node.inputs[0])):
            axis = node.attributes.get("axis")
            limits.append(shape[axis.as_int() if axis else 0])
        elif is_op(node, "OneHot") and index == 0 and node.inputs[1] is not None:
            depth = ir.convenience.get_const_tensor(node.inputs[1])
            limits.append(None if depth is None else int(depth.numpy().item()))
    return min((rows for rows in limits if rows), default=None)
