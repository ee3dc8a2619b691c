"""Checkpoints that others have quantized: packed here from the published formats, read there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal as assert_equal
from numpy.typing import NDArray
from safetensors.numpy import save_file

import qgraph
from qgraph.errors import ModelError, QGraphError
from qgraph.graph.reading import array
from qgraph.io.checkpoints.packed_layers import Layer, awq_layer, bnb_layer, gptq_layer, joined
from qgraph.io.checkpoints.resemblance import fitted
from qgraph.io.kv_cache import complete_feed
from qgraph.io.session import open_session, run
from qgraph.numerics.codebooks import LEVELS, dynamic_map
from qgraph.numerics.packing import unpack
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.load_checkpoint import LoadCheckpoint
from qgraph.recipes.weight_types import checkpoint
from tests.models import build, weight
from tests.pipelines import CPU, apply, body, golden, node

Array = NDArray[Any]
HIDDEN, SMALL, WORDS, GROUP = 64, 32, 96, 32

# ------------------------------------------------- packing, written from the formats' descriptions


def stream_of_words(values: Array, bits: int) -> Array:
    """GPTQ along the first axis: 32 integers of 3 bits lie in 3 words, two of them split."""
    result = []
    for column in values.T.astype(np.int64).tolist():
        words = []
        for start in range(0, len(column), 32):
            v = column[start : start + 32]
            if bits == 3:
                low = sum(x << (3 * i) for i, x in enumerate(v[:10])) | (v[10] & 3) << 30
                middle = v[10] >> 2 | sum(x << (3 * i + 1) for i, x in enumerate(v[11:21]))
                middle |= (v[21] & 1) << 31
                high = v[21] >> 1 | sum(x << (3 * i + 2) for i, x in enumerate(v[22:]))
                words += [low, middle, high]
                continue
            per = 32 // bits
            for first in range(0, len(v), per):
                words.append(sum(x << (bits * i) for i, x in enumerate(v[first : first + per])))
        result.append(words)
    return np.array(result, np.uint32).T.copy().view(np.int32)


def awq_words(values: Array) -> Array:
    """AWQ's GEMM layout along the second axis."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for column in range(words.shape[1]):
        for nibble, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words[:, column] |= values[:, column * 8 + place].astype(np.uint32) << (4 * nibble)
    return words.view(np.int32)


@dataclass(frozen=True)
class Packed:
    """A linear layer as a checkpoint has it, and the float weight (K, N) that it stands for."""

    tensors: dict[str, Array]
    floats: Array


def rounded(
    w: Array, groups: Array, bits: int, *, symmetric: bool, lowest: int = 0
) -> tuple[Array, Array, Array]:
    """Integers (K, N), zero points and half-precision scales (groups, N) of w (K, N)."""
    count, top = int(groups.max()) + 1, (1 << bits) - 1
    q = np.zeros(w.shape, np.int64)
    zero, scale = np.zeros((count, w.shape[1]), np.int64), np.zeros((count, w.shape[1]), np.float16)
    for g in range(count):
        rows = w[groups == g]
        low, high = np.minimum(rows.min(axis=0), 0), np.maximum(rows.max(axis=0), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scale[g] = (high - low) / top
        exact = -low / scale[g].astype(np.float32)
        zero[g] = (top + 1) // 2 if symmetric else np.clip(np.rint(exact), lowest, top)
        steps = np.rint(rows / scale[g].astype(np.float32))
        q[groups == g] = np.clip(steps + zero[g], 0, top)
    return q, zero, scale


def gptq(
    w: Array,
    bits: int = 4,
    size: int = GROUP,
    *,
    symmetric: bool = True,
    order: Array | None = None,
    v2: bool = False,
) -> Packed:
    groups = np.arange(len(w)) // size
    if order is not None:
        groups = groups[np.argsort(order)]
    q, zero, scale = rounded(w, groups, bits, symmetric=symmetric, lowest=0 if v2 else 1)
    stored = zero if v2 else zero - 1
    if stored.shape[1] % 32:  # words are whole
        stored = np.pad(stored, [(0, 0), (0, -stored.shape[1] % 32)])
    tensors = {
        "qweight": stream_of_words(q, bits),
        "qzeros": stream_of_words(stored.T, bits).T.copy(),
        "scales": scale,
        "g_idx": groups.astype(np.int32),
    }
    floats = (q - zero[groups]) * scale[groups].astype(np.float32)
    return Packed(tensors, floats.astype(np.float32))


def awq(w: Array, size: int = GROUP) -> Packed:
    groups = np.arange(len(w)) // size
    q, zero, scale = rounded(w, groups, 4, symmetric=False)
    tensors = {"qweight": awq_words(q), "qzeros": awq_words(zero), "scales": scale}
    floats = (q - zero[groups]) * scale[groups].astype(np.float32)
    return Packed(tensors, floats.astype(np.float32))


def bnb(w: Array, kind: str = "nf4", size: int = GROUP, *, double: bool = False) -> Packed:
    flat = w.T.reshape(-1, size)
    absmax = np.abs(flat).max(axis=1)
    levels = LEVELS[kind]  # type: ignore[index]
    codes = np.abs((flat / absmax[:, None])[..., None] - levels).argmin(axis=-1).reshape(-1)
    state = {"quant_type": kind, "blocksize": size, "dtype": "float16", "shape": list(w.T.shape)}
    tensors: dict[str, Array] = {"weight.absmax": absmax}
    if double:
        offset = np.float32(absmax.mean())
        blocks = np.pad(absmax - offset, (0, -absmax.size % 256)).reshape(-1, 256)
        largest = np.abs(blocks).max(axis=1)
        table = dynamic_map()
        found = np.abs((blocks / largest[:, None])[..., None] - table).argmin(axis=-1)
        found = found.reshape(-1)[: absmax.size].astype(np.uint8)
        absmax = table[found] * np.repeat(largest, 256)[: absmax.size] + offset
        tensors = {
            "weight.absmax": found,
            "weight.nested_absmax": largest,
            "weight.nested_quant_map": table,
        }
        state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
        state |= {"nested_offset": float(offset)}
    tensors |= {
        "weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, np.newaxis],
        "weight.quant_map": levels,
        f"weight.quant_state.bitsandbytes__{kind}": np.frombuffer(
            json.dumps(state).encode(), np.uint8
        ),
    }
    floats = levels[codes] * np.repeat(absmax, size)
    return Packed(tensors, floats.reshape(w.T.shape).T.astype(np.float32))


# ------------------------------------------------------------------------ a model, and its folder

APART = f"""
g (int64[batch,seq] ids) => (float[batch,seq,{WORDS}] y) {{
  e = Gather (embed, ids)
  h = Mul (e, norm)
  m = MatMul (h, q)
  b = Add (m, bias)
  ks = MatMul (h, k)
  vs = MatMul (h, v)
  c = Concat <axis = -1> (ks, vs)
  a = Mul (b, c)
  o1 = MatMul (a, o)
  r = Add (e, o1)
  y = MatMul (r, head)
}}"""
TOGETHER = f"""
g (int64[batch,seq] ids) => (float[batch,seq,{WORDS}] y) {{
  e = Gather (embed, ids)
  h = Mul (e, norm)
  m0 = MatMul (h, qkv)
  m = Add (m0, packed)
  b, c = Split <axis = -1, num_outputs = 2> (m)
  a = Mul (b, c)
  o1 = MatMul (a, o)
  r = Add (e, o1)
  y = MatMul (r, head)
}}"""
TRACED = {
    "e": "model.embed_tokens/Gather",
    "h": "model.layers.0.input_layernorm/Mul",
    "m": "model.layers.0.self_attn.q_proj/MatMul",
    "b": "model.layers.0.self_attn.q_proj/Add",
    "ks": "model.layers.0.self_attn.k_proj/MatMul",
    "vs": "model.layers.0.self_attn.v_proj/MatMul",
    "o1": "model.layers.0.self_attn.o_proj/MatMul",
    "y": "lm_head/MatMul",
}
BUILT = {
    "e": "/model/embed_tokens/Gather",
    "h": "/model/layers.0/input_layernorm/Mul",
    "m0": "/model/layers.0/attn/qkv_proj/MatMul",
    "m": "/model/layers.0/attn/qkv_proj/Add",
    "o1": "/model/layers.0/attn/o_proj/MatMul",
    "y": "/lm_head/MatMul",
}
ATTENTION = "model.layers.0.self_attn"
Q, K, V, O = (f"{ATTENTION}.{part}_proj" for part in "qkvo")
SHAPES = {Q: (HIDDEN, HIDDEN), K: (HIDDEN, SMALL), V: (HIDDEN, SMALL), O: (HIDDEN, HIDDEN)}


def floats(seed: int = 0) -> dict[str, Array]:
    """The float model's tensors; matrices of products as (K, N)."""
    rng = np.random.default_rng(seed)
    shapes = SHAPES | {"lm_head": (HIDDEN, WORDS), "model.embed_tokens": (WORDS, HIDDEN)}
    made = {name: weight(name, *shape, seed=seed).numpy() for name, shape in shapes.items()}
    made["model.embed_tokens"] = made["model.embed_tokens"] * 4
    made["model.layers.0.input_layernorm"] = rng.uniform(0.5, 2, HIDDEN).astype(np.float32)
    made[f"{Q}.bias"] = rng.standard_normal(HIDDEN).astype(np.float32)
    return made


def graph(w: Mapping[str, Array], *, packed: bool = False) -> ir.Model:
    """The float model, as it is traced, or as a builder writes it."""
    tensors = {
        "embed": w["model.embed_tokens"],
        "norm": w["model.layers.0.input_layernorm"],
        "o": w[O],
        "head": w["lm_head"],
    }
    if packed:
        tensors["qkv"] = np.concatenate([w[Q], w[K], w[V]], axis=1)
        tensors["packed"] = np.concatenate([w[f"{Q}.bias"], np.zeros(2 * SMALL, np.float32)])
    else:
        tensors |= {"q": w[Q], "k": w[K], "v": w[V], "bias": w[f"{Q}.bias"]}
    made = build(
        TOGETHER if packed else APART,
        *(ir.Tensor(np.ascontiguousarray(array), name=name) for name, array in tensors.items()),
    )
    names = BUILT if packed else TRACED
    for n in made.graph:
        n.name = names.get(str(n.outputs[0].name), n.name)
    return made


def write(
    folder: Path,
    layers: Mapping[str, Packed],
    w: Mapping[str, Array],
    config: Mapping[str, Any],
    *,
    shards: int = 1,
) -> Path:
    """A checkpoint with these quantized layers, the other tensors of `w` in bfloat16."""
    tensors = {f"{m}.{p}": a for m, layer in layers.items() for p, a in layer.tensors.items()}
    for name, values in w.items():
        if name in layers:
            continue
        stored = values.T if name in (*SHAPES, "lm_head") else values
        stored = np.ascontiguousarray(stored).astype(ml_dtypes.bfloat16)
        tensors[name if name.endswith("bias") else f"{name}.weight"] = stored
    if "qkv" in config:  # builders pack biases, too
        zeros = np.zeros(SMALL, ml_dtypes.bfloat16)
        tensors |= {f"{K}.bias": zeros, f"{V}.bias": zeros}
    folder.mkdir(exist_ok=True)
    parts = [dict(list(tensors.items())[i::shards]) for i in range(shards)]
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(shards)]
        listed = {n: file for part, file in zip(parts, files, strict=True) for n in part}
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    for part, file in zip(parts, files, strict=True):
        save_file(part, folder / file)
    settings = {key: value for key, value in config.items() if key != "qkv"}
    full = {"model_type": "llama", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(full))
    return folder


def half(w: Mapping[str, Array]) -> dict[str, Array]:
    """What bfloat16 makes of them."""
    return {n: a.astype(ml_dtypes.bfloat16).astype(np.float32) for n, a in w.items()}


ACT_ORDER = np.random.default_rng(7).permutation(HIDDEN)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
FORMATS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptq": (gptq, GPTQ),
    "gptq-asymmetric": (lambda w: gptq(w, symmetric=False), GPTQ),
    "gptq-v2": (
        lambda w: gptq(w, symmetric=False, v2=True),
        GPTQ | {"checkpoint_format": "gptq_v2"},
    ),
    "gptq-2": (lambda w: gptq(w, 2, symmetric=False), GPTQ | {"bits": 2}),
    "gptq-3": (lambda w: gptq(w, 3, symmetric=False), GPTQ | {"bits": 3}),
    "gptq-8": (lambda w: gptq(w, 8), GPTQ | {"bits": 8}),
    "gptq-channels": (lambda w: gptq(w, size=HIDDEN), GPTQ | {"group_size": -1}),
    "gptq-act-order": (lambda w: gptq(w, symmetric=False, order=ACT_ORDER), GPTQ),
    "awq": (awq, AWQ),
    "nf4": (bnb, BNB),
    "nf4-double": (lambda w: bnb(w, double=True), BNB),
    "fp4": (lambda w: bnb(w, "fp4"), BNB),
}


def saved(folder: Path, name: str, *, shards: int = 1, qkv: bool = False) -> dict[str, Array]:
    """Write a checkpoint of that format into `folder`; returns what its tensors stand for."""
    pack, config = FORMATS[name]
    w = floats()
    layers = {module: pack(w[module]) for module in SHAPES}
    write(folder, layers, w, config | ({"qkv": True} if qkv else {}), shards=shards)
    return half(w) | {module: layer.floats for module, layer in layers.items()}


def channels(product: ir.Node) -> list[int]:
    """The order of its data's channels, empty if it is their own."""
    source = product.inputs[0].producer() if product.inputs[0] is not None else None
    if source is None or not str(source.name).endswith("_in_order"):
        return []
    order = source.inputs[1]
    assert order is not None
    assert order.const_value is not None
    return [int(i) for i in order.const_value.numpy()]


def computed_weights(model: ir.Model) -> dict[str, Array]:
    """The weights that products read as (K, N), run without optimizations; input channels in the
    model's order."""
    products = [n for n in model.graph if n.op_type == "MatMul"]
    copy = model.clone()
    values = [n.inputs[1] for n in copy.graph if n.op_type == "MatMul"]
    computed = [v for v in values if v is not None and v.producer() is not None]
    count = len(copy.graph.outputs)
    copy.graph.outputs.extend(computed)
    ids = {"ids": np.zeros((1, 1), np.int64)}
    arrays = iter(run(open_session(copy, optimized=False), ids)[count:])
    result = {}
    for product, value in zip(products, values, strict=True):
        if value is None or value.producer() is None:
            continue
        rows = next(arrays)
        if order := channels(product):
            rows = rows[np.argsort(order)]
        result[str(product.name)] = rows
    return result


# ------------------------------------------------------------------------------------ the whole way


@pytest.mark.parametrize("packed", [False, True], ids=["traced", "built"])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_exact_all_the_way(name: str, packed: bool, tmp_path: Path) -> None:
    want = saved(tmp_path, name, qkv=packed)
    model = graph(floats(), packed=packed)
    apply(model, checkpoint(path=str(tmp_path)).passes)
    found = computed_weights(model)
    if packed:
        qkv = found["/model/layers.0/attn/qkv_proj/MatMul"]
        assert_equal(qkv, np.concatenate([want[Q], want[K], want[V]], axis=1))
        assert_equal(found["/model/layers.0/attn/o_proj/MatMul"], want[O])
    else:
        assert set(found) == {f"{module}/MatMul" for module in SHAPES}
        for module in SHAPES:
            assert_equal(found[f"{module}/MatMul"], want[module])
    ids = {"ids": np.arange(24).reshape(2, 12)}
    expected = run(open_session(graph(want, packed=packed)), ids)[0]
    got = run(open_session(model, optimized=False), ids)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_what_is_float_may_be_quantized_too(tmp_path: Path) -> None:
    want = saved(tmp_path, "gptq")
    model = graph(floats())
    context = apply(model, checkpoint(path=str(tmp_path), bits=8).passes)
    assert_equal(computed_weights(model)[f"{O}/MatMul"], want[O])
    verdicts = context.remarks.verdicts()
    assert verdicts["lm_head/MatMul"].message.startswith("weights int8 per-channel")
    assert verdicts[f"{O}/MatMul"].message == "weights int4 in blocks of 32, float activations"


@pytest.mark.parametrize("name", ["gptq", "gptq-asymmetric", "gptq-3", "gptq-act-order", "awq"])
def test_kernels_get_the_same_integers(name: str, tmp_path: Path) -> None:
    want = saved(tmp_path, name)
    model = graph(floats())
    apply(model, checkpoint(path=str(tmp_path)).passes, target=CPU)
    kernel = node(model, f"{O}/MatMul")
    assert kernel.op_type == "MatMulNBits"
    packed, scale, *zeros = (v.const_value.numpy() for v in kernel.inputs[1:] if v is not None)  # type: ignore[union-attr]
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(HIDDEN, -1, GROUP).astype(int)
    zero: Any = 8
    if zeros:
        zero = np.stack([zeros[0] & 15, zeros[0] >> 4], axis=-1).reshape(HIDDEN, -1)[..., None]
    rows = ((nibbles - zero) * scale[..., None]).reshape(HIDDEN, HIDDEN).T
    if order := channels(kernel):
        rows = rows[np.argsort(order)]
    assert_equal(rows.astype(np.float32), want[O])


def test_before_and_after(tmp_path: Path) -> None:
    saved(tmp_path, "gptq-act-order")
    model = graph(floats())
    context = apply(model, (Canonicalize(), LoadCheckpoint(str(tmp_path))))
    assert body(model) == golden("""
        %e: f32[batch, seq, 64] = Gather(%embed_loaded, %ids) @model.embed_tokens/Gather
        %h: f32[batch, seq, 64] = Mul(%e, %norm_loaded) @model.layers.0.input_layernorm/Mul
        %h_in_order: f32[batch, seq, 64] = Gather(%h, %h_order) {axis = -1}
        %m: f32[batch, seq, 64] = MatMul(%h_in_order, %q_gptq) @model.layers.0.self_attn.q_proj/MatMul
        %b: f32[batch, seq, 64] = Add(%m, %bias_loaded) @model.layers.0.self_attn.q_proj/Add
        %ks: f32[batch, seq, 32] = MatMul(%h_in_order, %k_gptq) @model.layers.0.self_attn.k_proj/MatMul
        %vs: f32[batch, seq, 32] = MatMul(%h_in_order, %v_gptq) @model.layers.0.self_attn.v_proj/MatMul
        %c: f32[batch, seq, 64] = Concat(%ks, %vs) {axis = -1}
        %a: f32[batch, seq, 64] = Mul(%b, %c)
        %a_in_order: f32[batch, seq, 64] = Gather(%a, %a_order) {axis = -1}
        %o1: f32[batch, seq, 64] = MatMul(%a_in_order, %o_gptq) @model.layers.0.self_attn.o_proj/MatMul
        %r: f32[batch, seq, 64] = Add(%e, %o1)
        %y: f32[batch, seq, 96] = MatMul(%r, %head_gptq) @lm_head/MatMul
    """)  # noqa: E501
    told = {r.site: r for r in context.remarks if r.message.startswith("gptq")}
    assert told[f"{K}/MatMul"].numbers == {"bits": 4, "group_size": GROUP}


def test_skeletons_take_everything(tmp_path: Path) -> None:
    want = saved(tmp_path, "gptq", shards=3)
    model = graph(floats(seed=1))
    apply(model, (Canonicalize(), LoadCheckpoint(str(tmp_path), check=False)))
    ids = {"ids": np.arange(24).reshape(2, 12)}
    expected = run(open_session(graph(want)), ids)[0]
    np.testing.assert_allclose(run(open_session(model), ids)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrap", ["inner.{}", "inner.model.{}"])
def test_a_graph_may_be_wrapped(wrap: str, tmp_path: Path) -> None:
    want = saved(tmp_path, "awq")
    model = graph(floats())
    for n in model.graph:
        if "/" in str(n.name):
            n.name = wrap.format(n.name)
    apply(model, checkpoint(path=str(tmp_path)).passes)
    assert_equal(computed_weights(model)[f"{wrap.format(O)}/MatMul"], want[O])


def test_a_graph_may_be_the_inner_model(tmp_path: Path) -> None:
    want = saved(tmp_path, "awq")
    model = graph(floats())
    product = node(model, f"{O}/MatMul")
    for n in model.graph:
        n.name = str(n.name).removeprefix("model.")
    model.graph.outputs[0] = product.outputs[0]
    context = apply(model, checkpoint(path=str(tmp_path)).passes)
    assert_equal(computed_weights(model)[str(product.name)], want[O])
    (told,) = (r for r in context.remarks if r.kind == "note" and r.pass_name == "load-checkpoint")
    assert told.message == "the graph has no place for lm_head: not loaded"


def test_tied_tables_stay_tied(tmp_path: Path) -> None:
    """Checkpoints have a tied matrix once, as the table."""
    w = floats()
    w["lm_head"] = w["model.embed_tokens"].T.copy()
    stored = {name: array for name, array in w.items() if name != "lm_head"}
    write(tmp_path, {m: gptq(w[m]) for m in SHAPES}, stored, GPTQ)
    model = graph(w)
    apply(model, (Canonicalize(), LoadCheckpoint(str(tmp_path), check=False)))
    table = node(model, "model.embed_tokens/Gather").inputs[0]
    head = node(model, "lm_head/MatMul").inputs[1]
    assert_equal(array(head), half(w)["lm_head"])
    assert_equal(array(table), half(w)["model.embed_tokens"])


def test_norms_that_add_one(tmp_path: Path) -> None:
    """Gemma multiplies by 1 + w, which exporters fold; the graph's own weights tell."""
    w = floats()
    write(tmp_path, {m: gptq(w[m]) for m in SHAPES}, w, GPTQ)
    w["model.layers.0.input_layernorm"] = w["model.layers.0.input_layernorm"] + 1
    model = graph(w)
    apply(model, (Canonicalize(), LoadCheckpoint(str(tmp_path))))
    norm = node(model, "model.layers.0.input_layernorm/Mul").inputs[1]
    assert_equal(array(norm), half(floats())["model.layers.0.input_layernorm"] + 1)

    edit(tmp_path, model_type="gemma2")
    with pytest.raises(ModelError, match="norms of gemma2 may add one to their weights"):
        apply(graph(w), (Canonicalize(), LoadCheckpoint(str(tmp_path), check=False)))


def test_parts_that_cannot_be_joined_become_floats(tmp_path: Path) -> None:
    w = floats()
    layers = {m: gptq(w[m]) for m in SHAPES} | {K: gptq(w[K], size=HIDDEN)}
    write(tmp_path, layers, w, GPTQ | {"qkv": True})
    model = graph(w, packed=True)
    context = apply(model, checkpoint(path=str(tmp_path)).passes)
    qkv = node(model, "/model/layers.0/attn/qkv_proj/MatMul")
    whole = np.concatenate([layers[part].floats for part in (Q, K, V)], axis=1)
    assert_equal(array(qkv.inputs[1]), whole)
    declined = [r.message for r in context.remarks if r.kind == "declined"]
    assert declined == [f"{Q}, {K}, {V} differ in bits, groups or order: one float weight"]


def test_a_layer_that_only_the_graph_has_stays_if_the_graph_is_to_be_trusted(
    tmp_path: Path,
) -> None:
    w = floats()
    stored = {name: array for name, array in w.items() if name != "lm_head"}
    write(tmp_path, {m: gptq(w[m]) for m in SHAPES}, stored, GPTQ)
    model = graph(w)
    context = apply(model, (Canonicalize(), LoadCheckpoint(str(tmp_path))))
    assert_equal(array(node(model, "lm_head/MatMul").inputs[1]), w["lm_head"])
    (told,) = context.remarks.warnings()
    assert told.site == "lm_head/MatMul"


# ------------------------------------------------------------------------------------- bad inputs


def edit(folder: Path, **changes: object) -> None:
    """Change `config.json`; what is not a field of it is one of quantization_config."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        (config if key == "model_type" else config["quantization_config"])[key] = value
    file.write_text(json.dumps(config))


def load(folder: Path, model: ir.Model | None = None, *, check: bool = True) -> None:
    steps = checkpoint(path=str(folder), check=check).passes
    apply(model or graph(floats()), steps, verify=False)


def test_without_a_folder() -> None:
    with pytest.raises(QGraphError, match="no checkpoint is given: set path"):
        apply(graph(floats()), checkpoint().passes)
    with pytest.raises(ModelError, match=r"is not a folder: give one with config\.json"):
        load(Path("nowhere"))


def test_folders_that_are_no_quantized_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json has no quantization_config"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json cannot be read"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": GPTQ}))
    with pytest.raises(ModelError, match=r"holds no \*.safetensors file"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="is no safetensors file, or is truncated"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "aqlm"}, "quant_method 'aqlm' is unknown: use a checkpoint of gptq"),
        ({"checkpoint_format": "marlin"}, "gptq format 'marlin' is not read: only gptq, gptq_v2"),
        ({"quant_method": "awq", "version": "gemv"}, "awq format 'gemv' is not read: only gemm"),
        ({"checkpoint_format": "gptq_v2"}, "zero points of layer .* are .* steps off"),
        ({"quant_method": "bitsandbytes"}, "has no 'weight': download it again"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    saved(tmp_path, "gptq")
    edit(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


def test_a_missing_shard_and_a_missing_tensor(tmp_path: Path) -> None:
    saved(tmp_path, "gptq", shards=3)
    index = tmp_path / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["more.weight"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(ModelError, match=r"has no tensor 'more\.weight': download"):
        load(tmp_path)
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00001-of-00003.safetensors is missing, but"):
        load(tmp_path)
    index.write_text("[]")
    with pytest.raises(ModelError, match="has no weight_map"):
        load(tmp_path)


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    w = floats()
    layers = {m: gptq(w[m]) for m in SHAPES}
    write(tmp_path, layers | {K: gptq(np.tile(w[K], (1, 2)))}, w, GPTQ)
    with pytest.raises(ModelError, match=rf"'{K}' of the checkpoint is 64x64, but .* is 64x32"):
        load(tmp_path)
    broken = Packed(layers[K].tensors | {"qzeros": np.zeros((1, 1), np.int32)}, layers[K].floats)
    write(tmp_path, layers | {K: broken}, w, GPTQ)
    with pytest.raises(ModelError, match=rf"layer '{K}' does not fit its format \(gptq\): qzeros"):
        load(tmp_path)
    write(tmp_path, layers, w | {"model.embed_tokens": np.zeros((5, HIDDEN), np.float32)}, GPTQ)
    with pytest.raises(ModelError, match=r"embed_tokens' of the checkpoint is 5x64, but"):
        load(tmp_path)


def test_another_model(tmp_path: Path) -> None:
    saved(tmp_path, "gptq")
    with pytest.raises(ModelError, match=r"does not resemble .* or check=false"):
        load(tmp_path, graph(floats(seed=1)))
    model = graph(floats())
    for n in model.graph:
        n.name = str(n.name).replace("model.", "other.")
    with pytest.raises(ModelError, match=f"the graph has no product for layer '{K}'"):
        load(tmp_path, model)
    for n in model.graph:
        n.name = f"node_{n.op_type}"
    with pytest.raises(ModelError, match="no node of the graph belongs to a layer"):
        load(tmp_path, model)


def test_layers_that_one_side_lacks(tmp_path: Path) -> None:
    w = floats()
    layers = {m: gptq(w[m]) for m in SHAPES}
    model = graph(w)
    node(model, f"{O}/MatMul").name = "elsewhere/MatMul"
    write(tmp_path, layers, w, GPTQ)
    with pytest.raises(ModelError, match=f"the graph has no product for layer '{O}'"):
        load(tmp_path, model)
    write(
        tmp_path,
        {m: p for m, p in layers.items() if m != O},
        {k: a for k, a in w.items() if k != O},
        GPTQ,
    )
    with pytest.raises(ModelError, match=f"the checkpoint has no weights for layer '{O}/MatMul'"):
        load(tmp_path, check=False)
    write(tmp_path, layers, w | {f"{O}.bias": np.ones(HIDDEN, np.float32)}, GPTQ)
    with pytest.raises(ModelError, match=f"the graph has no place for '{O}.bias'"):
        load(tmp_path)


# ---------------------------------------------------------------------------------- pure functions


@settings(max_examples=30, deadline=None)
@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    groups=st.integers(1, 3),
    n=st.sampled_from((32, 64, 96)),
    reorder=st.booleans(),
    v2=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gptq_unpacks_what_was_packed(
    bits: int, groups: int, n: int, reorder: bool, v2: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((32 * groups, n)).astype(np.float32)
    order = rng.permutation(len(w)) if reorder else None
    layer = gptq(w, bits, symmetric=False, order=order, v2=v2)
    t = layer.tensors
    found = gptq_layer(t["qweight"], t["qzeros"], t["scales"], t["g_idx"], 0, v2=v2)
    assert (found.bits, found.size) == (bits, 32)
    assert_equal(found.float(), layer.floats)
    for axis in (0, 1):
        spec, weight = found.quantized(axis)
        rows = weight.float() if axis else weight.float().T
        assert_equal(rows, layer.floats if found.order is None else layer.floats[found.order])
        assert spec.width == bits
    if not reorder:
        plain = gptq_layer(t["qweight"], t["qzeros"], t["scales"], None, bits, v2=v2)
        assert_equal(plain.q, found.q)


def test_zero_points_of_zero_survive_the_first_version() -> None:
    """Writers subtract one from whole words: 0 borrows from its neighbour."""
    zero = np.array([[0, 8, 15, 0, 1, 0, 7, 8]], np.int64)
    word = sum(int(z) << (4 * i) for i, z in enumerate(zero[0])) - 0x11111111
    stored = np.array([[word % (1 << 32)]], np.uint32).view(np.int32)
    found = gptq_layer(
        np.zeros((4, 8), np.int32), stored, np.ones((1, 8), np.float16), None, 4, v2=False
    )
    assert_equal(found.zero, zero)


@pytest.mark.parametrize(
    ("double", "kind"), [(False, "nf4"), (True, "nf4"), (True, "fp4"), (False, "fp4")]
)
def test_bitsandbytes_unpacks_what_was_packed(double: bool, kind: str) -> None:
    w = weight("w", 128, 96).numpy()
    layer = bnb(w, kind, 64, double=double)
    assert_equal(_unpack_bnb(layer).float(), layer.floats)


def test_bitsandbytes_blocks_must_stay_in_their_rows() -> None:
    layer = bnb(weight("w", 96, 64).numpy(), "nf4", 64)
    with pytest.raises(ValueError, match="blocks of 64 run across its rows of 96"):
        _unpack_bnb(layer)


def _unpack_bnb(layer: Packed) -> Layer:
    t = layer.tensors
    (state,) = (json.loads(a.tobytes()) for n, a in t.items() if "quant_state" in n)
    names = ("weight.nested_absmax", "weight.nested_quant_map")
    nested = [t[name] for name in names if name in t]
    return bnb_layer(t["weight"], t["weight.absmax"], t["weight.quant_map"], state, nested)


def test_layers_are_joined_only_if_they_are_alike() -> None:
    w = weight("w", 64, 32).numpy()
    one, other = (_unpack_gptq(gptq(w)), _unpack_gptq(gptq(2 * w)))
    whole = joined([one, other])
    assert whole is not None
    assert_equal(whole.float(), np.concatenate([one.float(), other.float()], axis=1))
    order = np.random.default_rng(0).permutation(64)
    for unlike in (gptq(w, 8), gptq(w, size=64), gptq(w, order=order)):
        assert joined([one, _unpack_gptq(unlike)]) is None


def _unpack_gptq(layer: Packed) -> Layer:
    t = layer.tensors
    return gptq_layer(t["qweight"], t["qzeros"], t["scales"], t["g_idx"], 0, v2=False)


def test_three_bits_run_over_words() -> None:
    values = np.random.default_rng(0).integers(0, 8, (64, 3))
    assert_equal(unpack(stream_of_words(values, 3), 3), values)


def test_awq_order() -> None:
    words = np.array([[0x76543210]], np.int32)
    found = awq_layer(words, np.zeros((1, 1), np.int32), np.ones((1, 8), np.float16))
    assert found.q[0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_factors_of_rows_and_columns_are_no_difference() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 48)).astype(np.float32)
    moved = (w * rng.uniform(0.2, 5, (64, 1)) * rng.uniform(0.5, 2, 48)).astype(np.float32)
    rest = np.linalg.norm(moved - fitted(w, moved)) / np.linalg.norm(moved)
    assert rest < 0.1
    other = rng.standard_normal((64, 48)).astype(np.float32)
    assert np.linalg.norm(other - fitted(w, other)) / np.linalg.norm(other) > 0.9


# ------------------------------------------------------------------------------------- real models


def llama() -> Any:
    """A tiny one with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(  # type: ignore[call-arg]
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=WORDS,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
        use_cache=False,
    )
    module = LlamaForCausalLM(config)
    module.train(False)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:  # norms of a new model are all ones
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def quantized_llama(folder: Path, name: str) -> Any:
    """Write a checkpoint of :func:`llama` of that format; returns the module that it stands for."""
    import torch

    module = llama()
    pack, config = FORMATS[name]
    tensors: dict[str, Array] = {}
    for path, part in module.named_modules():
        if isinstance(part, torch.nn.Linear) and path != "lm_head":
            layer = pack(part.weight.detach().numpy().T)
            tensors |= {f"{path}.{key}": array for key, array in layer.tensors.items()}
            part.weight.data = torch.from_numpy(layer.floats.T.copy())
        elif hasattr(part, "weight"):
            tensors[f"{path}.weight"] = part.weight.detach().numpy()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    full = {"model_type": "llama", "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(full))
    return module


@pytest.mark.slow
def test_a_traced_llama(tmp_path: Path) -> None:
    import torch

    ids = np.arange(12)[np.newaxis] * 7
    example = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    traced = qgraph.trace(llama(), example, {"input_ids": {1: "length"}})
    for name in FORMATS:
        if name == "gptq-act-order":  # its order is for one width
            continue
        want = quantized_llama(tmp_path / name, name)
        with torch.no_grad():
            expected = want(torch.from_numpy(ids)).logits.numpy()
        model = traced.clone()
        context = apply(model, checkpoint(path=str(tmp_path / name)).passes, verify=False)
        got = run(open_session(model, optimized=False), {"input_ids": ids})[0]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        told = context.remarks.verdicts().values()
        assert sum(r.kind == "quantized" for r in told) == 14


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq-asymmetric", "awq", "nf4-double"])
def test_a_folder_of_the_genai_builder(name: str, tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    pytest.importorskip("onnxruntime_genai")
    llama().save_pretrained(tmp_path / "hf")
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)  # type: ignore[no-untyped-call]
    made.save_pretrained(tmp_path / "hf")
    builder = (sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu")
    folders = ("-i", tmp_path / "hf", "-o", tmp_path / "built", "-c", tmp_path / "cache")
    offline = ("--extra_options", "hf_token=false")
    subprocess.run([*builder, *map(str, folders), *offline], check=True, capture_output=True)

    want = quantized_llama(tmp_path / "quantized", name)
    source = qgraph.load(tmp_path / "built")
    compiled = qgraph.compile(source, "checkpoint", path=str(tmp_path / "quantized"), target="onnx")
    compiled.save(tmp_path / "out")
    assert (tmp_path / "out" / "genai_config.json").is_file()
    ids = np.arange(12)[np.newaxis] * 7
    with torch.no_grad():
        expected = want(torch.from_numpy(ids)).logits.numpy()
    model = source.clone()
    apply(model, checkpoint(path=str(tmp_path / "quantized")).passes, verify=False)
    feed = complete_feed(model, {"input_ids": ids})
    got = run(open_session(model, optimized=False), feed)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
