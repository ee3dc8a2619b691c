"""Types and shapes of values, inferred where they are missing."""

from __future__ import annotations

import onnx
import onnx_ir as ir


def infer_types(model: ir.Model) -> None:
    """Fill in the types and shapes that ONNX can tell; where it cannot, the model stays as it is.

    Weights stay where they are. What a node of a foreign domain returns is known only where the
    file says so.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.type = ir.TensorType(value.const_value.dtype)
                value.shape = ir.Shape(value.const_value.shape.numpy())
    # onnx_ir's own pass takes every result for a tensor, sequences too, and writes to the log.
    try:
        proto = onnx.shape_inference.infer_shapes(_skeleton(model), data_prop=True)
    except onnx.shape_inference.InferenceError:
        return
    twins = ir.from_proto(proto).graphs()
    for graph, twin in zip(model.graphs(), twins, strict=True):
        inferred = {str(value.name): value for node in twin for value in node.outputs if value.name}
        for value in (value for node in graph for value in node.outputs):
            same = inferred.get(str(value.name))
            if same is not None and same.type is not None:
                value.type, value.shape = same.type, same.shape


def _skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model without its large weights, whose types and shapes stay."""
    large: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > 1024:
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
