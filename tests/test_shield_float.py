"""What was left float between integers stays float in onnxruntime, with its optimizations on."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.backends.lowering import shield_float
from qgraph.graph import array, is_op
from qgraph.numerics import sqnr_db
from qgraph.passes.annotate import Rule
from qgraph.session import open_session, run
from qgraph.target import Target
from qgraph.verify import check_structure
from tests.models import build, feed, ops, outputs, weight
from tests.pipelines import TARGETS, apply, body, golden, static

PARAMETERS = "<float s = {0.05}, uint8 z = {128}, float t = {0.0005}, uint8 u = {128}>"
CASES = {
    "conv": ("float[1,4,6,6]", "Conv (d, w)", (4, 4, 3, 3)),
    "conv with bias": ("float[1,4,6,6]", "Conv (d, w, b)", (4, 4, 3, 3)),
    "depthwise": ("float[1,4,6,6]", "Conv <group = 4> (d, w, b)", (4, 1, 3, 3)),
    "convolution over time": ("float[1,4,6]", "Conv (d, w, b)", (4, 4, 3)),
    "transposed": ("float[1,4,6,6]", "ConvTranspose (d, w, b)", (4, 4, 3, 3)),
    "gemm": ("float[6,8]", "Gemm (d, w, b)", (8, 4)),
    "gemm transposed": ("float[6,8]", "Gemm <transB = 1> (d, w, b)", (4, 8)),
}


def between_integers(name: str) -> ir.Model:
    """x -> Q -> DQ -> operator with a float weight -> Q -> DQ -> y."""
    kind, call, shape = CASES[name]
    text = f"""
    g ({kind} x) => (y) {PARAMETERS} {{
      q = QuantizeLinear (x, s, z)
      d = DequantizeLinear (q, s, z)
      f = {call}
      p = QuantizeLinear (f, s, z)
      y = DequantizeLinear (p, s, z)
    }}"""
    # weights in channels of very different size, which one int8 scale cannot hold
    return build(text, weight("w", *shape, spread=1e3), *([weight("b", 4)] if " b)" in call else []))


def optimized(model: ir.Model, given: dict[str, np.ndarray]) -> np.ndarray:
    result: np.ndarray = run(open_session(model, threads=1), given)[0]
    return result


@pytest.mark.parametrize("name", CASES)
def test_the_runtime_quantizes_float_weights_and_the_shield_keeps_it_from_that(name: str) -> None:
    model = between_integers(name)
    given_ = feed(model)
    wanted = outputs(model, given_)[0]
    print(name, np.abs(optimized(model, given_) - wanted).max())
    assert not np.allclose(optimized(model, given_), wanted, atol=0.051)
    assert shield_float(model)
    assert not check_structure(model)
    assert np.array_equal(outputs(model, given_)[0], wanted)
    assert np.allclose(optimized(model, given_), wanted, atol=0.051)  # one step
