"""What the target `cuda` takes, and what it makes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from qgraph.backends.cuda.lowering import lower_to_functions
from qgraph.backends.cuda.precision import narrow_products, without_casts
from qgraph.errors import ModelError, QGraphError
from qgraph.graph.ops import lowest_value
from qgraph.graph.sites import Site
from qgraph.io.session import open_session
from qgraph.numerics.spec import PerAxis, PerBlock, PerToken, QuantSpec
from qgraph.numerics.tokens import token_grid
from qgraph.pipeline.target import TARGET, Verdict

if TYPE_CHECKING:
    import torch

    from qgraph.backends.cuda.apply import Applied

_ELSEWHERE = {
    "conv": "convolutions have no int8 kernel here: target cpu has them, with recipe static",
    "conv_transpose": "convolutions have no int8 kernel here: target cpu has them",
    "gather": "tables stay float here: targets cpu and onnx keep them in int8",
    "rnn": "recurrent operators have no int8 kernel",
    "activations": "products of two computed values have no int8 kernel",
}
"""Why other kinds of sites stay float, and what takes them."""
PRECISIONS = {"cuda": None, "cuda:f16": ir.DataType.FLOAT16, "cuda:bf16": ir.DataType.BFLOAT16}
"""The targets, and the type in which each multiplies what stays float."""
FORMAT = "1"
_FORMAT = "qgraph.format"
"""Where a lowered model says so, in `metadata_props`."""
_BY_TOKEN = "recipes w8a8, smoothquant, llm-int8, zeroquant and dynamic give scales by token"


@dataclass(frozen=True)
class CudaTarget:
    """NVIDIA GPUs: products of int8 weights by channel and int8 activations by token.

    The lowered model is still one of ONNX, with calls of functions whose bodies are standard
    operators; what runs on a GPU is a torch module made of it.
    """

    name: str = "cuda"
    saturates: bool = False
    measured: bool = False
    half_floats: bool = True
    """Modules of Hugging Face take layers in their own type, often float16."""

    open_session = staticmethod(open_session)

    @property
    def precision(self) -> ir.DataType | None:
        """Type of the float products that are left; None: the model's own."""
        return PRECISIONS[self.name]

    @property
    def largest(self) -> float:
        """With some room below 65504, where float16 ends."""
        return 60000.0 if self.precision == ir.DataType.FLOAT16 else math.inf

    def supports(self, site: Site, activation: QuantSpec | None, weight: QuantSpec) -> Verdict:
        why = _lacking(site, activation, weight)
        return Verdict(why is None, why or "int8 kernels take it")

    def supports_glue(self, node: ir.Node) -> bool:
        return False

    def legalize(self, model: ir.Model) -> bool:
        lower_to_functions(model)
        if self.precision is not None:
            narrow_products(model, self.precision)
        model.metadata_props.update({TARGET: self.name, _FORMAT: FORMAT})
        return True

    def to_module(self, model: ir.Model) -> torch.nn.Module:
        if (found := model.metadata_props.get(_FORMAT)) != FORMAT:
            raise ModelError(
                f"the model is of format {found} of target cuda, and this qgraph reads {FORMAT}: "
                "compile it again"
            )
        from qgraph.backends.cuda.modules import Compiled, layers
        from qgraph.torch.ops.types import torch_dtype
        from qgraph.torch.to_module import raise_model  # which says it where torch is missing

        precision = None
        if self.precision is not None:
            precision, model = torch_dtype(self.precision), without_casts(model)
        raised = raise_model(model, layers(precision))
        return Compiled(raised, raised.graph, precision).eval().requires_grad_(False)

    def apply(self, model: ir.Model, source: ir.Model, module: torch.nn.Module) -> Applied:
        """Put the lowered model's layers into the module it was traced from: `qgraph.apply`."""
        if self.precision is not None:
            raise QGraphError(
                f"modules keep their own float type, not that of target '{self.name}': "
                "compile for cuda"
            )
        from qgraph.backends.cuda.apply import apply

        return apply(model, source, module)


def _lacking(site: Site, activation: QuantSpec | None, weight: QuantSpec) -> str | None:
    """Why there is no kernel, and what to do about it; None if there is one."""
    if not site.is_product:
        return _ELSEWHERE[site.kind]
    if activation is None:
        return f"weights alone have no kernel here yet: {_BY_TOKEN}"
    if isinstance(activation.granularity, PerBlock) or isinstance(weight.granularity, PerBlock):
        return "blocks have no kernel here yet: group_size=0 gives a scale for each channel"
    if not isinstance(activation.granularity, PerToken):
        return f"one scale for a run has no kernel here: {_BY_TOKEN}"
    by_channel = weight.granularity == PerAxis(site.axis)
    if weight.dtype != ir.DataType.INT8 or not (by_channel and weight.symmetric):
        return "only symmetric int8 weights by channel have a kernel here: bits=8"
    columns, zero = site.kn[0], token_grid(lowest_value(site.x)).zero
    if columns * 128 * max(zero, 255 - zero, 128) >= 2**31:
        return f"sums of {columns} products may not fit into 32 bits"
    return None
