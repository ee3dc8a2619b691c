"""Even out the columns of embedding tables before their rows are quantized."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qgraph.graph.annotation import (
    Stage,
    annotated_weight_spec,
    is_annotated,
    move_annotations,
    set_use_spec,
    set_use_specs,
    weight_spec,
)
from qgraph.graph.editing import add_constant, derived, insert, redirect, remove_dead, typed
from qgraph.graph.reading import constant, constant_array, constant_tensor, dims, release
from qgraph.graph.sites import Site, sites
from qgraph.numerics.spec import PerAxis, PerBlock
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass

ROWS = 256
"""Rows of a table read at a time."""
ROUNDING = 1e-6
"""Relative error of a weight that was scaled in float32, a few times over."""

SMALLEST = np.finfo(np.float32).tiny
"""Below it, float32 has fewer digits."""


@dataclass(frozen=True)
class BalanceTables(Pass):
    """Divide the columns of an embedding table by their largest magnitude, and multiply afterwards.

    A few columns of a language model's embeddings are several times larger than the rest, and a
    row's scale is set by them. Scaling columns before and after the lookup costs one product on
    the few rows that were looked up::

        W ── Gather ── y                W / c ── Gather ── Mul(c) ── y

    On SmolLM2-135M the signal-to-noise ratio of int8 rows rises from 38.6 to 43.1 dB.

    Many models have one matrix for the embeddings and, transposed, for the product that ends them,
    whose input channels other passes may have scaled by then. Such a lookup reads the product's
    weight as it is now, so that one tensor of integers serves both; c undoes the scaling, and
    where there was none, there is no Mul::

        W ──────── Gather ── y          Wᵀ·s ── Gather(axis=1) ── Transpose ── Mul(1/s) ── y
        Wᵀ · s ─── MatMul                 └──── MatMul

    Whether W and the weight are tied is read from their numbers, since exporters write it in many
    ways, and passes may change one of them: every row must be the weight's, times one c for all.
    Only tables that are annotated for quantization are touched.

    Source: the scale migration of SmoothQuant (Xiao et al. 2022, eq. 3), with alpha = 0: the
    lookup's result takes all of the scale.
    """

    name: ClassVar[str] = "balance-tables"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})

    def run(self, model: ir.Model, context: Context) -> bool:
        changed = False
        for site in list(sites(model)):
            tensor = constant(site.weight)
            if site.kind != "gather" or not is_annotated(site.node) or tensor is None:
                continue
            if site.axis != 0 or len(tensor.shape) != 2 or tensor.dtype != ir.DataType.FLOAT:
                continue
            if self._tie(model, site, context):
                changed = True
            elif not isinstance(annotated_weight_spec(site).granularity, PerBlock):
                _balance(model, site, tensor)  # blocks follow the columns as they are
                changed = True
        if changed:
            remove_dead(model)
        return changed

    def _tie(self, model: ir.Model, site: Site, context: Context) -> bool:
        """Make the lookup read the weight of the product that the table is tied to, if any is."""
        for product in sites(model):
            if not _may_share(model, site, product):
                continue
            factors = _column_ratio(site, product)
            if factors is None:
                why = f"stored apart from '{product.name}', whose weight holds other numbers"
                self.remark(context, site, "declined", why)
                continue
            _share(model, site, product, factors)
            why = f"reads the weight of '{product.name}': stored once"
            self.remark(context, site, "applied", why)
            return True
        return False


def _balance(model: ir.Model, site: Site, tensor: ir.TensorProtocol) -> None:
    """Give the lookup a table of its own, its columns divided by their largest magnitude."""
    node, base = site.node, site.weight.name
    table = constant_array(site.weight)
    factors = column_factors(table)
    release(site.weight)
    balanced = derived(tensor, lambda w: w / factors)
    node.replace_input_with(site.w_index, add_constant(model, f"{base}_balanced", balanced))
    _append(model, node, "Mul", add_constant(model, f"{base}_columns", factors), base="columns")


def _may_share(model: ir.Model, table: Site, product: Site) -> bool:
    """Whether the table has the shape of the product's weight and is to become such integers."""
    weight, indices = product.weight, table.x
    if not product.is_product:
        return False
    if model.graph.initializers.get(weight.name or "") is not weight:  # of a body: out of sight
        return False
    if weight.dtype != ir.DataType.FLOAT or product.kn[::-1] != tuple(dims(table.weight)):
        return False
    of_table = annotated_weight_spec(table)
    spec = weight_spec(product)
    if spec is None or indices.shape is None:
        return False
    if isinstance(of_table.granularity, PerBlock):
        blocks = PerBlock(1 - product.axis, of_table.granularity.size)
        return spec == of_table.with_(granularity=blocks)
    if of_table.granularity != PerAxis(table.axis):
        return False
    if isinstance(spec.granularity, PerBlock):  # finer than the table asks for
        return not spec.codebook and spec.with_(granularity=of_table.granularity) == of_table
    return spec == of_table.with_(granularity=PerAxis(product.axis))


def _column_ratio(table: Site, product: Site) -> np.ndarray | None:
    rows, weight = constant_array(table.weight), constant_array(product.weight)
    factors = column_ratio(rows, weight if product.axis == 0 else weight.T)
    del rows, weight
    release(table.weight)
    release(product.weight)
    return factors


def _share(model: ir.Model, site: Site, product: Site, factors: np.ndarray) -> None:
    """Make the lookup read columns of the product's weight, turned into rows and scaled back."""
    if product.axis == 0:
        product = _without_trans_b(model, product)
    node, result, base = site.node, site.node.outputs[0], site.weight.name
    indices = list(site.x.shape or ())
    node.replace_input_with(site.w_index, product.weight)
    node.attributes["axis"] = ir.AttrInt64("axis", 1)
    set_use_specs(node, {site.w_index: annotated_weight_spec(product)})
    turn = _append(model, node, "Transpose", base="rows", perm=[*range(1, len(indices) + 1), 0])
    result.shape = ir.Shape([product.kn[0], *indices])
    if (factors != 1).any():
        _append(model, turn, "Mul", add_constant(model, f"{base}_columns", factors), base="columns")


def _without_trans_b(model: ir.Model, product: Site) -> Site:
    """A Gemm with its weight as (K, N), which is what integer kernels take."""
    node, index, tensor = product.node, product.w_index, constant_tensor(product.weight)
    turned = derived(tensor, lambda w: w.T.copy(), product.kn)
    node.replace_input_with(index, add_constant(model, f"{product.weight.name}_T", turned))
    node.attributes.pop("transB")
    set_use_spec(node, index, annotated_weight_spec(product).with_(granularity=PerAxis(1)))
    return replace(product, axis=1)


def _append(
    model: ir.Model,
    node: ir.Node,
    op_type: str,
    *operands: ir.Value,
    base: str,
    **attributes: list[int],
) -> ir.Node:
    """Put an operator behind `node`, for all that read its result."""
    old = node.outputs[0]
    behind = insert(
        model, node, op_type, [old, *operands],
        base=f"{old.name}_{base}", attributes=attributes, after=True,
    )  # fmt: skip
    new = typed(behind, old.dtype, old.shape)
    redirect(old, new, keep=[behind])
    move_annotations(old, new)
    return behind


def column_factors(table: np.ndarray) -> np.ndarray:
    """Largest magnitude of each column, 1 for columns of zeros.

    Args:
        table: float (rows, columns); read in slices, so that it may be memory-mapped.

    Returns:
        float32 (columns,).
    """
    largest = np.zeros(table.shape[1], np.float32)
    for start in range(0, table.shape[0], ROWS):
        part = table[start : start + ROWS]
        np.maximum(largest, np.maximum(part.max(axis=0), -part.min(axis=0)), out=largest)
    return np.where(largest > 0, largest, np.float32(1)).astype(np.float32)


def column_ratio(table: np.ndarray, weight: np.ndarray) -> np.ndarray | None:
    """The positive factors c with `table = weight * c`, column by column.

    Args:
        table: float32 (rows, columns); read in slices, so that it may be memory-mapped.
        weight: the same.

    Returns:
        float32 (columns,), 1 for columns of zeros; None unless they explain every element but for
        :data:`ROUNDING`.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite explains nothing
        factors: np.ndarray = column_factors(table) / column_factors(weight)
        for start in range(0, table.shape[0], ROWS):
            part = table[start : start + ROWS]
            error = np.abs(weight[start : start + ROWS] * factors - part)
            if not (error <= ROUNDING * np.abs(part) + SMALLEST).all():
                return None
    return factors
