"""Compile, and prepare for training: the calls that users make."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from qgraph.backends import get_target
from qgraph.calibration.data import NEEDED_OR_DYNAMIC
from qgraph.compiled import CompiledModel
from qgraph.errors import ModelError, QGraphError, check_counts
from qgraph.graph.annotation import copied, stages_of
from qgraph.graph.reading import initializers
from qgraph.io.feeds import open_calibration
from qgraph.io.models import load
from qgraph.io.random_feed import first_feed
from qgraph.io.trial import check_runs
from qgraph.pipeline.blame import blaming
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import PassManager
from qgraph.pipeline.progress import Progress, silent
from qgraph.pipeline.remarks import Remarks
from qgraph.pipeline.target import TARGET, Purpose, Target
from qgraph.pipeline.verify import undefined
from qgraph.recipes import get_recipe
from qgraph.recipes.recipe import Recipe
from qgraph.report.bench import cpu_ratio

if TYPE_CHECKING:
    import torch

    from qgraph.training.module import QuantizedModule


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
            (then `example_inputs` and, where sizes vary, `dynamic_shapes` as for :func:`trace`). A
            module that :func:`prepare_qat` gave has its recipe with it.
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
        optimize_for: which runs of a language model decide between lowerings. Beside a target
            object it is refused: that has its own.
        verify: hold every pass to its contract with probe inputs.
        progress: display for long loops, see :mod:`qgraph.cli.progress`.
        **parameters: of the recipe.

    Raises:
        QGraphError: what was given cannot be used; one line that says what to do.
    """
    aim = _aim(target, optimize_for)
    trained = _in_training(model)
    if trained is None:
        chosen, source = _chosen(recipe, parameters), _source(model, example_inputs, dynamic_shapes)
        _check_trained(chosen)
    else:
        chosen, source = _rest(trained, recipe, parameters), trained.source
    feeds = None if calibration is None else open_calibration(calibration, source, samples=samples)
    if chosen.calibrates and feeds is None:
        raise QGraphError(f"recipe '{chosen.name}' {NEEDED_OR_DYNAMIC}")
    context = Context(
        target=aim,
        calibration=feeds,
        seed=seed,
        remarks=Remarks() if trained is None else trained.remarks,
        progress=progress or silent,
        cache=Path(cache) if cache is not None else None,
        max_memory=max_memory,
    )
    if chosen.calibrates and trained is None:
        check_runs(source, aim.open_session)
    result = copied(source) if trained is None else trained.annotated()
    given = frozenset(stages_of(result))
    with blaming(source, context):
        PassManager(chosen.passes, verify=verify, given=given).run(result, context)
    if aim.measured:
        _compare_speed(source, result, context)
    compiled = CompiledModel(
        result, context.remarks, recipe=chosen.name, target=aim.name, source=source
    )
    compiled.open_session = aim.open_session
    compiled.feed = _trial_feed(source, context)
    compiled.to_module = getattr(aim, "to_module", None)
    compiled.apply = getattr(aim, "apply", None)
    return compiled


def apply(compiled: CompiledModel, module: torch.nn.Module) -> Any:
    """Replace the linear layers of a torch module by those of the model compiled from it, in place.

    ::

        model = qgraph.trace(module, example, shapes)
        compiled = qgraph.compile(model, "smoothquant", calibration=feeds, target="cuda")
        report = qgraph.apply(compiled, module)
        module.generate(...)                                # as ever

    Layers are found by the names that traced graphs remember. Parameters of others that the recipe
    has changed, such as smoothed norms, are copied. Nothing of the replaced float weights is left.

    Args:
        compiled: for a target with torch modules, such as `cuda`.
        module: of transformers or any other; it keeps its device and its float type.

    Returns:
        the names of quantized `layers` and of copied `parameters`; it prints as a summary.

    Raises:
        QGraphError: the module is another one, or has been quantized before; it is unchanged then.
    """
    if compiled.apply is None or compiled.source is None:
        raise QGraphError(f"target '{compiled.target}' has no layers for torch: compile for cuda")
    return compiled.apply(compiled.model, compiled.source, module)


def load_module(path: str | Path, device: Any = "cpu") -> torch.nn.Module:
    """A compiled model that was saved, as a torch module: that of `compiled.module`.

    Args:
        path: of a file that was compiled for a target with torch modules, such as `cuda`.
        device: where to put it.

    Raises:
        QGraphError: there is no such file or device, or it was compiled for another target.
    """
    model = load(path)
    name = model.metadata_props.get(TARGET)
    if name is None:
        raise ModelError(f"{path} was not compiled for torch: compile it with target cuda")
    from qgraph.torch.calls import checked_device

    checked = checked_device(device)
    module: torch.nn.Module = get_target(name).to_module(model)  # type: ignore[attr-defined]
    return module.to(checked)


def prepare_qat(
    model: ir.Model | str | Path | torch.nn.Module,
    example_inputs: Any = None,
    recipe: str | Recipe = "qat",
    *,
    dynamic_shapes: Any = None,
    learn_scales: bool = True,
    observe: int = 8,
    seed: int = 0,
    **parameters: Any,
) -> QuantizedModule:
    """A model as a torch module that is trained with its quantization: then compile that module.

    ::

        qmodel = qgraph.prepare_qat(model, example_inputs, bits=2)
        for x, y in loader:                             # any loop, any optimizer
            loss = cross_entropy(qmodel(x), y)          # or qmodel.distillation_loss(x): no labels
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        compiled = qgraph.compile(qmodel)

    Batch normalizations are folded into the layers before them, dropout is left out.

    Args:
        model: an IR model, the path of an ONNX file, or an `nn.Module` with `example_inputs`; it is
            left as it is.
        recipe: `qat`, or a recipe of your own that commits and does not calibrate.
        dynamic_shapes: as for :func:`trace`; None lets the first axis of all inputs be any batch
            size where the module can be captured so.
        learn_scales: train scales too (learned step size); else they stay as they were chosen.
        observe: so many training batches are observed before scales are chosen.
        seed: for everything random.
        **parameters: of the recipe, such as `bits` and `act_bits`.

    Raises:
        QGraphError: what was given cannot be used; one line that says what to do.
    """
    chosen = _chosen(recipe, parameters)
    check_counts(observe=observe)
    if dynamic_shapes is None and _is_module(model) and example_inputs is not None:
        source = _any_batch(model, example_inputs)
    else:
        source = _source(model, example_inputs, dynamic_shapes)
    from qgraph.training.prepare import prepare

    return prepare(source, chosen, learn_scales=learn_scales, observe=observe, seed=seed)


def _aim(target: str | Target, optimize_for: Purpose) -> Target:
    if isinstance(target, str):
        return get_target(target, optimize_for)
    if optimize_for != "both":
        raise QGraphError(
            "'optimize_for' cannot be set on a Target object: make it with that value, "
            f"get_target(name, optimize_for='{optimize_for}')"
        )
    return target


def _chosen(recipe: str | Recipe, parameters: dict[str, Any]) -> Recipe:
    if not isinstance(recipe, Recipe):
        return get_recipe(recipe, parameters)
    if parameters:
        raise QGraphError(
            f"'{sorted(parameters)[0]}' cannot be set on a Recipe object: build it with that value"
        )
    return recipe


def _check_trained(recipe: Recipe) -> None:
    if recipe.trains:
        raise QGraphError(
            f"recipe '{recipe.name}' is for training: call qgraph.prepare_qat, train what it gives "
            "and compile that, or use --train on the command line"
        )


def _in_training(model: Any) -> QuantizedModule | None:
    """`model`, if `prepare_qat` gave it."""
    if not _is_module(model):
        return None
    from qgraph.training.module import QuantizedModule

    return model if isinstance(model, QuantizedModule) else None


def _rest(trained: QuantizedModule, recipe: str | Recipe, parameters: dict[str, Any]) -> Recipe:
    """What is left to do after training."""
    if parameters or recipe not in ("static", "qat"):
        what = sorted(parameters)[0] if parameters else "recipe"
        raise QGraphError(f"'{what}' was settled when the module was prepared: give it there")
    return Recipe("qat", trained.rest)


def _trial_feed(source: ir.Model, context: Context) -> dict[str, np.ndarray] | None:
    """What the result is tried on when it is saved."""
    try:
        return first_feed(source, context.calibration, context.seed)
    except QGraphError:  # an input that cannot be made up, or data that was read and is gone
        return None


def _compare_speed(source: ir.Model, result: ir.Model, context: Context) -> None:
    """Leave a remark about the speed of the whole: a warning where it is below float."""
    if sum(v.const_value.nbytes for v in initializers(source) if v.const_value) > MEASURED_BYTES:
        why = "too large to time float and quantized side by side here: see 'qgraph bench'"
        context.remark("note", "compile", "", "", why)
        return
    try:
        feed = first_feed(source, context.calibration, context.seed)
        speedup = cpu_ratio(source, result, feed, open_session=context.target.open_session)
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
        if (problem := next(undefined(model), None)) is not None:
            raise ModelError(f"this model is not sound: {problem}")
        return model
    if isinstance(model, str | Path):
        return load(model)
    if _is_module(model):
        if example_inputs is None:
            raise ModelError("an nn.Module needs example_inputs=(...) to be traced with")
        from qgraph.torch.from_module import trace

        return trace(model, example_inputs, dynamic_shapes)
    kind = type(model).__name__
    raise ModelError(f"cannot compile a {kind}: give an ir.Model, a path or a torch.nn.Module")


def _is_module(model: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(model, torch.nn.Module)


def _any_batch(module: Any, example_inputs: Any) -> ir.Model:
    """The module for batches of any size, or of that of the example where it takes no other."""
    from qgraph.torch.from_module import trace

    if isinstance(example_inputs, Mapping):
        named = {name: _two(x) for name, x in example_inputs.items()}
        example: Any = named
        shapes: Any = {name: {0: "batch"} for name in named}
    else:
        several = isinstance(example_inputs, tuple | list)
        example = tuple(_two(x) for x in (example_inputs if several else (example_inputs,)))
        shapes = tuple({0: "batch"} for _ in example)
    try:
        return trace(module, example, shapes)
    except ModelError:
        return trace(module, example_inputs)


def _two(x: Any) -> Any:
    """A batch of one as one of two: torch takes a size of 1 for a constant."""
    if getattr(x, "ndim", 0) and x.shape[0] == 1:
        import torch

        return torch.cat([torch.as_tensor(x)] * 2)
    return x
