"""Recipes are data: pipelines that fit together, whose parameters mean what they say."""

from __future__ import annotations

import inspect

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.errors import PipelineError, QGraphError
from qgraph.graph.annotation import Stage
from qgraph.graph.reading import constant
from qgraph.io.feeds import Feed
from qgraph.numerics.noise import sqnr_db
from qgraph.passes import all_passes
from qgraph.passes.adaround import AdaRound
from qgraph.passes.annotate import Annotate, Rule
from qgraph.passes.autoround import AutoRound
from qgraph.passes.awq import AWQ
from qgraph.passes.bias_correction import BiasCorrection
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.equalize import Equalize
from qgraph.passes.gptq import GPTQ
from qgraph.passes.guard_static import GuardStatic
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.lower import Lower
from qgraph.pipeline.parse import parse
from qgraph.pipeline.pass_manager import PassManager
from qgraph.pipeline.target import Target
from qgraph.recipes import RECIPES, get_recipe
from qgraph.recipes.eight_bits import dynamic, static
from qgraph.recipes.recipe import Recipe
from tests.models import mlp, outputs
from tests.pipelines import CPU, ONNX, TARGETS, apply, body, both, specs


def names(recipe: Recipe) -> list[str]:
    return [step.name for step in recipe.passes]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_sound_pipeline(name: str) -> None:
    recipe = get_recipe(name, {})
    assert recipe.name == name
    PassManager(recipe.passes)
    assert isinstance(recipe.passes[-1], Lower)
    readers = AdaRound | AutoRound | AWQ | Calibrate | GPTQ
    reads_data = any(isinstance(step, readers) for step in recipe.passes)
    assert recipe.calibrates is reads_data


RULED = (
    "adaround", "autoround", "awq", "checkpoint", "fp4", "fp8", "gptq", "hqq", "nf4", "rtn",
)  # fmt: skip
"""Recipes that are a rule and little else."""


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_written_as_text(name: str) -> None:
    if name in RULED:
        pytest.skip("its rules are Python")
    recipe = get_recipe(name, {"group_size": 0} if name == "w8a8" else {"bits": 4})
    text = str(PassManager(recipe.passes))
    assert parse(text, all_passes()) == list(recipe.passes)


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
        ("smoothquant", {"level": "O4"}, "level 'O4' is unknown: use one of O1, O2, O3"),
        ("smoothquant", {"level": 1}, "level '1' is unknown"),
        ("smoothquant", {"alpha": 2}, "alpha=2 is out of range: use 0 to 1, or search"),
        ("smoothquant", {"alpha": "foo"}, "alpha=foo is out of range"),
        ("w8a8", {"alpha": -0.5}, "alpha=-0.5 is out of range"),
        ("w8a8", {"group_size": -1}, "group_size=-1 is out of range: use 0 .per channel., or 16"),
        ("zeroquant", {"group_size": "foo"}, "group_size=foo is out of range"),
        ("zeroquant", {"group_size": 8}, "group_size=8 is out of range"),
        ("zeroquant", {"mlp_bits": 9}, "bits=9 is out of range"),
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
    if name == "checkpoint":
        pytest.skip("it wants a checkpoint")
    if name == "checkpoint":
        pytest.skip("it needs one: see test_checkpoints")
    if get_recipe(name, {}).trains:
        pytest.skip("between its passes there is training")
    texts = []
    for _ in range(2):
        model = mlp()
        apply(model, get_recipe(name, {}).passes, target=ONNX)
        texts.append(body(model, weights=True))
    assert texts[0] == texts[1]
    products = [n for n in model.graph if n.op_type == "MatMul"]
    in_float = [str(n.name) for n in products if constant(n.inputs[1]) is not None]
    assert all(product.endswith("/outliers") for product in in_float)


# --- smoothquant, level by level ------------------------------------------------------------------

TOKEN, RUN = "uint8 per-token sym dynamic", "uint8 per-tensor asym dynamic"
FIXED = "uint8 per-tensor asym minmax"


def tokens(spike: float) -> list[Feed]:
    """64 tokens, the first one times `spike`."""
    x = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    x[0] *= np.float32(spike)
    return [{"x": x}]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize(("level", "usual"), [("O1", TOKEN), ("O2", RUN), ("O3", FIXED)])
@pytest.mark.parametrize("spike", [1.0, 1000.0])
def test_levels_of_smoothquant(spike: float, level: str, usual: str, target: Target) -> None:
    model = mlp()
    recipe = get_recipe("smoothquant", {"level": level})
    passes = recipe.passes[: names(recipe).index("balance-tables")]
    context = apply(model, passes, tokens(spike), target)
    found = [by[0] for by in specs(model).values()]
    assert found == [usual if spike == 1 else TOKEN] * 2
    taken_back = [r for r in context.remarks if "too coarse for most tokens" in r.message]
    assert len(taken_back) == (2 if spike > 1 and level != "O1" else 0)


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("spike", [1.0, 1000.0])
def test_every_level_saves_the_usual_tokens(spike: float, level: str) -> None:
    model, feeds = mlp(), tokens(spike)
    wanted = outputs(model, feeds[0])[0]
    apply(model, get_recipe("smoothquant", {"level": level}).passes, feeds, CPU)
    found = both(model, feeds[0])[0]
    # One token alone decides what is smoothed, which the others pay for.
    assert sqnr_db(wanted[1:], found[1:]) > (30 if spike == 1 else 20)


def test_min_sqnr_of_smoothquant() -> None:
    for level in ("O2", "O3"):
        recipe = get_recipe("smoothquant", {"level": level, "min_sqnr": 12.0})
        assert GuardStatic(min_sqnr=12.0) in recipe.passes
    assert "guard-static" not in names(get_recipe("smoothquant", {}))


def test_rules_of_the_user_come_before_those_of_a_level() -> None:
    rule = Rule(("matmul",), None, layers="m0")
    model = mlp()
    apply(model, get_recipe("smoothquant", {"level": "O2", "rules": [rule]}).passes, tokens(1))
    assert next(n for n in model.graph if n.name == "m0").op_type == "MatMul"
