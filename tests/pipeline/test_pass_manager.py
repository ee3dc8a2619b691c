"""The pass manager: order, hooks, timings, and verification that catches every broken promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings

from qgraph.backends.onnx import OnnxTarget
from qgraph.errors import PipelineError, VerificationError
from qgraph.graph.annotation import Stage, stages_of
from qgraph.graph.editing import add_constant, insert, redirect
from qgraph.graph.names import fresh_name
from qgraph.graph.sites import sites
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass, PassManager
from tests.models import build, feed, if_model, mlp, ops, outputs, random_graph, small_convnet

Change = Callable[[ir.Model], object]


def editing(
    change: Change,
    contract: Contract = Contract.EQUIVALENT,
    *,
    name: str = "edit",
    requires: frozenset[Stage] = frozenset(),
    provides: frozenset[Stage] = frozenset(),
    invalidates: frozenset[Stage] = frozenset(),
) -> Pass:
    """A pass that calls `change`; it changed the model if that returns something true."""
    wanted, given_, lost, promise, title = requires, provides, invalidates, contract, name

    class Edit(Pass):
        name: ClassVar[str] = title
        contract: ClassVar[Contract] = promise
        requires: ClassVar[frozenset[Stage]] = wanted
        provides: ClassVar[frozenset[Stage]] = given_
        invalidates: ClassVar[frozenset[Stage]] = lost

        def run(self, model: ir.Model, context: Context) -> bool:
            return bool(change(model))

    return Edit()


def context() -> Context:
    """No pass here asks the target anything; it runs what is verified."""
    return Context(OnnxTarget())


def run(model: ir.Model, *passes: Pass) -> Context:
    """Run with verification on; the context with its remarks."""
    seen = context()
    PassManager(passes, verify=True).run(model, seen)
    return seen


def nothing(model: ir.Model) -> None:
    """The change of a pass that finds nothing to do."""


def scale_first_weight(factor: float) -> Change:
    """Multiply the first initializer."""

    def change(model: ir.Model) -> bool:
        value = next(iter(model.graph.initializers.values()))
        assert value.const_value is not None
        value.const_value = ir.Tensor((value.const_value.numpy() * factor).astype(np.float32))
        return True

    return change


def quantize_input(
    scale: float = 0.05, zero: int = 128, change: Change = nothing
) -> Callable[[ir.Model], None]:
    """Insert QuantizeLinear and DequantizeLinear in front of the first node."""

    def apply(model: ir.Model) -> None:
        node = model.graph[0]
        x = node.inputs[0]
        s = add_constant(model, "scale", np.array(scale, np.float32))
        z = add_constant(model, "zero", np.array(zero, np.uint8))
        q = insert(model, node, "QuantizeLinear", [x, s, z], base="q")
        d = insert(model, node, "DequantizeLinear", [q.outputs[0], s, z], base="d")
        node.replace_input_with(0, d.outputs[0])
        change(model)

    return apply


CANONICAL = frozenset({Stage.CANONICAL})
ANNOTATED = frozenset({Stage.ANNOTATED})


def test_a_pipeline_in_a_wrong_order_is_refused_when_it_is_built() -> None:
    first = editing(nothing, name="first", provides=CANONICAL)
    second = editing(nothing, name="second", requires=CANONICAL)
    PassManager([first, second])
    message = (
        "'second' needs a model that is canonical: put a pass that provides it before 'second'"
    )
    with pytest.raises(PipelineError, match=message):
        PassManager([second, first])


def test_a_stage_that_was_invalidated_must_be_provided_again() -> None:
    make = editing(nothing, provides=ANNOTATED)
    spoil = editing(nothing, invalidates=ANNOTATED)
    use = editing(nothing, name="use", requires=ANNOTATED)
    with pytest.raises(PipelineError, match="'use' needs a model that is annotated"):
        PassManager([make, spoil, use])
    PassManager([make, spoil, make, use])


def test_stages_given_from_outside_count() -> None:
    PassManager([editing(nothing, requires=CANONICAL)], given=CANONICAL)


def test_the_model_remembers_its_stages() -> None:
    model = mlp()
    PassManager([editing(nothing, provides=CANONICAL | ANNOTATED)]).run(model, context())
    assert stages_of(model) == {Stage.CANONICAL, Stage.ANNOTATED}
    PassManager([editing(nothing, invalidates=ANNOTATED)]).run(model, context())
    assert stages_of(model) == {Stage.CANONICAL}


def test_hooks_run_around_each_pass() -> None:
    seen: list[tuple[str, str, int]] = []
    model, shared = mlp(), context()

    def hook(when: str) -> Callable[[Pass, ir.Model, Context], None]:
        def note(step: Pass, model_: ir.Model, context_: Context) -> None:
            assert (model_, context_) == (model, shared)
            seen.append((when, step.name, len(model_.graph)))

        return note

    grow = editing(quantize_input(), Contract.LOSSY, name="grow")
    manager = PassManager(
        [grow, editing(nothing, name="rest")], before=[hook("before")], after=[hook("after")]
    )
    manager.run(model, shared)
    assert seen == [
        ("before", "grow", 5),
        ("after", "grow", 7),
        ("before", "rest", 7),
        ("after", "rest", 7),
    ]


def test_timings_say_what_ran_and_whether_it_changed_anything() -> None:
    model = mlp()
    manager = PassManager(
        [editing(nothing, name="idle"), editing(scale_first_weight(2), name="busy")]
    )
    assert manager.run(model, context())
    assert [(t.name, t.changed) for t in manager.timings] == [("idle", False), ("busy", True)]
    assert all(t.seconds >= 0 for t in manager.timings)
    assert not PassManager([editing(nothing)]).run(model, context())


def test_without_verify_nothing_is_checked() -> None:
    model = mlp()
    PassManager([editing(scale_first_weight(2))]).run(model, context())


@pytest.mark.parametrize("contract", [Contract.EQUIVALENT, Contract.EXACT])
def test_a_pass_that_changes_numbers_against_its_promise(contract: Contract) -> None:
    message = rf"pass 'edit' promised {contract}: output 'y' moved by 0\.\d+ of its largest value"
    with pytest.raises(VerificationError, match=message):
        run(mlp(), editing(scale_first_weight(1.01), contract))


def test_rounding_is_no_broken_promise() -> None:
    run(mlp(), editing(scale_first_weight(1 + 1e-6)))


def test_a_lossy_pass_may_change_numbers() -> None:
    model = mlp()
    run(model, editing(quantize_input(), Contract.LOSSY))
    assert ops(model)[:2] == ["QuantizeLinear", "DequantizeLinear"]


def test_an_exact_pass_may_move_outputs_by_no_more_than_quantization_did() -> None:
    lossy = editing(scale_first_weight(1.1), Contract.LOSSY)
    run(mlp(), lossy, editing(scale_first_weight(1.01), Contract.EXACT))
    with pytest.raises(VerificationError, match="promised exact"):
        run(mlp(), lossy, editing(scale_first_weight(1.5), Contract.EXACT))


def test_each_pass_is_compared_with_the_one_before_it() -> None:
    run(mlp(), editing(scale_first_weight(2), Contract.LOSSY), editing(nothing))


def test_new_infinities_are_caught_even_after_a_lossy_pass() -> None:
    with pytest.raises(VerificationError, match="promised lossy: output 'y' is no longer finite"):
        run(mlp(), editing(scale_first_weight(float("nan")), Contract.LOSSY))


def test_a_dangling_input_is_caught() -> None:
    def change(model: ir.Model) -> None:
        model.graph[1].replace_input_with(1, ir.Value(name="ghost"))

    with pytest.raises(VerificationError, match="Add 'a0': its input 'ghost' comes from nowhere"):
        run(mlp(), editing(change))


def test_a_scale_that_is_not_a_number_is_caught() -> None:
    with pytest.raises(VerificationError, match="QuantizeLinear 'q': its scale is not finite"):
        run(mlp(), editing(quantize_input(scale=float("nan")), Contract.LOSSY))


def test_a_value_that_onnxruntime_refuses_is_caught() -> None:
    def change(model: ir.Model) -> None:
        model.graph[0].op_type = "NoSuchOperator"

    with pytest.raises(VerificationError, match="promised equivalent: the model no longer runs: "):
        run(mlp(), editing(change))


def test_a_renamed_output_is_caught() -> None:
    def change(model: ir.Model) -> None:
        model.graph.outputs[0].name = "z"

    with pytest.raises(VerificationError, match="outputs were y and are now z"):
        run(mlp(), editing(change))


def test_a_missing_output_is_caught() -> None:
    def change(model: ir.Model) -> None:
        model.graph.outputs.append(model.graph[0].outputs[0])

    with pytest.raises(VerificationError, match="outputs were y and are now y, m0"):
        run(mlp(), editing(change))


@pytest.mark.parametrize("shape", [[8, -1], [1, -1, 8]])
def test_another_output_shape_is_caught(shape: list[int]) -> None:
    def change(model: ir.Model) -> None:
        old = model.graph.outputs[0]
        target = add_constant(model, "shape", np.array(shape, np.int64))
        last = model.graph[-1]
        made = insert(model, last, "Reshape", [old, target], base="r", after=True)
        redirect(old, made.outputs[0], keep=[made])
        made.outputs[0].shape = None

    with pytest.raises(
        VerificationError, match=r"output 'y' was float32\[.*\] and is now float32\["
    ):
        run(mlp(), editing(change, Contract.LOSSY))


def test_another_output_type_is_caught() -> None:
    def change(model: ir.Model) -> None:
        old = model.graph.outputs[0]
        made = insert(
            model,
            model.graph[-1],
            "Cast",
            [old],
            base="c",
            after=True,
            attributes={"to": int(ir.DataType.DOUBLE)},
        )
        redirect(old, made.outputs[0], keep=[made])
        made.outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)

    with pytest.raises(VerificationError, match=r"output 'y' was float32.* and is now float64"):
        run(mlp(), editing(change))


def test_faults_that_the_model_came_with_are_not_blamed_on_a_pass() -> None:
    model = mlp()
    quantize_input(scale=-1.0)(model)
    run(model, editing(nothing))


def test_a_model_that_onnxruntime_cannot_run_is_checked_for_structure_only() -> None:
    model = build("g (float[2] x) => (float[2] y) { y = Foo (x) }")
    remarks = run(model, editing(nothing)).remarks
    assert [(r.kind, r.pass_name) for r in remarks] == [("note", "verify")]
    assert "numeric checks are off: onnxruntime cannot run this model" in remarks[0].message


def test_the_probe_sees_into_branches() -> None:
    def change(model: ir.Model) -> None:
        for branch in ("then_branch", "else_branch"):
            body = model.graph[0].attributes[branch].as_graph()
            made = ir.node("Neg", [body.outputs[0]], name=fresh_name(model, "neg"))
            made.outputs[0].name = made.name
            body.append(made)
            body.outputs[0] = made.outputs[0]

    model = if_model()
    run(model, editing(nothing))
    with pytest.raises(VerificationError, match="output 'y' moved by 2 of its largest value"):
        run(model, editing(change))


@settings(max_examples=25, deadline=None)
@given(random_graph())
def test_sound_rewrites_of_random_graphs_pass(model: ir.Model) -> None:
    before = outputs(model, feed(model))

    def change(model: ir.Model) -> None:
        for node in list(model.graph):
            made = insert(model, node, "Identity", [node.inputs[0]], base="same")
            node.replace_input_with(0, made.outputs[0])

    run(model, editing(change))
    for old, new in zip(before, outputs(model, feed(model)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_convolutional_models_are_probed_too() -> None:
    with pytest.raises(VerificationError, match="moved by"):
        run(small_convnet(), editing(scale_first_weight(1.5)))


# --- remarks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2])
def test_a_remark_about_several_sites_is_made_of_each(count: int) -> None:
    model = if_model()
    products = list(sites(model))[:count]
    seen = context()
    about = products[0] if count == 1 else iter(products)
    editing(lambda _: False, name="speaker").remark(seen, about, "note", "so", number=0.5)
    assert [(r.pass_name, r.kind, r.message, r.numbers) for r in seen.remarks] == [
        ("speaker", "note", "so", {"number": 0.5})
    ] * count
    assert [r.site for r in seen.remarks] == [site.name for site in products]
    assert [r.op for r in seen.remarks] == ["MatMul", "Gemm"][:count]
