"""Made-up inputs, completed language-model feeds and calibration data."""

from __future__ import annotations

import operator
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import CalibrationError, ModelError
from qgraph.io.feeds import open_calibration
from qgraph.io.kv_cache import complete_feed
from qgraph.io.random_feed import first_feed

F32, F16, I64, I32 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64, ir.DataType.INT32
Dims = list[int | str | None]


def model_of(
    *nodes: ir.Node, **inputs: tuple[ir.DataType, Dims] | ir.Value
) -> tuple[ir.Model, dict[str, ir.Value]]:
    """A model with these inputs, each of which some node uses or none at all."""
    values = {
        name: given
        if isinstance(given, ir.Value)
        else ir.Value(name=name, type=ir.TensorType(given[0]), shape=ir.Shape(given[1]))
        for name, given in inputs.items()
    }
    graph = ir.Graph(list(values.values()), [], nodes=nodes, opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10), values


def only(**inputs: tuple[ir.DataType, Dims] | ir.Value) -> ir.Model:
    return model_of(**inputs)[0]


def language_model() -> ir.Model:
    cache: tuple[ir.DataType, Dims] = (F16, ["batch_size", 3, "past_sequence_length", 64])
    return only(
        input_ids=(I64, ["batch_size", "sequence_length"]),
        attention_mask=(I64, ["batch_size", "total_sequence_length"]),
        position_ids=(I64, ["batch_size", "sequence_length"]),
        **{
            f"past_key_values.{layer}.{kind}": cache
            for layer in range(2)
            for kind in ("key", "value")
        },
    )


IMAGES = only(x=(F32, ["batch", 3, 8, 8]))
PAIR = only(a=(F32, ["n", 4]), b=(I64, ["n"]))


# Made up


def test_random_feed_fits_and_repeats() -> None:
    model = only(
        x=(F32, ["n", 3, "h", "h"]),
        y=(F16, ["n", "t"]),
        flag=(ir.DataType.BOOL, []),
        attention_mask=(I64, ["n", "t"]),
        pixels=(ir.DataType.UINT8, [2, 2]),
    )
    feed = first_feed(model, None, seed=3)
    assert {name: array.dtype.name for name, array in feed.items()} == {
        "x": "float32",
        "y": "float16",
        "flag": "bool",
        "attention_mask": "int64",
        "pixels": "uint8",
    }
    assert feed["x"].shape[2] == feed["x"].shape[3]
    assert feed["y"].shape == feed["attention_mask"].shape
    assert feed["attention_mask"].all()
    assert feed["flag"].item() is True
    again = first_feed(model, None, seed=3)
    assert all(np.array_equal(feed[name], again[name]) for name in feed)
    assert not np.array_equal(feed["x"], first_feed(model, None, seed=4)["x"])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 5), st.sampled_from(["a", "b", "c"]), st.none()), max_size=5),
    st.sampled_from([F32, F16, I64, I32, ir.DataType.BOOL, ir.DataType.DOUBLE]),
)
def test_random_feed_fits_any_shape(shape: Dims, dtype: ir.DataType) -> None:
    model = only(x=(dtype, shape), y=(dtype, shape))
    feed = first_feed(model, None, 0)
    assert feed["x"].dtype == dtype.numpy()
    assert feed["x"].ndim == len(shape)
    for given_dim, x, y in zip(shape, feed["x"].shape, feed["y"].shape, strict=True):
        assert x == given_dim if isinstance(given_dim, int) else x > 0
        assert x == y or given_dim is None


def test_token_ids_stay_inside_the_shortest_table() -> None:
    tokens = ir.Value(name="tokens", type=ir.TensorType(I32), shape=ir.Shape([1, 500]))
    words = ir.Value(name="words", const_value=ir.Tensor(np.zeros((30, 4), np.float32)))
    types = ir.Value(name="types", const_value=ir.Tensor(np.zeros((7, 4), np.float32)))
    for table in (words, types):
        table.shape = ir.Shape(table.const_value.shape.numpy())  # type: ignore[union-attr]
    cast = ir.node("Cast", [tokens], attributes={"to": ir.DataType.INT64.value})
    nodes = [ir.node("Gather", [words, tokens]), cast, ir.node("Gather", [types, cast.outputs[0]])]
    model, _ = model_of(*nodes, tokens=tokens)
    feed = first_feed(model, None, 0)
    assert feed["tokens"].min() == 0
    assert feed["tokens"].max() == 6


def test_a_mode_input_gets_a_value_that_the_model_knows() -> None:
    rate = ir.Value(name="sr", type=ir.TensorType(I64), shape=ir.Shape([]))
    known = ir.Value(name="c", const_value=ir.Tensor(np.array(16000)))
    model, _ = model_of(ir.node("Equal", [rate, known]), sr=rate)
    model.graph.register_initializer(known)
    assert first_feed(model, None, 0)["sr"] == 16000


def test_state_of_a_recurrent_layer_has_a_batch_of_one() -> None:
    assert first_feed(only(h=(F32, [2, None, 128])), None, 0)["h"].shape == (2, 1, 128)


def test_inputs_with_defaults_are_left_out() -> None:
    model, values = model_of(x=(F32, [1]), w=(F32, [1]))
    values["w"].const_value = ir.Tensor(np.ones(1, np.float32), name="w")
    model.graph.register_initializer(values["w"])
    assert list(first_feed(model, None, 0)) == ["x"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (ir.Value(name="x", type=ir.SequenceType(ir.TensorType(F32))), "no tensor"),
        (ir.Value(name="x", type=ir.OptionalType(ir.TensorType(F32))), "no tensor"),
        (ir.Value(name="x", type=ir.TensorType(F32)), "unknown rank"),
        (ir.Value(name="x", type=ir.TensorType(ir.DataType.STRING), shape=ir.Shape([1])), "string"),
        (
            ir.Value(name="x", type=ir.TensorType(ir.DataType.BFLOAT16), shape=ir.Shape([1])),
            "bfloat16",
        ),
    ],
)
def test_inputs_that_cannot_be_made_up(value: ir.Value, says: str) -> None:
    with pytest.raises(ModelError, match=f"{says}.*give calibration data"):
        first_feed(only(x=value), None, 0)


def test_first_feed_is_the_first_of_the_calibration_data() -> None:
    model = language_model()
    tokens = np.array([[5, 6, 7]])
    feed = first_feed(model, [{"input_ids": tokens}, {"input_ids": tokens + 1}], 0)
    assert feed["input_ids"] is tokens
    assert feed["attention_mask"].shape == (1, 3)


# Language models


def test_empty_cache_and_full_mask() -> None:
    feed = complete_feed(language_model(), {"input_ids": np.array([[1, 2, 3], [4, 5, 6]])})
    assert feed["past_key_values.1.value"].shape == (2, 3, 0, 64)
    assert feed["past_key_values.1.value"].dtype == np.float16
    assert np.array_equal(feed["attention_mask"], np.ones((2, 3), np.int64))
    assert np.array_equal(feed["position_ids"], [[0, 1, 2], [0, 1, 2]])


def test_given_cache_counts() -> None:
    past = np.zeros((1, 3, 4, 64), np.float16)
    given_feed = {"input_ids": np.array([[9]]), "past_key_values.0.key": past}
    feed = complete_feed(language_model(), given_feed)
    assert feed["past_key_values.0.key"] is past
    assert feed["past_key_values.1.key"].shape == (1, 3, 4, 64)
    assert feed["attention_mask"].shape == (1, 5)
    assert np.array_equal(feed["position_ids"], [[4]])


def test_padding_on_the_left_moves_positions() -> None:
    mask = np.array([[0, 0, 1, 1]])
    feed = complete_feed(
        language_model(), {"input_ids": np.array([[0, 0, 8, 9]]), "attention_mask": mask}
    )
    assert np.array_equal(feed["position_ids"], [[0, 0, 0, 1]])


def test_random_feed_of_a_language_model() -> None:
    feed = first_feed(language_model(), None, 0)
    assert feed["past_key_values.0.key"].size == 0
    assert feed["attention_mask"].shape == feed["input_ids"].shape


def test_open_head_size_is_that_of_the_attention() -> None:
    cache: tuple[ir.DataType, Dims] = (F32, ["b", 3, "past_sequence_length", "kv_cache_dim"])
    model, values = model_of(input_ids=(I64, ["b", "s"]), **{"past_key_values.0.key": cache})
    attention = ir.node(
        "GroupQueryAttention",
        [None, None, None, values["past_key_values.0.key"]],
        attributes={"num_heads": 9, "kv_num_heads": 3},
        domain="com.microsoft",
    )
    model.graph.append(attention)
    assert complete_feed(model, {"input_ids": np.ones((1, 2), np.int64)}).keys() == {"input_ids"}
    attention.outputs[0].shape = ir.Shape(["b", "s", 576])
    feed = complete_feed(model, {"input_ids": np.ones((1, 2), np.int64)})
    assert feed["past_key_values.0.key"].shape == (1, 3, 0, 64)


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": (I64, ["b", "s"]), "attention_mask": (I64, ["b", "s"])},
        {"x": (F32, ["b", 4]), "past_state.0": (F32, ["b", 3, "t", 64])},
        {"input_ids": (I64, ["b", "s"]), "past_ids.0": (I64, ["b", 3, "t", 64])},
        {"input_ids": (I64, ["b", "s"]), "past_key": (F32, [1, 3, 7, 64])},
    ],
)
def test_other_models_are_left_alone(inputs: dict[str, tuple[ir.DataType, Dims]]) -> None:
    feed = {"input_ids": np.ones((1, 2), np.int64)}
    assert complete_feed(only(**inputs), feed) == feed


# Calibration data


def shapes(data: object, model: ir.Model, samples: int | None = None) -> list[tuple[int, ...]]:
    return [next(iter(feed.values())).shape for feed in open_calibration(data, model, samples)]


@pytest.mark.parametrize(
    "feed",
    [
        {"x": np.zeros((1, 3, 8, 8), np.float32)},
        (np.zeros((1, 3, 8, 8), np.float32),),
        [np.zeros((1, 3, 8, 8), np.float32)],
        np.zeros((1, 3, 8, 8), np.float32),
        np.zeros((1, 3, 8, 8), np.float64),
    ],
)
def test_forms_of_a_feed(feed: object) -> None:
    (got,) = open_calibration([feed], IMAGES)
    assert got["x"].shape == (1, 3, 8, 8)
    assert got["x"].dtype == np.float32


@pytest.mark.parametrize(
    "make",
    [
        lambda feeds: feeds,
        tuple,
        lambda feeds: lambda: iter(feeds),
        lambda feeds: dict(enumerate(feeds)).values(),
    ],
)
def test_data_can_be_read_again(make: Callable[[list[np.ndarray]], object]) -> None:
    calibration = open_calibration(make([np.zeros((n, 3, 8, 8)) for n in (1, 2, 3)]), IMAGES)
    for _ in range(2):
        assert [feed["x"].shape[0] for feed in calibration] == [1, 2, 3]


def test_generator_serves_one_pass() -> None:
    calibration = open_calibration((np.zeros((n, 3, 8, 8)) for n in (1, 2, 3)), IMAGES)
    assert first_feed(IMAGES, calibration, 0)["x"].shape[0] == 1
    assert [feed["x"].shape[0] for feed in calibration] == [1, 2, 3]
    with pytest.raises(CalibrationError, match="give a list, or a function"):
        list(calibration)


def test_samples_limits_the_feeds() -> None:
    feeds = [np.zeros((n, 3, 8, 8)) for n in (1, 2, 3)]
    assert len(shapes(feeds, IMAGES, samples=2)) == 2
    assert len(shapes(iter(feeds), IMAGES, samples=2)) == 2
    assert len(shapes(feeds, IMAGES, samples=9)) == 3
    with pytest.raises(CalibrationError, match="at least one"):
        open_calibration(feeds, IMAGES, samples=0)


def test_length_is_known_where_the_data_knows_it() -> None:
    feeds = [np.zeros((1, 3, 8, 8))] * 3
    assert operator.length_hint(open_calibration(feeds, IMAGES), -1) == 3
    assert operator.length_hint(open_calibration(feeds, IMAGES, samples=2), -1) == 2
    assert operator.length_hint(open_calibration((f for f in feeds), IMAGES), -1) == -1


def test_torch_values_and_loader() -> None:
    torch = pytest.importorskip("torch")
    images = torch.utils.data.TensorDataset(torch.zeros(5, 3, 8, 8))
    loader = torch.utils.data.DataLoader(images, batch_size=2)
    assert shapes(loader, IMAGES) == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    leaf = torch.zeros(1, 3, 8, 8, requires_grad=True)
    assert shapes([{"x": leaf}, leaf, (leaf.bfloat16(),)], IMAGES) == [(1, 3, 8, 8)] * 3


def test_torch_stays_unloaded() -> None:
    code = (
        "import sys, numpy as np; from tests.io.test_feeds import IMAGES, open_calibration;"
        "list(open_calibration([np.zeros((1, 3, 8, 8))], IMAGES));"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "feed",
    [
        {"input_ids": np.array([[1, 2]])},
        np.array([[1, 2]]),
        (np.array([[1, 2]]), np.ones((1, 2)) > 0),
    ],
)
def test_language_model_needs_tokens_only(feed: object) -> None:
    model = language_model()
    if isinstance(feed, tuple):
        feed = (feed[0], feed[1].astype(np.int32))
    (got,) = open_calibration([feed], model)
    assert got.keys() == {value.name for value in model.graph.inputs}
    assert got["attention_mask"].dtype == np.int64


def test_one_feed_is_held_at_a_time() -> None:
    def feeds() -> Iterator[np.ndarray]:
        for _ in range(20):
            yield np.zeros((128, 3, 8, 8), np.float32)  # 98 kB

    calibration = open_calibration(feeds, IMAGES)
    tracemalloc.start()
    for _ in calibration:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000


# Files


def test_npz_holds_samples_along_the_first_axis(tmp_path: Path) -> None:
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.savez(tmp_path / "d.npz", a=a, b=np.arange(3))
    feeds = list(open_calibration(tmp_path / "d.npz", PAIR))
    assert [feed["a"].tolist() for feed in feeds] == [[row.tolist()] for row in a]
    assert [feed["b"].tolist() for feed in feeds] == [[0], [1], [2]]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_layouts(save: Callable[..., None], tmp_path: Path) -> None:
    a = np.asfortranarray(np.arange(12, dtype=np.float64).reshape(3, 4))
    model = only(a=(F32, ["n", 4]), rate=(I64, []), state=(F32, [2, "n", 5]))
    save(tmp_path / "d.npz", a=a, rate=np.full(3, 16000), state=np.zeros((3, 2, 1, 5), np.float32))
    feeds = list(open_calibration(str(tmp_path / "d.npz"), model))
    assert [feed["a"].tolist() for feed in feeds] == [[row.tolist()] for row in a]
    assert feeds[0]["rate"].shape == ()
    assert feeds[0]["state"].shape == (2, 1, 5)


def test_npz_without_names_goes_by_position(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    np.savez(tmp_path / "d.npz", np.zeros((2, 4), np.float32), np.zeros(2, np.int64))
    np.savez(tmp_path / "folder" / "0.npz", np.zeros((2, 4), np.float32), np.zeros(2, np.int64))
    assert len(list(open_calibration(tmp_path / "d.npz", PAIR))) == 2
    assert len(list(open_calibration(tmp_path / "folder", PAIR))) == 1


def test_npz_is_read_sample_by_sample(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((500, 3, 8, 8), np.float32))  # 384 kB
    calibration = open_calibration(tmp_path / "d.npz", IMAGES)
    assert operator.length_hint(calibration) == 500
    tracemalloc.start()
    assert sum(1 for _ in calibration) == 500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150_000


def test_folder_holds_one_feed_per_file(tmp_path: Path) -> None:
    for n in (3, 1, 2):
        np.savez(tmp_path / f"{n}.npz", x=np.zeros((n, 3, 8, 8), np.float32))
    calibration = open_calibration(tmp_path, IMAGES)
    assert [feed["x"].shape[0] for feed in calibration] == [1, 2, 3]
    assert operator.length_hint(calibration) == 3


# Bad data


def refused(data: object, model: ir.Model = IMAGES) -> str:
    with pytest.raises(CalibrationError) as caught:
        list(open_calibration(data, model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


GOOD = np.zeros((1, 3, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("feed", "says"),
    [
        ({"y": GOOD}, "the model has no input 'y', only x"),
        ({}, "input 'x' is missing, only nothing given"),
        ((), "input 'x' is missing"),
        ((GOOD, GOOD), "2 values for the inputs x"),
        ({"x": GOOD[0]}, "input 'x' has shape (3, 8, 8), expected [batch,3,8,8]"),
        ({"x": GOOD[:, :2]}, "input 'x' has shape (1, 2, 8, 8), expected [batch,3,8,8]"),
        ({"x": GOOD.astype(np.int64)}, "input 'x' has dtype int64, expected float"),
        ({"x": GOOD.astype(np.float16)}, "input 'x' has dtype float16, expected float"),
        ({"x": np.full_like(GOOD, np.nan)}, "input 'x' holds NaN or infinity"),
        ({"x": np.full_like(GOOD, np.inf)}, "input 'x' holds NaN or infinity"),
        ({"x": np.full((1, 3, 8, 8), 1e300)}, "input 'x' holds NaN or infinity"),
        ({"x": GOOD[:0]}, "is an empty batch"),
        ({"x": [[1.0], [2.0, 3.0]]}, "input 'x' is not an array"),
        ({"x": "picture.png"}, "input 'x' has dtype <U11"),
        ({"x": None}, "input 'x' has dtype object"),
    ],
)
def test_feeds_that_do_not_fit(feed: object, says: str) -> None:
    assert says in refused([feed])
    message = refused([{"x": GOOD}, feed])
    assert message.startswith("calibration feed 1: ")
    assert says in message


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "no feeds"),
        (iter(()), "no feeds"),
        (lambda: iter(()), "no feeds"),
        ({"x": GOOD}, "give a list of feeds"),
        (GOOD, "give a list of feeds"),
        (3, "is a int"),
        ("nowhere.npz", "does not exist"),
    ],
)
def test_data_that_is_none(data: object, says: str) -> None:
    assert says in refused(data)


def test_missing_input_names_what_was_given() -> None:
    message = refused([{"a": np.zeros((1, 4), np.float32)}], PAIR)
    assert message == "calibration feed 0: input 'b' is missing, only a given"


def test_integers_must_fit() -> None:
    model = only(ids=(I32, [1]))
    (feed,) = open_calibration([np.array([7])], model)
    assert feed["ids"].dtype == np.int32
    assert "do not fit int32" in refused([np.array([1 << 40])], model)


def test_inputs_that_are_no_tensors() -> None:
    model = only(x=ir.Value(name="x", type=ir.SequenceType(ir.TensorType(F32))))
    assert "is no tensor" in refused([GOOD], model)


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    path.write_bytes(b"not a zip file")
    assert "cannot be read as an .npz file" in refused(path)
    np.savez(path, x=np.zeros((50, 3, 8, 8), np.float32))
    path.write_bytes(path.read_bytes()[:-2000])
    assert "cannot be read as an .npz file" in refused(path)
    assert "cannot be read as an .npz file" in refused(tmp_path)
    np.savez(path, x=np.array([{}], dtype=object))
    assert "Python objects" in refused(path)
    np.savez(path, x=np.float32(3))
    assert "no axis of samples" in refused(path)
    np.savez(path, a=np.zeros((3, 4), np.float32), b=np.arange(2))
    assert "unlike sample counts: a 3, b 2" in refused(path, PAIR)
    np.savez(path, x=np.zeros((0, 3, 8, 8), np.float32))
    assert "no feeds" in refused(path)
    path.unlink()
    assert "holds no .npz file" in refused(tmp_path)


def test_damaged_sample_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).random((50, 3, 8, 8), np.float32))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 100] = bytes(100)
    path.write_bytes(content)
    assert "cannot be read as an .npz file" in refused(path)


def _flag(local: int, central: int, value: int) -> Callable[[bytearray], None]:
    """Sets a byte in both headers of the first file of an archive."""

    def change(content: bytearray) -> None:
        content[content.find(b"PK\x03\x04") + local] = value
        content[content.find(b"PK\x01\x02") + central] = value

    return change


def _header(text: str) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        start, end = content.find(b"{'descr"), content.find(b"}")
        content[start : end + 1] = text.ljust(end + 1 - start).encode()

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_flag(6, 8, 1), "encrypted"),
        (_flag(8, 10, 77), "compression method"),
        (_header("{'descr': '<f4', 'shape': (4,"), ""),
        (_header(f"{{'descr':'<f4','fortran_order':False,'shape':({1 << 70},)}}"), ""),
    ],
)
def test_archives_that_cannot_be_read(
    change: Callable[[bytearray], None], why: str, tmp_path: Path
) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=np.zeros((4, 3, 8, 8), np.float32))
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    assert re.search(f"cannot be read as an .npz file: .*{why}", refused(path))


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "d.npz")
    for path in (tmp_path / "d.npz", tmp_path, Path("/dev/zero")):
        assert "it is not a file" in refused(path)
