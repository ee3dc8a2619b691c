"""Constants that a file stores by their elements that are not 0."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from qgraph.errors import ModelError

LARGEST_BYTES = 1 << 31
"""A dense constant of more does not fit a file's initializers."""


def make_dense(proto: onnx.ModelProto) -> None:
    """Write out every sparse initializer and Constant of `proto`.

    Raises:
        ModelError: one has indices that do not fit it, or would be too large.
    """
    for graph in _graphs(proto.graph):
        for sparse in graph.sparse_initializer:
            graph.initializer.append(_dense(sparse, sparse.values.name))
        del graph.sparse_initializer[:]
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
                    dense = _dense(attribute.sparse_tensor, node.output[0])
                    attribute.CopyFrom(onnx.helper.make_attribute("value", dense))


def _dense(sparse: onnx.SparseTensorProto, name: str) -> onnx.TensorProto:
    values = numpy_helper.to_array(sparse.values)
    places = numpy_helper.to_array(sparse.indices)
    shape, count = tuple(sparse.dims), math.prod(sparse.dims)
    if count * values.itemsize > LARGEST_BYTES:
        raise ModelError(f"the sparse constant '{name}' of shape {shape} is too large to be dense")
    if places.ndim == 2:  # one index for each axis
        inside = ((places >= 0) & (places < np.array(shape))).all(axis=1)
        flat = places @ np.array([math.prod(shape[i + 1 :]) for i in range(len(shape))])
        places = np.where(inside, flat, -1)
    fits = places.shape == values.shape and ((places >= 0) & (places < count)).all()
    if not fits:
        raise ModelError(f"the sparse constant '{name}' has indices outside its shape {shape}")
    dense = np.zeros(count, values.dtype)
    dense[places] = values
    return numpy_helper.from_array(dense.reshape(shape), name)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _graphs(body)
