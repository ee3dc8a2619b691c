"""Nodes for a graph that is there already; a graph that is new is written on an `ir.tape.Tape`."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qgraph.graph.editing import insert, typed


class Builder:
    """Puts nodes before another one, in the order of the calls.

    Args:
        model: gets the nodes.
        anchor: the node before which they go.
        prefix: what their names begin with; the operator follows.
    """

    def __init__(self, model: ir.Model, anchor: ir.Node, prefix: str) -> None:
        self.model, self.anchor, self.prefix = model, anchor, prefix

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        dtype: ir.DataType | None = ir.DataType.FLOAT,
        shape: ir.Shape | Sequence[int] | None = None,
        **attributes: int | str | list[int],
    ) -> ir.Value:
        """What a new node computes, of this dtype and shape (None: unknown)."""
        node = insert(
            self.model, self.anchor, op_type, inputs,
            base=f"{self.prefix}{op_type}", attributes=attributes, domain=domain,
        )  # fmt: skip
        return typed(node, dtype, shape)
