"""Modules of a torch model in its graph, and in its checkpoint."""

from __future__ import annotations

import ast
import re

import onnx_ir as ir

from qgraph.graph.reading import node_name, nodes

Path = tuple[str, ...]


def modules(model: ir.Model) -> dict[Path, list[ir.Node]]:
    """The nodes of each module, in graph order."""
    members: dict[Path, list[ir.Node]] = {}
    for node in nodes(model):
        module = layer(node) or node_name(node).rpartition("/")[0]
        if module:
            members.setdefault(module_path(module), []).append(node)
    return members


def module_path(module: str) -> Path:
    """A module's path, spelt alike for checkpoints and for builders."""
    parts = [part for part in re.split(r"[./]", module) if part]
    if parts[-1:] == ["final_norm_layernorm"]:  # of onnxruntime-genai's builder
        parts = ["model", "norm"]
    return tuple("self_attn" if part == "attn" else part for part in parts)


def layer(node: ir.Node) -> str:
    """Path of the torch module that `node` was traced from, `""` where it is not known."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes is None:
        return ""
    try:
        path = [str(scope) for scope in ast.literal_eval(scopes)[:-1]]
    except (ValueError, SyntaxError):
        return ""
    return path[-1] if path else ""
