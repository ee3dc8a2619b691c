"""The ways to quantize that the benchmarks compare, on a model small enough for every run."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

import qgraph
from benchmarks import variants
from benchmarks.subjects import Subject
from benchmarks.variants import make, must_have_a_verdict, recipe, unaccounted
from benchmarks.zoo import Array
from tests import models
from tests.models import feed


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    def build(folder: Path) -> Path:
        ir.save(models.mlp(), folder / "mlp.onnx")
        return folder / "mlp.onnx"

    def feeds(path: Path) -> list[dict[str, Array]]:
        return [feed(models.mlp())]

    return Subject("mlp", build, feeds, feeds, lambda path: {"": feeds(path)})


@pytest.mark.parametrize("name", ["static", "dynamic"])
def test_a_recipe_with_parameters_is_a_variant(
    name: str, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(variants.VARIANTS, "qgraph 4 bits", recipe(name, bits=4))
    model = subject.build(tmp_path)
    made = make("qgraph 4 bits", subject, model, tmp_path)
    assert made.name == "qgraph 4 bits"
    assert made.note == ""
    assert made.path is not None
    assert made.path.exists()
    assert made.remarks is not None
    assert unaccounted(must_have_a_verdict(qgraph.load(model)), made.remarks) == []


def test_what_fails_becomes_a_note(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(variants.VARIANTS, "wrong", recipe("static", teapot=1))
    made = make("wrong", subject, subject.build(tmp_path), tmp_path)
    assert made.path is None
    assert "no parameter 'teapot'" in made.note


def test_operators_without_a_verdict_are_found(subject: Subject, tmp_path: Path) -> None:
    wanted = must_have_a_verdict(qgraph.load(subject.build(tmp_path)))
    assert len(wanted) == 2
    assert unaccounted(wanted, qgraph.Remarks()) == wanted
