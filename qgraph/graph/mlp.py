"""Which products make up a transformer's MLPs: found by dataflow, never by names."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qgraph.graph.ops import ACTIVATIONS, ARITHMETIC, COPIES, FUSED_ACTIVATIONS
from qgraph.graph.reading import MICROSOFT, constant, is_op
from qgraph.graph.sites import Site, site_of


def in_mlp(site: Site) -> bool:
    """Whether `site` is a product before or after an activation function, in the same MLP.

    An MLP ends in a product whose data comes from products alone, through elementwise operators
    and at least one activation function::

        MatMul ── Gelu ── MatMul            MatMul ── Sigmoid ── Mul ── Mul ── MatMul
                                               └──────────────────┘      │
                                            MatMul ──────────────────────┘

    Normalization, softmax and attention are none of these operators, so what comes from them ends
    no MLP, gated or not.
    """
    if not _is_product(site.node):
        return False
    return bool(_feeding(site.node)) or any(
        site.node in _feeding(later) for later in _reached(site.node)
    )


def ends_mlp(site: Site) -> bool:
    """Whether `site` is the last product of an MLP: its data comes from an activation function."""
    return _is_product(site.node) and bool(_feeding(site.node))


def _is_product(node: ir.Node) -> bool:
    site = site_of(node)
    return site is not None and site.is_product


def _activates(node: ir.Node) -> bool:
    return is_op(node, *ACTIVATIONS) or is_op(node, *FUSED_ACTIVATIONS, domain=MICROSOFT)


def _passes_on(node: ir.Node) -> bool:
    return _activates(node) or is_op(node, *ARITHMETIC, *COPIES, "Cast")


def _feeding(product: ir.Node) -> set[ir.Node]:
    """The products whose results become the data of `product`; none if it ends no MLP."""
    site = site_of(product)
    assert site is not None
    feeding: set[ir.Node] = set()
    seen: set[ir.Node] = set()
    activated, stack = False, [site.x]
    while stack:
        value = stack.pop()
        node = value.producer()
        if node in seen or constant(value) is not None:
            continue
        if node is None:
            return set()
        seen.add(node)
        if _is_product(node):
            feeding.add(node)
        elif _passes_on(node):
            activated |= _activates(node)
            stack += [v for v in _data(node) if v is not None]
        else:
            return set()
    return feeding if activated else set()


def _data(node: ir.Node) -> Iterator[ir.Value | None]:
    """The inputs that carry values; those of moves beside the first tell where to."""
    yield from node.inputs[:1] if is_op(node, *COPIES, "Clip", "Cast") else node.inputs


def _reached(product: ir.Node) -> set[ir.Node]:
    """The products that read the result of `product` through elementwise operators."""
    reached: set[ir.Node] = set()
    seen: set[ir.Node] = set()
    stack = [product]
    while stack:
        for output in stack.pop().outputs:
            for user in output.consumers():
                if user in seen:
                    continue
                seen.add(user)
                if _is_product(user):
                    reached.add(user)
                elif _passes_on(user):
                    stack.append(user)
    return reached
