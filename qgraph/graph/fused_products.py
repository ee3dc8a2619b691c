"""Products that onnxruntime has fused with what is around them: taken apart, or why not.

onnxruntime fuses the parts again where they stay float; quantized, a product is worth more alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from qgraph.graph.editing import (
    Attribute,
    derived_constant,
    insert,
    replace,
    shared_constant,
    typed,
)
from qgraph.graph.ops import FLOATS
from qgraph.graph.reading import (
    MICROSOFT,
    attribute,
    constant,
    constant_tensor,
    dims,
    input_of,
    is_op,
    node_name,
    opset,
)

_SCALED = ("FusedMatMul", "TransposeMatMul")
_BLOCKED = "com.microsoft.nchwc"
_PARAMETERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Relu": (),
        "Sigmoid": (),
        "Softplus": (),
        "Softsign": (),
        "Tanh": (),
        "Elu": ("alpha",),
        "LeakyRelu": ("alpha",),
        "ThresholdedRelu": ("alpha",),
        "HardSigmoid": ("alpha", "beta"),
        "Selu": ("alpha", "gamma"),
    }
)
"""Activation functions that are fused into products, and their attributes; Clip has inputs."""
_CLIP_HAS_INPUTS, _SPLIT_HAS_INPUTS = 11, 13
"""Versions of the standard operators."""
_MASKED = 2
"""Rank of a mask that both kinds of attention read alike."""

_REASONS: Mapping[str, str] = MappingProxyType({
    "Attention": "its projections lie in a fused attention that keeps a past or a mask of its own",
    "CausalConvWithState": "a depthwise convolution with its state, which has no integer kernel",
    "DecoderMaskedSelfAttention": "its projections lie inside a fused attention with its past",
    "LongformerAttention": "its projections lie inside a fused attention, which is left as it is",
    "MoE": "the weights of its experts lie inside one fused operator, which is left as it is",
    "PackedAttention": "its projections lie inside a fused attention, which is left as it is",
    "QMoE": "its experts came quantized, and are left as they are",
})  # fmt: skip
_UNKNOWN = "it is fused with a function that has no operator of its own"
_QUANTIZED = (
    "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul",
)  # fmt: skip
_QUANTIZED_BY_MICROSOFT = (
    "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "MatMulBnb4", "MatMulFpQ4", "MatMulInteger16",
    "MatMulIntegerToFloat", "MatMulNBits", "QAttention", "QGemm", "QLinearConv",
)  # fmt: skip


def why_fused(node: ir.Node) -> str | None:
    """Why a linear operator that is no site by its kind stays as it is; None for others."""
    if is_op(node, *_QUANTIZED) or is_op(node, *_QUANTIZED_BY_MICROSOFT, domain=MICROSOFT):
        return "it came quantized, and is left as it is"
    if is_op(node, "Conv", domain=_BLOCKED):
        return "onnxruntime laid it out for one machine: give the model that it was optimized from"
    if is_op(node, *_SCALED, domain=MICROSOFT):
        return _why_scaled(node)
    if is_op(node, "FusedConv", "FusedGemm", domain=MICROSOFT):
        return _UNKNOWN
    return _REASONS.get(node.op_type) if node.domain == MICROSOFT else None


def take_apart(model: ir.Model, node: ir.Node) -> bool:
    """Put the parts of a fused product in its place.

    ::

        FusedMatMul <alpha, transB> (x, w)         MatMul (x, alpha·wᵀ)
        FusedGemm <activation> (x, w, b)           Gemm -> activation
        FusedConv <activation> (x, w, b, z)        Conv -> Add (z) -> activation
        Attention (x, w, b, mask)                  MatMul -> Add -> Split -> MultiHeadAttention
    """
    if is_op(node, *_SCALED, domain=MICROSOFT) and _why_scaled(node) is None:
        _scaled(model, node)
    elif is_op(node, "FusedGemm", domain=MICROSOFT) and _known_activation(node):
        _activated(model, node, "Gemm")
    elif is_op(node, "FusedConv", domain=MICROSOFT) and _known_activation(node):
        _activated(model, node, "Conv")
    elif is_op(node, "Attention", domain=MICROSOFT) and _plain_attention(node):
        _attention(model, node)
    else:
        return False
    return True


def _op(
    model: ir.Model,
    anchor: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Attribute] | None = None,
    domain: str = "",
) -> ir.Value:
    """What a part of `anchor` computes; its results are all of one type."""
    base = f"{node_name(anchor)}_{op_type}"
    node = insert(model, anchor, op_type, inputs, base=base, attributes=attributes, domain=domain)
    return typed(node, anchor.outputs[0].dtype, None)


def _finish(node: ir.Node, product: ir.Value, result: ir.Value) -> None:
    """Put `result` in the place of what `node` computed; the product has its name from now on."""
    last = product.producer()
    assert last is not None
    last.metadata_props.update(node.metadata_props)
    replace(node, result, takes_name=False)
    last.name = node.name


# --------------------------------------------------------------------------------- FusedMatMul


def _why_scaled(node: ir.Node) -> str | None:
    """Why a FusedMatMul is no plain MatMul with a constant weight; None if it is one."""
    tensor = constant(node.inputs[1])
    if tensor is None:
        return "both operands are computed: it has no weight"
    if tensor.dtype not in FLOATS or len(tensor.shape) < 2:
        return "its weight is no matrix of floating-point numbers"
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        return "it moves the batch axis of an operand"
    if attribute(node, "transA", 0) and len(dims(node.inputs[0])) < 2:
        return "its data, which it transposes, has no shape"
    if attribute(node, "alpha", 1.0) != 1 and tensor.dtype not in FLOATS[::3]:
        return "its weight times alpha may overflow"
    return None


def _scaled(model: ir.Model, node: ir.Node) -> None:
    x, weight = input_of(node, 0), input_of(node, 1)
    tensor, alpha = constant_tensor(weight), attribute(node, "alpha", 1.0)
    turned = bool(attribute(node, "transB", 0))
    if attribute(node, "transA", 0):
        *batch, rows, inner = range(len(dims(x)))
        x = _op(model, node, "Transpose", [x], {"perm": [*batch, inner, rows]})
    if alpha != 1 or turned:
        shape = tensor.shape.numpy()
        shape = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
        weight = derived_constant(
            model, weight, "scaled", lambda w: alpha * (w.swapaxes(-1, -2) if turned else w), shape
        )
    y = _op(model, node, "MatMul", [x, weight])
    _finish(node, y, y)


# ----------------------------------------------------------------------- FusedGemm and FusedConv


def _known_activation(node: ir.Node) -> bool:
    return _activation(node) in ("", "Clip", *_PARAMETERS)


def _activation(node: ir.Node) -> str:
    activation = node.attributes.get("activation")
    return "" if activation is None else activation.as_string()


def _activated(model: ir.Model, node: ir.Node, op_type: str) -> None:
    own = {k: v for k, v in node.attributes.items() if not k.startswith("activation")}
    product = y = _op(model, node, op_type, node.inputs[:3], own)
    if op_type == "Conv" and len(node.inputs) > 3 and node.inputs[3] is not None:
        y = _op(model, node, "Add", [y, node.inputs[3]])
    activation = _activation(node)
    listed = node.attributes.get("activation_params")  # of FusedConv
    numbers = [] if listed is None else [*listed.as_floats()]
    if activation == "Clip":
        y = _clipped(model, node, y, numbers)
    elif activation:
        parameters = _PARAMETERS[activation]
        named: dict[str, Attribute] = dict(zip(parameters, numbers, strict=False))
        for name in parameters:  # of FusedGemm
            if (parameter := node.attributes.get(f"activation_{name}")) is not None:
                named[name] = parameter.as_float()
        y = _op(model, node, activation, [y], named)
    _finish(node, product, y)


def _clipped(model: ir.Model, node: ir.Node, y: ir.Value, bounds: list[float]) -> ir.Value:
    if opset(model) < _CLIP_HAS_INPUTS:
        return _op(model, node, "Clip", [y], {"min": bounds[0], "max": bounds[1]})
    dtype = (y.dtype or ir.DataType.FLOAT).numpy()
    low, high = (
        shared_constant(model, f"{node_name(node)}_bound", np.array(bound, dtype))
        for bound in bounds
    )
    return _op(model, node, "Clip", [y, low, high])


# ----------------------------------------------------------------------------------- Attention


def _plain_attention(node: ir.Node) -> bool:
    """Whether a fused attention has no past, no rotation, and a mask that the parts know, too."""
    inputs = [*node.inputs, *[None] * 6]
    weight, mask = constant(inputs[1]), inputs[3]
    return (
        weight is not None
        and weight.dtype in FLOATS
        and inputs[4] is None
        and (mask is None or len(dims(mask)) == _MASKED)
        and not any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
        and not attribute(node, "do_rotary", 0)
    )


def _attention(model: ir.Model, node: ir.Node) -> None:
    x, weight, *others = node.inputs
    bias, mask, _, added = [*others, None, None, None, None][:4]
    width = constant_tensor(weight).shape.numpy()[-1]
    listed = node.attributes.get("qkv_hidden_sizes")
    sizes = [width // 3] * 3 if listed is None else [*listed.as_ints()]
    product = y = _op(model, node, "MatMul", [x, weight])
    if bias is not None:
        y = _op(model, node, "Add", [y, bias])
    q, k, v = _pieces(model, node, y, sizes)
    shared = ("mask_filter_value", "num_heads", "scale", "unidirectional")
    own = {key: node.attributes[key] for key in shared if key in node.attributes}
    y = _op(model, node, "MultiHeadAttention", [q, k, v, None, mask, added], own, MICROSOFT)
    _finish(node, product, y)


def _pieces(
    model: ir.Model, node: ir.Node, y: ir.Value, sizes: Sequence[int]
) -> Sequence[ir.Value]:
    """`y` split along its last axis."""
    inputs: list[ir.Value] = [y]
    attributes: dict[str, Attribute] = {"axis": -1}
    if opset(model) < _SPLIT_HAS_INPUTS:
        attributes["split"] = [*sizes]
    else:
        name = f"{node_name(node)}_sizes"
        inputs.append(shared_constant(model, name, np.array(sizes, np.int64)))
    base = f"{node_name(node)}_Split"
    split = insert(
        model, node, "Split", inputs, base=base, attributes=attributes, outputs=len(sizes)
    )
    for value in split.outputs:
        value.type = y.type
    return split.outputs
