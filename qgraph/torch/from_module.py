"""From a torch module to the IR: torch.export, then torch's own ONNX exporter.

The exporter's result already is an `ir.Model`. What is added here: quiet, a mode that is restored,
names that people recognise (nodes by their module path, inputs by the signature of `forward`,
outputs by the structure it returns), and errors that name the layer.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from qgraph.errors import ModelError
from qgraph.graph.names import numbered
from qgraph.graph.provenance import layer
from qgraph.graph.reading import graphs, nodes
from qgraph.torch.caches import add_past, past_names, with_past, without_caches
from qgraph.torch.experts import expert_by_expert
from qgraph.torch.failures import axes_not_free, explain
from qgraph.torch.signature import all_shapes, bind, replaced_forward, values_by_name, with_names

if TYPE_CHECKING:
    import numpy as np
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
    *,
    cache: bool = False,
) -> ir.Model:
    """Capture what `module` computes in eval mode.

    Weights are shared with the module, not copied: do not train it while the model is in use.

    A mixture of experts of transformers is captured expert by expert: each works on the tokens that
    chose it. Caches of keys and values that a language model returns are left out, with a warning,
    or become inputs and outputs.

    Args:
        module: left as it was, training mode included.
        example_inputs: one tensor or array, a tuple of positional arguments, or a dict by argument
            name. Values do not matter, shapes and dtypes do.
        dynamic_shapes: which axes may change, by argument name (or a tuple in their order):
            `{"x": {0: "batch"}}`, with a name or a `torch.export.Dim` for each axis, or a list of
            axes, `{"x": [0, 2]}`. Arguments that are not named keep the shape of the example.
        cache: give a causal language model of transformers inputs `past_key_values.0.key`, ... and
            outputs `present.0.key`, ... of shape (batch, heads, tokens, head size), any number of
            tokens. An `attention_mask` then covers past and new tokens; the example's the new ones.

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

    arguments = bind(module, example_inputs)
    values = values_by_name(arguments)
    shapes = all_shapes(arguments, values, dynamic_shapes)
    left_out: list[str] = []
    with _evaluating(module), _quiet(), torch.no_grad(), expert_by_expert(module):
        try:
            if cache:
                values, shapes = add_past(module, values, shapes)

            def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
                inner = with_past(forward) if cache else without_caches(forward, left_out)
                return with_names(inner, arguments, [*values])

            with replaced_forward(module, wrap):
                program = torch.onnx.export(
                    module,
                    (*values.values(), {}),  # a last dict is taken for the kwargs
                    dynamo=True,
                    dynamic_shapes=shapes,
                    opset_version=OPSET,
                    verbose=False,
                )
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(explain(error, module, _path_of)) from error
    if left_out:
        warnings.warn(
            f"the {left_out[0]} that {type(module).__name__} returns is left out: "
            "trace(..., cache=True) makes it inputs and outputs",
            stacklevel=2,
        )
    assert program is not None
    model: ir.Model = program.model
    _drop_metadata(model)
    _name_values(model, program.exported_program)
    _name_nodes(model)
    if fixed := next(axes_not_free(model, shapes), None):
        raise ModelError(f"cannot trace module {type(module).__name__} {fixed}")
    return model


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


def _path_of(node: torch.fx.Node) -> str | None:
    """The innermost submodule that a captured node comes from."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else None


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
    inputs = past_names([name for name in signature.user_inputs if isinstance(name, str)])
    structure = spec.unflatten(range(spec.num_leaves)) if spec is not None else None
    leaves = _leaf_names(structure, "")
    outputs = [
        leaves.get(index, f"output_{index}")
        for index, name in enumerate(signature.user_outputs)
        if isinstance(name, str)  # the others are constants: None, numbers
    ]
    pairs = [*zip(model.graph.inputs, inputs, strict=False)]
    pairs += [*zip(model.graph.outputs, outputs, strict=False)]
    named = {id(value) for value, _ in pairs}
    others = {v.name for v in _values(model) if v.name and id(v) not in named}
    for value, _ in pairs:
        value.name = None
    for value, name in pairs:
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
