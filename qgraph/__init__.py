"""qgraph: a compiler for quantized neural networks.

Trace or load a model, compile it by a recipe, save the result as ONNX that any runtime reads::

    import qgraph

    compiled = qgraph.compile("model.onnx", recipe="dynamic")
    compiled.save("model-int8.onnx")
    print(compiled.remarks.summary())
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# onnxruntime would keep an identifier of this machine in the user's cache and report to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from qgraph.api import apply, compile, load_module, prepare_qat
    from qgraph.compiled import CompiledModel
    from qgraph.errors import QGraphError
    from qgraph.graph.annotation import Stage
    from qgraph.graph.text.printer import to_text
    from qgraph.io.models import load
    from qgraph.numerics.spec import PerAxis, PerBlock, PerTensor, PerToken, QuantSpec
    from qgraph.pipeline.context import Context
    from qgraph.pipeline.pass_manager import Contract, Pass, PassManager
    from qgraph.pipeline.remarks import Remark, Remarks
    from qgraph.pipeline.target import Target, Verdict
    from qgraph.recipes import Recipe
    from qgraph.torch.from_module import trace

_HOME = {
    "apply": "api",
    "compile": "api",
    "CompiledModel": "compiled",
    "Context": "pipeline.context",
    "Remark": "pipeline.remarks",
    "Remarks": "pipeline.remarks",
    "QGraphError": "errors",
    "load": "io.models",
    "load_module": "api",
    "Contract": "pipeline.pass_manager",
    "Pass": "pipeline.pass_manager",
    "PassManager": "pipeline.pass_manager",
    "Stage": "graph.annotation",
    "Recipe": "recipes",
    "PerAxis": "numerics.spec",
    "PerBlock": "numerics.spec",
    "PerTensor": "numerics.spec",
    "PerToken": "numerics.spec",
    "QuantSpec": "numerics.spec",
    "prepare_qat": "api",
    "Target": "pipeline.target",
    "Verdict": "pipeline.target",
    "to_text": "graph.text.printer",
    "trace": "torch.from_module",
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
    "apply",
    "compile",
    "load",
    "load_module",
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
