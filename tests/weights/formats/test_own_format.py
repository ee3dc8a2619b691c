"""A format that qgraph does not have: integers of 3 bits, one stream of bits in words of 32."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from qgraph.graph import add_constant, insert
from qgraph.graph.functions import DOMAIN, declare
from qgraph.graph.sites import PRODUCTS, Site
from qgraph.io.session import open_session, run
from qgraph.numerics.packing import WORD, pack
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.spec import PerBlock, QuantSpec
from qgraph.passes.annotate import Annotate, Rule
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.passes.lower import Lower
from qgraph.pipeline.pass_manager import Pass
from qgraph.weights import formats
from qgraph.weights.formats.blocks import quantize_in_groups
from qgraph.weights.formats.format import Format, Reader
from tests.models import feed, if_model, mlp
from tests.pipelines import apply, initializer

BITS = 3
BODY = """
<opset_import: ["" : 21], domain: "qgraph">
DequantizeWords (words, low, high, shift, scale, blocks, matrix) => (w) {
  wide = Cast <to = 13> (words)
  first = Gather <axis = 1> (wide, low)
  second = Gather <axis = 1> (wide, high)
  bits = Constant <value = uint64 {32}> ()
  above = BitShift <direction = "LEFT"> (second, bits)
  both = BitwiseOr (first, above)
  moved = BitShift <direction = "RIGHT"> (both, shift)
  mask = Constant <value = uint64 {7}> ()
  codes = BitwiseAnd (moved, mask)
  floats = Cast <to = 1> (codes)
  middle = Constant <value = float {4.0}> ()
  integers = Sub (floats, middle)
  in_blocks = Reshape (integers, blocks)
  scaled = Mul (in_blocks, scale)
  rows = Reshape (scaled, matrix)
  w = Transpose <perm = [1, 0]> (rows)
}
"""


class Words(Format):
    """Symmetric integers of 3 bits in blocks of a matrix (K, N), K and blocks multiples of 32."""

    def owns(self, spec: QuantSpec) -> bool:
        return spec.width == BITS and isinstance(spec.granularity, PerBlock)

    def fits(self, spec: QuantSpec, site: Site, data: QuantSpec | None, version: int) -> str | None:
        return "K is no multiple of 32" if site.kn[0] % WORD else None

    def quantize(self, w: np.ndarray, spec: QuantSpec) -> Quantized:
        assert isinstance(spec.granularity, PerBlock)
        return quantize_in_groups(w, spec.granularity, spec)

    def write(self, model: ir.Model, base: str, weight: Quantized, spec: QuantSpec) -> Reader:
        declare(model, "DequantizeWords", _function)
        k, n = weight.q.shape
        words = pack((weight.q.T + 4).astype(np.uint8), BITS).view(np.uint32)
        place = np.arange(k) * BITS
        last = np.minimum(place // WORD + 1, words.shape[1] - 1)
        parts = {
            "words": words,
            "low": place // WORD,
            "high": last,
            "shift": (place % WORD).astype(np.uint64),
            "scale": np.ascontiguousarray(weight.scale.T)[:, :, np.newaxis],
            "blocks": np.array([n, -1, weight.block]),
            "matrix": np.array([n, k]),
        }
        inputs = [add_constant(model, f"{base}_{name}", data) for name, data in parts.items()]
        call = insert(
            model, model.graph[0], "DequantizeWords", inputs, base=f"{base}_float", domain=DOMAIN
        )
        call.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        call.outputs[0].shape = ir.Shape((k, n))
        return lambda _: call.outputs[0]


def _function(version: int) -> ir.Function:
    return ir.serde.deserialize_function(onnx.parser.parse_function(BODY))


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", [Words(), *formats.FORMATS])


def quantized_by(spec: QuantSpec) -> list[Pass]:
    return [Canonicalize(), Annotate(rules=(Rule(PRODUCTS, spec),)), InsertQDQ()]


def test_it_is_quantized_written_and_computed_by_the_body_of_its_function() -> None:
    model = mlp((64, 32, 96))
    weights = [model.graph.initializers[f"w{i}"] for i in (0, 1)]
    floats = [np.array(w.const_value.numpy()) for w in weights if w.const_value is not None]
    spec = QuantSpec(ir.DataType.INT4, PerBlock(0, 32), observer="absmax", bits=BITS)
    context = apply(model, [*quantized_by(spec), Lower()])

    stored = {str(v.name): v.const_value for v in model.graph.initializers.values()}
    for i, w in enumerate(floats):
        (words,) = (t for name, t in stored.items() if name.startswith(f"w{i}_words") and t)
        assert words.nbytes * 8 == w.size * BITS
        assert words.dtype == ir.DataType.UINT32

    rounded = [formats.of(spec).round_trip(w, spec) for w in floats]
    assert all(0 < np.abs(a - b).max() < 0.5 for a, b in zip(floats, rounded, strict=True))
    biases = [initializer(model, f"b{i}") for i in (0, 1)]
    x = feed(model)["x"]
    expected = np.maximum(x @ rounded[0] + biases[0], 0) @ rounded[1] + biases[1]
    for optimized in (False, True):
        (y,) = run(open_session(model, optimized=optimized), {"x": x})
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    (message,) = {r.message for r in context.remarks if r.kind == "quantized"}
    assert message == "weights int4 in blocks of 32, float activations"


def test_where_it_does_not_fit_the_reason_is_said() -> None:
    model = if_model()
    context = apply(model, quantized_by(QuantSpec(ir.DataType.INT4, PerBlock(0, 32), bits=BITS)))
    reasons = {r.message for r in context.remarks if r.kind == "declined"}
    assert reasons == {"weights are not int4 in blocks of 32: K is no multiple of 32"}
