"""Where the weights meet the data: linear sites found by dataflow, never by names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.graph.ops import CLAMPS, FLOATS, RECURRENT
from qgraph.graph.reading import attribute, constant, dims, input_of, is_op, node_name, nodes

SiteKind = Literal["matmul", "gemm", "conv", "conv_transpose", "gather", "rnn", "activations"]
PRODUCTS: tuple[SiteKind, ...] = ("matmul", "gemm")
CONVOLUTIONS: tuple[SiteKind, ...] = ("conv", "conv_transpose")


@dataclass(frozen=True, eq=False)
class Site:
    """One operator whose weight (or second operand) can be quantized.

    Attributes:
        node: the operator.
        kind: `activations` is a MatMul of two computed values, all others have a constant weight.
        x_index: input that carries the data.
        w_index: input that carries the weight.
        axis: output-channel axis of the weight: one scale for each index of it keeps the product
            linear. MatMul and Gemm (K, N) -> 1, Gemm with transB (N, K) -> 0, Conv (N, C/g, ...)
            -> 0, ConvTranspose (C, N/g, ...) -> 1 for one group (with several groups an index of
            axis 1 belongs to a channel of every group, which is still linear), Gather -> the axis
            that is gathered, so that rows keep their own scale.
        bias_index: input that carries the bias, or None.
    """

    node: ir.Node
    kind: SiteKind
    x_index: int
    w_index: int
    axis: int
    bias_index: int | None = None

    @property
    def is_product(self) -> bool:
        """Whether the node multiplies matrices, of which the second is constant."""
        return self.kind in PRODUCTS

    @property
    def is_convolution(self) -> bool:
        """Whether the node is a convolution, transposed or not."""
        return self.kind in CONVOLUTIONS

    @property
    def name(self) -> str:
        """The node's name: how remarks call the site."""
        return node_name(self.node)

    @property
    def x(self) -> ir.Value:
        """The data input."""
        return input_of(self.node, self.x_index)

    @property
    def weight(self) -> ir.Value:
        """The weight input."""
        return input_of(self.node, self.w_index)

    @property
    def bias(self) -> ir.Value | None:
        """The bias input, if the node has one."""
        if self.bias_index is None or self.bias_index >= len(self.node.inputs):
            return None
        return self.node.inputs[self.bias_index]

    @property
    def kn(self) -> tuple[int, int]:
        """(K, N): length of the dot products and number of output channels, 0 where unknown."""
        shape = [d or 0 for d in dims(self.weight)]
        if not shape:
            return 0, 0
        n = shape[self.axis]
        count = 1
        for d in shape:
            count *= d
        return (count // n if n else 0), n


def site_of(node: ir.Node) -> Site | None:
    """The site at `node`, or None if it is not an operator with a floating-point weight."""
    if is_op(node, "MatMul"):
        return _matmul(node)
    if is_op(node, "Gemm"):
        if not _float_weight(node, 1) or attribute(node, "transA", 0):
            return None
        return Site(node, "gemm", 0, 1, 0 if attribute(node, "transB", 0) else 1, 2)
    if is_op(node, "Conv") and _float_weight(node, 1):
        return Site(node, "conv", 0, 1, 0, 2)
    if is_op(node, "ConvTranspose") and _float_weight(node, 1):
        return Site(node, "conv_transpose", 0, 1, 1, 2)
    if is_op(node, "Gather") and _float_weight(node, 0) and len(dims(node.inputs[0])) >= 2:
        return Site(
            node, "gather", 1, 0, int(attribute(node, "axis", 0)) % len(dims(node.inputs[0]))
        )
    if is_op(node, *RECURRENT) and _float_weight(node, 1) and _float_weight(node, 2):
        return Site(node, "rnn", 0, 1, 1, 3)
    return None


def _matmul(node: ir.Node) -> Site | None:
    left, right = node.inputs[0], node.inputs[1]
    if _float_weight(node, 1) and len(dims(right)) == 2:
        return Site(node, "matmul", 0, 1, 1)
    if left is not None and right is not None and left.dtype in FLOATS:
        return Site(node, "activations", 0, 1, 1)
    return None


def _float_weight(node: ir.Node, index: int) -> bool:
    if index >= len(node.inputs):
        return False
    tensor = constant(node.inputs[index])
    return tensor is not None and tensor.dtype in FLOATS and tensor.size > 0


def sites(model: ir.Model) -> Iterator[Site]:
    """Every site of the model, control-flow bodies included, in graph order."""
    for node in nodes(model):
        if (site := site_of(node)) is not None:
            yield site


def nested(model: ir.Model, node: ir.Node) -> bool:
    """Whether `node` sits in a body of If, Loop, Scan or a function, where no observer can look."""
    return node.graph is not model.graph


def only_user(value: ir.Value) -> ir.Node | None:
    """The node that alone reads `value`, in the same graph; None for a graph output."""
    uses = tuple(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    user, producer = uses[0].node, value.producer()
    return user if producer is not None and user.graph is producer.graph else None


def output_value(node: ir.Node) -> ir.Value:
    """Where the node's result is quantized: behind an activation that integer clamps absorb."""
    value = node.outputs[0]
    while (user := only_user(value)) is not None and is_op(user, *CLAMPS):
        if user.inputs[0] is not value:
            break
        value = user.outputs[0]
    return value


def bias_use(site: Site) -> tuple[ir.Node, int] | None:
    """Where the site's bias is, or would be, read: (node, input index).

    That is the node itself, or for a MatMul the Add of a constant that alone reads its result, or
    None where there is no such Add.
    """
    if site.bias_index is not None:
        return site.node, site.bias_index
    result = site.node.outputs[0]
    user = only_user(result)
    if site.kind != "matmul" or user is None or not is_op(user, "Add"):
        return None
    index = 1 if user.inputs[0] is result else 0
    return (user, index) if constant(user.inputs[index]) is not None else None


def by_input_channel(site: Site, w: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """The weight of a Conv, MatMul or Gemm as (groups, outputs, inputs, taps), a view of `w`.

    Data channel g · inputs + i meets `[g, :, i]`, output channel g · outputs + o is `[g, o]`. A
    depthwise convolution has one input for each group, a matrix one group and one tap.

    Args:
        w: contiguous array of the weight's shape.
    """
    if site.kind == "conv":
        groups = int(attribute(site.node, "group", 1))
        return w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)
    return (w if site.axis == 0 else w.T)[np.newaxis, :, :, np.newaxis]


def reduction_rows(q: np.ndarray, site: Site) -> np.ndarray:
    """The weight as (K, N), K in the order in which kernels add products; a view if possible."""
    if site.kind == "conv":
        # onnxruntime convolves with the channels last: kernel position first, then channel.
        order = (*range(2, q.ndim), 1, 0)
        return q.transpose(order).reshape(-1, q.shape[0])
    return q.T if site.axis == 0 else q
