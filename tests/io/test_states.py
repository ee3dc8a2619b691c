"""States of a model: which inputs come back as outputs, and what they are before the first run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.errors import CalibrationError, ModelError
from qgraph.io.feeds import open_calibration
from qgraph.io.kv_cache import Completer, complete_feed
from qgraph.io.models import load, save
from qgraph.io.random_feed import first_feed

F32, I64 = ir.DataType.FLOAT, ir.DataType.INT64
Dims = list[int | str | None]
HIDDEN = 8


def value(name: str, shape: Dims, dtype: ir.DataType = F32) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def named(node: ir.Node, name: str, shape: Dims | None, index: int = 0) -> ir.Value:
    output = node.outputs[index]
    output.name, output.type = name, ir.TensorType(F32)
    output.shape = None if shape is None else ir.Shape(shape)
    return output


class Net:
    """A model in the making: tokens that look up rows, and what a test adds to them."""

    def __init__(self, tokens: str = "input_ids") -> None:
        table = ir.Value(name="table", const_value=ir.Tensor(np.ones((16, HIDDEN), np.float32)))
        table.shape = ir.Shape([16, HIDDEN])
        self.ids = value(tokens, ["batch", "sequence"], I64)
        self.nodes: list[ir.Node] = []
        self.inputs, self.outputs, self.constants = [self.ids], list[ir.Value](), [table]
        self.hidden = self.node("Gather", table, self.ids)
        self.output(self.node("Relu", self.hidden), "logits")

    def node(
        self, op: str, *inputs: ir.Value | None, domain: str = "", **attributes: object
    ) -> ir.Value:
        self.nodes.append(ir.node(op, list(inputs), attributes=attributes, domain=domain))  # type: ignore[arg-type]
        return self.nodes[-1].outputs[0]

    def input(self, name: str, shape: Dims, dtype: ir.DataType = F32) -> ir.Value:
        self.inputs.append(value(name, shape, dtype))
        return self.inputs[-1]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        made = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        self.constants.append(made)
        return made

    def output(self, made: ir.Value, name: str, shape: Dims | None = None) -> None:
        node = made.producer()
        assert node is not None
        self.outputs.append(named(node, name, shape, made.index() or 0))

    def model(self) -> ir.Model:
        graph = ir.Graph(
            self.inputs, self.outputs, nodes=self.nodes, initializers=self.constants,
            opset_imports={"": 21, "com.microsoft": 1}, name="g",
        )  # fmt: skip
        return ir.Model(graph, ir_version=10)


def cached(name: str = "kv_cache.0", back: str = "new_cache.0", tokens: str = "input_ids") -> Net:
    """The past before what is new, whatever they are called."""
    net = Net(tokens)
    past = net.input(name, ["batch", "before", HIDDEN])
    net.output(net.node("Concat", past, net.hidden, axis=1), back, ["batch", "after", HIDDEN])
    return net


def stacked() -> Net:
    """One state for keys and values of all layers."""
    net = Net()
    past = net.input("state_in", [2, "batch", "before", HIDDEN])
    layers = []
    for layer in range(2):
        index = net.constant(f"i{layer}", np.array(layer))
        one = net.node("Gather", past, index, axis=0)
        longer = net.node("Concat", one, net.hidden, axis=1)
        layers.append(net.node("Unsqueeze", longer, net.constant(f"a{layer}", np.array([0]))))
    net.output(net.node("Concat", *layers, axis=0), "state_out", [2, "batch", "after", HIDDEN])
    return net


def decaying() -> Net:
    net = Net()
    past = net.input("s", ["batch", HIDDEN])
    decayed = net.node("Mul", past, net.constant("decay", np.full(HIDDEN, 0.5, np.float32)))
    new = net.node("ReduceMean", net.hidden, net.constant("axes", np.array([1])), keepdims=0)
    net.output(net.node("Add", decayed, new), "s_out", ["batch", HIDDEN])
    return net


def convolution() -> Net:
    net = Net()
    past = net.input("window", ["batch", HIDDEN, 2])
    moved = net.node("Transpose", net.hidden, perm=[0, 2, 1])
    longer = net.node("Concat", past, moved, axis=2)
    ends = [net.constant(n, np.array([x])) for n, x in (("from", -2), ("to", 1 << 40), ("ax", 2))]
    net.output(net.node("Slice", longer, *ends), "window_out", ["batch", HIDDEN, 2])
    return net


@pytest.mark.parametrize(
    ("make", "want"),
    [
        (cached, {"kv_cache.0": (2, 0, HIDDEN)}),
        (lambda: cached("a", "b"), {"a": (2, 0, HIDDEN)}),
        (lambda: cached(tokens="ids"), {"kv_cache.0": (2, 0, HIDDEN)}),
        (stacked, {"state_in": (2, 2, 0, HIDDEN)}),
        (decaying, {"s": (2, HIDDEN)}),
        (convolution, {"window": (2, HIDDEN, 2)}),
    ],
)
def test_states_are_known_by_what_becomes_of_them(
    make: Callable[[], Net], want: dict[str, tuple[int, ...]]
) -> None:
    model = make().model()
    (tokens,) = (v.name for v in model.graph.inputs if v.dtype == I64)
    feed = complete_feed(model, {str(tokens): np.ones((2, 5), np.int64)})
    assert {n: a.shape for n, a in feed.items() if n != tokens} == want
    assert not any(a.any() for n, a in feed.items() if n != tokens)
    assert first_feed(model, None, 0).keys() == {tokens, *want}
    (got,) = open_calibration([np.ones((2, 5), np.int64)], model)
    assert got.keys() == feed.keys()


def test_what_comes_first_is_the_past() -> None:
    net = Net()
    new, past = (net.input(n, ["batch", t, HIDDEN]) for n, t in (("new", "n"), ("past", "p")))
    net.output(net.node("Concat", past, new, axis=1), "out", ["batch", "m", HIDDEN])
    assert Completer(net.model()).states == {"past": (None, -1, HIDDEN)}


@pytest.mark.parametrize("kind", ["residual", "untouched", "other size", "other type", "image"])
def test_data_are_no_states(kind: str) -> None:
    net = Net()
    x = net.input("x", ["batch", HIDDEN])
    if kind == "residual":  # x goes through a layer, not around it
        weight = net.constant("w", np.ones((HIDDEN, HIDDEN), np.float32))
        net.output(net.node("MatMul", x, weight), "y", ["batch", HIDDEN])
    elif kind == "untouched":
        net.output(net.node("Identity", x), "y", ["batch", HIDDEN])
    elif kind == "other size":
        net.output(net.node("Concat", x, x, axis=1), "y", ["batch", 2 * HIDDEN])
    elif kind == "other type":
        net.output(net.node("Mul", x, x), "y", ["batch", HIDDEN])
        net.outputs[-1].type = ir.TensorType(ir.DataType.FLOAT16)
    else:  # without tokens sums of elements say nothing
        t = value("t", ["batch", 1])
        added = ir.node("Add", [x, t])
        mean = ir.node("Relu", [t])
        y = named(added, "y", ["batch", HIDDEN])
        graph = ir.Graph(
            [x, t], [y, named(mean, "z", ["batch", 1])], nodes=[added, mean],
            opset_imports={"": 21}, name="g",
        )  # fmt: skip
        assert not Completer(ir.Model(graph, ir_version=10)).states
        return
    assert not Completer(net.model()).states


def test_a_recurrent_layer_starts_at_zero() -> None:
    x, h = value("x", ["time", "batch", 4]), value("h", [1, "batch", 3])
    weights = [ir.Value(name=n) for n in ("w", "r")]
    gru = ir.node("GRU", [x, *weights, None, None, h], attributes={"hidden_size": 3}, num_outputs=2)
    outputs = [named(gru, "y", ["time", 1, "batch", 3]), named(gru, "h_out", [1, "batch", 3], 1)]
    graph = ir.Graph([x, h], outputs, nodes=[gru], opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    assert Completer(model).states == {"h": (1, None, 3)}
    assert not first_feed(model, None, 0)["h"].any()
    assert list(Completer(model).data) == ["x", "h"]  # a list of inputs still holds both


def test_a_windowed_cache_has_room_for_its_window() -> None:
    net = Net()
    past = [net.input(n, ["batch", 2, "sliding", "dim"]) for n in ("k", "v")]
    attention = ir.node(
        "GroupQueryAttention", [net.hidden, None, None, *past], domain="com.microsoft",
        attributes={
            "num_heads": 4, "kv_num_heads": 2, "local_window_size": 6, "sliding_window_cache": 1
        },
        num_outputs=3,
    )  # fmt: skip
    net.nodes.append(attention)
    attention.outputs[0].shape = ir.Shape(["batch", "sequence", 4 * 16])
    for index, name in enumerate(("k_out", "v_out"), 1):
        net.outputs.append(named(attention, name, ["batch", 2, "total", "dim"], index))
    net.input("attention_mask", ["batch", "all"], I64)
    feed = complete_feed(net.model(), {"input_ids": np.ones((3, 10), np.int64)})
    assert feed["k"].shape == feed["v"].shape == (3, 2, 6, 16)
    assert feed["attention_mask"].shape == (3, 10)


def test_positions_in_time_height_and_width() -> None:
    net = cached()
    net.input("position_ids", [3, "batch", "sequence"], I64)
    net.input("cache_position", ["sequence"], I64)
    past = np.zeros((1, 4, HIDDEN), np.float32)
    feed = complete_feed(net.model(), {"input_ids": np.ones((1, 2), np.int64), "kv_cache.0": past})
    assert feed["position_ids"].tolist() == [[[4, 5]]] * 3
    assert feed["cache_position"].tolist() == [4, 5]


def test_embeddings_instead_of_tokens() -> None:
    x, past = value("inputs_embeds", ["b", "s", HIDDEN]), value("p", ["b", "t", HIDDEN])
    longer, out = ir.node("Concat", [past, x], attributes={"axis": 1}), ir.node("Relu", [x])
    outputs = [named(out, "y", ["b", "s", HIDDEN]), named(longer, "q", ["b", "u", HIDDEN])]
    graph = ir.Graph([x, past], outputs, nodes=[longer, out], opset_imports={"": 21}, name="g")
    feed = complete_feed(
        ir.Model(graph, ir_version=10), {"inputs_embeds": np.ones((2, 3, HIDDEN), np.float32)}
    )
    assert feed["p"].shape == (2, 0, HIDDEN)


def crossed() -> Net:
    """A decoder that also reads what an encoder makes: a cache that does not come back."""
    net = cached("past_key_values.0", "present.0")
    for layer in range(3):
        cross = net.input(f"past_key_cross_{layer}", ["batch", 4, HIDDEN])
        mean = net.node("ReduceMean", cross, net.constant(f"m{layer}", np.array([1])))
        net.output(net.node("Add", mean, net.hidden), f"y{layer}")
    return net


def test_what_cannot_be_known_is_asked_for() -> None:
    model = crossed().model()
    with pytest.raises(CalibrationError) as caught:
        open_calibration([np.ones((1, 2), np.int64)], model)
    assert str(caught.value) == (
        "calibration feed 0: input 'past_key_cross_0' is missing (and 2 like it), only input_ids"
        " given: give {'input_ids': int64 (batch, sequence), 'past_key_cross_0': float32 (batch,"
        " 4, 8) and 2 like it}"
    )


def folder(root: Path, audio: str = "audio") -> Path:
    """A decoder with its encoder, which doubles what it is given, and adds the layer's number."""
    root.mkdir()
    config = {
        "decoder": {
            "filename": "decoder.onnx",
            "inputs": {
                "input_ids": "input_ids",
                "past_key_names": "past_key_values.%d",
                "cross_past_key_names": "past_key_cross_%d",
            },
            "outputs": {"present_key_names": "present.%d"},
        },
        "encoder": {
            "filename": "encoder.onnx",
            "outputs": {"cross_present_key_names": "made_%d"},
        },
    }
    (root / "genai_config.json").write_text(json.dumps({"model": config}))
    save(crossed().model(), root / "decoder.onnx")
    x, numbers, nodes = value(audio, ["batch", 4, HIDDEN]), [], []
    for layer in range(3):
        numbers.append(ir.Value(name=f"n{layer}"))
        numbers[-1].const_value = ir.Tensor(np.array(layer, np.float32), name=f"n{layer}")
        nodes += [ir.node("Add", [x, x])]
        nodes += [ir.node("Add", [nodes[-1].outputs[0], numbers[-1]])]
        named(nodes[-1], f"made_{layer}", ["batch", 4, HIDDEN])
    graph = ir.Graph(
        [x], [node.outputs[0] for node in nodes[1::2]], nodes=nodes, initializers=numbers,
        opset_imports={"": 21}, name="g",
    )  # fmt: skip
    save(ir.Model(graph, ir_version=10), root / "encoder.onnx")
    return root


def test_the_encoder_of_the_folder_makes_what_the_decoder_reads(tmp_path: Path) -> None:
    model = load(folder(tmp_path / "m"))
    ids, audio = np.ones((3, 2), np.int64), np.ones((3, 4, HIDDEN), np.float32)
    np.savez(tmp_path / "c.npz", input_ids=ids, audio=audio)
    feeds = list(open_calibration(tmp_path / "c.npz", model))
    assert len(feeds) == 3
    assert feeds[0].keys() == {v.name for v in model.graph.inputs}
    assert [feeds[0][f"past_key_cross_{i}"].mean() for i in range(3)] == [2, 3, 4]
    (by_position,) = open_calibration([(ids, audio)], model)
    assert by_position["past_key_cross_2"].shape == (3, 4, HIDDEN)
    made = {f"past_key_cross_{i}": np.zeros((3, 4, HIDDEN), np.float32) for i in range(3)}
    (given,) = open_calibration([{"input_ids": ids, **made}], model)
    assert not given["past_key_cross_1"].any()
    with pytest.raises(CalibrationError, match=r"'audio': float32 \(batch, 4, 8\)}$"):
        open_calibration([ids], model)
    with pytest.raises(CalibrationError, match="input 'audio' has shape"):
        open_calibration([(ids, audio[:, :2])], model)


def test_an_encoder_with_the_decoders_names_is_left_alone(tmp_path: Path) -> None:
    model = load(folder(tmp_path / "m", audio="past_key_cross_1"))
    assert Completer(model).encoder is None


def test_an_encoder_that_does_not_run(tmp_path: Path) -> None:
    model = load(folder(tmp_path / "m"))
    feed: dict[str, np.ndarray] = {"input_ids": np.ones((1, 2), np.int64)}
    feed["audio"] = np.ones((1, 4, HIDDEN + 1), np.float32)
    with pytest.raises(ModelError, match=r"^encoder.onnx does not run on audio: [^\n]+$"):
        complete_feed(model, feed)
