"""Models raised to torch: they compute what onnxruntime computes, train, print, and refuse."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings

pytest.importorskip("torch")

import torch

import qgraph
from benchmarks import tasks, whisper, zoo
from qgraph.errors import ModelError
from qgraph.io.kv_cache import complete_feed
from qgraph.io.random_feed import first_feed
from qgraph.io.session import open_session, run
from qgraph.torch.to_module import NODE, WEIGHTS, raise_model, write_back
from tests import models

Array = np.ndarray
Feed = dict[str, Array]
RNG = np.random.default_rng


def both(model: ir.Model, feed: Mapping[str, Array]) -> tuple[list[Array], list[Array]]:
    """Results of torch and of onnxruntime."""
    with torch.no_grad():
        got = raise_model(model)(*(torch.from_numpy(np.array(x)) for x in feed.values()))
    results = [x.numpy() for x in (got if isinstance(got, tuple) else (got,))]
    return results, run(open_session(model, optimized=False), feed)


def agree(model: ir.Model, feed: Mapping[str, Array], tolerance: float = 2e-6) -> None:
    """Each result within `tolerance`, relative to the largest magnitude that onnxruntime gives."""
    for got, wanted in zip(*both(model, feed), strict=True):
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        if wanted.dtype.kind in "bui":
            np.testing.assert_array_equal(got, wanted)
        elif wanted.size:
            bound = tolerance * max(float(np.abs(wanted).max()), 1e-30)
            np.testing.assert_allclose(got, wanted, rtol=0, atol=bound)


def one(
    op_type: str,
    inputs: list[Array | None],
    outputs: int = 1,
    weights: tuple[int, ...] = (),
    **attributes: Any,
) -> tuple[ir.Model, dict[str, Array]]:
    """A model of one operator of com.microsoft, and its feed; `weights` are initializers."""
    values: list[ir.Value | None] = []
    initializers, feed = [], {}
    for index, data in enumerate(inputs):
        if data is None:
            values.append(None)
            continue
        tensor = ir.tensor(data, name=f"i{index}")
        value = ir.Value(name=f"i{index}", type=ir.TensorType(tensor.dtype))
        value.shape = ir.Shape(tensor.shape.numpy())
        if index in weights:
            value.const_value = tensor
            initializers.append(value)
        else:
            feed[f"i{index}"] = data
        values.append(value)
    node = ir.node(op_type, values, attributes, domain="com.microsoft", num_outputs=outputs)
    for index, output in enumerate(node.outputs):
        output.name = f"o{index}"
        kept = [d for d in inputs if d is not None and d.dtype.kind == "f"]
        output.type = ir.TensorType(ir.DataType.from_numpy(kept[0].dtype))
        if op_type == "EmbedLayerNormalization" and index == 1:
            output.type = ir.TensorType(ir.DataType.INT32)
    graph = ir.Graph(
        [v for v in values if v is not None and v.name in feed],
        node.outputs,
        nodes=[node],
        initializers=initializers,
        opset_imports={"": 21, "com.microsoft": 1},
        name="one",
    )
    return ir.Model(graph, ir_version=10), feed


# --------------------------------------------------------------------------- the module itself


def test_import_of_qgraph_leaves_torch_alone() -> None:
    code = "import sys, qgraph, qgraph.backends; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_prints_as_python_and_refers_to_the_model() -> None:
    module = raise_model(models.mlp((4, 6, 2)))
    print(module.code)
    assert "matmul" in module.code
    assert "torch.relu(" in module.code
    names = [node.meta.get(NODE) for node in module.graph.nodes if node.op == "call_function"]
    assert all(names)
    assert set(dict(module.named_parameters())) == {
        path for path in module.meta[WEIGHTS] if path in dict(module.named_parameters())
    }


def test_it_can_be_pickled_and_copied() -> None:
    module = raise_model(models.mlp((4, 6, 2)))
    again = torch.load(_saved(module), weights_only=False)
    x = torch.randn(3, 4)
    torch.testing.assert_close(again(x), module(x))
    torch.testing.assert_close(copy.deepcopy(module)(x), module(x))


def _saved(module: torch.nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return file


def test_the_model_stays_as_it_is() -> None:
    model = models.mlp()
    before = qgraph.to_text(model)
    module = raise_model(model)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert qgraph.to_text(model) == before


def test_gradients_reach_every_parameter() -> None:
    module = raise_model(models.mlp((5, 7, 3)))
    module(torch.randn(4, 5)).square().sum().backward()
    parameters = dict(module.named_parameters())
    assert len(parameters) == 4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values())


def test_only_weights_train() -> None:
    model = models.build(
        """g (float[N,2,4] x) => (float[N,2,4] y)
           <float[2] scale = {1, 1}, float[2] bias = {0, 0}, float[2] mean = {0, 0},
            float[2] var = {1, 1}, float scalar = {0.5}, float six = {6}, float[1] one = {1},
            float step = {0.1}, uint8 zero = {3}> {
             a = BatchNormalization (x, scale, bias, mean, var)
             b = Mul (a, scalar)
             c = Clip (b, , six)
             d = QuantizeLinear (c, step, zero)
             e = DequantizeLinear (d, step, zero)
             y = Add (e, one)
           }"""
    )
    module = raise_model(model)
    assert set(dict(module.named_parameters())) == {"scale", "bias", "one"}
    assert {"mean", "var", "scalar", "six", "step", "zero"} <= set(dict(module.named_buffers()))


def test_a_traced_module_comes_back_with_its_names() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
            self.head = torch.nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(self.body(x))
            return y

    net = Net()
    model = qgraph.trace(net, (torch.randn(2, 5, 4),), {"x": {0: "batch"}})
    module = raise_model(model)
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(module(x), net(x))
    assert dict(module.named_parameters()).keys() == dict(net.named_parameters()).keys()
    other = Net()
    original = dict(net.named_parameters())
    assert all(p.shape == original[name].shape for name, p in module.named_parameters())
    module.load_state_dict(other.state_dict(), strict=False)
    torch.testing.assert_close(module(x), other(x))


def test_trained_weights_go_back() -> None:
    model = models.mlp((5, 7, 3))
    module = raise_model(model)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.from_numpy(_floats(4, 5))
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    write_back(module, model)
    wanted = module(x).detach().numpy()
    (got,) = models.outputs(model, {"x": x.numpy()})
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_inputs_with_an_initializer_may_be_left_out() -> None:
    model = models.build("g (float[2] x) => (float[2] y) <float[2] w = {3, 4}> { y = Mul (x, w) }")
    model.graph.inputs.insert(0, model.graph.initializers["w"])
    module = raise_model(model)
    x = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(module(x), torch.tensor([3.0, 8.0]))
    torch.testing.assert_close(module(x, torch.ones(2)), x)


def test_functions_are_raised_by_their_bodies() -> None:
    model = qgraph.compile(models.mlp((16, 32, 8)), recipe="dynamic", target="onnx").model
    agree(model, {"x": RNG(0).standard_normal((5, 16)).astype(np.float32)}, 1e-5)


def test_shapes_follow_the_input() -> None:
    model = models.build(
        """g (float[N,M] x) => (float[K] y) <int64 zero = {0}, int64[1] last = {-1}> {
             s = Shape (x)
             n = Gather (s, zero)
             m = Unsqueeze (n, last_axis)
             t = Expand (x, s)
             r = Concat <axis = 0> (m, last)
             u = Reshape (t, r)
             y = ReduceSum <keepdims = 0> (u, one)
           }""".replace("last_axis", "first").replace(
            "<int64 zero = {0},", "<int64[1] first = {0}, int64[1] one = {1}, int64 zero = {0},"
        )
    )
    for shape in ((2, 3), (5, 1)):
        agree(model, {"x": RNG(0).standard_normal(shape).astype(np.float32)})


def test_loops_count_and_stack() -> None:
    model = models.build(
        """g (float[2] x, int64 n) => (float[2] last, float[K,2] all) <bool yes = {1}> {
             last, all = Loop (n, yes, x) <body = b (int64 i, bool c, float[2] s)
               => (bool d, float[2] t, float[2] u) {
                 d = Identity (c)
                 t = Add (s, x)
                 u = Mul (t, s)
             }>
           }"""
    )
    for count in (0, 1, 4):
        agree(model, {"x": np.array([1, 2], np.float32), "n": np.array(count, np.int64)})


@settings(max_examples=15, deadline=None)
@given(models.random_graph())
def test_random_models_agree(model: ir.Model) -> None:
    agree(model, models.feed(model), 2e-5)


def test_what_torch_lacks_is_named_before_anything_is_built() -> None:
    model = models.build(
        """g (float[2] x) => (float[2] y) <bool yes = {1}> {
             y = If (yes) <then_branch = t () => (float[2] a) { a = Abs (x) },
                           else_branch = e () => (float[2] b) { b = Abs (x) }>
           }"""
    )
    for graph in model.graph.subgraphs():
        for node in graph:
            node.domain, node.op_type = "my.own", f"Odd{graph.name}"
    with pytest.raises(ModelError, match=r"my\.own\.Odde, my\.own\.Oddt"):
        raise_model(model)
    with pytest.raises(ModelError, match="with attribute wrong"):
        raise_model(one("QuickGelu", [np.zeros(3, np.float32)], wrong=1)[0])
    text = models.build("g (string[2] x) => (string[2] y) { y = Identity (x) }")
    with pytest.raises(ModelError, match=r"string tensors \('x'\)"):
        raise_model(text)


# ----------------------------------------------------------------- operators of com.microsoft


def _floats(*shape: int, seed: int = 0) -> Array:
    return RNG([seed, *shape]).standard_normal(shape).astype(np.float32)


GROUPED: dict[str, dict[str, Any]] = {
    "prompt": {"past": 0, "new": 5},
    "token": {"past": 6, "new": 1},
    "chunk": {"past": 6, "new": 3},
    "window": {"past": 0, "new": 7, "local_window_size": 3},
    "window of a token": {"past": 9, "new": 1, "local_window_size": 4},
    "window of a chunk": {"past": 9, "new": 3, "local_window_size": 4},
    "rotary": {"past": 4, "new": 2, "do_rotary": 1},
    "interleaved": {"past": 4, "new": 2, "do_rotary": 1, "rotary_interleaved": 1},
    "scaled and capped": {"past": 2, "new": 2, "scale": 0.7, "softcap": 2.0},
    "smooth": {"past": 2, "new": 2, "smooth_softmax": 1},
    "padded prompt": {"past": 0, "new": 5, "lengths": [5, 3]},
    "padded cache": {"past": 6, "new": 1, "lengths": [7, 4], "do_rotary": 1},
    "room in the cache": {"past": 9, "new": 1, "lengths": [5, 5]},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", GROUPED)
def test_group_query_attention(case: str, packed: bool) -> None:
    settings = dict(GROUPED[case])
    past, new = settings.pop("past"), settings.pop("new")
    lengths = settings.pop("lengths", [past + new] * (1 if past and new > 1 else 2))
    batch, count, few, size = len(lengths), 4, 2, 16
    q, k, v = (_floats(batch, new, n * size, seed=n) for n in (count, few, few + 1))
    v = v[..., : few * size].copy()
    angle = np.arange(20)[:, None] / 10 ** np.arange(size // 2)
    inputs: list[Array | None] = [
        *([np.concatenate([q, k, v], -1), None, None] if packed else [q, k, v]),
        _floats(batch, few, past, size, seed=7),
        _floats(batch, few, past, size, seed=8),
        np.array(lengths, np.int32) - 1,
        np.array(max(lengths), np.int32),
    ]
    if settings.get("do_rotary"):
        inputs += [np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)]
    model, feed = one(
        "GroupQueryAttention", inputs, 3, num_heads=count, kv_num_heads=few, **settings
    )
    got, wanted = both(model, feed)
    real = np.arange(new) < np.minimum(np.array(lengths)[:, None], new)
    np.testing.assert_allclose(got[0][real], wanted[0][real], atol=2e-6)
    for mine, theirs in zip(got[1:], wanted[1:], strict=True):
        assert mine.shape == theirs.shape
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(mine[row, :, :length], theirs[row, :, :length], atol=2e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", [None, "packed", "float"])
@pytest.mark.parametrize("level", [0, 4])
def test_matmul_nbits(bits: int, zeros: str | None, level: int) -> None:
    k, n, block = 70, 6, 32
    count, rng = 3, RNG(bits)
    if zeros == "float" and bits == 8:
        pytest.skip("onnxruntime has no such kernel")
    points: Array | None = None
    if zeros == "packed":
        points = rng.integers(0, 256, (n, -(-count * bits // 8))).astype(np.uint8)
    elif zeros == "float":
        points = (rng.random((n, count)) * (1 << bits)).astype(np.float32)
    inputs = [
        _floats(3, k),
        rng.integers(0, 256, (n, count, block * bits // 8)).astype(np.uint8),
        np.abs(_floats(n, count)) / 8,
        points,
    ]
    model, feed = one(
        "MatMulNBits",
        inputs if zeros else inputs[:3],
        weights=(1, 2, 3),
        K=k,
        N=n,
        bits=bits,
        block_size=block,
        accuracy_level=level,
    )
    agree(model, feed, 2e-6 if level == 0 else 2e-2)


@pytest.mark.parametrize("quant_type", [0, 1])
def test_levels_of_bnb4_are_those_of_onnxruntime_to_the_last_bit(quant_type: int) -> None:
    codes = np.arange(0, 16, dtype=np.uint8).reshape(8, 2)
    model, feed = one(
        "MatMulBnb4",
        [np.eye(16, dtype=np.float32), codes[:, 0] << 4 | codes[:, 1], np.ones(1, np.float32)],
        weights=(1, 2),
        K=16,
        N=1,
        block_size=16,
        quant_type=quant_type,
    )
    np.testing.assert_array_equal(*both(model, feed))


def _ids(*shape: int, below: int = 7) -> Array:
    return RNG(shape).integers(0, below, shape).astype(np.int32)


CONTRIB: dict[str, Callable[[], tuple[ir.Model, dict[str, Array]]]] = {
    "simplified": lambda: one(
        "SkipSimplifiedLayerNormalization",
        [_floats(2, 3, 8), _floats(2, 3, 8, seed=1), _floats(8), _floats(8, seed=1)],
    ),
    "skip": lambda: one(
        "SkipLayerNormalization",
        [_floats(2, 3, 8), _floats(2, 3, 8, seed=1), _floats(8), _floats(8, seed=1)],
        1,
        epsilon=1e-3,
    ),
    "embed": lambda: one(
        "EmbedLayerNormalization",
        [
            _ids(2, 5),
            _ids(2, 5, below=2),
            _floats(7, 8),
            _floats(9, 8),
            _floats(2, 8),
            _floats(8),
            _floats(8, seed=1),
            np.array([[1] * 5, [1, 1, 1, 0, 0]], np.int32),
        ],
        2,
    ),
    "rotary": lambda: one(
        "RotaryEmbedding",
        [_floats(2, 3, 16), np.array([[0, 1, 2], [4, 5, 6]]), _floats(9, 4), _floats(9, 4, seed=1)],
    ),
    "rotary from": lambda: one(
        "RotaryEmbedding",
        [_floats(2, 2, 3, 8), np.array([4]), _floats(9, 4), _floats(9, 4, seed=1)],
        interleaved=1,
    ),
    "partial rotary": lambda: one(
        "RotaryEmbedding",
        [_floats(2, 3, 24), np.array([4]), _floats(9, 4), _floats(9, 4, seed=1)],
        num_heads=2,
        rotary_embedding_dim=8,
    ),
    "fused": lambda: one(
        "FusedMatMul", [_floats(2, 5, 3), _floats(2, 4, 5)], alpha=0.3, transA=1, transB=1
    ),
    "fused batch": lambda: one(
        "FusedMatMul", [_floats(5, 2, 3), _floats(3, 2, 4)], transBatchA=1, transBatchB=1
    ),
    "gelu": lambda: one("Gelu", [_floats(9)]),
    "fast gelu": lambda: one("FastGelu", [_floats(2, 9), _floats(9)]),
    "bias gelu": lambda: one("BiasGelu", [_floats(2, 9), _floats(9)]),
    "quick gelu": lambda: one("QuickGelu", [_floats(9)], alpha=1.5),
    "to float": lambda: one(
        "MatMulIntegerToFloat",
        [
            _ids(3, 5, below=255).astype(np.uint8),
            _ids(5, 4, below=127).astype(np.int8),
            np.array(0.1, np.float32),
            np.abs(_floats(4)),
            np.array(7, np.uint8),
            np.zeros(4, np.int8),
            _floats(4),
        ],
    ),
    "dynamic": lambda: one(
        "DynamicQuantizeMatMul",
        [_floats(3, 5), _ids(5, 4, below=127).astype(np.int8), np.abs(_floats(4))],
    ),
    "bnb4": lambda: one(
        "MatMulBnb4",
        [_floats(3, 32), _ids(4 * 16, below=256).astype(np.uint8), np.abs(_floats(8))],
        weights=(1, 2),
        K=32,
        N=4,
        block_size=16,
        quant_type=1,
    ),
    "fp4": lambda: one(
        "MatMulBnb4",
        [_floats(3, 32), _ids(4 * 16, below=256).astype(np.uint8), np.abs(_floats(8))],
        weights=(1, 2),
        K=32,
        N=4,
        block_size=16,
        quant_type=0,
    ),
    "gather": lambda: one(
        "GatherBlockQuantized",
        [_ids(6, 32, below=256).astype(np.uint8), _ids(2, 3, below=6), np.abs(_floats(6, 2))],
        weights=(0, 2),
        block_size=32,
        bits=4,
    ),
    "gather with zeros": lambda: one(
        "GatherBlockQuantized",
        [
            _ids(6, 48, below=256).astype(np.uint8),
            _ids(2, 3, below=6),
            np.abs(_floats(6, 3)),
            _ids(6, 2, below=256).astype(np.uint8),
        ],
        weights=(0, 2, 3),
        block_size=32,
        bits=4,
    ),
    "attention": lambda: one(
        "Attention",
        [_floats(2, 3, 8), _floats(8, 24), _floats(24), np.array([[1, 1, 1], [1, 1, 0]], np.int32)],
        num_heads=2,
    ),
    "causal attention": lambda: one(
        "Attention",
        [_floats(2, 3, 8), _floats(8, 24), _floats(24), None, _floats(2, 2, 2, 4, 4)],
        2,
        num_heads=2,
        unidirectional=1,
    ),
    "heads": lambda: one(
        "MultiHeadAttention",
        [
            _floats(2, 3, 8),
            _floats(2, 4, 8, seed=1),
            _floats(2, 4, 8, seed=2),
            _floats(24),
            np.array([[1, 1, 1, 1], [1, 1, 0, 0]], np.int32),
            _floats(2, 2, 3, 4),
        ],
        num_heads=2,
    ),
    "heads with a cache": lambda: one(
        "MultiHeadAttention",
        [
            _floats(2, 1, 8),
            _floats(2, 1, 8, seed=1),
            _floats(2, 1, 8, seed=2),
            None,
            None,
            None,
            _floats(2, 2, 5, 4),
            _floats(2, 2, 5, 4, seed=1),
        ],
        3,
        num_heads=2,
        unidirectional=1,
    ),
}


@pytest.mark.parametrize("case", CONTRIB)
def test_operators_of_microsoft(case: str) -> None:
    agree(*CONTRIB[case](), 3e-6)


# --------------------------------------------------------------------------------- real models


def _random(model: ir.Model) -> Feed:
    return first_feed(model, None, 0)


def _first(feeds: Callable[[], Sequence[Feed]]) -> Callable[[ir.Model], Feed]:
    """Real data: on noise probabilities are so small that they compare nothing."""
    return lambda _: feeds()[0]


def _speech(model: ir.Model) -> Feed:
    """The loudest frame of a recording, behind a bit of what came before."""
    audio, _ = tasks.speech("calibration", 1)
    end = int(np.abs(audio[576:-576]).argmax()) + 576
    known = {
        "input": audio[None, end - 300 : end + 276].astype(np.float32),
        "state": _floats(2, 1, 128),
        "sr": np.array(16000, np.int64),
    }
    return {str(v.name): known[str(v.name)] for v in model.graph.inputs}


def _files() -> list[Feed]:
    return [feed for feed, _ in tasks.magika_files("eval", 1)]


REAL: dict[str, tuple[Callable[[], Path], Callable[[ir.Model], Feed], float]] = {
    "efficientnet": (zoo.efficientnet_lite0_onnx, _first(tasks.images_eval), 1e-5),
    "minilm": (zoo.minilm_onnx, _random, 1e-5),
    "antiberty": (zoo.antiberty_onnx, _random, 1e-5),
    "detection": (
        partial(zoo.ppocr, "det"), _first(lambda: tasks.ocr_feeds("det", "eval", 1)), 1e-4,
    ),
    "recognition": (
        partial(zoo.ppocr, "rec"), _first(lambda: tasks.ocr_feeds("rec", "eval", 1)), 1e-4,
    ),
    "orientation": (
        partial(zoo.ppocr, "cls"), _first(lambda: tasks.ocr_feeds("cls", "eval", 1)), 1e-5,
    ),
    "magika": (zoo.magika, _first(_files), 1e-5),
    "smollm2 traced": (zoo.smollm2_traced, _random, 1e-5),
    "whisper encoder": (zoo.whisper_encoder, _first(lambda: whisper.encoder_feeds(n=1)), 1e-4),
    "whisper decoder": (zoo.whisper_decoder, _first(lambda: whisper.decoder_feeds(n=1)), 1e-5),
    **{
        name: (partial(zoo.silero_vad, name), _speech, 1e-5)
        for name in zoo.SILERO_MODELS
        if "sequence" not in name
    },
}  # fmt: skip
"""Models, what to feed them, and how far results may be apart, relative to the largest."""


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models_agree(name: str) -> None:
    path, feed, tolerance = REAL[name]
    model = qgraph.load(path())
    agree(model, feed(model), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.light_models())
def test_light_models_agree(name: str) -> None:
    model = qgraph.load(zoo.light_models()[name])
    agree(model, _random(model), 1e-5)


@pytest.mark.slow
def test_smollm2_speaks_with_its_cache() -> None:
    """A prompt, then one more token: logits and cache within 1e-5 of the largest."""
    model = qgraph.load(zoo.smollm2_genai())
    module, session = raise_model(model), open_session(model, optimized=False)
    tokens = RNG(0).integers(0, 1000, (2, 8))
    feed = complete_feed(model, {"input_ids": tokens[:, :7]})
    order = [str(v.name) for v in model.graph.inputs]
    for step in range(2):
        with torch.no_grad():
            got = module(*(torch.from_numpy(feed[name]) for name in order))
        wanted = run(session, feed)
        for mine, theirs in zip(got, wanted, strict=True):
            assert mine.shape == theirs.shape
            bound = 1e-5 * np.abs(theirs).max()
            np.testing.assert_allclose(mine.numpy(), theirs, rtol=0, atol=bound)
        if step == 0:
            cache = {
                str(v.name).replace("present", "past_key_values"): data
                for v, data in zip(model.graph.outputs[1:], wanted[1:], strict=True)
            }
            feed = {
                "input_ids": tokens[:, 7:],
                "attention_mask": np.ones((2, 8), np.int64),
                **cache,
            }
