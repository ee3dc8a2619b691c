"""Values at the edges of what floats hold: tokens of zeros, masks of infinities, bounded tokens."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph.graph.ops import lowest_value
from qgraph.graph.sites import sites
from qgraph.io.session import open_session, run
from qgraph.numerics.noise import sqnr_db
from qgraph.numerics.tokens import token_grid
from qgraph.passes.annotate import Scheme
from qgraph.passes.guard_static import GuardStatic
from qgraph.pipeline.remarks import Remarks
from qgraph.pipeline.target import Target
from tests.models import build, feed, outputs, transformer_block, weight
from tests.pipelines import COMMIT, TARGETS, annotate, apply, dynamic, initializer, static

# --- tokens of zeros ------------------------------------------------------------------------------

MLP = """
mlp (float[2,T,16] x) => (float[2,T,8] y) {
  m = MatMul (x, w1)
  a = Add (m, b1)
  h = Relu (a)
  n = MatMul (h, w2)
  y = Add (n, b2)
}"""


def padded_mlp() -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Half of the tokens that go in are zeros, and behind Relu, so are some that were not."""
    low = ir.Tensor(np.full(24, -0.5, np.float32), name="b1")
    model = build(MLP, weight("w1", 16, 24), low, weight("w2", 24, 8), weight("b2", 8))
    x = np.random.default_rng(0).standard_normal((2, 9, 16)).astype(np.float32)
    x[0, :6] = 0
    x[1, 2] = 0
    x[1, 3:6] *= 1e-3  # all below Relu's zero
    return model, {"x": x}


@pytest.mark.parametrize("min_sqnr", [-1e9, 25.0, 1e9], ids=["static", "usual", "dynamic"])
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_tokens_of_zeros_give_no_nan(target: Target, min_sqnr: float) -> None:
    model, given = padded_mlp()
    wanted = outputs(model, given)[0]
    apply(model, (*annotate("static"), GuardStatic(min_sqnr=min_sqnr), *COMMIT), [given], target)
    for optimized in (False, True):
        found = run(open_session(model, optimized=optimized, threads=1), given)[0]
        assert np.isfinite(found).all()
        assert sqnr_db(wanted, found) > 30
        assert sqnr_db(wanted[0, :6], found[0, :6]) > 30


@pytest.mark.parametrize("recipe", ["static", "dynamic"])
@pytest.mark.parametrize("target", ["cpu", "cpu:avx2", "onnx"])
def test_nothing_but_zeros(recipe: str, target: str) -> None:
    model = transformer_block()
    zeros = {"x": np.zeros((1, 4, 16), np.float32)}
    wanted = outputs(model, zeros)[0]
    compiled = qgraph.compile(model, recipe, [zeros], target)
    for optimized in (False, True):
        session = open_session(compiled.model, optimized=optimized, threads=1)
        found = run(session, zeros)[0]
        assert sqnr_db(wanted, found) > 25
        assert np.isfinite(run(session, feed(model))[0]).all()


def test_padding_does_not_count_as_tokens_that_static_scales_serve_badly() -> None:
    model, given = padded_mlp()
    given["x"][:, 1:7] = 0
    remarks = apply(model, static(), [given]).remarks
    assert verdicts(remarks) == {"m": "static", "n": "static"}


def verdicts(remarks: Remarks) -> dict[str, str]:
    return {
        site: "dynamic" if "dynamic" in remark.message else "static"
        for site, remark in remarks.verdicts().items()
    }


# --- tables of infinities -------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["static", "dynamic"])
def test_a_mask_that_is_looked_up_stays_float(recipe: str) -> None:
    mask = np.triu(np.full((160, 160), -np.inf, np.float32), 1)
    text = "g (int64[5] ids) => (float[5,160] y) { y = Gather (w, ids) }"
    model = build(text, ir.Tensor(mask, name="w"))
    feeds = [{"ids": np.arange(5)}]
    compiled = qgraph.compile(model, recipe, feeds, "onnx")
    assert np.array_equal(compiled(feeds[0]), mask[:5])
    assert "infinities" in compiled.remarks.verdicts()["y"].message


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_weight_that_is_not_finite_stays_float(bad: float) -> None:
    w = weight("w", 16, 8).numpy().copy()
    w[3, 4] = bad
    text = "g (float[5,16] x) => (float[5,8] y) { y = MatMul (x, w) }"
    model = build(text, ir.Tensor(w, name="w"))
    remarks = apply(model, dynamic(), verify=False).remarks
    assert "NaN" in remarks.verdicts()["y"].message


def test_the_most_negative_float_masks_exactly_enough() -> None:
    mask = np.triu(np.full((160, 160), np.finfo(np.float32).min, np.float32), 1)
    text = "g (int64[5] ids) => (float[5,160] y) { y = Gather (w, ids) }"
    model = build(text, ir.Tensor(mask, name="w"))
    given = {"ids": np.array([0, 3, 159])[[0, 1, 2, 0, 1]]}
    compiled = qgraph.compile(model, "dynamic", target="onnx")
    found = compiled(given)
    assert (found[mask[given["ids"]] == 0] == 0).all()
    assert (found[mask[given["ids"]] < 0] < -1e38).all()


# --- values that activation functions bound -------------------------------------------------------

BOUNDED = {
    "Relu": ("b = Relu (x)", 0),
    "Gelu": ("b = Gelu (x)", 32),
    "Sigmoid": ("b = Sigmoid (x)", 0),
    "reshaped": ("r = Relu (x) b = Reshape (r, shape)", 0),
    "transposed": ("r = Gelu (x) b = Transpose <perm = [1,0,2]> (r)", 32),
    "both": ("g = Gelu (x) t = Transpose <perm = [1,0,2]> (g) b = Reshape (t, shape)", 32),
    "flattened": ("g = Relu (x) f = Flatten <axis = 2> (g) b = Unsqueeze (f, zeroth)", 0),
    "cast": ("h = Cast <to = 10> (x) r = Relu (h) b = Cast <to = 1> (r)", 0),
    "negated": ("r = Relu (x) b = Neg (r)", 128),
    "added to": ("r = Relu (x) b = Add (r, x)", 128),
    "an input": ("b = Identity (x)", 128),
}


def bounded(statements: str) -> ir.Model:
    """The product of tokens whose values `statements` bound."""
    shape = ir.Tensor(np.array([2, 12, 64], np.int64), name="shape")
    zeroth = ir.Tensor(np.array([0], np.int64), name="zeroth")
    text = f"g (float[3,8,64] x) => (y) {{ {statements} y = MatMul (b, w) }}"
    used = [t for t in (shape, zeroth) if str(t.name) in statements]
    return build(text, weight("w", 64, 16), *used)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("name", BOUNDED)
def test_bounds_are_seen_through_what_only_moves_data(name: str, target: Target) -> None:
    statements, zero = BOUNDED[name]
    model = bounded(statements)
    given = feed(model)
    given["x"][0, 1] = -3.0  # tokens without a positive value
    given["x"][0, 2] = 0.0
    wanted = outputs(model, given)[0]
    apply(model, dynamic(), [given], target)
    zeros = [v for v in model.graph.initializers if "token_zero" in v]
    assert [int(initializer(model, v)) for v in zeros] == [zero]
    for optimized in (False, True):
        found = run(open_session(model, optimized=optimized, threads=1), given)[0]
        assert sqnr_db(wanted, found) > 38


def test_the_lowest_values() -> None:
    (site,) = sites(bounded(BOUNDED["both"][0]))
    assert lowest_value(site.x) == -0.17
    assert token_grid(lowest_value(site.x)).zero == 32
    assert lowest_value(None) is None
    assert lowest_value(site.weight) is None


@pytest.mark.parametrize(
    ("text", "factors", "lowest"),
    [
        ("y = Mul (g, f)", [1.0, 0.0], -0.17),
        ("y = Mul (f, g)", [2.0], -0.34),
        ("m = Mul (g, f) t = Identity (m) y = Mul (t, f)", [2.0, 0.0], -0.68),
        ("r = Relu (g) y = Mul (r, f)", [2.0, 5.0], 0.0),
        ("y = Mul (g, f)", [2.0, 5.0], None),
        ("y = Mul (g, f)", [0.0, 0.0], 0.0),
        ("y = Mul (g, f)", [1.0, -0.5], None),
        ("y = Mul (g, f)", [1.0, np.inf], None),
        ("y = Mul (g, f)", [1.0, np.nan], None),
        ("y = Mul (x, f)", [1.0, 1.0], None),
        ("y = Mul (g, g)", [1.0, 1.0], None),
        ("y = Div (g, f)", [1.0, 1.0], None),
    ],
)
def test_a_bound_survives_masks_and_a_bound_of_0_all_factors(
    text: str, factors: list[float], lowest: float | None
) -> None:
    model = build(
        f"g (float[3,2] x) => (float[3,2] y) {{ g = Gelu (x) {text} }}",
        ir.Tensor(np.array(factors, np.float32), name="f"),
    )
    assert lowest_value(model.graph.outputs[0]) == pytest.approx(lowest)


@pytest.mark.parametrize("op", ["Relu", "Gelu", "Sigmoid", "Softmax", "HardSwish", "Abs", "Exp"])
def test_the_bound_of_an_operator_holds(op: str) -> None:
    model = build(f"g (float[4000] x) => (float[4000] y) {{ y = {op} (x) }}")
    x = np.linspace(-30, 30, 4000, dtype=np.float32)
    lowest = lowest_value(model.graph.outputs[0])
    assert lowest is not None
    y = outputs(model, {"x": x})[0]
    assert y.min() >= lowest
    assert y.min() < lowest + 0.01 or op == "Softmax"


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_bounded_tokens_of_zeros(scheme: Scheme) -> None:
    model = bounded(BOUNDED["transposed"][0])
    given = feed(model)
    given["x"][1] = 0
    wanted = outputs(model, given)[0]
    apply(model, (*annotate(scheme), *COMMIT), [given])
    found = outputs(model, given)[0]
    assert sqnr_db(wanted, found) > 25
    if scheme == "dynamic":
        assert not found[:, 1].any()
