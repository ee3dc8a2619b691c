"""Every architecture that onnxruntime-genai's model builder makes: compiled, run, generating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qgraph
from benchmarks import genai_folders
from benchmarks.generation import greedy, load
from qgraph.graph.reading import is_op, node_name, nodes
from qgraph.io.kv_cache import complete_feed
from qgraph.io.session import open_session, run

pytest.importorskip("onnxruntime_genai")
pytest.importorskip("transformers")

CALIBRATED = ("gptq", "awq", "smoothquant", "llm-int8", "zeroquant", "w8a8")
NAMES = sorted(genai_folders.ARCHITECTURES)
SIGNAL = {"qwen3.5": 13.0, "qwen3.5-moe": 13.0}
"""dB of the logits where 19 are too many: a random recurrence carries errors along."""


@pytest.fixture(autouse=True, scope="module")
def _no_progress() -> None:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)


def decibels(want: np.ndarray, got: np.ndarray) -> float:
    """Of the middle token: a few go to other experts, and have nothing in common then."""
    signal, noise = (np.square(x).sum(axis=-1) for x in (want, want - got))
    return 10 * float(np.log10(np.median(signal / noise)))


def generated(folder: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime_genai as genai

    model = load(folder, threads=2)
    if "audio_features" not in feed:
        return greedy(model, feed["input_ids"][0], 8)
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=12, min_length=12, do_sample=False)
    generator = genai.Generator(model, params)
    inputs = genai.NamedTensors()
    inputs["audio_features"] = feed["audio_features"]
    generator.set_inputs(inputs)
    generator.append_tokens(feed["input_ids"][0, :4])
    while not generator.is_done():
        generator.generate_next_token()
    return np.array(generator.get_sequence(0)[4:])


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_compiles_runs_and_generates(name: str, tmp_path: Path) -> None:
    source = genai_folders.folder(name)
    data = genai_folders.data(name, 4, 24)
    np.savez(tmp_path / "c.npz", **data)  # type: ignore[arg-type]
    feed: dict[str, Any] = {key: array[:1] for key, array in data.items()}
    model = qgraph.load(source)
    full = complete_feed(model, feed)
    want = run(open_session(model, optimized=False), full)
    assert np.isfinite(want[0]).all()
    tokens = generated(source, feed)
    for recipe in ("dynamic", CALIBRATED[NAMES.index(name) % len(CALIBRATED)]):
        compiled = qgraph.compile(source, recipe, tmp_path / "c.npz")
        out = compiled.save(tmp_path / recipe)
        for optimized in (False, True):
            got = run(open_session(qgraph.load(out), optimized=optimized), full)
            assert [g.shape for g in got] == [w.shape for w in want]
            assert decibels(want[0], got[0]) > SIGNAL.get(name, 19.0), (recipe, optimized)
        np.testing.assert_array_equal(compiled(**feed)[0].shape, want[0].shape)
        assert generated(out, feed).shape == tokens.shape
        verdicts = compiled.remarks.verdicts()
        silent = [
            node_name(node)
            for node in nodes(model)
            if is_op(node, "MatMul", "Gemm", "Conv") or is_op(node, "MoE", domain="com.microsoft")
            if node_name(node) not in verdicts
        ]
        assert not silent


@pytest.mark.parametrize("recipe", [*CALIBRATED, "rtn"])
@pytest.mark.parametrize("name", ["gemma3", "lfm2", "qwen3.5", "whisper"])
@pytest.mark.slow
def test_every_recipe_on_every_kind_of_state(name: str, recipe: str, tmp_path: Path) -> None:
    data = genai_folders.data(name, 4, 24)
    np.savez(tmp_path / "c.npz", **data)  # type: ignore[arg-type]
    compiled = qgraph.compile(genai_folders.folder(name), recipe, tmp_path / "c.npz")
    feed = {key: array[:1] for key, array in data.items()}
    want = run(
        open_session(qgraph.load(genai_folders.folder(name))), complete_feed(compiled.model, feed)
    )
    assert decibels(want[0], compiled(**feed)[0]) > 15


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt-oss"])
def test_a_prompt_longer_than_the_window_is_read_in_one_as_in_two(name: str) -> None:
    """An empty windowed cache changes nothing: all tokens at once, or the last one after them."""
    model = qgraph.load(genai_folders.folder(name))
    ids = genai_folders.data(name, 2, 3 * genai_folders.WINDOW)["input_ids"]
    session = open_session(model)
    names = [str(output.name) for output in model.graph.outputs]
    whole = run(session, complete_feed(model, {"input_ids": ids}))
    first = dict(
        zip(names, run(session, complete_feed(model, {"input_ids": ids[:, :-1]})), strict=True)
    )
    past = {
        str(v.name): first[str(v.name).replace("past_key_values", "present")]
        for v in model.graph.inputs
        if str(v.name).startswith("past")
    }
    last = run(session, complete_feed(model, {"input_ids": ids[:, -1:], **past}))
    np.testing.assert_allclose(last[0][:, -1], whole[0][:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt-oss", "lfm2-moe", "qwen3.5-moe"])
def test_experts_stay_float_and_that_is_said(name: str) -> None:
    compiled = qgraph.compile(genai_folders.folder(name), "dynamic")
    experts = [r for r in compiled.remarks.verdicts().values() if r.op == "MoE"]
    assert experts
    assert all(r.kind == "float" and "experts" in r.message for r in experts)


@pytest.mark.parametrize("name", ["gemma3-vl", "lfm2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_a_decoder_that_is_given_embeddings(name: str) -> None:
    folder = genai_folders.folder(name, "exclude_embeds=true")
    rng = np.random.default_rng(0)
    feeds = [{"inputs_embeds": rng.standard_normal((1, 12, 64)).astype(np.float32)}] * 2
    compiled = qgraph.compile(folder, "w8a8", feeds)
    want = run(open_session(qgraph.load(folder)), complete_feed(compiled.model, feeds[0]))
    assert decibels(want[0], compiled(**feeds[0])[0]) > 20
