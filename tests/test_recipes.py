"""Recipes are data: pipelines that fit together, whose parameters mean what they say."""

from __future__ import annotations

import inspect

import onnx_ir as ir
import pytest

from qgraph.errors import PipelineError, QGraphError
from qgraph.pass_manager import PassManager, Stage
from qgraph.passes.annotate import Annotate, Rule
from qgraph.passes.bias_correction import BiasCorrection
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.equalize import Equalize
from qgraph.passes.guard_static import GuardStatic
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.lower import Lower
from qgraph.pipeline import parse_pipeline
from qgraph.recipes import RECIPES, Recipe, dynamic, get_recipe, static
from tests.models import mlp, ops
from tests.pipelines import ONNX, apply, body


def names(recipe: Recipe) -> list[str]:
    return [step.name for step in recipe.passes]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_sound_pipeline(name: str) -> None:
    recipe = get_recipe(name, {})
    assert recipe.name == name
    PassManager(recipe.passes)
    assert isinstance(recipe.passes[-1], Lower)
    assert recipe.calibrates is any(isinstance(step, Calibrate) for step in recipe.passes)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_written_as_text(name: str) -> None:
    recipe = get_recipe(name, {"bits": 4})
    text = str(PassManager(recipe.passes))
    assert parse_pipeline(text) == list(recipe.passes)


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_is_documented(name: str) -> None:
    assert RECIPES[name].__doc__
    for parameter in inspect.signature(RECIPES[name]).parameters:
        assert f"{parameter}: " in str(RECIPES[name].__doc__)


def test_parameters_reach_their_passes() -> None:
    recipe = static(observer="entropy", bits=4, min_sqnr=12.0, equalize=True)
    (annotate,) = (s for s in recipe.passes if isinstance(s, Annotate))
    assert annotate.observer == "entropy"
    assert annotate.weight.width == 4
    assert annotate.weight.dtype == ir.DataType.INT8
    assert GuardStatic(min_sqnr=12.0) in recipe.passes
    assert Equalize() in recipe.passes
    assert InsertObservers(channel_means=True) in recipe.passes
    bare = static(bias_correction=False)
    assert BiasCorrection() not in bare.passes
    assert Equalize() not in bare.passes
    assert InsertObservers(channel_means=False) in bare.passes


def test_rules_reach_annotation() -> None:
    rule = Rule(("matmul",), None, layers="m0")
    for make in (static, dynamic):
        (annotate,) = (s for s in make(rules=[rule]).passes if isinstance(s, Annotate))
        assert annotate.rules == (rule,)


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
def test_fewer_bits_leave_fewer_levels(bits: int) -> None:
    model = mlp()
    apply(model, dynamic(bits=bits).passes)
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.INT8 and value.const_value is not None:
            q = value.const_value.numpy()
            assert abs(q).max() <= max(2 ** (bits - 1) - 1, 2)


@pytest.mark.parametrize(
    ("name", "parameters", "why"),
    [
        ("magic", {}, "unknown recipe 'magic': use one of static, dynamic"),
        ("dynamic", {"observer": "mse"}, "recipe 'dynamic' has no parameter 'observer': it has"),
        ("static", {"bit": 4}, "no parameter 'bit'"),
        ("static", {"bits": 9}, "bits=9 is out of range: use 2 to 8"),
        ("static", {"bits": 1}, "bits=1 is out of range"),
        ("static", {"bits": "4"}, "bits='4' is no int"),
        ("dynamic", {"bits": 4.0}, r"bits=4.0 is no int"),
        ("static", {"min_sqnr": "high"}, "min_sqnr='high' is no float"),
        ("static", {"equalize": "no"}, "equalize='no' is no bool"),
        ("static", {"observer": "median"}, "observer 'median' is unknown: use one of .*minmax"),
        ("static", {"observer": "dynamic"}, "observer 'dynamic' is unknown"),
    ],
)
def test_what_a_recipe_does_not_take(name: str, parameters: dict[str, object], why: str) -> None:
    with pytest.raises(QGraphError, match=why) as error:
        get_recipe(name, parameters)
    assert "\n" not in str(error.value)


def test_whole_numbers_are_numbers() -> None:
    assert GuardStatic(min_sqnr=30) in get_recipe("static", {"min_sqnr": 30}).passes


def test_a_pass_goes_before_the_one_named() -> None:
    recipe = dynamic()
    longer = recipe.insert(Equalize(), before="annotate")
    at = names(recipe).index("annotate")
    assert names(longer) == [*names(recipe)[:at], "equalize", *names(recipe)[at:]]
    assert names(recipe) == names(dynamic())
    assert longer.name == "dynamic"
    with pytest.raises(QGraphError, match=r"has no pass 'smooth': it has .*annotate"):
        recipe.insert(Equalize(), before="smooth")


def test_a_pass_in_the_wrong_place_is_noticed() -> None:
    recipe = dynamic().insert(GuardStatic(), before="annotate")
    with pytest.raises(PipelineError, match="'guard-static' needs a model that is calibrated"):
        PassManager(recipe.passes)


def test_the_stages_end_lowered() -> None:
    holding: set[Stage] = set()
    for step in static().passes:
        holding = (holding - step.invalidates) | step.provides
    assert holding >= {Stage.COMMITTED, Stage.LOWERED}
    assert not holding & {Stage.ANNOTATED, Stage.OBSERVED, Stage.CALIBRATED}


@pytest.mark.parametrize("name", RECIPES)
def test_two_runs_give_the_same_text(name: str) -> None:
    texts = []
    for _ in range(2):
        model = mlp()
        apply(model, get_recipe(name, {}).passes, target=ONNX)
        texts.append(body(model, weights=True))
    assert texts[0] == texts[1]
    assert "MatMul" not in ops(model) or name == "static"
