"""Per-token quantization as the cpu backend spells it out, and the magnitudes it defers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.backends.cpu.tokens import defer_scales, lower_quantizers
from qgraph.backends.lowering.products import lower_products
from qgraph.io.session import open_session, run
from qgraph.passes.insert_qdq import InsertQDQ
from tests.models import build, feed, ops, weight
from tests.pipelines import CPU, annotate, apply

GATED = """
g (float[N,16] x) => (float[N,4] y) {
  gate = MatMul (x, wg)
  active = Sigmoid (gate)
  up = MatMul (x, wu)
  h = Mul (active, up)
  y = MatMul (h, wd)
}"""


def committed(opset: int) -> ir.Model:
    """A gated MLP quantized token by token, its products lowered, its quantizers still calls."""
    model = build(GATED, weight("wg", 16, 24), weight("wu", 16, 24), weight("wd", 24, 4))
    model.opset_imports[""] = opset
    apply(model, (*annotate(), InsertQDQ()), target=CPU)
    lower_products(model, "onnxruntime")
    return model


@pytest.mark.parametrize("opset", [17, 21])
def test_the_magnitude_passes_by_the_gate(opset: int) -> None:
    model = committed(opset)
    given = feed(model)
    given["x"] = given["x"] * np.geomspace(1e-3, 1e3, len(given["x"]))[:, None].astype(np.float32)
    given["x"][0] = 0.0
    before = run(open_session(model, optimized=False), given)[0]
    assert defer_scales(model)
    up = next(n for n in model.graph if n.outputs[0].name == "h")
    producers = [v.producer().op_type for v in up.inputs if v is not None and v.producer()]  # type: ignore[union-attr]
    assert "MatMulIntegerToFloat" in producers
    assert not defer_scales(model)
    assert lower_quantizers(model)
    assert ("Div" in ops(model)) == (opset < 21)
    for optimized in (False, True):
        after = run(open_session(model, optimized=optimized), given)[0]
        # A step of h can round the other way, no more.
        np.testing.assert_allclose(
            after, before, atol=0.02 * np.abs(before).max(axis=1).min() + 1e-6, rtol=0.05
        )


def test_a_magnitude_that_others_read_is_not_deferred() -> None:
    model = committed(21)
    up = next(n for n in model.graph if n.name == "up")
    model.graph.outputs.append(up.outputs[0])
    assert not defer_scales(model)
