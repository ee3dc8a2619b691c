"""What ONNX operators are in torch: one table, and the functions it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qgraph.graph.reading import MICROSOFT
from qgraph.torch.ops import (
    activations,
    arithmetic,
    attention,
    contrib_attention,
    convolution,
    images,
    indexing,
    normalization,
    packed,
    quantized,
    recurrent,
    reductions,
    shapes,
    signal,
)

OPERATORS: Mapping[tuple[str, str], Callable[..., Any]] = {
    (domain, name): function
    for domain, table in (
        ("", activations.OPERATORS),
        ("", arithmetic.OPERATORS),
        ("", attention.OPERATORS),
        ("", convolution.OPERATORS),
        ("", images.OPERATORS),
        ("", indexing.OPERATORS),
        ("", normalization.OPERATORS),
        ("", quantized.OPERATORS),
        ("", recurrent.OPERATORS),
        ("", reductions.OPERATORS),
        ("", shapes.OPERATORS),
        ("", signal.OPERATORS),
        (MICROSOFT, activations.MICROSOFT),
        (MICROSOFT, arithmetic.MICROSOFT),
        (MICROSOFT, contrib_attention.MICROSOFT),
        (MICROSOFT, normalization.MICROSOFT),
        (MICROSOFT, packed.MICROSOFT),
        (MICROSOFT, quantized.MICROSOFT),
    )
    for name, function in table.items()
}
"""The function of each operator by domain ("" is ONNX's own) and name."""
