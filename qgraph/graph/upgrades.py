"""What onnx's version converter gets wrong between opsets, done here."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qgraph.graph.builder import Builder
from qgraph.graph.editing import replace, shared_constant
from qgraph.graph.reading import array, attribute, dims, input_of, is_op, node_name


def is_own(node: ir.Node, current: int, version: int) -> bool:
    """Whether :func:`upgrade` is for `node` on its way from opset `current` to `version`."""
    if is_op(node, "Hardmax"):
        return current < 13 <= version
    if is_op(node, "GroupNormalization"):
        return current < 21 <= version and bool(dims(node.inputs[0])) and _channels(node) > 0
    return False


def upgrade(model: ir.Model, node: ir.Node) -> None:
    """Make `node` one of the newer opset, in place."""
    if is_op(node, "Hardmax"):
        _hardmax(model, node)
    else:
        _group_normalization(model, node)


def keep_coordinates(node: ir.Node, current: int, converted: list[ir.Node]) -> None:
    """Upsample and the first Resize sample pixels at their corners; later the default moved."""
    if not is_op(node, "Upsample") and not (is_op(node, "Resize") and current < 11):
        return
    for new in converted:
        if is_op(new, "Resize"):
            new.attributes["coordinate_transformation_mode"] = ir.AttrString(
                "coordinate_transformation_mode", "asymmetric"
            )
            nearest = "ceil" if _shrinks(node) else "floor"
            new.attributes["nearest_mode"] = ir.AttrString("nearest_mode", nearest)


def _shrinks(node: ir.Node) -> bool:
    """Whether no axis grows and one gets shorter."""
    given = node.attributes.get("scales")
    scales = array(node.inputs[1]) if given is None else np.asarray(given.as_floats())
    return scales is not None and bool((scales <= 1).all() and (scales < 1).any())


def _hardmax(model: ir.Model, node: ir.Node) -> None:
    """Before opset 13, the axes from `axis` on are taken as one: flatten, and shape back."""
    x, result = input_of(node, 0), node.outputs[0]
    axis = int(attribute(node, "axis", 1))
    graph = Builder(model, node, f"{node_name(node)}_")
    shape = graph.op("Shape", x, dtype=ir.DataType.INT64)
    dtype = x.dtype or ir.DataType.FLOAT
    flat = graph.op("Flatten", x, axis=axis, dtype=dtype)
    largest = graph.op("Hardmax", flat, axis=-1, dtype=dtype)
    replace(node, graph.op("Reshape", largest, shape, dtype=dtype, shape=result.shape))


def _group_normalization(model: ir.Model, node: ir.Node) -> None:
    """Before opset 21, scale and bias are those of groups: repeat each for its channels."""
    channels, groups = _channels(node), int(attribute(node, "num_groups", 1))
    owner = shared_constant(
        model,
        f"qgraph/groups_{channels}_{groups}",
        np.arange(channels, dtype=np.int64) // (channels // groups),
    )
    graph = Builder(model, node, f"{node_name(node)}_")
    for index in (1, 2):
        value = input_of(node, index)
        dtype = value.dtype or ir.DataType.FLOAT
        node.replace_input_with(
            index, graph.op("Gather", value, owner, dtype=dtype, shape=(channels,))
        )


def _channels(node: ir.Node) -> int:
    """How many channels the data has, 0 if that is not known."""
    return dims(node.inputs[0])[1] or 0
