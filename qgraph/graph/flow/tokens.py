"""Which values have the same tokens: all axes but the last of the same lengths, at every run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import onnx_ir as ir

from qgraph.graph.reading import MAIN_DOMAINS, MICROSOFT, attribute, constant, dims, nodes

_KEEP = {
    "BiasGelu", "Cast", "Erf", "FastGelu", "Gelu", "GroupQueryAttention", "Identity",
    "LayerNormalization", "MatMulNBits", "QuantizePerToken", "QuickGelu", "RMSNormalization",
    "Relu", "RotaryEmbedding", "Sigmoid", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization", "Softmax", "Tanh",
}  # fmt: skip
"""Operators whose results have the tokens of their first input."""
_PRODUCTS = {"DynamicQuantizeMatMul", "Gemm", "MatMul", "MatMulInteger", "MatMulIntegerToFloat"}
"""So have products, where the second input is a matrix."""
_BROADCAST = {"Add", "Sub", "Mul", "Div", "Pow"}
"""And these, if all that they combine has the same tokens."""


def same_tokens(model: ir.Model, values: Sequence[ir.Value]) -> list[Hashable]:
    """A label for each value; what has equal labels has the same tokens.

    Symbolic sizes count by name only where one input bears the name: exporters call the batch of
    each input `batch`, and onnxruntime takes batches that differ. Else values have the same tokens
    that come from one value by operators which keep them.
    """
    declared = Counter(
        size.value
        for value in model.graph.inputs
        for size in value.shape or ()
        if isinstance(size, ir.SymbolicDim)
    )
    first: dict[ir.Value, ir.Value] = {}
    for node in nodes(model):
        begun = {first.get(value, value) for value in _alike(node)}
        if len(begun) == 1:
            first.update(dict.fromkeys(node.outputs, begun.pop()))

    def label(value: ir.Value) -> Hashable:
        sizes = list(value.shape or ())[:-1]
        names = [size.value for size in sizes if isinstance(size, ir.SymbolicDim)]
        # Inference calls what it does not know unk__0, unk__1, ...: each once.
        if sizes and all(
            n is not None and (declared[n] == 1 or n.startswith("unk__")) for n in names
        ):
            return tuple(map(str, sizes))
        return first.get(value, value)

    return [label(value) for value in values]


def _inferred(name: str) -> bool:
    """Whether ONNX's inference gave it: it calls what it does not know unk__0, unk__1, ..."""
    return name.startswith("unk__")


def _alike(node: ir.Node) -> list[ir.Value]:
    """The inputs that have the tokens of the results of `node`, if all of these agree."""
    inputs = [value for value in node.inputs if value is not None]
    if node.domain not in (*MAIN_DOMAINS, MICROSOFT, "qgraph"):
        return []
    if node.op_type in _KEEP:
        return inputs[:1]
    if node.op_type in _PRODUCTS:
        fits = len(dims(inputs[1])) == 2 and not attribute(node, "transA", 0)
        return inputs[:1] if fits else []
    if node.op_type not in _BROADCAST:
        return []
    fixed = [value for value in inputs if constant(value) is not None]
    if any(size != 1 for value in fixed for size in dims(value)[:-1]):
        return []
    return [value for value in inputs if value not in fixed]
