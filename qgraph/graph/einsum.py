"""Einsum with a constant operand, as the product of matrices that it mostly is."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from qgraph.graph.builder import Builder
from qgraph.graph.editing import derived_constant, insert, replace, shared_constant, typed
from qgraph.graph.ops import FLOATS
from qgraph.graph.reading import constant, constant_tensor, dims, input_of, is_op, node_name


@dataclass(frozen=True)
class Product:
    """An Einsum of two operands whose axes are those of a product of matrices.

    Attributes:
        w_index: which operand is constant.
        data, weight, result: the axes of each, by letter.
        lead: axes of data and result that stand before those of `batch`.
        batch: axes of all three.
        rows: the other axes of data and result.
        inner: axes of both operands that are summed over.
        columns: axes of weight and result.
    """

    w_index: int
    data: str
    weight: str
    result: str
    lead: str
    batch: str
    rows: str
    inner: str
    columns: str


def product_of(node: ir.Node) -> Product | str:
    """How an Einsum is a product with a constant matrix, or why it is none."""
    constants = [i for i, value in enumerate(node.inputs) if constant(value) is not None]
    if not constants:
        return "all operands are computed: it has no weight"
    if len(node.inputs) != 2:
        return f"an Einsum of {len(node.inputs)} operands is no product of two matrices"
    w_index = constants[0]
    values = [input_of(node, 0), input_of(node, 1)]
    tensor = constant_tensor(values[w_index])
    if tensor.dtype not in FLOATS or not tensor.size:
        return "its weight is empty or not floating-point"
    if any(value.shape is None for value in values):
        return "its data has no shape"
    terms = _terms(node.attributes["equation"].as_string(), [len(dims(v)) for v in values])
    if terms is None or any(len(set(term)) < len(term) for term in terms):
        return "it takes a diagonal"
    *operands, result = terms
    data, weight = operands[1 - w_index], operands[w_index]
    sizes = [
        dict(zip(term, dims(v), strict=True)) for term, v in zip(operands, values, strict=True)
    ]
    if any(sizes[0][axis] != sizes[1][axis] or not sizes[0][axis] for axis in {*data} & {*weight}):
        return "the sizes of the axes that its operands share are not known to be equal"
    if lost := ({*data} ^ {*weight}) - {*result}:
        return f"it sums axis '{min(lost)}', which only one of its operands has"
    inner = "".join(axis for axis in weight if axis in data and axis not in result)
    if not inner:
        return "it multiplies without summing"
    batch = "".join(axis for axis in data if axis in weight and axis in result)
    rows = "".join(axis for axis in data if axis not in weight)
    before = data[: data.index(batch[0])] if batch else ""
    lead = before if {*before} < {*rows} else ""
    return Product(
        w_index, data, weight, result, lead, batch, rows.removeprefix(lead), inner,
        columns="".join(axis for axis in result if axis in weight and axis not in data),
    )  # fmt: skip


def _terms(equation: str, ranks: Sequence[int]) -> list[str] | None:
    """A term of single letters for each operand and for the result, without ellipses."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    dots = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    if any(count < 0 for count in dots) or len(free) < max(dots):
        return None
    if any(count and "..." not in term for count, term in zip(dots, terms, strict=True)):
        return None
    hidden = "".join(free[: max(dots)])
    if not arrow:
        counts = Counter(left.replace("...", "").replace(",", ""))
        right = "..." + "".join(sorted(letter for letter, n in counts.items() if n == 1))
    terms = [
        term.replace("...", hidden[len(hidden) - count :])
        for term, count in zip(terms, dots, strict=True)
    ]
    return [*terms, right.replace("...", hidden)]


def plain_einsum(model: ir.Model, node: ir.Node) -> bool:
    """Put a MatMul, and what brings its axes in order, in the place of an Einsum that is one.

    ::

        Einsum <"bte,ehd->bthd"> (x, w)      MatMul (x, w') -> Reshape
        Einsum <"bthd,hde->bte"> (x, w)      Reshape -> MatMul (.., w')
        Einsum <"bhte,hed->bhtd"> (x, w)     MatMul (x, w), a batch of constant matrices
    """
    if not is_op(node, "Einsum") or isinstance(p := product_of(node), str):
        return False
    x, weight = input_of(node, 1 - p.w_index), constant_tensor(node.inputs[p.w_index])
    sizes = dict(zip(p.weight, weight.shape.numpy(), strict=True))
    inner, columns = ([sizes[axis] for axis in axes] for axes in (p.inner, p.columns))
    outer = p.lead + p.batch + p.rows
    same = [0] * len(outer)  # as they are, whatever their sizes
    row = [1] if p.batch and not p.rows else []  # a batch of vectors: matrices of one row

    x = _transposed(model, node, x, p.data, outer + p.inner)
    if row or len(inner) != 1:
        x = _reshaped(model, node, x, [*same, *row, prod(inner)])
    base = f"{node_name(node)}_MatMul"
    product = insert(model, node, "MatMul", [x, _matrix(model, node, p)], base=base)
    product.metadata_props.update(node.metadata_props)
    y = typed(product, x.dtype, None)
    if row or len(columns) != 1:
        y = _reshaped(model, node, y, [*same, *columns])
    y = _transposed(model, node, y, outer + p.columns, p.result)
    replace(node, y, takes_name=False)
    product.name = node.name
    return True


def _transposed(model: ir.Model, anchor: ir.Node, x: ir.Value, old: str, new: str) -> ir.Value:
    if old == new:
        return x
    order = [old.index(axis) for axis in new]
    return _build(model, anchor).op("Transpose", x, dtype=x.dtype, perm=order)


def _reshaped(model: ir.Model, anchor: ir.Node, x: ir.Value, shape: list[int]) -> ir.Value:
    sizes = shared_constant(model, f"{node_name(anchor)}_shape", np.array(shape, np.int64))
    return _build(model, anchor).op("Reshape", x, sizes, dtype=x.dtype)


def _build(model: ir.Model, anchor: ir.Node) -> Builder:
    return Builder(model, anchor, f"{node_name(anchor)}_")


def _matrix(model: ir.Model, node: ir.Node, p: Product) -> ir.Value:
    """The weight as (batch, 1, ..., inner, columns), one 1 for each axis of rows but one."""
    value = input_of(node, p.w_index)
    old = constant_tensor(value).shape.numpy()
    order = [p.weight.index(axis) for axis in p.batch + p.inner + p.columns]
    sizes = dict(zip(p.weight, old, strict=True))
    between = [1] * (len(p.rows) - 1) if p.batch else []
    ends = [prod(sizes[axis] for axis in axes) for axes in (p.inner, p.columns)]
    shape = [*(sizes[axis] for axis in p.batch), *between, *ends]
    if order == sorted(order) and shape == [*old]:
        return value
    return derived_constant(
        model, value, "matrix", lambda w: w.transpose(order).reshape(shape), shape
    )
