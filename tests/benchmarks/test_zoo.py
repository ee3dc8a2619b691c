"""The zoo's metrics are right, and its float models score what they should."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import antibodies, ctranslate2, generation, metrics, tasks, whisper, zoo
from benchmarks.zoo import Array


def test_cached_builds_once_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QGRAPH_CACHE_ZOO", str(tmp_path))

    def fail(out: Path) -> None:
        out.write_text("half")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        zoo.cached("entry", fail)
    assert not (tmp_path / "entry").exists()
    assert zoo.cached("entry", lambda out: out.mkdir()) == tmp_path / "entry"
    assert zoo.cached("entry", fail).is_dir()
    assert capsys.readouterr().err.count("zoo: building") == 2


def test_sqnr_and_cosine_of_a_known_error() -> None:
    reference = np.array([[3.0, 4.0]])
    assert metrics.sqnr_db(reference, reference) == np.inf
    assert metrics.sqnr_db(reference, reference * 0.9) == pytest.approx(20)
    assert metrics.mean_cosine(reference, reference * 0.9) == pytest.approx(1)


def test_agreement_counts_equal_argmax() -> None:
    assert metrics.agreement(np.eye(4), np.eye(4)[[0, 1, 3, 2]]) == 0.5


@pytest.mark.parametrize(
    ("scores", "labels", "area"),
    [([1, 2, 3, 4], [0, 0, 1, 1], 1.0), ([1, 1], [0, 1], 0.5), ([1, 2, 3], [1, 0, 1], 0.5)],
)
def test_roc_auc(scores: list[float], labels: list[int], area: float) -> None:
    assert metrics.roc_auc(np.array(scores), np.array(labels)) == area


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("", "ab", 2), ("kitten", "sitting", 3), ("ab", "ab", 0)]
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert metrics.edit_distance(a, b) == metrics.edit_distance(b, a) == distance


def test_cross_entropy_of_known_probabilities() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]])) + 500
    entropy = metrics.cross_entropy(logits, np.array([1, 2]))
    np.testing.assert_allclose(entropy, -np.log([0.25, 0.1]), rtol=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "length"), [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 4, 3], 1), ([1], [2], 0)]
)
def test_common_beginning(a: list[int], b: list[int], length: int) -> None:
    assert metrics.common_beginning(np.array(a), np.array(b)) == length


def test_each_amino_acid_is_masked_once() -> None:
    sequence = antibodies.LETTERS
    ids = antibodies.masked(sequence)["input_ids"]
    assert ids.shape == (antibodies.TURNS, len(sequence) + 2)
    hidden = ids == antibodies.MASK
    assert (hidden.sum(0)[1:-1] == 1).all()
    assert set(ids[:, 0]) == {antibodies.CLS}
    assert set(ids[:, -1]) == {antibodies.SEP}
    shown = np.where(hidden, 0, ids).max(0)[1:-1]
    assert (shown == antibodies.FIRST + np.arange(20)).all()


def test_perplexity_of_a_uniform_model_is_its_vocabulary() -> None:
    def uniform(feed: tasks.Feed) -> list[Array]:
        return [np.zeros((*feed["input_ids"].shape, 7), np.float32)]

    chunks = np.arange(10).reshape(2, 5) % 7
    assert tasks.perplexity(uniform, chunks) == pytest.approx(7)


def test_edit_distance_counts_words_of_lists() -> None:
    assert metrics.edit_distance(["press", "1", "now"], ["press", "one"]) == 2


def test_ctranslate2_files() -> None:
    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    matrix = np.arange(6, dtype=np.float16).reshape(2, 3)
    content = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<II", 3, 2)
    content += string("a/weight") + struct.pack("<BIIBI", 2, 2, 3, 4, 12) + matrix.tobytes()
    content += string("heads") + struct.pack("<BBIh", 0, 2, 2, 8)
    content += struct.pack("<I", 1) + string("b/weight") + string("a/weight")
    read = ctranslate2.read(content)
    assert read.keys() == {"a/weight", "heads", "b/weight"}
    assert read["heads"] == 8
    np.testing.assert_array_equal(read["b/weight"], matrix)
    with pytest.raises(ValueError, match="CTranslate2 format 5; only 6"):
        ctranslate2.read(struct.pack("<I", 5))


def test_whisper_weights_go_by_the_names_of_transformers() -> None:
    def rows(n: int) -> Array:
        return np.arange(n * 2, dtype=np.float16).reshape(n, 2)

    state = ctranslate2.whisper_state(
        {
            "decoder/embeddings/weight": rows(5),
            "decoder/layer_3/attention/linear_1/weight": rows(4),
            "decoder/layer_3/attention/linear_1/bias": np.zeros(4, np.float16),
            "encoder/layer_norm/gamma": np.ones(2, np.float16),
            "encoder/position_encodings/encodings": rows(3),
            "encoder/num_heads": np.array(8, np.int16),
        }
    )
    layer = "model.decoder.layers.3.encoder_attn"
    assert sorted(state) == [
        "model.decoder.embed_tokens.weight",
        f"{layer}.k_proj.weight",
        f"{layer}.v_proj.bias",
        f"{layer}.v_proj.weight",
        "model.encoder.embed_positions.weight",
        "model.encoder.layer_norm.weight",
        "proj_out.weight",
    ]
    np.testing.assert_array_equal(state[f"{layer}.v_proj.weight"], [[4, 5], [6, 7]])
    assert {value.dtype for value in state.values()} == {np.dtype(np.float32)}


@given(seed=st.integers(0, 9), draft=st.lists(st.integers(0, 3), max_size=14))
def test_a_draft_does_not_change_the_transcript(seed: int, draft: list[int]) -> None:
    def after(beginning: Array) -> int:
        return int(np.random.default_rng([seed, *beginning]).integers(0, 4))

    def decoder(feed: tasks.Feed) -> list[Array]:
        (ids,) = feed["input_ids"]
        best = [after(ids[: place + 1]) for place in range(len(ids))]
        return [np.eye(4, dtype=np.float32)[best][None]]

    expected: list[int] = []
    while len(expected) < 8 and 3 not in expected:
        expected.append(after(np.array([*whisper.START, *expected])))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(whisper, "END", 3)
        patched.setattr(whisper, "LONGEST", 8)
        patched.setattr(whisper, "_suppressed", lambda _: [])
        found = whisper.greedy(decoder, np.zeros(()), np.array(draft, np.int64))
    assert found.tolist() == expected


def test_fit_drops_strangers_and_adds_an_empty_cache() -> None:
    feed = {"input_ids": np.ones((1, 5), np.int64), "sr": np.array(16_000)}
    shapes: dict[str, list[int | str]] = {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "position_ids": ["batch", "sequence"],
        "past_key_values.0.key": ["batch", 3, "past", "width"],
    }
    fitted = tasks.fit(feed, shapes)
    assert fitted.keys() == shapes.keys()
    assert fitted["past_key_values.0.key"].shape == (1, 3, 0, tasks.HEAD_SIZE)
    assert fitted["position_ids"].tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.slow
def test_efficientnet_lite0() -> None:
    run = tasks.session(zoo.efficientnet_lite0_onnx())
    assert tasks.top1(run) == 117
    images = {feed["inputs"].tobytes() for feed in tasks.images_eval()}
    assert not images & {feed["inputs"].tobytes() for feed in tasks.images_calibration()}


@pytest.mark.slow
def test_efficientnet_lite0_module_and_onnx_agree() -> None:
    module, _ = zoo.efficientnet_lite0_module()
    run = tasks.session(zoo.efficientnet_lite0_onnx(), optimized=False)
    feed = tasks.images_eval()[0]
    assert metrics.sqnr_db(tasks.module_runner(module)(feed)[0], run(feed)[0]) > 90


@pytest.mark.slow
def test_minilm_module_and_onnx_agree() -> None:
    module, _, _ = zoo.minilm_module()
    run = tasks.session(zoo.minilm_onnx())
    assert tasks.embedding_cosine(tasks.module_runner(module), run) > 0.999999


@pytest.mark.slow
def test_antiberty() -> None:
    run = tasks.session(zoo.antiberty_onnx(), threads=2)
    module, _, _ = zoo.antiberty_module()
    (feed,) = antibodies.feeds(n=1)
    assert metrics.sqnr_db(tasks.module_runner(module)(feed)[0], run(feed)[0]) > 90
    logits, right = antibodies.guesses(run, 8)
    assert metrics.accuracy(logits, right) == pytest.approx(0.8776, abs=0.001)
    assert not set(antibodies.sequences("eval", 700)) & set(
        antibodies.sequences("calibration", 700)
    )


@pytest.mark.slow
def test_whisper() -> None:
    texts = {split: {p.text for p in whisper.prompts(split)} for split in whisper.PROMPTS}
    assert {split: len(found) for split, found in texts.items()} == whisper.PROMPTS
    assert not texts["eval"] & texts["calibration"]
    assert whisper.word_errors(whisper.float_tokens("eval")) == pytest.approx(1.84, abs=0.3)
    (feed,) = whisper.decoder_feeds(n=1)
    (sound,) = whisper.encoder_feeds(n=1)
    for half, inputs in (("encoder", sound), ("decoder", feed)):
        module, _, _ = getattr(zoo, f"whisper_{half}_module")()
        run = tasks.session(getattr(zoo, f"whisper_{half}")(), threads=2)
        expected = tasks.module_runner(module)(inputs)[0]
        assert metrics.sqnr_db(expected, run(inputs)[0]) > 80


@pytest.mark.slow
def test_ppocr() -> None:
    assert tasks.rec_cer(tasks.session(zoo.ppocr("rec"))) < 0.003
    assert tasks.cls_accuracy(tasks.session(zoo.ppocr("cls"))) > 0.93
    det = tasks.session(zoo.ppocr("det"))
    assert tasks.det_iou(det, tasks.session(zoo.ppocr("det"), optimized=False)) > 0.999
    assert not set(tasks.text_lines("eval")) & set(tasks.text_lines("calibration"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in zoo.SILERO_MODELS if "sequence" not in n])
def test_silero(name: str) -> None:
    assert tasks.silero_auc(tasks.session(zoo.silero_vad(name))) > 0.998


@pytest.mark.slow
def test_silero_calibration_carries_the_state() -> None:
    feeds = tasks.silero_calibration(zoo.silero_vad("silero_vad_openvino_16k.onnx"), 16)
    assert len(feeds) == 16
    assert feeds[-1].keys() == {"input", "state"}
    assert np.any(feeds[-1]["state"])


@pytest.mark.slow
def test_magika() -> None:
    assert tasks.magika_accuracy(tasks.session(zoo.magika())) > 0.98
    assert len(tasks.magika_calibration()) == 128


@pytest.mark.slow
def test_smollm2() -> None:
    run = tasks.session(zoo.smollm2_genai(), threads=2)
    assert tasks.perplexity(run, tasks.smollm2_chunks(n=4, text="lee")) == pytest.approx(
        25.337, rel=1e-3
    )
    (feed,) = tasks.smollm2_calibration(zoo.smollm2_genai(), 1, 64)
    assert len(feed) == 62
    assert run(feed)[0].shape == (1, 64, 49152)


@pytest.mark.slow
def test_smollm2_traced_is_smollm2() -> None:
    chunks = tasks.smollm2_chunks(n=2, length=128, text="kjv")
    traced, genai = (
        tasks.perplexity(tasks.session(path, threads=2), chunks)
        for path in (zoo.smollm2_traced(), zoo.smollm2_genai())
    )
    assert traced == pytest.approx(genai, rel=1e-5)


@pytest.mark.slow
def test_greedy_tokens_are_the_likeliest() -> None:
    path = zoo.smollm2_genai()
    (prompt,) = tasks.smollm2_chunks(n=1, length=16)
    tokens = generation.greedy(generation.load(path, threads=2), prompt, 4)
    text = np.concatenate([prompt, tokens])
    logits = tasks.session(path, threads=2)({"input_ids": text[None]})[0][0]
    assert tokens.tolist() == logits.argmax(-1)[15:-1].tolist()


@pytest.mark.slow
def test_light_models_load() -> None:
    models = zoo.light_models()
    assert len(models) == 9
    feed = {"data_0": np.zeros((1, 3, 224, 224), np.float32)}
    assert tasks.session(models["squeezenet"])(feed)[0].shape == (1, 1000, 1, 1)


@pytest.mark.slow
def test_texts_and_digits() -> None:
    images, labels = zoo.mnist()
    assert images.shape == (5000, 28, 28)
    assert np.bincount(labels).tolist() == [500] * 10
    assert len(zoo.lee_documents()) == 300
    assert 900_000 < len(zoo.handbook_prose()) < 1_100_000
    assert zoo.kjv().startswith("In the beginning God created")
