"""Names of layers in checkpoints, and the layers that graphs pack together."""

from __future__ import annotations

from collections.abc import Collection

from qgraph.errors import ModelError
from qgraph.graph.provenance import Path, module_path

PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Products of builders that are several layers of a checkpoint, side by side."""


def parts_of(path: Path, names: dict[Path, str]) -> list[Path]:
    """The checkpoint's modules behind a module of the graph: itself, those packed into it, none."""
    if path in names or not path:
        return [path] if path in names else []
    packed = [(*path[:-1], part) for part in PACKED.get(path[-1], ())]
    return packed if all(part in names for part in packed) else []


def aligned(names: Collection[str], graph: Collection[Path]) -> dict[Path, str]:
    """The checkpoint's modules by their path in the graph. Either may be wrapped in more modules.

    Raises:
        ModelError: they have no module in common.
    """
    paths = {module_path(name): name for name in names}
    wrappers = sorted({path[:n] for path in graph for n in (0, 1, 2)}, key=lambda p: (len(p), p))
    candidates = [{(*outer, *path): name for path, name in paths.items()} for outer in wrappers]
    candidates += [{path[n:]: name for path, name in paths.items()} for n in (1, 2)]
    best = max(candidates, key=lambda known: sum(bool(parts_of(path, known)) for path in graph))
    if not any(parts_of(path, best) for path in graph):
        raise ModelError(
            f"no node of the graph belongs to a layer of the checkpoint, such as "
            f"'{min(names)}': give a graph of the same model, its nodes named by layer"
        )
    return best
