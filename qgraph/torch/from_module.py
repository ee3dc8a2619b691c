"""From a torch module to the IR: torch.export, then torch's own ONNX exporter.

The exporter's result already is an `ir.Model`. What is added here: quiet, a mode that is restored,
names that people recognise (nodes by their module path, inputs by the signature of `forward`,
outputs by the structure it returns), and errors that name the layer.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from qgraph.errors import ModelError
from qgraph.graph.names import numbered
from qgraph.graph.provenance import layer
from qgraph.graph.reading import graphs, nodes

if TYPE_CHECKING:
    import torch


OPSET = 21
"""Version of the standard operators that tracing asks for: the first with 4-bit integers."""

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_UNUSED_METADATA = ("namespace", "pkg.torch.onnx.stack_trace")
_LOUD_LOGGERS = ("torch", "torch.onnx", "torch.export", "torch._dynamo", "torch.fx", "onnxscript")


def trace(
    module: torch.nn.Module,
    example_inputs: torch.Tensor | np.ndarray | Sequence[Any] | Mapping[str, Any],
    dynamic_shapes: Any = None,
) -> ir.Model:
    """Capture what `module` computes in eval mode.

    Weights are shared with the module, not copied: do not train it while the model is in use.

    Args:
        module: left as it was, training mode included.
        example_inputs: one tensor or array, a tuple of positional arguments, or a dict by argument
            name. Values do not matter, shapes and dtypes do.
        dynamic_shapes: which axes may change, by argument name (or a tuple in their order):
            `{"x": {0: "batch"}}`, with a name or a `torch.export.Dim` for each axis, or a list of
            axes, `{"x": [0, 2]}`. Arguments that are not named keep the shape of the example.

    Returns:
        a model whose nodes are named by module path, "encoder.layer.0.query/MatMul", whose inputs
        are named as `forward` calls them, and whose outputs are named "output", "output_0", ... or
        by the keys of a dict or dataclass.

    Raises:
        ModelError: torch is missing, the example does not fit `forward`, or the module cannot be
            captured; the message names the layer.
    """
    try:
        import torch
    except ImportError:
        raise ModelError('tracing needs torch: pip install "qgraph-compiler[torch]"') from None

    arguments = _bind(module, example_inputs)
    shapes = _all_shapes(arguments.arguments, dynamic_shapes, _is_variadic(module))
    with _evaluating(module), _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module,
                (*arguments.args, dict(arguments.kwargs)),  # a last dict is taken for the kwargs
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                verbose=False,
            )
        except Exception as error:
            raise ModelError(_explain(error, module)) from error
    assert program is not None
    model: ir.Model = program.model
    _drop_metadata(model)
    _name_values(model, program.exported_program)
    _name_nodes(model)
    return model


# ---------------------------------------------------------------------------- before the capture


def _bind(module: torch.nn.Module, example_inputs: Any) -> inspect.BoundArguments:
    """The example as arguments of `forward`, in the order of its signature."""
    import torch

    def tensor(value: Any) -> Any:
        return torch.as_tensor(value) if isinstance(value, np.ndarray) else value

    signature = inspect.signature(module.forward)
    try:
        if isinstance(example_inputs, Mapping):
            return signature.bind(**{key: tensor(value) for key, value in example_inputs.items()})
        if not isinstance(example_inputs, tuple | list):
            example_inputs = (example_inputs,)
        return signature.bind(*map(tensor, example_inputs))
    except TypeError as error:
        raise ModelError(
            f"example_inputs do not fit {type(module).__name__}.forward{signature}: {error}"
        ) from None


def _is_variadic(module: torch.nn.Module) -> bool:
    kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
    return bool(kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD})


def _all_shapes(arguments: Mapping[str, Any], shapes: Any, variadic: bool) -> Any:
    """`dynamic_shapes` with an entry for every argument, as torch.export wants it."""
    if shapes is None or variadic:
        return shapes
    if not isinstance(shapes, Mapping):
        if len(shapes) > len(arguments):
            raise ModelError(
                f"dynamic_shapes has {len(shapes)} entries for {len(arguments)} inputs: "
                "give one for each input, or a dict by input name"
            )
        shapes = dict(zip(arguments, shapes, strict=False))
    if unknown := sorted(set(shapes) - set(arguments)):
        raise ModelError(
            f"dynamic_shapes names '{unknown[0]}', which is no input: use {', '.join(arguments)}"
        )
    return {name: _axes(name, shapes.get(name)) for name in arguments}


def _axes(name: str, axes: Any) -> Any:
    """A list of axis numbers as torch's exporter spells it; everything else as it is."""
    if isinstance(axes, list) and all(isinstance(axis, int) for axis in axes):
        return {axis: f"{name}_{axis}" for axis in axes}
    return axes


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every submodule is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's warnings, logs and prints are about itself: keep them from the user."""
    loggers = [logging.getLogger(name) for name in _LOUD_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ------------------------------------------------------------------------------ when it fails


def _explain(error: BaseException, module: torch.nn.Module) -> str:
    """One line: the layer that was being captured, and the reason."""
    chain = _chain(error)
    layer = next((found for cause in chain if (found := _layer(cause, module))), None)
    text = " ".join(str(chain[0]).split("\n\n")[0].split()) or type(chain[0]).__name__
    where = f"layer '{layer}'" if layer else f"module {type(module).__name__}"
    if "data-dependent" in text:
        text = text.split(" (unhinted")[0]
        text += "; its control flow depends on values, use torch.where or torch.cond there"
    return f"cannot trace {where}: {text[:300].removesuffix('.')}"


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, the first cause first."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) and cause not in found:
        found.append(cause)
    return found[::-1]


def _layer(error: BaseException, module: torch.nn.Module) -> str | None:
    """The innermost submodule whose code, or whose captured node, was at work when `error` rose."""
    import torch

    paths = {id(part): path for path, part in module.named_modules()}
    found = None
    step = error.__traceback__
    while step is not None:
        for local in step.tb_frame.f_locals.values():
            if isinstance(local, torch.fx.Node) and local.meta.get("nn_module_stack"):
                found = list(local.meta["nn_module_stack"].values())[-1][0] or found
        part = step.tb_frame.f_locals.get("self")
        if isinstance(part, torch.nn.Module) and paths.get(id(part)):
            found = paths[id(part)]
        step = step.tb_next
    return found


# ------------------------------------------------------------------------- names and provenance


def _drop_metadata(model: ir.Model) -> None:
    """Drop what is large and of no use: stack traces, and the captured program behind its nodes."""
    for graph in graphs(model):
        graph.metadata_props.clear()
        initializers = graph.initializers.values() if isinstance(graph, ir.Graph) else ()
        for value in (*graph.inputs, *initializers, *(v for n in graph for v in n.outputs)):
            value.meta.clear()
    for node in nodes(model):
        node.meta.clear()
        for key in _UNUSED_METADATA:
            node.metadata_props.pop(key, None)
        if "_empty_nn_module_stack" in node.metadata_props.get(SCOPES_KEY, ""):
            del node.metadata_props[SCOPES_KEY]  # torch's way to say that it does not know


def _name_values(model: ir.Model, exported: torch.export.ExportedProgram | None) -> None:
    """Outputs by the structure that `forward` returned, inputs by its signature."""
    if exported is None:
        return
    signature, spec = exported.graph_signature, exported.call_spec.out_spec
    inputs = [name for name in signature.user_inputs if isinstance(name, str)]
    structure = spec.unflatten(range(spec.num_leaves)) if spec is not None else None
    leaves = _leaf_names(structure, "")
    outputs = [
        leaves.get(index, f"output_{index}")
        for index, name in enumerate(signature.user_outputs)
        if isinstance(name, str)  # the others are constants: None, numbers
    ]
    wanted = [*zip(model.graph.inputs, inputs, strict=False)]
    wanted += [*zip(model.graph.outputs, outputs, strict=False)]
    chosen = {id(value) for value, _ in wanted}
    others = {v.name for v in _values(model) if v.name and id(v) not in chosen}
    for value, _ in wanted:
        value.name = None
    for value, name in wanted:
        value.name = numbered(name, others)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in graphs(model):
        yield from graph.inputs
        if isinstance(graph, ir.Graph):
            yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _leaf_names(structure: Any, path: str) -> dict[int, str]:
    """Name of each leaf (an int) of what `forward` returned."""
    if isinstance(structure, int):
        return {structure: path or "output"}
    if isinstance(structure, Mapping):
        parts = [(str(key), part) for key, part in structure.items()]
    elif hasattr(structure, "_fields"):
        parts = [*zip(structure._fields, structure, strict=True)]
    elif isinstance(structure, tuple | list):
        if len(structure) == 1 and not path:
            return _leaf_names(structure[0], path)
        parts = [(f"{path or 'output'}_{index}", part) for index, part in enumerate(structure)]
        return {leaf: name for p, part in parts for leaf, name in _leaf_names(part, p).items()}
    else:
        parts = list(vars(structure).items()) if hasattr(structure, "__dict__") else []
    prefix = f"{path}_" if path else ""
    return {
        leaf: name for key, part in parts for leaf, name in _leaf_names(part, prefix + key).items()
    }


def _name_nodes(model: ir.Model) -> None:
    """Name every node by the module it comes from and its operator."""
    taken: set[str] = set()
    for node in nodes(model):
        path = layer(node)
        node.name = numbered(f"{path}/{node.op_type}" if path else node.op_type, taken)
