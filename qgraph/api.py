"""Trace, load, compile: the calls that users make."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir as ir

from qgraph.backends import get_target
from qgraph.bench import cpu_ratio
from qgraph.compiled import CompiledModel
from qgraph.context import Context, Progress, silent
from qgraph.errors import ModelError, QGraphError
from qgraph.external_data import initializers
from qgraph.feeds import first_feed, open_calibration
from qgraph.model_io import load
from qgraph.pass_manager import STAGES_KEY, PassManager
from qgraph.recipes import Recipe, get_recipe
from qgraph.target import Target

if TYPE_CHECKING:
    import torch

MEASURED_BYTES = 256 << 20
"""Weights of the largest model that is timed against float after compilation."""
NOISE = 0.98
"""A ratio of times below this is slower, not noise."""


def compile(
    model: ir.Model | str | Path | torch.nn.Module,
    recipe: str | Recipe = "static",
    calibration: Any = None,
    target: str | Target = "cpu",
    *,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    samples: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    max_memory: int | None = None,
    optimize_for: Literal["prompt", "decode", "both"] = "both",
    verify: bool = False,
    progress: Progress | None = None,
    **parameters: Any,
) -> CompiledModel:
    """Quantize a model by a recipe and lower it to a target. The model given is left as it is.

    Args:
        model: an IR model, the path of an ONNX file or onnxruntime-genai folder, or an `nn.Module`
            (then `example_inputs` and, where sizes vary, `dynamic_shapes` as for :func:`trace`).
        recipe: a name from `qgraph.recipes`, or a :class:`Recipe` of your own.
        calibration: typical inputs: any iterable of feeds (dict by input name, tuple, array or
            tensor; a `DataLoader` works), an `.npz` file (one array per input, first axis =
            samples), or a folder of `.npz` files (one feed each).
        target: `cpu`, `cpu:avx2`, ..., `onnx`, or a target object.
        samples: use only this many feeds.
        seed: for everything random.
        cache: folder in which calibration statistics are kept between runs.
        max_memory: bytes to stay within: histograms of large activations are collected in several
            runs of each feed, so that a quarter of it holds them.
        optimize_for: which runs of a language model decide between lowerings.
        verify: hold every pass to its contract with probe inputs.
        progress: display for long loops, see :mod:`qgraph.progress`.
        **parameters: of the recipe.

    Raises:
        QGraphError: what was given cannot be used; one line that says what to do.
    """
    if isinstance(recipe, Recipe):
        if parameters:
            raise QGraphError(
                f"'{sorted(parameters)[0]}' cannot be set on a Recipe object: "
                "build it with that value"
            )
        chosen = recipe
    else:
        chosen = get_recipe(recipe, parameters)
    aim = get_target(target) if isinstance(target, str) else target
    source = _source(model, example_inputs, dynamic_shapes)
    feeds = None if calibration is None else open_calibration(calibration, source, samples=samples)
    if chosen.calibrates and feeds is None:
        raise QGraphError(
            f"recipe '{chosen.name}' needs calibration data: give some typical inputs "
            "(calibration=..., or -c on the command line), or use the recipe 'dynamic'"
        )
    context = Context(
        target=aim,
        calibration=feeds,
        seed=seed,
        progress=progress or silent,
        cache=Path(cache) if cache is not None else None,
        max_memory=max_memory,
        optimize_for=optimize_for,
    )
    result = source.clone()
    result.meta.update(source.meta)
    result.meta[STAGES_KEY] = set(source.meta.get(STAGES_KEY, ()))
    result.meta.pop("qgraph.names", None)
    PassManager(chosen.passes, verify=verify).run(result, context)
    if aim.measured:
        _compare_speed(source, result, context)
    return CompiledModel(
        result, context.remarks, recipe=chosen.name, target=aim.name, source=source
    )


def _compare_speed(source: ir.Model, result: ir.Model, context: Context) -> None:
    """Leave a remark about the speed of the whole: a warning where it is below float."""
    if sum(v.const_value.nbytes for v in initializers(source) if v.const_value) > MEASURED_BYTES:
        why = "too large to time float and quantized side by side here: see 'qgraph bench'"
        context.remark("note", "compile", "", "", why)
        return
    try:
        feed = first_feed(source, context.calibration, context.seed)
        speedup = cpu_ratio(source, result, feed)
    except Exception as error:  # a random feed may not fit the model, or an operator be unknown
        reason = str(error).splitlines()[0]
        context.remark("note", "compile", "", "", f"speed was not compared with float: {reason}")
        return
    shapes = ", ".join(f"{name} {'x'.join(map(str, a.shape))}" for name, a in feed.items())
    if speedup < NOISE:
        why = f"the result is slower than float on this host, one thread, {shapes}"
        context.remark("warning", "compile", "", "", why, speedup=speedup)
        return
    why = f"the whole model against float on this host, one thread, {shapes}"
    context.remark("note", "compile", "", "", why, speedup=speedup)


def _source(model: Any, example_inputs: Any, dynamic_shapes: Any) -> ir.Model:
    if isinstance(model, ir.Model):
        return model
    if isinstance(model, str | Path):
        return load(model)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        if example_inputs is None:
            raise ModelError("an nn.Module needs example_inputs=(...) to be traced with")
        from qgraph.tracing import trace

        return trace(model, example_inputs, dynamic_shapes)
    kind = type(model).__name__
    raise ModelError(f"cannot compile a {kind}: give an ir.Model, a path or a torch.nn.Module")
