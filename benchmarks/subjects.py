"""The models that the measuring scripts and `tests/test_models.py` go over, with their tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import qgraph
from benchmarks import antibodies, tasks, whisper, zoo
from benchmarks.metrics import agreement, sqnr_db
from benchmarks.tasks import Feed, Runner
from benchmarks.zoo import Array
from qgraph.io.models import save


@dataclass(frozen=True)
class Metric:
    """What a model is good for, as one number of a runner.

    Attributes:
        name: with its unit.
        measure: the number.
        relative: whether it is best told as a rise over float in per cent, as perplexities are.
    """

    name: str
    measure: Callable[[Runner], float]
    relative: bool = False


@dataclass(frozen=True)
class Likeness:
    """How alike the answers of two runners are: `measure(float runner, other)`."""

    name: str
    measure: Callable[[Runner, Runner], float]


@dataclass(frozen=True)
class Subject:
    """One model.

    Attributes:
        name: as on the command line.
        build: writes or finds the float model, given a scratch folder; a file or a genai folder.
        calibration: feeds for the recipes and for onnxruntime's `quantize_static`, from material
            that no metric uses.
        evaluation: feeds on which outputs are compared with float.
        timed: sets of feeds to time, by name; each feed is one call.
        metric, likeness: None where nothing is known about the task.
        second: another metric, for what the first does not tell.
    """

    name: str
    build: Callable[[Path], Path]
    calibration: Callable[[Path], list[Feed]]
    evaluation: Callable[[Path], list[Feed]]
    timed: Callable[[Path], dict[str, list[Feed]]]
    metric: Metric | None = None
    likeness: Likeness | None = None
    second: Metric | None = None


def model_file(path: Path) -> Path:
    """The ONNX file of a model that may be a folder."""
    return path / "model.onnx" if path.is_dir() else path


def outputs(runner: Runner, feeds: Sequence[Feed]) -> Array:
    """The first output for every feed, flat and one after the other: shapes may differ."""
    return np.concatenate([np.ravel(runner(feed)[0]) for feed in feeds])


def sqnr(reference: Array, other: Array) -> float:
    """Decibels over all outputs; nan if `other` has another size or is not finite."""
    if reference.shape != other.shape or not np.isfinite(other).all():
        return float("nan")
    return sqnr_db(reference, other)


def same_answers(feeds: Callable[[], list[Feed]]) -> Likeness:
    """The share of feeds for which the largest output is at the same place."""

    def measure(reference: Runner, runner: Runner) -> float:
        rows = [np.concatenate([run(f)[0] for f in feeds()]) for run in (reference, runner)]
        return agreement(*rows)

    return Likeness("same class", measure)


# ------------------------------------------------------------------------------- the models


def _traced_efficientnet(scratch: Path) -> Path:
    import torch

    module, (image,) = zoo.efficientnet_lite0_module()
    two = image.repeat(2, 1, 1, 1)  # a batch of 1 would be taken for a constant
    model = qgraph.trace(module, two, {"inputs": {0: torch.export.Dim("batch")}})
    return _saved(model, scratch / "efficientnet.onnx")


def _traced_minilm(scratch: Path) -> Path:
    return _saved(qgraph.trace(*zoo.minilm_module()), scratch / "minilm.onnx")


def _traced_antiberty(scratch: Path) -> Path:
    return _saved(qgraph.trace(*zoo.antiberty_module()), scratch / "antiberty.onnx")


def _saved(model: object, path: Path) -> Path:
    save(model, path)  # type: ignore[arg-type]
    return path


def _efficientnet(name: str, build: Callable[[Path], Path]) -> Subject:
    return Subject(
        name,
        build,
        lambda _: tasks.images_calibration(),
        lambda _: tasks.images_eval(),
        lambda _: {"1 image": tasks.images_eval()[::20]},
        Metric("right of 138", tasks.top1),
        Likeness("same class", tasks.top1_agreement),
    )


def _minilm() -> Subject:
    def timed(_: Path) -> dict[str, list[Feed]]:
        return {
            "8 sentences": tasks.minilm_feeds(n=64),
            "1 sentence": tasks.minilm_feeds(n=8, batch=1),
        }

    return Subject(
        "minilm",
        _traced_minilm,
        lambda _: tasks.minilm_feeds("calibration"),
        lambda _: tasks.minilm_feeds(n=32),
        timed,
        None,
        Likeness("cosine", tasks.embedding_cosine),
    )


def _antiberty() -> Subject:
    return Subject(
        "antiberty",
        _traced_antiberty,
        lambda _: antibodies.feeds("calibration"),
        lambda _: antibodies.feeds(n=4),
        lambda _: {"8 copies of an antibody": antibodies.feeds(n=8)},
        Metric("amino acids right", antibodies.masked_accuracy),
        second=Metric("their perplexity", antibodies.masked_perplexity, relative=True),
    )


def _whisper() -> list[Subject]:
    return [
        Subject(
            "whisper-encoder",
            lambda _: zoo.whisper_encoder(),
            lambda _: whisper.encoder_feeds("calibration", 16),
            lambda _: whisper.encoder_feeds(n=3),
            lambda _: {"half a minute of sound": whisper.encoder_feeds(n=1)},
            Metric("words wrong, %", whisper.encoder_word_errors),
            Likeness("cosine", whisper.encoder_cosine),
            Metric("transcripts' perplexity", whisper.encoder_perplexity, relative=True),
        ),
        Subject(
            "whisper-decoder",
            lambda _: zoo.whisper_decoder(),
            lambda _: whisper.decoder_feeds("calibration", 48),
            lambda _: whisper.decoder_feeds(n=6),
            lambda _: {"1 transcript": whisper.decoder_feeds(n=4)},
            Metric("words wrong, %", whisper.decoder_word_errors),
            Likeness("cosine", whisper.decoder_cosine),
            Metric("transcripts' perplexity", whisper.decoder_perplexity, relative=True),
        ),
    ]


def _ppocr() -> list[Subject]:
    return [
        Subject(
            "ppocr-det",
            lambda _: zoo.ppocr("det"),
            lambda _: tasks.ocr_feeds("det", "calibration", 8),
            lambda _: tasks.ocr_feeds("det", "eval", 3),
            lambda _: {"1 page": tasks.ocr_feeds("det", "eval", 2)},
            None,
            Likeness("text overlap", tasks.det_iou),
        ),
        Subject(
            "ppocr-rec",
            lambda _: zoo.ppocr("rec"),
            lambda _: tasks.ocr_feeds("rec", "calibration", 48),
            lambda _: tasks.ocr_feeds("rec", "eval")[::4],
            lambda _: {"1 line": tasks.ocr_feeds("rec", "eval", 5)},
            Metric("characters wrong, %", lambda run: 100 * tasks.rec_cer(run)),
        ),
        Subject(
            "ppocr-cls",
            lambda _: zoo.ppocr("cls"),
            lambda _: tasks.ocr_feeds("cls", "calibration", 64),
            lambda _: tasks.ocr_feeds("cls", "eval"),
            lambda _: {"1 line": tasks.ocr_feeds("cls", "eval", 4)},
            Metric("right, %", lambda run: 100 * tasks.cls_accuracy(run)),
            same_answers(lambda: tasks.ocr_feeds("cls", "eval")),
        ),
    ]


def _silero(name: str, file: str) -> Subject:
    @functools.cache
    def frames(path: Path) -> list[Feed]:
        audio, _ = tasks.speech("eval", 4)
        feeds = [feed for feed, _ in tasks.silero_feeds(tasks.session(path), audio)]
        return feeds[:: max(1, len(feeds) // 200)]

    return Subject(
        name,
        lambda _: zoo.silero_vad(file),
        tasks.silero_calibration,
        frames,
        lambda path: {"1 frame": frames(path)[::40]},
        Metric("AUC", tasks.silero_auc),
    )


def _magika() -> Subject:
    feeds = functools.cache(lambda: [feed for feed, _ in tasks.magika_files("eval")])
    return Subject(
        "magika",
        lambda _: zoo.magika(),
        lambda _: tasks.magika_calibration(),
        lambda _: feeds(),
        lambda _: {"1 file": feeds()[::40]},
        Metric("right, %", lambda run: 100 * tasks.magika_accuracy(run)),
        same_answers(feeds),
    )


def _smollm2(name: str, build: Callable[[], Path]) -> Subject:
    def chunk(path: Path, length: int) -> list[Feed]:
        shapes = tasks.input_shapes(path)
        tokens = tasks.smollm2_chunks("eval", n=1, length=length)
        return [tasks.fit({"input_ids": tokens}, shapes)]

    def perplexity(text: tasks.Text) -> Metric:
        def measure(run: Runner) -> float:
            return tasks.perplexity(run, tasks.smollm2_chunks(text=text))

        return Metric(f"perplexity, {text}", measure, relative=True)

    return Subject(
        name,
        lambda _: build(),
        tasks.smollm2_calibration,
        lambda path: chunk(path, 256),
        lambda path: {"prompt of 512": chunk(path, 512)},
        perplexity("handbook"),
        Likeness(
            "same next token",
            lambda reference, run: agreement(
                *(r(chunk(build(), 256)[0])[0] for r in (reference, run))
            ),
        ),
        perplexity("kjv"),
    )


def _light(name: str, path: Path) -> Subject:
    def images(seed: int, n: int) -> list[Feed]:
        random = np.random.default_rng(seed)
        shapes = tasks.input_shapes(path)
        return [
            {key: random.random(shape, np.float32) for key, shape in shapes.items()}  # type: ignore[arg-type]
            for _ in range(n)
        ]

    return Subject(
        f"light-{name.replace('_', '-')}",
        lambda _: path,
        lambda _: images(0, 2),
        lambda _: images(1, 1),
        lambda _: {"1 image": images(1, 1)},
    )


@functools.cache
def subjects() -> dict[str, Subject]:
    """All of them by name, small before large."""
    listed = [
        _efficientnet("efficientnet", _traced_efficientnet),
        _efficientnet("efficientnet-onnx", lambda _: zoo.efficientnet_lite0_onnx()),
        _minilm(),
        *_ppocr(),
        _silero("silero", "silero_vad.onnx"),
        _silero("silero-16k", "silero_vad_16k_op15.onnx"),
        _magika(),
        _antiberty(),
        *_whisper(),
        _smollm2("smollm2", zoo.smollm2_genai),
        _smollm2("smollm2-traced", zoo.smollm2_traced),
        *(_light(name, path) for name, path in zoo.light_models().items()),
    ]
    return {subject.name: subject for subject in listed}


def chosen(names: Sequence[str] | None) -> list[Subject]:
    """The subjects of these names, or whose names start so where none is just so; or all of them.

    Raises:
        SystemExit: a name fits none.
    """
    known = subjects()
    found: dict[str, Subject] = {}
    for name in [""] if names is None else names:
        fitting = [name] if name in known else [key for key in known if key.startswith(name)]
        if not fitting:
            raise SystemExit(f"no model '{name}': there are {', '.join(known)}")
        found |= {key: known[key] for key in fitting}
    return list(found.values())
