"""Integers that a DequantizeLinear makes floats of, one for each node that reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qgraph.graph.editing import insert, typed


@dataclass(frozen=True)
class Stored:
    """A weight in integers, as initializers.

    Attributes:
        base: name of the weight.
        parts: integers, scale and, unless it is 0 throughout, zero point.
        attributes: of each DequantizeLinear.
    """

    model: ir.Model
    base: str
    parts: Sequence[ir.Value]
    attributes: Mapping[str, int]

    def __call__(self, node: ir.Node) -> ir.Value:
        """The float32 weight for `node`, dequantized right before it.

        For bodies of control flow it is dequantized outside: onnxruntime looks for the integers of
        a DequantizeLinear in the body itself, and refuses the model where they are further out.
        """
        anchor = node if node.graph is self.model.graph else self.model.graph[0]
        dq = insert(
            self.model, anchor, "DequantizeLinear", self.parts,
            base=f"{self.base}_dq", attributes=self.attributes,
        )  # fmt: skip
        return typed(dq, ir.DataType.FLOAT, self.parts[0].shape)
