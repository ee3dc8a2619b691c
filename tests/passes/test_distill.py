"""Layer-by-layer distillation: integers that imitate the float product on calibration tokens."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import CalibrationError, PipelineError, QGraphError
from qgraph.graph.annotation import INTEGERS
from qgraph.graph.reading import array
from qgraph.numerics.noise import sqnr_db
from qgraph.numerics.saturation import can_saturate
from qgraph.numerics.spec import PER_RUN, PER_TOKEN, WEIGHT, PerAxis, PerBlock, QuantSpec
from qgraph.passes.annotate import Annotate, Rule
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.distill import Distill, distilled, normal_equations
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Pass, PassManager
from qgraph.pipeline.target import Target
from tests.models import build, if_model, outputs, transformer_block, weight
from tests.pipelines import (
    COMMIT,
    CPU,
    ONNX,
    TARGETS,
    apply,
    body,
    both,
    golden,
    initializer,
    specs,
)

INT4 = QuantSpec(ir.DataType.INT4, PerBlock(0, 8), observer="mse")
SMALL = QuantSpec(ir.DataType.INT8, bits=4)


def tokens(count: int, k: int, seed: int = 0) -> np.ndarray:
    """Data with unequal, correlated channels, float64 (count, k)."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(k, k)) * np.geomspace(1, 0.05, k)[:, np.newaxis]
    return np.asarray(rng.normal(size=(count, k)) @ mixing)


def annotate(spec: QuantSpec = INT4, activation: QuantSpec = PER_TOKEN) -> tuple[Pass, ...]:
    rule = Rule(("matmul", "gemm"), spec, (activation,))
    return Canonicalize(), Annotate("dynamic", rules=(rule,))


def product(k: int = 32, n: int = 12, *, trans_b: bool = False) -> ir.Model:
    op = "Gemm <transB = 1> (x, w)" if trans_b else "MatMul (x, w)"
    text = f"g (float[batch,{k}] x) => (float[batch,{n}] y) {{ h = Identity (x) y = {op} }}"
    text = text.replace("Identity (x)", "Neg (x)").replace(f"{op}", op.replace("x,", "h,"))
    w = weight("w", k, n).numpy()
    return build(text, ir.Tensor(np.ascontiguousarray(w.T) if trans_b else w, name="w"))


def feeds(k: int = 32, count: int = 4) -> list[Mapping[str, np.ndarray]]:
    mixed = tokens(64 * count, k).astype(np.float32)
    return [{"x": part} for part in np.split(mixed, count)]


def noise(
    model: ir.Model, wanted: Sequence[np.ndarray], data: Sequence[Mapping[str, np.ndarray]]
) -> float:
    found = [outputs(model, feed)[0] for feed in data]
    return -sqnr_db(np.concatenate(wanted), np.concatenate(found))


# --- the mathematics ------------------------------------------------------------------------------


def error(x: np.ndarray, seen: np.ndarray, w: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Squared error of each column in float64, tokens at unit power."""
    even = 1 / np.sqrt(np.square(x).mean(axis=1, keepdims=True))
    return np.asarray(np.square((seen @ v - x @ w) * even).sum(axis=0))


def test_a_worked_example() -> None:
    # Two channels always equal: 0.4 and 0.4 round to 0 and 0, though their sum 0.8 is nearly 1.
    x = np.array([[1.0, 1.0], [1.0, 1.0]])
    gram, cross = normal_equations(x, x)
    assert gram.tolist() == cross.tolist() == [[2, 2], [2, 2]]
    w, q, steps = np.array([[0.4], [0.4]]), np.zeros((2, 1), np.int8), np.ones((2, 1))
    found = distilled(w, q, steps, gram, cross, SMALL, damping=0.0)
    assert found.tolist() == [[1], [0]]  # an error of 0.2, not of 0.8
    assert found.dtype == np.int8  # the first is best at (2 · 0.8) / 2, the second then at -0.2


def test_the_student_learns_to_see_through_its_rounding() -> None:
    # What the student sees is half of what is there: its weight must be twice as large.
    x = np.array([[2.0], [-2.0]])
    gram, cross = normal_equations(x, x / 2)
    w, q, steps = np.full((1, 1), 3.0), np.full((1, 1), 3), np.ones((1, 1))
    assert distilled(w, q, steps, gram, cross, SMALL, damping=0.0).tolist() == [[6]]


def test_tokens_count_alike() -> None:
    x = np.array([[100.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    gram, cross = normal_equations(x, x)
    np.testing.assert_allclose(gram, 2 * np.eye(2), rtol=1e-12)
    np.testing.assert_allclose(cross, gram, rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 70), st.integers(1, 5), st.integers(1, 60), st.integers(2, 8),
    st.sampled_from([np.float32, np.float64]), st.floats(0, 2), st.integers(0, 2**16),
)  # fmt: skip
def test_no_column_is_worse_than_rounding_to_nearest(
    k: int, n: int, count: int, bits: int, dtype: type, damping: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = tokens(count, k, seed)
    seen = x + rng.normal(size=x.shape) * 0.05 * np.abs(x).max(axis=1, keepdims=True)
    w, steps = rng.normal(size=(k, n)), rng.uniform(0.05, 0.5, (k, n))
    spec = QuantSpec(ir.DataType.INT8, bits=bits)
    q = np.clip(np.rint(w / steps), spec.qmin, spec.qmax).astype(np.int8)
    gram, cross = (m.astype(dtype) for m in normal_equations(x, seen))
    found = distilled(w.astype(dtype), q, steps.astype(dtype), gram, cross, spec, damping=damping)
    assert (spec.qmin <= found).all()
    assert (found <= spec.qmax).all()
    before, after = (error(x, seen, w, i * steps) for i in (q, found))
    slack = 1e-9 if dtype is np.float64 else 1e-3
    assert (after <= before + slack * (1 + before)).all()


def test_more_sweeps_are_no_worse_and_a_fixed_point_is_reached() -> None:
    x = tokens(500, 48)
    w, steps = np.random.default_rng(1).normal(size=(48, 6)), np.full((48, 6), 0.4)
    q = np.clip(np.rint(w / steps), -7, 7)
    gram, cross = normal_equations(x, x)
    errors = [error(x, x, w, q * steps).sum()]
    for sweeps in (1, 2, 3, 20):
        found = distilled(w, q, steps, gram, cross, SMALL, sweeps, damping=0.0)
        errors.append(error(x, x, w, found * steps).sum())
    assert all(b <= a * 1.0001 for a, b in itertools.pairwise(errors))
    assert errors[2] < 0.5 * errors[0]
    again = distilled(w, found, steps, gram, cross, SMALL, 1, damping=0.0)
    assert np.array_equal(again, found)
    for k in range(48):  # no weight gains by moving alone
        for move in (-1, 1):
            other = found.copy()
            other[k] = np.clip(other[k] + move, -7, 7)
            better = error(x, x, w, other * steps) < error(x, x, w, found * steps) - 1e-9
            assert not better.any()


# --- the pass -------------------------------------------------------------------------------------


def test_before_and_after() -> None:
    model = product(k=16, n=2)
    apply(model, annotate(INT4.with_(granularity=PerBlock(0, 16))), feeds(16), ONNX)
    assert body(model) == golden("""
        %h: f32[batch, 16] = Neg(%x)
        %y: f32[batch, 2] = MatMul(%h <uint8 per-token sym dynamic>, %w <int4 per-block(0, 16) sym mse>)
    """)  # noqa: E501
    context = apply(model, [Distill()], feeds(16), ONNX)
    assert body(model) == golden("""
        %h: f32[batch, 16] = Neg(%x)
        %y: f32[batch, 2] = MatMul(%h <uint8 per-token sym dynamic>, %w_distilled <int4 per-block(0, 16) sym mse>)
    """)  # noqa: E501
    assert list(model.graph.initializers) == ["w_distilled"]
    (remark,) = (r for r in context.remarks if r.pass_name == "distill")
    assert (remark.kind, remark.site, remark.message) == ("applied", "y", "distilled")
    assert remark.numbers["noise"] < remark.numbers["undistilled"]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("trans_b", [False, True], ids=["MatMul", "Gemm"])
@pytest.mark.parametrize("activation", [PER_TOKEN, PER_RUN], ids=["token", "run"])
@pytest.mark.parametrize(
    "spec", [INT4, INT4.with_(granularity=PerAxis(1)), WEIGHT.with_(bits=4)], ids=str
)
def test_outputs_come_nearer_to_float_on_other_data(
    spec: QuantSpec, activation: QuantSpec, trans_b: bool, target: Target
) -> None:
    data = feeds(count=10)
    wanted = [outputs(product(trans_b=trans_b), feed)[0] for feed in data]
    found = []
    for middle in ((), (Distill(),)):
        model = product(trans_b=trans_b)
        apply(model, (*annotate(spec, activation), *middle, *COMMIT), data[:4], target)
        found.append(noise(model, wanted[4:], data[4:]))
    plain, learned = found
    few_bits = INT4.dtype in {v.dtype for v in model.graph.initializers.values()} or spec.bits == 4
    assert learned < plain - (1.0 if few_bits else 0.1)


def test_insert_qdq_takes_the_integers_as_they_are() -> None:
    for spec in (INT4, WEIGHT.with_(bits=4)):
        model = product()
        apply(model, (*annotate(spec), Distill()), feeds())
        value = model.graph.initializers["w_distilled"]
        wanted, student = value.meta[INTEGERS]
        assert str(wanted) == specs(model)["y"][1]
        np.testing.assert_array_equal(array(value), student.float())
        assert isinstance(value.const_value, ir.LazyTensor)
        apply(model, [InsertQDQ()], feeds())
        np.testing.assert_array_equal(initializer(model, "w_distilled_q").astype(int), student.q)
        assert not any(INTEGERS in v.meta for v in model.graph.initializers.values())


def test_all_products_learn_from_float_data() -> None:
    """What the first of two products became must not change what the second one sees."""
    text = """
    g (float[batch,16] x) => (float[batch,16] y) {
      h = Neg (x)
      m = MatMul (h, w1)
      a = Relu (m)
      y = MatMul (a, w2)
    }"""
    data = feeds(16)
    spec = INT4.with_(granularity=PerAxis(1))
    joint = build(text, weight("w1", 16, 16), weight("w2", 16, 16))
    apply(joint, (*annotate(spec), Distill()), data)
    alone = build(text, weight("w1", 16, 16), weight("w2", 16, 16))
    rules = (Rule(("matmul",), None, layers="m"), Rule(("matmul",), spec, (PER_TOKEN,)))
    apply(alone, (Canonicalize(), Annotate("dynamic", rules=rules), Distill()), data)
    a, b = (m.graph.initializers["w2_distilled"].meta[INTEGERS][1].q for m in (joint, alone))
    np.testing.assert_array_equal(a, b)


def test_what_it_leaves_alone() -> None:
    text = """
    g (float[batch,16] x, int64[2] ids) => (float[batch,16] y, float[batch,16] z, float[2,16] e) {
      h = Neg (x)
      y = MatMul (h, w)
      z = MatMul (h, v)
      e = Gather (w, ids)
    }"""
    model = build(text, weight("w", 16, 16), weight("v", 16, 16))
    data = [{**feed, "ids": np.array([0, 1])} for feed in feeds(16)]
    asymmetric = Rule(("matmul",), WEIGHT.with_(symmetric=False), (PER_TOKEN,), layers="z")
    passes = (Canonicalize(), Annotate("dynamic", rules=(asymmetric,)), Distill())
    context = apply(model, passes, data, CPU)
    assert sorted(model.graph.initializers) == ["v", "w"]
    assert [(r.site, r.message) for r in context.remarks if r.pass_name == "distill"] == [
        ("y", "not distilled: others read its weight too, and need it as it is"),
        ("z", "not distilled: its weight has a zero point"),
    ]

    branches = if_model()
    apply(branches, (*annotate(), Distill()))
    assert not any("distilled" in name for name in branches.graph.initializers)


def test_rounding_to_nearest_stays_where_nothing_is_gained() -> None:
    """Weights that are exact cannot be bettered."""
    text = "g (float[batch,16] x) => (float[batch,2] y) { h = Neg (x) y = MatMul (h, w) }"
    w = np.random.default_rng(0).integers(-127, 128, (16, 2)).astype(np.float32)
    w[0] = 127
    model = build(text, ir.Tensor(w, name="w"))
    eye = {"x": np.eye(16, dtype=np.float32)}
    context = apply(model, (*annotate(WEIGHT), Distill()), [eye] * 4, ONNX)
    assert list(model.graph.initializers) == ["w"]
    (remark,) = (r for r in context.remarks if r.pass_name == "distill")
    assert (remark.kind, remark.numbers["noise"]) == ("declined", remark.numbers["undistilled"])


def test_on_saturating_targets_no_pair_can_overflow() -> None:
    for spec in (WEIGHT, WEIGHT.with_(bits=7)):
        model = product(k=64, n=16)
        apply(model, (*annotate(spec), Distill(), InsertQDQ()), feeds(64), CPU)
        name = "w_distilled" if "w_distilled_q" in model.graph.initializers else "w"
        q = initializer(model, f"{name}_q").astype(np.int32)
        assert not can_saturate(q, 255).any()


def test_few_tokens_or_zeros() -> None:
    for x in (np.zeros((3, 32)), np.zeros((40, 32)), tokens(1, 32), tokens(5, 32)):
        model = product()
        feed = {"x": x.astype(np.float32)}
        apply(model, (*annotate(), Distill(), *COMMIT), [feed], CPU, verify=False)
        assert np.isfinite(both(model, feed)[0]).all()


def test_a_transformer() -> None:
    rng = np.random.default_rng(0)
    data = [{"x": rng.normal(size=(2, 40, 16)).astype(np.float32)} for _ in range(8)]
    wanted = [outputs(transformer_block(), feed)[0] for feed in data]
    found = []
    for middle in ((), (Distill(),)):
        model = transformer_block()
        apply(model, (*annotate(), *middle, *COMMIT), data[:4], CPU)
        found.append(noise(model, wanted[4:], data[4:]))
    assert found[1] < found[0] - 1


def test_bad_inputs() -> None:
    with pytest.raises(QGraphError, match="sweeps=0 is out of range: use 1 or more"):
        Distill(sweeps=0)
    with pytest.raises(PipelineError, match="annotated"):
        PassManager([Distill()])
    model = product()
    context = Context(ONNX)
    with pytest.raises(CalibrationError, match="calibration data"):
        PassManager((*annotate(), Distill())).run(model, context)
    untouched = product()
    PassManager([Canonicalize(), Annotate("dynamic", rules=(Rule(("matmul",), None),)), Distill()])
    assert not Distill().run(untouched, Context(ONNX))


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 40), st.integers(1, 6), st.integers(1, 30), st.sampled_from([2, 4, 8]),
    st.booleans(), st.sampled_from(TARGETS), st.integers(0, 2**16),
)  # fmt: skip
def test_any_product(
    k: int, n: int, count: int, bits: int, trans_b: bool, target: Target, seed: int
) -> None:
    """Verified; with onnxruntime's optimizations or not, but where those round data once more."""
    dtype = ir.DataType.INT4 if bits <= 4 else ir.DataType.INT8
    spec = QuantSpec(dtype, PerBlock(0, 16), bits=2 if bits == 2 else 0, observer="mse")
    data = [{"x": tokens(count, k, seed + i).astype(np.float32)} for i in range(3)]
    model = product(k, n, trans_b=trans_b)
    context = apply(model, (*annotate(spec), Distill(), *COMMIT), data, target)
    if target is not ONNX:
        both(model, data[0])
    for remark in context.remarks:
        if remark.pass_name == "distill" and remark.kind == "applied":
            assert remark.numbers["noise"] < remark.numbers["undistilled"]
