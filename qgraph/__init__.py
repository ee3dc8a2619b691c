"""qgraph: a compiler for quantized neural networks.

Trace or load a model, compile it by a recipe, save the result as ONNX that any runtime reads::

    import qgraph

    compiled = qgraph.compile("model.onnx", recipe="dynamic")
    compiled.save("model-int8.onnx")
    print(compiled.remarks.summary())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qgraph.api import compile, prepare_qat
    from qgraph.compiled import CompiledModel
    from qgraph.context import Context, Remark, Remarks
    from qgraph.errors import QGraphError
    from qgraph.model_io import load
    from qgraph.pass_manager import Contract, Pass, PassManager, Stage
    from qgraph.recipes import Recipe
    from qgraph.spec import PerAxis, PerBlock, PerTensor, PerToken, QuantSpec
    from qgraph.target import Target, Verdict
    from qgraph.text import to_text
    from qgraph.tracing import trace

_HOME = {
    "compile": "api",
    "CompiledModel": "compiled",
    "Context": "context",
    "Remark": "context",
    "Remarks": "context",
    "QGraphError": "errors",
    "load": "model_io",
    "Contract": "pass_manager",
    "Pass": "pass_manager",
    "PassManager": "pass_manager",
    "Stage": "pass_manager",
    "Recipe": "recipes",
    "PerAxis": "spec",
    "PerBlock": "spec",
    "PerTensor": "spec",
    "PerToken": "spec",
    "QuantSpec": "spec",
    "prepare_qat": "api",
    "Target": "target",
    "Verdict": "target",
    "to_text": "text",
    "trace": "tracing",
}

__all__ = [
    "CompiledModel",
    "Context",
    "Contract",
    "Pass",
    "PassManager",
    "PerAxis",
    "PerBlock",
    "PerTensor",
    "PerToken",
    "QGraphError",
    "QuantSpec",
    "Recipe",
    "Remark",
    "Remarks",
    "Stage",
    "Target",
    "Verdict",
    "compile",
    "load",
    "prepare_qat",
    "to_text",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Public names load where they are first used, so that `import qgraph` stays light."""
    if name not in _HOME:
        raise AttributeError(f"module 'qgraph' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"qgraph.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
