"""Bring any model into the form that the other passes expect."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from qgraph.graph.annotation import Stage
from qgraph.graph.editing import derived_constant, redirect, remove_dead
from qgraph.graph.einsum import plain_einsum
from qgraph.graph.fused_products import take_apart
from qgraph.graph.names import unique_names
from qgraph.graph.ops import dilated_average
from qgraph.graph.reading import (
    INLINE_BYTES,
    array,
    attribute,
    constant,
    dims,
    input_of,
    is_op,
)
from qgraph.graph.symbols import untie_symbols
from qgraph.graph.types import infer_types
from qgraph.passes.fold_constants import FoldConstants
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass


@dataclass(frozen=True)
class Canonicalize(Pass):
    """One way to say each thing, the same function.

    The problem: exporters differ. Weights hide in Constant nodes, behind transposes, in functions;
    nodes have no names or share one; what quantization looks for is a few plain forms.

    ::

        Constant -> Transpose -> MatMul            MatMul with a constant weight
        MatMul (.., w (1, K, N))                   MatMul (.., w (K, N))
        Gemm <alpha = 2, beta = .5> (x, w, b)      Gemm (x, 2 w, .5 b)
        Einsum <"bte,ehd->bthd"> (x, w)            MatMul (x, w') -> Reshape
        FusedConv, FusedGemm, FusedMatMul          their parts
        Attention (x, w, b, mask)                  MatMul -> Add -> Split -> MultiHeadAttention
        Identity, inference Dropout                gone
        AveragePool <dilations = [1, 1]>           AveragePool
        a call of a model-local function           its body (functions of domain qgraph stay)
        If with a constant condition               the branch that is taken
        nodes whose results nobody reads           gone
        initializers with the same content         one of them

    Every node and every value gets a name of its own, control-flow bodies included, so that remarks
    can call a layer by its name; types and shapes are inferred. Constants are folded by
    :class:`~qgraph.passes.fold_constants.FoldConstants`.

    The inputs and outputs of the model stay, with two exceptions. An initializer that is also an
    input is a default that callers may override, so it stays an input and no constant. Before IR
    version 4, however, every initializer had to be listed as input: those are constants, lose
    their place among the inputs, and the model becomes one of IR version 4. Symbolic sizes that
    inputs share by name alone are told apart, see :func:`qgraph.graph.symbols.untie_symbols`.

    Einsums become products where one operand is constant and they are one, and what onnxruntime has
    fused with products is taken apart (onnxruntime fuses it again where it stays float): on its own
    a product can be quantized. BERT's attention of 128 tokens, width 384, is 1.7 times as fast with
    its projections in int8, and 5 % slower with the parts in float (AVX2, one thread).

    Left alone: other foreign operators, quantization that the model brings along, an Add behind a
    MatMul (onnxruntime fuses it), `auto_pad` and a missing `kernel_shape` of Conv (every runtime
    and every pass here reads the weight's shape).
    """

    name: ClassVar[str] = "canonicalize"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    provides: ClassVar[frozenset[Stage]] = frozenset({Stage.CANONICAL})

    def run(self, model: ir.Model, context: Context) -> bool:
        changed = self._constants_are_no_inputs(model, context)
        changed |= self._inline_functions(model, context)
        changed |= unique_names(model)
        changed |= FoldConstants().run(model, context)
        if count := untie_symbols(model):
            message = "inputs call sizes alike that nothing ties: told apart"
            context.remark("note", self.name, "", "", message, symbols=count)
            infer_types(model)
        nodes = model.graph.all_nodes
        simplified = sum(plain_einsum(model, node) or take_apart(model, node) for node in nodes())
        for node in nodes():
            simplified += (
                _drop_identity(node)
                or _plain_gemm(model, node)
                or _flat_weight(model, node)
                or _plain_pool(node)
            )
        if simplified:
            context.remark("applied", self.name, "", "", "simplified nodes", count=simplified)
            infer_types(model)
        changed |= _share_equal(model) | remove_dead(model)
        return changed or bool(simplified or count)

    def _constants_are_no_inputs(self, model: ir.Model, context: Context) -> bool:
        if (model.ir_version or 0) >= 4 or not common.RemoveInitializersFromInputsPass()(
            model
        ).modified:
            return False
        context.remark(
            "note",
            self.name,
            "",
            "",
            f"IR version {model.ir_version} lists constants as inputs: they are no longer inputs",
        )
        model.ir_version = 4
        return True

    def _inline_functions(self, model: ir.Model, context: Context) -> bool:
        if all(function.domain == "qgraph" for function in model.functions.values()):
            return False
        # Inlining fails in the middle of its work: try it on a copy (which shares the weights).
        copy = model.clone()
        try:
            common.InlinePass(lambda function: function.domain != "qgraph")(copy)
            common.RemoveUnusedFunctionsPass()(copy)  # type: ignore[no-untyped-call]
        except Exception as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            context.remark("declined", self.name, "", "", f"functions stay calls: {reason}")
            return False
        model.graph = copy.graph
        model.functions.clear()
        model.functions.update(copy.functions)
        return True


def _share_equal(model: ir.Model) -> bool:
    """One initializer for all with the same content: folding makes copies in every If branch.

    Memory-mapped weights are not compared, which would mean reading them all.
    """
    first: dict[tuple[ir.DataType, tuple[int | ir.SymbolicDim, ...], bytes], ir.Value] = {}
    changed = False
    for value in list(model.graph.initializers.values()):
        tensor = constant(value)
        if tensor is None or isinstance(tensor, ir.ExternalTensor | ir.LazyTensor):
            continue
        if tensor.nbytes <= INLINE_BYTES or value.is_graph_output():
            continue
        digest = hashlib.blake2b(tensor.tobytes(), digest_size=16).digest()
        known = first.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), digest), value)
        if known is not value:
            ir.convenience.replace_all_uses_with(value, known)
            changed = True
    return changed


def _drop_identity(node: ir.Node) -> bool:
    """Remove a node that only passes its input on, where the result's name can be kept.

    onnx-ir's IdentityEliminationPass knows no Dropout, and lets a graph return one value twice, or
    a body what the graph around it has computed.
    """
    if not is_op(node, "Identity") and not _idle_dropout(node):
        return False
    source, result, graph = node.inputs[0], node.outputs[0], node.graph
    if source is None or graph is None:
        return False
    if result.is_graph_output():
        # A graph returns values of its own, each once.
        producer = source.producer()
        if producer is None or producer.graph is not graph or source.is_graph_output():
            return False
    if source.type is None:
        source.type = result.type
    if source.shape is None:
        source.shape = result.shape
    redirect(result, source)
    graph.remove(node, safe=True)
    return True


def _idle_dropout(node: ir.Node) -> bool:
    """A Dropout whose mask is not used and that is not in training mode."""
    if not is_op(node, "Dropout") or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return False
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return not attribute(node, "training_mode", 0) and attribute(node, "is_test", 1) == 1
    training = array(node.inputs[2])
    return training is not None and not training.any()


def _plain_gemm(model: ir.Model, node: ir.Node) -> bool:
    """Move alpha and beta of a Gemm into its constant weight and bias."""
    if not is_op(node, "Gemm"):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    alpha, beta = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
    changed = _absorb(model, node, 1, alpha, "alpha")
    if bias is None:
        return changed | (node.attributes.pop("beta", None) is not None and beta != 1.0)
    return changed | _absorb(model, node, 2, beta, "beta")


_WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
"""Half floats may overflow where the product, summed in float32, did not."""


def _absorb(model: ir.Model, node: ir.Node, index: int, factor: float, name: str) -> bool:
    """Multiply the constant input `index` by `factor` and drop the attribute that says so."""
    value = node.inputs[index]
    tensor = constant(value)
    if factor == 1.0 or tensor is None or tensor.dtype not in _WIDE:
        return False
    _substitute(model, node, index, name, tensor.shape.numpy(), lambda w: w * factor)
    node.attributes.pop(name)
    return True


def _plain_pool(node: ir.Node) -> bool:
    """Drop dilations of 1, which integer kernels do not know the name of."""
    if not is_op(node, "AveragePool") or "dilations" not in node.attributes:
        return False
    return not dilated_average(node) and node.attributes.pop("dilations") is not None


def _flat_weight(model: ir.Model, node: ir.Node) -> bool:
    """Make a MatMul weight of shape (1, ..., K, N) a matrix, where the result keeps its rank."""
    if not is_op(node, "MatMul"):
        return False
    tensor = constant(node.inputs[1])
    if tensor is None or len(tensor.shape) < 3 or tensor.size != prod(tensor.shape.numpy()[-2:]):
        return False
    if len(dims(node.inputs[0])) < len(tensor.shape):
        return False
    shape = tensor.shape.numpy()[-2:]
    _substitute(model, node, 1, "matrix", shape, lambda w: w.reshape(shape))
    return True


def _substitute(
    model: ir.Model,
    node: ir.Node,
    index: int,
    suffix: str,
    shape: Sequence[int],
    change: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Give `node` a constant of its own, computed from an old one when it is read."""
    new = derived_constant(model, input_of(node, index), suffix, change, shape)
    node.replace_input_with(index, new)
