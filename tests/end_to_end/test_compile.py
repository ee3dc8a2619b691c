"""`qgraph.compile` and what it returns: what goes in, what comes out, and what stays as it was."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qgraph
from qgraph.calibration import collect
from qgraph.errors import CalibrationError, ModelError, PipelineError, QGraphError
from qgraph.graph.annotation import Stage, stages_of
from qgraph.graph.text.printer import to_text
from qgraph.io.feeds import Feed
from qgraph.io.session import open_session
from qgraph.passes.annotate import Rule
from qgraph.passes.canonicalize import Canonicalize
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass, PassManager
from qgraph.pipeline.target import Target
from qgraph.pipeline.verify import check_structure
from qgraph.recipes.eight_bits import dynamic, static
from tests.models import (
    build,
    feed,
    if_model,
    mlp,
    outputs,
    random_graph,
    small_convnet,
    transformer_block,
    weight,
)
from tests.pipelines import CPU, ONNX, TARGETS, both

RECIPES = ("static", "dynamic")


def feeds(model: ir.Model, count: int = 3) -> list[Feed]:
    return [feed(model, seed) for seed in range(count)]


def saved(model: ir.Model, path: Path) -> Path:
    ir.save(model, path)
    return path


# --- what goes in ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("target", ["cpu", "onnx", "cpu:avx2", "cpu:neon"])
def test_a_model_of_the_ir(
    recipe: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QGRAPH_CACHE", str(tmp_path))
    model = mlp()
    compiled = qgraph.compile(model, recipe, feeds(model), target)
    given_ = feed(model)
    np.testing.assert_allclose(compiled(**given_), outputs(model, given_)[0], atol=0.2)
    assert (compiled.recipe, compiled.target) == (recipe, target)
    assert set(compiled.remarks.verdicts()) == {"m0", "m1"}


def test_a_path_and_a_string(tmp_path: Path) -> None:
    path = saved(mlp(), tmp_path / "m.onnx")
    before = path.read_bytes()
    for source in (path, str(path)):
        compiled = qgraph.compile(source, "dynamic", target="onnx")
        x = feed(mlp())["x"]
        np.testing.assert_allclose(compiled(x), outputs(mlp(), {"x": x})[0], atol=0.1)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_a_module_of_torch() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    x = torch.randn(5, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = qgraph.compile(
            module, "static", [(x,)], ONNX, example_inputs=(x,),
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        )  # fmt: skip
    y = compiled(x)
    assert isinstance(y, torch.Tensor)
    torch.testing.assert_close(y, module(x).detach(), atol=0.1, rtol=0.1)
    assert isinstance(compiled(x.numpy()), np.ndarray)
    assert compiled(torch.randn(2, 16, requires_grad=True)).shape == (2, 4)
    with pytest.raises(ModelError, match="needs example_inputs"):
        qgraph.compile(module, "dynamic", target=ONNX)


class Batches:
    """Data that can be iterated, once or often, and counts how often it was."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.runs = model, 0

    def __iter__(self) -> Iterator[Feed]:
        self.runs += 1
        yield from feeds(self.model)


def test_calibration_data_in_its_forms(tmp_path: Path) -> None:
    model = mlp()
    texts = set()
    data = [f["x"] for f in feeds(model)]
    np.savez(tmp_path / "all.npz", x=np.concatenate(data))
    forms: list[object] = [
        feeds(model), data, [(x,) for x in data], Batches(model), iter(feeds(model)),
        lambda: iter(feeds(model)), str(tmp_path / "all.npz"),
    ]  # fmt: skip
    for form in forms:
        texts.add(to_text(qgraph.compile(model, "static", form, ONNX).model))
    assert len(texts) == 1


def test_only_so_many_samples() -> None:
    model = mlp()
    few = qgraph.compile(model, "static", feeds(model, 9), ONNX, samples=2)
    same = qgraph.compile(model, "static", feeds(model, 2), ONNX)
    assert to_text(few.model) == to_text(same.model)


def test_a_second_compilation_takes_the_statistics_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_convnet()
    first = qgraph.compile(model, "static", feeds(model), ONNX, cache=tmp_path)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the session ran")

    monkeypatch.setattr(collect, "open_session", never)
    second = qgraph.compile(model, "static", feeds(model), ONNX, cache=str(tmp_path))
    assert to_text(first.model, weights=True) == to_text(second.model, weights=True)
    fewer_bits = qgraph.compile(model, "static", feeds(model), ONNX, cache=tmp_path, bits=4)
    assert to_text(fewer_bits.model) != to_text(first.model)


@pytest.mark.parametrize("recipe", ["static", "gptq", "awq", "smoothquant"])
@pytest.mark.parametrize("make", [mlp, small_convnet, transformer_block])
def test_how_many_samples_are_put_together_does_not_matter(
    recipe: str, make: Callable[[], ir.Model]
) -> None:
    model = make()
    x = np.concatenate([(1 + i / 8) * feed(model, i)["x"][:1] for i in range(16)])
    parameters: dict[str, Any] = {"bias_correction": True} if recipe == "static" else {}
    texts = set()
    for size in (1, 2, 16):
        batches = [{"x": x[i : i + size]} for i in range(0, 16, size)]
        compiled = qgraph.compile(model, recipe, batches, ONNX, **parameters)
        texts.add(to_text(compiled.model))
    assert len(texts) == 1


# --- what stays -----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("make", [mlp, small_convnet, transformer_block, if_model])
def test_the_model_given_is_left_as_it_is(recipe: str, make: Callable[[], ir.Model]) -> None:
    model = make()
    PassManager([Canonicalize()]).run(model, Context(ONNX))
    before, held = to_text(model, weights=True), set(stages_of(model))
    texts = []
    for _ in range(2):
        compiled = qgraph.compile(model, recipe, feeds(model), ONNX, seed=7)
        texts.append(to_text(compiled.model, weights=True))
    assert to_text(model, weights=True) == before
    assert stages_of(model) == held
    assert texts[0] == texts[1]
    for node in model.graph.all_nodes():
        assert not node.meta
        assert not any(v.meta for v in (*node.inputs, *node.outputs) if v is not None)


def _looks(model: ir.Model) -> list[object]:
    """The tensors of a model and what can be seen of them, without reading them."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    mapped = [getattr(tensor, "raw", None) for tensor in tensors]
    return [*tensors, *(tensor.name for tensor in tensors if tensor is not None), *mapped]


def test_the_model_given_is_left_alone_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ir.save(mlp((64, 64, 8)), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = qgraph.load(tmp_path / "m.onnx")
    before, keys = _looks(model), set(model.meta)
    serialize, moments = ir.to_proto, 0

    def watched(*args: Any) -> Any:
        nonlocal moments
        moments += 1
        assert _looks(model) == before
        return serialize(*args)

    monkeypatch.setattr(ir, "to_proto", watched)
    compiled = qgraph.compile(model, "static", feeds(model), ONNX, bias_correction=True)
    compiled.save(tmp_path / "out.onnx")
    assert moments > 2
    assert _looks(model) == before
    assert set(model.meta) == keys


def test_several_threads_compile_one_model(tmp_path: Path) -> None:
    ir.save(mlp((64, 64, 8)), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = qgraph.load(tmp_path / "m.onnx")

    def made(number: int) -> str:
        compiled = qgraph.compile(model, "static", feeds(model), ONNX, bias_correction=True)
        compiled.save(tmp_path / f"{number}.onnx")
        return to_text(qgraph.load(tmp_path / f"{number}.onnx"))

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(made, range(8)))) == 1


def test_seeds_only_matter_where_something_is_random() -> None:
    model = mlp()
    texts = {
        to_text(qgraph.compile(model, "static", feeds(model), ONNX, seed=seed).model)
        for seed in (0, 1)
    }
    assert len(texts) == 1


# --- recipes of one's own -------------------------------------------------------------------------


@dataclass(frozen=True)
class Halve(Pass):
    """Halve every product's weights: not what it promises."""

    name: ClassVar[str] = "halve"
    contract: ClassVar[Contract] = Contract.EQUIVALENT
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.CANONICAL})

    def run(self, model: ir.Model, context: Context) -> bool:
        for value in model.graph.initializers.values():
            if len(value.shape or ()) == 2 and value.const_value is not None:
                value.const_value = ir.Tensor(value.const_value.numpy() / 2, name=value.name)
        context.remark("note", self.name, "", "", "halved")
        return True


def test_a_recipe_with_a_pass_of_ones_own() -> None:
    model = mlp((16, 8))
    recipe = dynamic().insert(Halve(), before="annotate")
    compiled = qgraph.compile(model, recipe, target=ONNX)
    given_ = feed(model)
    bias = model.graph.initializers["b0"].const_value
    assert bias is not None
    wanted = (outputs(model, given_)[0] - bias.numpy()) / 2 + bias.numpy()
    np.testing.assert_allclose(compiled(given_), wanted, atol=0.05)
    assert any(r.message == "halved" for r in compiled.remarks)
    with pytest.raises(QGraphError, match="pass 'halve' promised equivalent"):
        qgraph.compile(model, recipe, target=ONNX, verify=True)


def test_rules_keep_layers_float() -> None:
    model = mlp()
    compiled = qgraph.compile(
        model, "dynamic", target=ONNX, rules=(Rule(("matmul",), None, layers="m0", why="because"),)
    )
    assert compiled.remarks.verdicts()["m0"].message == "because"
    assert compiled.remarks.verdicts()["m1"].kind == "quantized"
    assert "float        1 MatMul: because" in compiled.remarks.summary()
    assert "recipe='dynamic'" in repr(compiled)


# --- calls ----------------------------------------------------------------------------------------

TWO = """
g (float[N,4] a, float[N,4] b) => (float[N,4] s, float[N,2] y) {
  s = Sub (a, b)
  y = MatMul (s, w)
}"""


@pytest.fixture(scope="module")
def two() -> qgraph.CompiledModel:
    return qgraph.compile(build(TWO, weight("w", 4, 2)), "dynamic", target=ONNX)


def test_copies_run_like_the_original() -> None:
    compiled = qgraph.compile(mlp(), "dynamic", target=ONNX)
    wanted = compiled(**feed(mlp()))
    for copy in (pickle.loads(pickle.dumps(compiled)), deepcopy(compiled)):
        np.testing.assert_array_equal(copy(**feed(mlp())), wanted)


def test_calls_by_position_and_by_name(two: qgraph.CompiledModel) -> None:
    a, b = (np.full((3, 4), v, np.float32) for v in (3, 1))
    wanted = two(a, b)
    assert isinstance(wanted, list)
    np.testing.assert_array_equal(wanted[0], a - b)
    for found in (two(a, b=b), two(b=b, a=a), two({"a": a, "b": b}), two({"a": a}, b=b)):
        np.testing.assert_array_equal(found[1], wanted[1])


def test_other_kinds_of_numbers_are_cast(two: qgraph.CompiledModel) -> None:
    a, b = np.ones((3, 4)), np.zeros((3, 4), np.float32)
    assert two(a, b)[0].dtype == np.float32
    np.testing.assert_array_equal(two(a.tolist(), b)[0], a)


def test_the_order_of_bytes_does_not_matter(two: qgraph.CompiledModel, tmp_path: Path) -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    for type_ in (">f4", ">f8"):
        for found, wanted in zip(two(a.astype(type_), b=b.astype(type_)), two(a, b), strict=True):
            np.testing.assert_array_equal(found, wanted)
    np.savez(tmp_path / "data.npz", x=a.astype(">f4"))
    model = mlp((4, 2))
    given_ = [{"x": a[i : i + 1].astype(">f4")} for i in range(3)], str(tmp_path / "data.npz")
    texts = {
        to_text(qgraph.compile(model, "static", data, ONNX).model)
        for data in (*given_, [{"x": a[i : i + 1]} for i in range(3)])
    }
    assert len(texts) == 1


def test_any_kind_of_torch_tensor(two: qgraph.CompiledModel) -> None:
    torch = pytest.importorskip("torch")
    a, b = torch.ones(3, 4), torch.eye(3, 4)
    wanted = two(a, b)
    for other in (b.bfloat16(), b.to_sparse(), b.double(), b.t().conj().t()):
        for found, same in zip(two(a, other), wanted, strict=True):
            torch.testing.assert_close(found, same, rtol=0, atol=0)
    with pytest.raises(QGraphError, match=r"input 'b' is not an array: .*'meta'"):
        two(a, b.to("meta"))


def test_torch_in_torch_out(two: qgraph.CompiledModel) -> None:
    torch = pytest.importorskip("torch")
    a, b = torch.ones(3, 4), np.zeros((3, 4), np.float32)
    s, y = two(a, b)
    assert isinstance(s, torch.Tensor)
    assert isinstance(y, torch.Tensor)
    torch.testing.assert_close(s, a)


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [
        ((1, 2, 3), {}, "3 inputs given, the model takes 2: a, b"),
        ((np.ones((3, 4), np.float32),), {}, "input 'b' is missing"),
        ((), {}, "input 'a' is missing"),
        (({},), {}, "input 'a' is missing"),
        ((), {"a": 1, "c": 2}, "no input 'c', only a, b"),
        ((np.ones((3, 4), np.float32),), {"a": 1, "b": 1}, "input 'a' is given twice"),
        ((np.ones((3, 5), np.float32), np.ones((3, 5), np.float32)), {}, "does not run on these"),
        ((np.ones(4, np.float32), np.ones(4, np.float32)), {}, "does not run on these inputs"),
        ((np.array(["x"]), np.array(["y"])), {}, "does not run on these inputs"),
    ],
)
def test_calls_that_cannot_work_say_why_in_one_line(
    two: qgraph.CompiledModel, args: tuple[object, ...], kwargs: dict[str, object], why: str
) -> None:
    with pytest.raises(QGraphError, match=why) as error:
        two(*args, **kwargs)
    assert "\n" not in str(error.value)


# --- what comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_saved_is_what_was_called(recipe: str, tmp_path: Path) -> None:
    model = small_convnet()
    compiled = qgraph.compile(model, recipe, feeds(model), ONNX)
    path = compiled.save(tmp_path / "out.onnx")
    assert path == tmp_path / "out.onnx"
    onnx.checker.check_model(str(path))
    given_ = feed(model)
    found = open_session(qgraph.load(path)).run(None, dict(given_))[0]
    np.testing.assert_array_equal(found, compiled(given_))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx"]


def test_benchmarks_against_the_source(tmp_path: Path) -> None:
    path = saved(mlp(), tmp_path / "m.onnx")
    compiled = qgraph.compile(path, "dynamic", target="onnx")
    results = compiled.benchmark(rounds=2)
    assert len(results) == 2


# --- errors ---------------------------------------------------------------------------------------


def _out_of_order() -> ir.Model:
    model = mlp()
    model.graph.insert_after(model.graph[-1], model.graph[-2])
    return model


def test_a_model_that_does_not_run_is_to_blame(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise ValueError("could not be broadcast")

    monkeypatch.setattr(Canonicalize, "run", fail)
    model = small_convnet()
    with pytest.raises(ValueError, match="broadcast"):
        qgraph.compile(model, "dynamic", target=ONNX)
    model.graph.initializers["m1"].const_value = ir.Tensor(np.zeros(5, np.float32), name="m1")
    with pytest.raises(ModelError, match="onnxruntime does not run this model: ") as error:
        qgraph.compile(model, "dynamic", target=ONNX)
    assert isinstance(error.value.__cause__, ValueError)


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    model = mlp()
    cases: list[tuple[type[QGraphError], str, dict[str, object]]] = [
        (QGraphError, "unknown recipe 'magic'", {"recipe": "magic"}),
        (QGraphError, "no parameter 'bit'", {"recipe": "dynamic", "bit": 4}),
        (QGraphError, "'bits' cannot be set on a Recipe object", {"recipe": dynamic(), "bits": 4}),
        (QGraphError, "make it with that value", {"target": ONNX, "optimize_for": "prompt"}),
        (QGraphError, "use one of prompt, decode, both", {"target": "cpu", "optimize_for": "x"}),
        (QGraphError, "unknown target 'gpu'", {"target": "gpu"}),
        (QGraphError, "recipe 'static' needs calibration data", {"calibration": None}),
        (CalibrationError, "no input 'z'", {"calibration": [{"z": np.ones(3)}]}),
        (CalibrationError, "holds no feeds", {"calibration": []}),
        (CalibrationError, "NaN or infinity",
         {"calibration": [{"x": np.full((2, 16), np.nan, np.float32)}]}),
        (CalibrationError, "samples=0", {"samples": 0}),
        (ModelError, "does not exist|no such|not found", {"model": tmp_path / "absent.onnx"}),
        (ModelError, "not sound: Add 'y': its input 'm1' comes from MatMul 'm1', which runs later",
         {"model": _out_of_order()}),
        (ModelError, "cannot compile a int: give an ir.Model, a path or a torch.nn.Module",
         {"model": 3}),
        (PipelineError, "needs a model that is calibrated",
         {"recipe": qgraph.Recipe("mine", static().passes[7:])}),
    ]  # fmt: skip
    for kind, why, changes in cases:
        arguments: dict[str, object] = {
            "model": model, "recipe": "static", "calibration": feeds(model), "target": ONNX,
        } | changes  # fmt: skip
        with pytest.raises(kind, match=why) as error:
            qgraph.compile(**arguments)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


def test_a_model_without_sites_comes_out_as_it_went_in() -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    for recipe in RECIPES:
        compiled = qgraph.compile(model, recipe, feeds(model), ONNX, verify=True)
        np.testing.assert_array_equal(compiled(x=np.array([-1, 1], np.float32)), [0, 1])
        assert not compiled.remarks.verdicts()


# --- properties -----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(random_graph(), st.sampled_from(RECIPES), st.sampled_from(TARGETS))
def test_any_model_compiles_to_a_sound_one(model: ir.Model, recipe: str, target: Target) -> None:
    before = to_text(model, weights=True)
    compiled = qgraph.compile(model, recipe, feeds(model), target, verify=True)
    assert to_text(model, weights=True) == before
    assert not check_structure(compiled.model)
    assert [v.name for v in compiled.model.graph.outputs] == [v.name for v in model.graph.outputs]
    for a, b in zip(outputs(model, feed(model)), both(compiled.model, feed(model)), strict=True):
        assert a.shape == b.shape
        assert np.isfinite(b).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_half_precision_all_the_way(recipe: str) -> None:
    text = """
    g (float16[N,16] x) => (float16[N,8] y) {
      m = MatMul (x, w)
      a = Add (m, b)
      h = Relu (a)
      y = MatMul (h, v)
    }"""
    tensors = [weight("w", 16, 32), weight("b", 32), weight("v", 32, 8)]
    model = build(text, *(ir.Tensor(t.numpy().astype(np.float16), name=t.name) for t in tensors))
    for target in (ONNX, CPU):
        compiled = qgraph.compile(model, recipe, feeds(model), target, verify=True)
        given_ = feed(model)
        found = compiled(given_)
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, outputs(model, given_)[0], atol=0.15)
