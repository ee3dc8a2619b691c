"""Random small graphs with what is odd in them, all at once: each compiles, runs and agrees."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.end_to_end.test_odd_graphs import check, normal, scaled, written
from tests.models import build, weight

STEPS = {
    "shared": "{y} = MatMul({x}, w)",
    "own": "{y} = MatMul({x}, v)",
    "relu": "{y} = Relu({x})",
    "gemm": "{y} = Gemm <transB = 1> ({x}, w, bias)",
    "twice": "{y} = Add({x}, {x})",
    "if": """{y} = If (c) <
        then_branch = t{i} () => (float[p{i},16] a{i}) {{ a{i} = MatMul({x}, w) }},
        else_branch = e{i} () => (float[q{i},16] b{i}) {{ b{i} = Neg({x}) }}
    >""",
}


@st.composite
def odd_graphs(draw: st.DrawFn) -> ir.Model:
    """A chain of steps over one shared weight, of any magnitude, and a second input of its own
    batch, called as the first one's."""
    names = draw(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4))
    lines = [STEPS[n].format(x=f"x{i}", y=f"x{i + 1}", i=i) for i, n in enumerate(names)]
    lines += [f"y = Identity(x{len(names)})", "z = MatMul(other, w)"]
    text = (
        "m (float[batch,16] x0, float[batch,16] other, bool c) => (float[k,16] y, float[l,16] z) {"
    )
    size = draw(st.sampled_from([1.0, 1.0, 1e-30, 1e-4]))
    tensors = [scaled(weight("w", 16, 16), size), weight("v", 16, 16), weight("bias", 16)]
    return build("\n".join([text, *lines, "}"]), *tensors)


@pytest.mark.parametrize("target", ["onnx", "cpu:avx2"])
@given(odd_graphs(), st.sampled_from(["dynamic", "static", "rtn"]), st.sampled_from([0, 1, 3]))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_odd_graphs(target: str, model: ir.Model, recipe: str, rows: int) -> None:
    typical = {"x0": normal(8, 16), "other": normal(8, 16, seed=1), "c": np.array(True)}
    feeds = [
        typical | {"x0": normal(rows, 16, seed=2), "c": np.array(flag)} for flag in (True, False)
    ]
    both = [typical | {"c": np.array(flag)} for flag in (True, False)]
    with tempfile.TemporaryDirectory() as folder:
        check(model, written(model, Path(folder), recipe, target, both), feeds, 3)
