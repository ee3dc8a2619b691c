"""From a float model to one with quantizers, ready to be trained."""

from __future__ import annotations

import onnx_ir as ir

from qgraph.backends.onnx import OnnxTarget
from qgraph.errors import ModelError, QGraphError
from qgraph.graph.annotation import Stage, annotated, copied, retract, set_use_spec
from qgraph.graph.sites import Site, nested, site_of
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import PassManager
from qgraph.recipes.recipe import Recipe
from qgraph.training.module import Origin, QuantizedModule
from qgraph.weights import formats

PASS = "prepare-qat"
"""Under this name preparation leaves remarks."""


def prepare(
    source: ir.Model, recipe: Recipe, *, learn_scales: bool = True, observe: int = 8, seed: int = 0
) -> QuantizedModule:
    """The float model as a module for training: see :func:`qgraph.prepare_qat`.

    Raises:
        ModelError: the model cannot be trained; the message names what is in the way.
        QGraphError: the recipe is not for training.
    """
    names = [Stage.COMMITTED in step.provides for step in recipe.passes]
    if True not in names or recipe.calibrates:
        raise QGraphError(f"recipe '{recipe.name}' is not for training: use 'qat'")
    split = names.index(True)
    model = copied(source)
    # The result may meet any target: what is fast there must not decide what is trained here.
    context = Context(target=OnnxTarget(), seed=seed)
    PassManager(recipe.passes[:split]).run(model, context)
    _leave_out(model, context)
    if not any(True for _ in annotated(model)):
        raise ModelError("nothing in this model can be quantized: see the remarks of 'dynamic'")
    origin = Origin(source, model, context.remarks, recipe.passes[split:])
    return QuantizedModule(origin, learn_scales=learn_scales, observe=observe)


def _leave_out(model: ir.Model, context: Context) -> None:
    """Take back what cannot be trained, and give 8-bit weights the bits that every CPU can add."""
    for node, specs in list(annotated(model)):
        site = site_of(node)
        if site is None:
            continue
        spec = specs[site.w_index]
        why = None
        if nested(model, node):
            why = "kept float: weights in bodies of control flow are not trained"
        elif site.weight.dtype != ir.DataType.FLOAT:
            why = "kept float: only float32 weights are trained"
        elif not formats.of(spec).even:
            why = "kept float: codebooks and float8 are not trained"
        if why is not None:
            retract(site)
            context.remark("float", PASS, site.name, node.op_type, why)
        elif spec.width == 8 and site.x_index in specs and not _depthwise(site):
            set_use_spec(node, site.w_index, spec.with_(bits=7))
            why = "trained with 7 bits, so that no CPU's u8·s8 products overflow int16"
            context.remark("note", PASS, site.name, node.op_type, why)


def _depthwise(site: Site) -> bool:
    return site.kind == "conv" and site.kn[0] == 1
