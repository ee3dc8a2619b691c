"""A target in a folder of its own: found by name, with no source of qgraph edited."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import qgraph
from qgraph import backends
from qgraph.cli import main
from qgraph.errors import ModelError, QGraphError
from qgraph.io.session import open_session
from tests.models import feed, mlp, outputs

SOURCE = '''
"""Target `mine`: multiplies integers by an operator that only its own sessions know."""

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qgraph.backends.lowering.functions import inline_functions
from qgraph.backends.lowering.products import lower_products
from qgraph.errors import QGraphError
from qgraph.io.session import open_session
from qgraph.pipeline.target import Verdict

TARGETS = (("mine", "operators of my own"), ("mine:new", "the newest of them"))


@dataclass(frozen=True)
class Mine:
    name: str
    optimize_for: str
    saturates = False
    measured = False

    def supports(self, site, activation, weight):
        return Verdict(site.kind == "matmul", "only products")

    def supports_glue(self, node):
        return False

    def legalize(self, model):
        changed = lower_products(model, "standard") | inline_functions(model)
        model.opset_imports["mine"] = 1
        for node in model.graph:
            if node.op_type == "MatMulInteger":
                node.domain = "mine"
        return changed

    def open_session(self, model, **options):
        plain = ir.load(model) if isinstance(model, Path) else model.clone()
        for node in plain.graph:
            node.domain = node.domain.removeprefix("mine")
        return open_session(plain, **options)


def make(name, optimize_for):
    if name not in dict(TARGETS):
        raise QGraphError(f"unknown target '{name}': use mine or mine:new")
    return Mine(name, optimize_for)


def describe():
    return "mine: as good as new"
'''


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Python finds the target, and forgets it again."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/mine.py").write_text(SOURCE)
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path / "own")])
    yield
    if sys.modules.pop("qgraph.backends.mine", None) is not None:
        del backends.mine


def test_it_compiles_by_name(own: None, tmp_path: Path) -> None:
    model = mlp((16, 32, 8))
    given = feed(model)
    compiled = qgraph.compile(model, "dynamic", target="mine", verify=True)
    assert compiled.target == "mine"
    assert [n.op_type for n in compiled.model.graph if n.domain == "mine"] == ["MatMulInteger"] * 2
    wanted = outputs(model, given)[0]
    np.testing.assert_allclose(compiled(given), wanted, atol=0.05 * np.abs(wanted).max())


def test_all_that_runs_the_result_goes_through_its_sessions(own: None, tmp_path: Path) -> None:
    compiled = qgraph.compile(mlp((16, 32, 8)), "dynamic", target="mine")
    with pytest.raises(ModelError, match="onnxruntime cannot run this model"):
        open_session(compiled.model)
    assert len(compiled.benchmark(rounds=1)) == 2
    path = compiled.save(tmp_path / "out.onnx")
    assert any(node.domain == "mine" for node in qgraph.load(path).graph)
    assert main(["opt", str(path), "-p", "canonicalize", "-t", "mine", "-o", f"{path}2"]) == 0


def test_it_is_told_what_the_model_is_optimized_for(own: None) -> None:
    target = backends.get_target("mine:new", optimize_for="prompt")
    assert target.name == "mine:new"
    assert target.optimize_for == "prompt"  # type: ignore[attr-defined]


def test_it_is_listed(own: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert [name for name, _ in backends.TARGETS][-3:] == ["onnx", "mine", "mine:new"]
    assert main(["targets"]) == 0
    printed = capsys.readouterr().out
    assert "the newest of them" in printed
    assert printed.endswith("mine: as good as new\n")
    with pytest.raises(QGraphError, match=r"use one of cpu, .*, onnx, mine, mine:new$"):
        backends.get_target("yours")
    with pytest.raises(QGraphError, match="use mine or mine:new"):
        backends.get_target("mine:old")


@pytest.mark.parametrize("name", ["mine", "lowering", "cpu.isa", "cpu.isa:x", "__init__", "."])
def test_what_is_no_target_is_unknown(name: str) -> None:
    with pytest.raises(QGraphError, match=r"unknown target .*: use one of cpu, .*, onnx$"):
        backends.get_target(name)


def test_targets_load_when_they_are_asked_for() -> None:
    code = "import sys; from qgraph.backends import get_target; get_target('onnx')\n"
    code += "assert 'qgraph.backends.cpu' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
