"""Types and shapes of values, inferred where they are missing."""

from __future__ import annotations

from collections.abc import Collection

import onnx
import onnx_ir as ir

from qgraph.graph.maps import hide_maps, show_maps
from qgraph.graph.reading import INLINE_BYTES, MAIN_DOMAINS, MICROSOFT


def infer_types(model: ir.Model) -> None:
    """Fill in the types and shapes that ONNX can tell; where it cannot, the model stays as it is.

    What is inferred counts, not what the file says of inner values: exporters leave shapes of the
    batch that they saw. Inputs and outputs keep what is declared of them. Weights stay where they
    are. What a node of a foreign domain returns is known only where the file says so.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.type = ir.TensorType(value.const_value.dtype)
                value.shape = ir.Shape(value.const_value.shape.numpy())
    skeleton = _skeleton(model)
    forget_inner_types(skeleton, MAIN_DOMAINS)
    for body in _graphs(skeleton.graph):
        for output in body.output:
            if output.type.HasField("tensor_type"):
                output.type.tensor_type.ClearField("shape")
    # onnx_ir's own pass takes every result for a tensor, sequences too, and writes to the log.
    try:
        proto = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return
    hide_maps(proto)
    twins = ir.from_proto(proto).graphs()
    pairs: list[tuple[ir.Value, ir.Value]] = []
    for graph, twin in zip(model.graphs(), twins, strict=True):
        inferred = {str(value.name): value for node in twin for value in node.outputs if value.name}
        for value in (value for node in graph for value in node.outputs):
            same = inferred.get(str(value.name))
            if same is None or same.type is None:
                continue
            if graph is model.graph and value.is_graph_output() and value.shape is not None:
                continue
            pairs.append((value, same))
    symbols = {str(size) for v in model.graph.inputs for size in v.shape or () if not _fixed(size)}
    believed = not any(_contradicts(v.shape, same.shape, symbols) for v, same in pairs)
    for value, same in pairs:
        value.type, value.shape = same.type, _merged(same.shape, value.shape, symbols, believed)


def _fixed(size: int | ir.SymbolicDim) -> bool:
    return isinstance(size, int)


def _contradicts(declared: ir.Shape | None, inferred: ir.Shape | None, symbols: set[str]) -> bool:
    """Whether a declared shape is another one than what follows from the inputs, as where an
    exporter left the batch of one that it saw."""
    if declared is None or inferred is None:
        return False
    if len(declared) != len(inferred):
        return True
    for said, found in zip(declared, inferred, strict=True):
        known = _fixed(found) or str(found) in symbols
        if known and said != found and (_fixed(said) or str(said) in symbols):
            return True
    return False


def _merged(
    inferred: ir.Shape | None, declared: ir.Shape | None, symbols: set[str], believed: bool
) -> ir.Shape | None:
    """What was inferred; what it leaves open is as declared if nothing declared is wrong, else only
    the last axis is, which no batch and no length changes."""
    if declared is None or (inferred is not None and len(inferred) != len(declared)):
        return inferred
    if inferred is None:
        inferred = ir.Shape([None] * len(declared))
    last = len(declared) - 1
    sizes = [
        size
        if _fixed(size) or str(size) in symbols or not (believed or axis == last)
        else _said(declared[axis], size)
        for axis, size in enumerate(inferred)
    ]
    return ir.Shape(sizes)


def _said(size: int | ir.SymbolicDim, inferred: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    """A declared size; but names that inference gave count for one run of it alone, so that those
    of an earlier run would be others' by now."""
    return inferred if str(size).startswith("unk__") else size


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as runtimes get it: without types and shapes that they infer themselves.

    onnxruntime believes what it is told: it lets values of equal symbolic shape share a buffer,
    though exporters call the batch of each of two inputs `batch`.
    """
    proto = ir.to_proto(model)
    forget_inner_types(proto, (*MAIN_DOMAINS, MICROSOFT, "qgraph"))
    show_maps(model, proto)
    return proto


def forget_inner_types(proto: onnx.ModelProto, domains: Collection[str]) -> None:
    """Drop what `proto` says of inner values, but results of operators of other domains."""
    for graph in _graphs(proto.graph):
        foreign = {n for node in graph.node if node.domain not in domains for n in node.output}
        theirs = [info for info in graph.value_info if info.name in foreign]
        if len(theirs) < len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(theirs)


def _graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """A graph and all the bodies in it."""
    graphs = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                graphs += _graphs(attribute.g)
            elif attribute.type == onnx.AttributeProto.GRAPHS:
                for body in attribute.graphs:
                    graphs += _graphs(body)
    return graphs


def _skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model without its large weights, whose types and shapes stay."""
    large: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > INLINE_BYTES:
            large.append((value, tensor))
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor(
                "elsewhere", 0, tensor.nbytes, tensor.dtype, name=name, shape=shape
            )
    try:
        return ir.to_proto(model)
    finally:
        for value, tensor in large:
            value.const_value = tensor
