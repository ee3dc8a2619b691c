"""The cache of attention in 8 and 4 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import qgraph
from qgraph.errors import CalibrationError, PipelineError, QGraphError
from qgraph.graph.attention import keeps_integers
from qgraph.graph.reading import is_op, nodes
from qgraph.io.session import open_session
from qgraph.numerics.noise import sqnr_db
from qgraph.passes.quantize_kv_cache import QuantizeKVCache
from tests.models import mlp, parsed, weight

HEADS, SIZE, WIDTH, POSITIONS = 2, 16, 64, 256
CACHE = f"batch,{HEADS},past,{SIZE}"


def decoder(attributes: str = "") -> ir.Model:
    """A layer of attention with a past, as onnxruntime-genai's builder writes them."""
    angles = np.outer(np.arange(POSITIONS), 10000.0 ** (-np.arange(SIZE // 2) * 2 / SIZE))
    text = f"""
    <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
    g (float[batch,length,{WIDTH}] x, int64[batch,total] attention_mask,
       float[{CACHE}] past_key, float[{CACHE}] past_value)
      => (float[batch,length,{WIDTH}] y, float[{CACHE.replace("past", "total")}] present_key,
          float[{CACHE.replace("past", "total")}] present_value) {{
      q = MatMul (x, wq)
      k = MatMul (x, wk)
      v = MatMul (x, wv)
      axis = Constant <value = int64[1] {{1}}> ()
      counts = ReduceSum <keepdims = 0> (attention_mask, axis)
      one = Constant <value = int64 {{1}}> ()
      before = Sub (counts, one)
      seqlens = Cast <to = 6> (before)
      sizes = Shape (attention_mask)
      most = Gather (sizes, one)
      total = Cast <to = 6> (most)
      a, present_key, present_value = com.microsoft.GroupQueryAttention
        <num_heads = 4, kv_num_heads = {HEADS}, do_rotary = 1 {attributes}>
        (q, k, v, past_key, past_value, seqlens, total, cosines, sines)
      y = MatMul (a, wo)
    }}"""
    return parsed(
        text,
        *(weight(name, WIDTH, WIDTH) for name in ("wq", "wo")),
        *(weight(name, WIDTH, HEADS * SIZE) for name in ("wk", "wv")),
        ir.Tensor(np.cos(angles).astype(np.float32), name="cosines"),
        ir.Tensor(np.sin(angles).astype(np.float32), name="sines"),
    )


def some(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, length, WIDTH)).astype(np.float32)


def calibration() -> list[dict[str, np.ndarray]]:
    return [state(some(60, seed), None, ir.DataType.FLOAT, SIZE) for seed in range(4)]


def state(
    x: np.ndarray, past: list[np.ndarray] | None, dtype: ir.DataType, size: int
) -> dict[str, np.ndarray]:
    empty = np.zeros((1, HEADS, 0, size), dtype.numpy())
    key, value = past or (empty, empty)
    total = key.shape[2] + x.shape[1]
    names = "past_key", "past_value"
    mask = np.ones((1, total), np.int64)
    return {"x": x, "attention_mask": mask, **dict(zip(names, (key, value), strict=True))}


def generate(model: ir.Model, x: np.ndarray, lengths: tuple[int, ...], level: bool) -> list[Any]:
    """What the model makes of x in runs of these lengths, and the cache after them."""
    key = next(v for v in model.graph.inputs if v.name == "past_key")
    assert key.shape is not None
    assert key.dtype is not None
    session, past, outputs = open_session(model, optimized=level, threads=1), None, []
    at = 0
    for length in lengths:
        given = state(
            x[:, at : at + length],
            past,
            key.dtype,
            SIZE if key.dtype != ir.DataType.UINT8 else SIZE // 2,
        )
        y, *past = session.run(None, given)
        outputs.append(y)
        at += length
    return [np.concatenate(outputs, axis=1), *(past or [])]


def compiled(bits: int, **given: Any) -> qgraph.CompiledModel:
    target = given.pop("target", "cpu:avx2")
    return qgraph.compile(
        decoder(), "dynamic", calibration(), target=target, kv_bits=bits, rules=FLOAT, **given
    )


FLOAT = (qgraph.passes.annotate.Rule(("matmul",), None),)
RUNS = (40, 1, 1, 20, 1, 2, 1)


@pytest.mark.parametrize("target", ["onnx", "cpu:avx2"])
@pytest.mark.parametrize(("bits", "least"), [(8, 28), (4, 13)])
def test_prompts_and_tokens_through_the_cache(bits: int, least: float, target: str) -> None:
    x = some(sum(RUNS), 9)
    exact, *_ = generate(decoder(), x, RUNS, True)
    two, one = compiled(bits, target=target), compiled(bits, target=target, bodies=1)
    assert [is_op(m.model.graph[-1], "If") for m in (two, one)] == [True, False]
    assert sum(keeps_integers(n) for n in nodes(two.model)) == 1
    results = [generate(m.model, x, RUNS, level) for m in (two, one) for level in (False, True)]
    for y, key, value in results:
        assert sqnr_db(exact, y) > least
        for cache in (key, value):
            assert cache.dtype == (np.int8 if bits == 8 else np.uint8)
            assert cache.shape == (1, HEADS, sum(RUNS), SIZE * bits // 8)
    # What prompts leave in the cache is the same from both kinds of attention, but for ties.
    for a, b in ((results[0][1], results[2][1]), (results[0][2], results[2][2])):
        assert np.mean(a != b) < 0.01
    applied = [r for r in two.remarks if r.pass_name == "quantize-kv-cache"]
    assert applied[0].numbers["bytes"] == 2 * HEADS * SIZE * bits / 8


def test_a_batch_of_tokens_reads_the_integers() -> None:
    two = compiled(8)
    one = compiled(8, bodies=1)
    for length in (1, 20):
        given = state(some(length, 3), None, ir.DataType.INT8, SIZE)
        given = {name: np.concatenate([array] * 20) for name, array in given.items()}
        a, b = (open_session(m.model, threads=1).run(None, given)[0] for m in (two, one))
        assert np.array_equal(a, b) == (length == 1)  # sixteen tokens of a sequence are a prompt


def test_windows_stay_float() -> None:
    model = decoder(", sliding_window_cache = 1, local_window_size = 8")
    with pytest.raises(QGraphError, match="kv_bits=8 needs attention with a cache"):
        qgraph.compile(model, "rtn", calibration(), target="onnx", kv_bits=8)


def test_models_without_a_cache() -> None:
    data = [{"x": np.ones((1, 16), np.float32)}]
    with pytest.raises(
        QGraphError, match=r"kv_bits=8 needs attention with a cache .* leave it out"
    ):
        qgraph.compile(mlp(), "rtn", data, target="onnx", kv_bits=8)


def test_bad_input() -> None:
    with pytest.raises(PipelineError, match="bits=5 is out of range for a cache: use 8 or 4"):
        QuantizeKVCache(bits=5)
    with pytest.raises(QGraphError, match="'rtn' needs calibration data"):
        qgraph.compile(decoder(), "rtn", target="onnx", kv_bits=8)
    broken = calibration()
    broken[0]["x"] = broken[0]["x"] * np.nan
    with pytest.raises(CalibrationError):
        qgraph.compile(decoder(), "rtn", broken, target="onnx", kv_bits=8)
