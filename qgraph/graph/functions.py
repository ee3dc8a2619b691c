"""Operators of the `qgraph` domain: model-local ONNX functions whose bodies are their meaning.

What ONNX cannot say in one operator is a call of one of these. Any runtime can run the call through
its body; a lowering replaces it by something faster that must agree with the body.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from qgraph.graph.editing import insert, shared_constant, typed
from qgraph.graph.reading import opset
from qgraph.numerics.tokens import SYMMETRIC_GRID, TokenGrid

DOMAIN = "qgraph"
OBSERVER = "Observer"
QUANTIZE_PER_TOKEN = "QuantizePerToken"
DEQUANTIZE_PER_TOKEN = "DequantizePerToken"
ROUND_IN_BLOCKS = "RoundInBlocks"
DEQUANTIZE_CODEBOOK = "DequantizeCodebook"


def _observer(version: int) -> ir.Function:
    x, body = ir.Value(name="x"), Tape()
    return _function(OBSERVER, [x], [body.op("Identity", [x])], body, version)


def _quantize_per_token(version: int) -> ir.Function:
    """(x, step, zero, floor) -> (q uint8, largest), see `numerics.tokens.quantize_per_token`."""
    inputs, body = [ir.Value(name=name) for name in ("x", "step", "zero", "floor")], Tape()
    x, step, zero, floor = inputs
    largest = body.op("Max", [_max_last(body, body.op("Abs", [x]), version), floor])
    q = body.op("QuantizeLinear", [body.op("Div", [x, largest]), step, zero])
    return _function(QUANTIZE_PER_TOKEN, inputs, [q, largest], body, version)


def _dequantize_per_token(version: int) -> ir.Function:
    """(q, largest, step, zero) -> x, see `numerics.tokens.dequantize_per_token`."""
    inputs, body = [ir.Value(name=name) for name in ("q", "largest", "step", "zero")], Tape()
    q, largest, step, zero = inputs
    y = body.op("Mul", [body.op("DequantizeLinear", [q, step, zero]), largest])
    return _function(DEQUANTIZE_PER_TOKEN, inputs, [y], body, version)


def _round_in_blocks(version: int) -> ir.Function:
    """(x, block, step, floor) -> x, see `numerics.tokens.round_in_blocks`; block is [-1, size]."""
    inputs, body = [ir.Value(name=name) for name in ("x", "block", "step", "floor")], Tape()
    x, block, step, floor = inputs
    last, none = (_constant(body, np.array([i], np.int64)) for i in (-1, 0))
    size = body.op("Gather", [block, _constant(body, np.array([1], np.int64))])
    channels = body.op("Gather", [body.op("Shape", [x]), last])
    spare = body.op("Mod", [body.op("Neg", [channels]), size])  # the last block may be shorter
    lead = body.op("Slice", [body.op("Shape", [x]), none, last])
    filling = body.op("ConstantOfShape", [body.op("Concat", [lead, spare], {"axis": 0})])
    padded = body.op("Concat", [x, filling], {"axis": -1})
    blocks = body.op("Reshape", [padded, block])
    largest = body.op("Max", [_max_last(body, body.op("Abs", [blocks]), version), floor])
    scale = body.op("Mul", [largest, step])
    rounded = body.op("Mul", [body.op("Round", [body.op("Div", [blocks, scale])]), scale])
    padded = body.op("Reshape", [rounded, body.op("Shape", [padded])])
    y = body.op("Slice", [padded, none, channels, last])
    return _function(ROUND_IN_BLOCKS, inputs, [y], body, version)


def _dequantize_codebook(version: int) -> ir.Function:
    """(codes (..., size), table, scale (...)) -> table[codes] · scale, float32 (..., size)."""
    inputs, body = [ir.Value(name=name) for name in ("codes", "table", "scale")], Tape()
    codes, table, scale = inputs
    levels = body.op("Gather", [table, body.op("Cast", [codes], {"to": int(ir.DataType.INT32)})])
    steps = body.op("Unsqueeze", [scale, _constant(body, np.array([-1], np.int64))])
    return _function(DEQUANTIZE_CODEBOOK, inputs, [body.op("Mul", [levels, steps])], body, version)


_MAKERS: dict[str, Callable[[int], ir.Function]] = {
    OBSERVER: _observer,
    QUANTIZE_PER_TOKEN: _quantize_per_token,
    DEQUANTIZE_PER_TOKEN: _dequantize_per_token,
    ROUND_IN_BLOCKS: _round_in_blocks,
    DEQUANTIZE_CODEBOOK: _dequantize_codebook,
}


def _function(
    name: str, inputs: list[ir.Value], outputs: list[ir.Value], body: Tape, version: int
) -> ir.Function:
    graph = ir.Graph(inputs, outputs, nodes=body.nodes, opset_imports={"": version}, name=name)
    return ir.Function(domain=DOMAIN, name=name, graph=graph, attributes=[])


def _constant(body: Tape, array: np.ndarray) -> ir.Value:
    return body.op("Constant", [], {"value": ir.Tensor(array)})


def _max_last(body: Tape, x: ir.Value, version: int) -> ir.Value:
    """ReduceMax over the last axis, which became an input in opset 18."""
    if version < 18:
        return body.op("ReduceMax", [x], {"axes": [-1], "keepdims": 1})
    last = _constant(body, np.array([-1], np.int64))
    return body.op("ReduceMax", [x, last], {"keepdims": 1})


def declare(model: ir.Model, name: str, make: Callable[[int], ir.Function] | None = None) -> None:
    """Make sure that `model` carries the function `name` of the qgraph domain.

    Args:
        make: from the model's opset to the function, for one that is not of this file.
    """
    model.opset_imports.setdefault(DOMAIN, 1)
    key = (DOMAIN, name, "")
    if key not in model.functions:
        model.functions[key] = (make or _MAKERS[name])(opset(model))


def undeclare_unused(model: ir.Model) -> None:
    """Drop qgraph functions, and the domain import, that no node calls any more."""
    from qgraph.graph.reading import nodes

    called = {(n.domain, n.op_type) for n in nodes(model) if n.domain == DOMAIN}
    for key in [k for k in model.functions if k[0] == DOMAIN and (k[0], k[1]) not in called]:
        del model.functions[key]
    if not called:
        model.opset_imports.pop(DOMAIN, None)


def is_call(node: ir.Node | None, name: str) -> bool:
    """Whether `node` calls the qgraph function `name`."""
    return node is not None and node.domain == DOMAIN and node.op_type == name


def grid_values(model: ir.Model, grid: TokenGrid) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Step, zero point and floor of a grid as initializers, shared by all calls with that grid."""
    step, zero, floor = (
        shared_constant(model, f"qgraph/token_{name}_{grid.zero}", value)
        for name, value in (
            ("step", grid.step),
            ("zero", np.uint8(grid.zero)),
            ("floor", grid.floor),
        )
    )
    return step, zero, floor


def round_per_token(model: ir.Model, anchor: ir.Node, value: ir.Value, grid: TokenGrid) -> ir.Value:
    """`value` rounded to uint8 with a scale for each token, before `anchor`."""
    declare(model, QUANTIZE_PER_TOKEN)
    declare(model, DEQUANTIZE_PER_TOKEN)
    step, zero, floor = grid_values(model, grid)
    q = insert(
        model, anchor, QUANTIZE_PER_TOKEN, [value, step, zero, floor],
        base=f"{value.name}_q", domain=DOMAIN, outputs=2,
    )  # fmt: skip
    typed(q, ir.DataType.UINT8, value.shape)
    q.outputs[1].type = ir.TensorType(ir.DataType.FLOAT)
    dq = insert(
        model, anchor, DEQUANTIZE_PER_TOKEN, [*q.outputs, step, zero],
        base=f"{value.name}_dq", domain=DOMAIN,
    )  # fmt: skip
    return typed(dq, ir.DataType.FLOAT, value.shape)


def round_in_blocks(model: ir.Model, anchor: ir.Node, value: ir.Value, size: int) -> ir.Value:
    """`value` rounded to int8 with a scale for each block of each token, before `anchor`."""
    declare(model, ROUND_IN_BLOCKS)
    block = shared_constant(model, f"qgraph/block_{size}", np.array([-1, size], np.int64))
    step, _, floor = grid_values(model, SYMMETRIC_GRID)
    rounded = insert(
        model, anchor, ROUND_IN_BLOCKS, [value, block, step, floor],
        base=f"{value.name}_rounded", domain=DOMAIN,
    )  # fmt: skip
    return typed(rounded, ir.DataType.FLOAT, value.shape)
