"""The project itself: packages, imports that point one way, the public API, the documentation.

`python -m tests.test_project` rewrites the snapshot of the public API.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Container, Iterator
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from types import FunctionType

import networkx as nx
import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from tests import models

ROOT = Path(__file__).parent.parent
SNAPSHOT = Path(__file__).parent / "public_api.txt"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


# ------------------------------------------------------------------------------- packages


def test_the_packages_that_are_built_are_those_in_the_tree() -> None:
    setuptools = PYPROJECT["tool"]["setuptools"]
    found = set()
    for name in ("qgraph", "passes", "backends"):
        for init in (ROOT / name).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            found.add(".".join(parts if parts[0] == "qgraph" else ("qgraph", *parts)))
    assert set(setuptools["packages"]) == found
    for package in found:
        folder = setuptools["package-dir"].get(package)
        if folder is None:  # setuptools then looks below the folder of the nearest parent
            top, *rest = package.split(".")
            named = f"{top}.{rest[0]}" in setuptools["package-dir"]
            folder = "/".join(rest if named else (top, *rest))
        assert (ROOT / folder / "__init__.py").is_file(), package


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_passes_and_backends_load_under_one_name_only(name: str) -> None:
    code = f"import {name}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert f"import this package as qgraph.{name}" in done.stderr


# -------------------------------------------------------------------------------- imports

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("numerics",),
    ("graph",),
    ("io",),
    ("pipeline",),
    ("calibration",),
    ("weights",),
    ("torch",),
    ("passes", "backends"),
    ("recipes",),
    ("training",),
    ("report",),
    ("compiled",),
    ("api",),
    ("cli",),
    ("__main__",),
)
"""A module may import from its own package and from those above it in this list, for types too.
Packages side by side never import each other."""


def _sources() -> Iterator[tuple[str, Path]]:
    for folder, prefix in (("qgraph", ""), ("passes", "passes."), ("backends", "backends.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "qgraph" and parts[0] in ("passes", "backends"):
                continue  # the symbolic links
            yield (prefix + ".".join(parts)).removesuffix(".__init__").removesuffix("."), path


def _imports(node: ast.AST, modules: Container[str] = ()) -> Iterator[str]:
    """What is imported, for types and inside functions too, as modules of qgraph.

    Args:
        modules: names of modules: a package from which only such are taken is not itself imported.
    """
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from names
            if not all(name.removeprefix("qgraph.") in modules for name in names):
                yield child.module


def _graph() -> nx.DiGraph:
    sources = dict(_sources())
    graph = nx.DiGraph()
    graph.add_nodes_from(sources)
    for module, path in sources.items():
        for name in _imports(ast.parse(path.read_text()), sources):
            imported = name.removeprefix("qgraph.")
            if name.startswith("qgraph.") and imported in sources and imported != module:
                graph.add_edge(module, imported)
    graph.remove_node("__init__")  # loads everything on demand
    return graph


def _may_import(module: str, imported: str) -> bool:
    levels = {name: level for level, layer in enumerate(LAYERS) for name in layer}
    package, other = module.split(".")[0], imported.split(".")[0]
    return package == other or levels[package] > levels[other]


def test_every_package_is_in_one_layer() -> None:
    named = [name for layer in LAYERS for name in layer]
    assert sorted(named) == sorted({module.split(".")[0] for module in _graph()})
    assert all(LAYERS)


def test_imports_point_one_way() -> None:
    assert not [f"{a} -> {b}" for a, b in _graph().edges if not _may_import(a, b)]


@pytest.mark.parametrize(
    ("module", "imported"),
    [("backends.onnx", "passes.fuse"), ("passes.fuse", "backends.onnx"), ("graph.sites", "api")],
)
def test_the_rule_knows_a_wrong_import(module: str, imported: str) -> None:
    assert not _may_import(module, imported)
    assert _may_import("api", imported)


def test_no_import_goes_in_a_circle() -> None:
    graph = _graph()
    # A package that lists its modules, which import siblings, is no circle that matters.
    graph.remove_node("passes")
    assert nx.is_directed_acyclic_graph(graph), nx.find_cycle(graph)


def _loaded_at_once(node: ast.AST) -> Iterator[str]:
    """What is imported when the module is: neither for types alone nor inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield from _imports(child)
        elif not isinstance(child, ast.FunctionDef) and not _for_types(child):
            yield from _loaded_at_once(child)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _needs_torch(source: str) -> bool:
    loaded = _loaded_at_once(ast.parse(source))
    return any(re.match(r"torch\b|qgraph\.(torch|training)\b", name) for name in loaded)


TORCH_OUTSIDE = ("backends.cuda.apply", "backends.cuda.modules", "backends.cuda.ops")
"""What a target has of torch, which it loads when it makes a module."""


def test_torch_is_imported_in_its_packages_only() -> None:
    """Elsewhere for types, or inside functions, so that all else works without it."""
    for module, path in _sources():
        if module.split(".")[0] not in ("torch", "training") and module not in TORCH_OUTSIDE:
            assert not _needs_torch(path.read_text()), path


@pytest.mark.parametrize(
    ("source", "needs"),
    [
        ("import torch.nn", True),
        ("try:\n    import torch\nexcept ImportError:\n    pass", True),
        ("class A:\n    from qgraph.torch.block import Block", True),
        ("from qgraph import training", True),
        ("if TYPE_CHECKING:\n    import torch", False),
        ("class A:\n    def run(self):\n        import torch", False),
        ("import torchvision, qgraph.torches", False),
    ],
)
def test_the_rule_knows_an_import_of_torch(source: str, needs: bool) -> None:
    assert _needs_torch(source) is needs


METADATA = (
    "graph.annotation", "graph.maps", "graph.names", "io.models", "torch.from_module",
    "torch.to_module",
)  # fmt: skip
"""The modules that open `meta`; everybody else calls their functions."""


def test_metadata_is_opened_in_few_modules() -> None:
    opening = {module for module, path in _sources() if re.search(r"\.meta\b", path.read_text())}
    assert opening <= set(METADATA)


@pytest.mark.parametrize("name", ["CPUExecutionProvider", "com.microsoft"])
def test_names_of_onnxruntime_are_spelled_once(name: str) -> None:
    texts = [path.read_text() for _, path in _sources()]
    assert sum(text.count(f'"{name}"') for text in texts) == 1


def test_modules_and_classes_stay_small() -> None:
    for module, path in _sources():
        text = path.read_text()
        assert text.count("\n") <= 400, module
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno < 200, node.name


def test_no_private_module_of_onnx_ir_is_used() -> None:
    for _, path in _sources():
        for name in _imports(ast.parse(path.read_text())):
            assert not re.search(r"^onnx_ir.*\._", name), f"{path}: {name}"


def _loaded_by(code: str) -> set[str]:
    show = "import json, sys; before = set(sys.modules)\n"
    show += f"{code}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_import_is_light() -> None:
    assert len(_loaded_by("import qgraph")) <= 20
    heavy = {"torch", "onnxruntime", "onnxscript", "transformers", "typer"}
    assert not heavy & _loaded_by("from qgraph import compile, load, trace, Pass, QuantSpec")
    assert not heavy - {"typer"} & _loaded_by("import qgraph.cli")


# ----------------------------------------------------------------------------- public API


def public_api() -> str:
    """Names and signatures of everything in `qgraph.__all__`, the recipes and the passes."""
    from qgraph.passes import all_passes
    from qgraph.recipes import RECIPES

    lines = [line for name in sorted(qgraph.__all__) for line in _described(name)]
    lines += [f"recipe {name}{inspect.signature(recipe)}" for name, recipe in RECIPES.items()]
    lines += [
        f"pass {name}: {p.__name__}{_signature(p)}" for name, p in sorted(all_passes().items())
    ]
    return "\n".join(lines) + "\n"


def _described(name: str) -> Iterator[str]:
    thing = getattr(qgraph, name)
    if isinstance(thing, type) and issubclass(thing, StrEnum):
        yield f"{name}: {', '.join(thing)}"
        return
    yield f"{name}{_signature(thing)}"
    if isinstance(thing, type):
        for attribute, value in sorted(vars(thing).items()):
            if attribute.startswith("_") and attribute != "__call__":
                continue
            if isinstance(value, property | cached_property):
                yield f"    {name}.{attribute}"
            elif isinstance(value, classmethod | staticmethod | FunctionType):
                bound = value if isinstance(value, FunctionType) else value.__func__
                yield f"    {name}.{attribute}{_signature(bound)}"


def _signature(thing: object) -> str:
    try:
        return re.sub(r"<function (\w+) at 0x\w+>", r"\1", str(inspect.signature(thing)))  # type: ignore[arg-type]
    except ValueError:
        return ""


def test_no_public_name_is_a_module_too() -> None:
    """Importing the module would put it in the place of the function."""
    assert not set(qgraph.__all__) & {module for module, _ in _sources()}


def test_the_public_api_is_the_recorded_one() -> None:
    assert public_api() == SNAPSHOT.read_text(), "if meant: python -m tests.test_project"


# -------------------------------------------------------------------------- documentation

RUNNABLE = (
    "README.md",
    "docs/writing-a-pass.md",
    "docs/transformers-at-8-bits.md",
    "docs/four-bits.md",
    "docs/quantization-aware-training.md",
    "docs/on-a-gpu.md",
)
SHOWING = (*RUNNABLE, "docs/models.md")
"""With examples in Python, and those with commands as well."""
DOCUMENTS = (*SHOWING, "README.zh.md", "CONTRIBUTING.md", "docs/how-a-model-flows.md")


def _blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_make_targets_exist(document: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / document).read_text()
    named = set(re.findall(r"^make ([\w-]+)", "\n".join(_blocks(document, "sh")), re.MULTILINE))
    named |= set(re.findall(r"`make ([\w-]+)", text))
    assert named <= targets
    if document == "README.md":
        assert {"demo", "test"} <= named


def test_the_chinese_readme_is_in_step() -> None:
    """The same code, headings of the same levels, and the same numbers, names and links."""
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README.zh.md"))
    for pattern in (
        r"^```\w+\n.*?^```",
        r"^#+ ",
        r"\d+(?:\.\d+)?",
        r"`[^`\n]+`",
        r"\]\((?!README)([^)]+)",
    ):
        flags = re.MULTILINE | re.DOTALL
        found = (sorted(re.findall(pattern, text, flags)) for text in (english, chinese))
        assert next(found) == next(found), pattern


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / document).read_text()):
        if not target.startswith("http"):
            assert ((ROOT / document).parent / target).exists(), target


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the examples in the documentation take for granted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    ir.save(models.mlp((16, 32, 8)), "model.onnx")
    np.savez("data.npz", x=np.zeros((4, 16), np.float32) + np.arange(16, dtype=np.float32))
    (tmp_path / "keep_sensitive.py").write_text((ROOT / "examples/keep_sensitive.py").read_text())
    for document in RUNNABLE:
        for code in _blocks(document, "python"):
            if file := re.match(r"# (\w+\.py)\n", code):
                (tmp_path / file[1]).write_text(code)
    return tmp_path


@pytest.mark.parametrize("document", RUNNABLE)
def test_documented_commands_run(
    document: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    from qgraph.cli import main

    commands = [
        shlex.split(line, comments=True)
        for line in "".join(_blocks(document, "sh")).splitlines()
        if line.startswith("qgraph ")
    ]
    assert commands
    for command in commands:
        assert main(command[1:]) == 0, (command, capsys.readouterr())


@pytest.mark.parametrize("document", SHOWING)
def test_documented_python_runs(document: str, workplace: Path) -> None:
    pytest.importorskip("torch")
    example = (ROOT / "examples/keep_sensitive.py").read_text()
    seen: dict[str, object] = {"__name__": "documented"}
    for code in _blocks(document, "python"):
        if code.strip() not in example:
            exec(compile(code, document, "exec", dont_inherit=True), seen)
    if "SquareAsProduct" in seen:
        check_square(seen["SquareAsProduct"])


def check_square(step: object) -> None:
    from qgraph.backends import get_target
    from qgraph.graph.text.printer import to_text

    text = "g (float[N] x) => (float[N] y) <float two = {2}> { y = Pow (x, two) }"
    model = models.build(text)
    manager = qgraph.PassManager([step()], verify=True)  # type: ignore[operator]
    assert manager.run(model, qgraph.Context(get_target("onnx")))
    assert "%y: f32[N] = Mul(%x, %x)" in to_text(model)


def test_the_documentation_lists_the_passes_of_the_recipes() -> None:
    from qgraph.recipes.eight_bits import dynamic, static

    text = (ROOT / "docs/how-a-model-flows.md").read_text()
    for recipe, title in (
        (static(equalize=True, bias_correction=True), "static"),
        (dynamic(), "dynamic"),
    ):
        section = text.split(f"## The recipe `{title}`")[1].split("\n## ")[0]
        named = [n for n in re.findall(r"`([a-z]+-[a-z-]+|[a-z]+)[`{]", section) if n != "target"]
        wanted = [step.name for step in recipe.passes]
        assert [n for n in named if n in wanted] == wanted


def test_the_documentation_shows_the_example_as_it_is() -> None:
    code = (ROOT / "examples/keep_sensitive.py").read_text()
    (shown,) = [
        b for b in _blocks("docs/writing-a-pass.md", "python") if "KeepSensitive(Pass)" in b
    ]
    assert code.endswith(shown)


if __name__ == "__main__":
    SNAPSHOT.write_text(public_api())
