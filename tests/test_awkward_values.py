"""Values at the edges of what floats hold: tokens of zeros, masks of infinities, bounded tokens."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph.context import Remarks
from qgraph.numerics import sqnr_db
from qgraph.passes.guard_static import GuardStatic
from qgraph.session import open_session, run
from qgraph.target import Target
from tests.models import build, feed, outputs, transformer_block, weight
from tests.pipelines import COMMIT, TARGETS, annotate, apply, static

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
