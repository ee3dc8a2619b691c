"""Residual norms taken apart where onnxruntime's fused kernel is slower than its two parts."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.graph.editing import insert, redirect, replace, typed
from qgraph.graph.reading import MICROSOFT, constant, is_op, nodes, producer
from qgraph.graph.sites import only_user


def part_norms(model: ir.Model) -> bool:
    """Keep onnxruntime from fusing Add and LayerNormalization into SkipLayerNormalization.

    That kernel is scalar on CPU and takes several times as long as its parts (its rewrite rules
    look for Add only, so Sum is left alone). A constant bias added just before joins the sum::

        y ── Add(bias) ── Add(residual) ── LayerNormalization
        y ── Sum(bias, residual) ── LayerNormalization
    """
    changed = False
    for node in nodes(model):
        total = producer(node, 0)
        if not is_op(node, "LayerNormalization") or total is None or not is_op(total, "Add"):
            continue
        if any(value is None or value.dtype != ir.DataType.FLOAT for value in total.inputs):
            continue
        terms = [term for value in total.inputs for term in _terms(value)]
        joined = insert(model, total, "Sum", terms, base=f"{total.outputs[0].name}_sum")
        replace(total, joined.outputs[0])
        changed = True
    return changed


def _terms(value: ir.Value | None) -> list[ir.Value]:
    """A summand, or bias and product where it is an Add of a constant that nothing else reads."""
    assert value is not None
    node = value.producer()
    if node is None or not is_op(node, "Add") or only_user(value) is None:
        return [value]
    if not any(constant(v) is not None for v in node.inputs):
        return [value]
    return [v for v in node.inputs if v is not None]


def part_rms_norms(model: ir.Model) -> bool:
    """SkipSimplifiedLayerNormalization as Sum and SimplifiedLayerNormalization::

    x, skip ── SkipSimplifiedLayerNormalization ── y, sum
    x, skip ── Sum ── sum ── SimplifiedLayerNormalization ── y
    """
    changed = False
    for node in nodes(model):
        if not is_op(node, "SkipSimplifiedLayerNormalization", domain=MICROSOFT):
            continue
        x, skip, gamma, bias = (*node.inputs, None)[:4]
        if x is None or skip is None or x.dtype != ir.DataType.FLOAT:
            continue
        if any(tuple(o.uses()) or o.is_graph_output() for o in node.outputs[1:3]):
            continue
        terms = [x, skip] if bias is None else [x, skip, bias]
        total = insert(model, node, "Sum", terms, base=f"{node.outputs[0].name}_sum")
        typed(total, x.dtype, x.shape)
        epsilon = node.attributes.get("epsilon")
        attributes = {"epsilon": epsilon.as_float() if epsilon else 1e-12, "axis": -1}
        norm = insert(
            model, node, "SimplifiedLayerNormalization", [total.outputs[0], gamma],
            base=f"{node.outputs[0].name}_norm", attributes=attributes,
        )  # fmt: skip
        if len(node.outputs) > 3:
            redirect(node.outputs[3], total.outputs[0])
        replace(node, norm.outputs[0])
        changed = True
    return changed
