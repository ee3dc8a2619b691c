"""Nodes, one after the other, for the body of a function."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class _Body:
    """Collects the nodes of a function body."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def op(
        self, op_type: str, *inputs: ir.Value, **attributes: int | list[int] | ir.Attr
    ) -> ir.Value:
        node = ir.node(op_type, inputs=list(inputs), attributes=attributes or None)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, array: np.ndarray) -> ir.Value:
        return self.op("Constant", value=ir.AttrTensor("value", ir.Tensor(array)))

    def max_last(self, x: ir.Value, version: int) -> ir.Value:
        """ReduceMax over the last axis, which became an input in opset 18."""
        if version >= 18:
            return self.op("ReduceMax", x, self.constant(np.array([-1], np.int64)), keepdims=1)
        return self.op("ReduceMax", x, axes=[-1], keepdims=1)
