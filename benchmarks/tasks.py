"""What each model of the zoo is for: inputs to feed it and a metric of what comes out.

A *feed* is the named inputs of one call; a *runner* turns a feed into the outputs.  Feeds for
calibration and feeds for evaluation come from disjoint material.  A metric that needs labels takes
one runner; an agreement takes the float runner first and the runner under test second.
"""

from __future__ import annotations

import functools
import json
import os
import re
import wave
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import onnx
import onnxruntime as ort
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tokenizers import Tokenizer

from benchmarks import zoo
from benchmarks.metrics import (
    agreement,
    cross_entropy,
    edit_distance,
    mean_cosine,
    roc_auc,
    sqnr_db,
)
from benchmarks.zoo import Array

if TYPE_CHECKING:
    import torch

Feed = dict[str, Array]
Runner = Callable[[Feed], list[Array]]
Split = Literal["eval", "calibration"]
Text = Literal["handbook", "kjv", "lee"]
T = TypeVar("T")

# ------------------------------------------------------------------------------------- running


def session(path: Path | str, optimized: bool = True, threads: int = 1) -> Runner:
    """A runner on stock onnxruntime, for an ONNX file or a genai folder with ``model.onnx``.

    Inputs are fitted to the model by ``fit``, so that one feed serves all variants of a model.
    """
    path = Path(path) / "model.onnx" if Path(path).is_dir() else Path(path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    ran = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    shapes = {value.name: list(value.shape) for value in ran.get_inputs()}

    def run(feed: Feed) -> list[Array]:
        outputs: list[Array] = ran.run(None, fit(feed, shapes))
        return outputs

    return run


def module_runner(module: torch.nn.Module) -> Runner:
    """A runner on a torch module, which takes a feed's values in order."""
    import torch

    def run(feed: Feed) -> list[Array]:
        with torch.inference_mode():
            output: Array = module(*map(torch.tensor, feed.values())).numpy()
        return [output]

    return run


def fit(feed: Feed, shapes: dict[str, list[int | str]]) -> Feed:
    """Drop what a model does not take, and add a language model's empty cache, mask, positions."""
    fitted = {name: value for name, value in feed.items() if name in shapes}
    for name, shape in shapes.items():
        if name in fitted:
            continue
        if name.startswith("past_key_values"):
            heads = shape[1]
            assert isinstance(heads, int)
            fitted[name] = np.zeros((len(feed["input_ids"]), heads, 0, HEAD_SIZE), np.float32)
        elif name == "attention_mask":
            fitted[name] = np.ones_like(feed["input_ids"])
        elif name == "position_ids":
            fitted[name] = np.cumsum(np.ones_like(feed["input_ids"]), axis=1) - 1
    return fitted


def input_shapes(path: Path | str) -> dict[str, list[int | str]]:
    """The inputs of a model without loading its weights, as ``fit`` wants them."""
    path = Path(path) / "model.onnx" if Path(path).is_dir() else Path(path)
    graph = onnx.load(path, load_external_data=False).graph
    weights = {weight.name for weight in graph.initializer}
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in graph.input
        if value.name not in weights
    }


def _first_outputs(runner: Runner, feeds: Iterable[Feed]) -> Array:
    """The first output of every feed, one under the other."""
    return np.concatenate([runner(feed)[0] for feed in feeds])


def spread(items: Sequence[T], n: int) -> list[T]:
    """At most ``n`` items, evenly spread."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


# ------------------------------------------------------------------------ images: EfficientNet


def _stamps() -> Path:
    return zoo.debian_package("tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps"


@functools.cache
def _labels() -> dict[str, list[int]]:
    """The accepted ImageNet classes of 118 stamps, chosen by hand."""
    text = (Path(__file__).parent / "data" / "tuxpaint_labels.json").read_text()
    labels: dict[str, list[int]] = json.loads(text)
    return labels


def _on_white(path: Path) -> Image.Image:
    """An image at 224 pixels; a cut-out lies on white."""
    image = Image.open(path).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return ImageOps.pad(image, (224, 224), Image.Resampling.BICUBIC, color="white")


def _image_feed(image: Image.Image) -> Feed:
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None]
    return {"inputs": (pixels - 127) / 128}


@functools.cache
def labelled_images() -> tuple[tuple[Feed, frozenset[int]], ...]:
    """20 photos of foolbox and 118 stamps, each with its accepted ImageNet classes.

    Not ImageNet: too few and too easy for an ImageNet accuracy.
    """
    photos = sorted((zoo.package("foolbox", "3.3.4") / "foolbox" / "data").glob("imagenet_*.jpg"))
    of_photos = [(path, [int(path.stem.split("_")[-1])]) for path in photos]
    of_stamps = [(_stamps() / name, classes) for name, classes in _labels().items()]
    found = of_photos + of_stamps
    return tuple((_image_feed(_on_white(path)), frozenset(classes)) for path, classes in found)


def images_eval() -> list[Feed]:
    """The 138 labelled images, one a feed."""
    return [feed for feed, _ in labelled_images()]


def images_calibration(n: int = 64) -> list[Feed]:
    """Other stamps than the labelled ones, every second one mirrored and cropped."""
    paths = sorted(_stamps().rglob("*.png"))
    others = [path for path in paths if str(path.relative_to(_stamps())) not in _labels()]
    images = [_on_white(path) for path in spread(others, n)]
    changed = [
        ImageOps.mirror(image).crop((16, 16, 208, 208)).resize((224, 224)) for image in images
    ]
    return [_image_feed((changed if i % 2 else images)[i]) for i in range(len(images))]


def top1(runner: Runner) -> int:
    """How many of the 138 labelled images get an accepted class."""
    return sum(int(runner(feed)[0].argmax()) in classes for feed, classes in labelled_images())


def logit_sqnr_db(reference: Runner, runner: Runner) -> float:
    """Noise on the logits of the labelled images."""
    return sqnr_db(*(_first_outputs(run, images_eval()) for run in (reference, runner)))


def top1_agreement(reference: Runner, runner: Runner) -> float:
    """The share of labelled images that both runners put into the same class."""
    return agreement(*(_first_outputs(run, images_eval()) for run in (reference, runner)))


# ------------------------------------------------------------------------- sentences: MiniLM


def minilm_feeds(split: Split = "eval", n: int = 128, batch: int = 8) -> list[Feed]:
    """Padded batches of news sentences; the two splits come from different articles."""
    tokenizer = Tokenizer.from_file(str(zoo.minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    sentences = zoo.lee_sentences()
    half = len(sentences) // 2
    chosen = spread(sentences[:half] if split == "eval" else sentences[half:], n)
    feeds = []
    for start in range(0, len(chosen), batch):
        tokenizer.enable_padding()
        encoded = tokenizer.encode_batch(chosen[start : start + batch])
        ids = np.array([one.ids for one in encoded], np.int64)
        mask = np.array([one.attention_mask for one in encoded], np.int64)
        feeds.append({"input_ids": ids, "attention_mask": mask})
    return feeds


def embeddings(runner: Runner, feeds: Iterable[Feed]) -> Array:
    """One mean-pooled vector of length 1 for every sentence."""
    pooled = []
    for feed in feeds:
        mask = feed["attention_mask"][..., None]
        pooled.append((runner(feed)[0] * mask).sum(1) / mask.sum(1))
    vectors = np.concatenate(pooled)
    lengths: Array = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / lengths


def embedding_cosine(reference: Runner, runner: Runner) -> float:
    """The mean cosine between the two runners' sentence embeddings."""
    feeds = minilm_feeds()
    return mean_cosine(embeddings(reference, feeds), embeddings(runner, feeds))


# ---------------------------------------------------------------------------- text in images


def text_lines(split: Split, n: int = 95) -> list[str]:
    """Pieces of at most 32 characters out of news sentences."""
    texts = [" ".join(s.split()) for s in zoo.lee_sentences() if s.isascii()]
    sentences = [text[:32].rsplit(" ", 1)[0] for text in texts if len(text) > 40]
    half = len(sentences) // 2
    return spread(sentences[:half] if split == "eval" else sentences[half:], n)


def render(lines: Sequence[str], font: int, size: int = 32) -> Image.Image:
    """Black text on white, in one of four DejaVu fonts."""
    folder = zoo.package("matplotlib", "3.10.0") / "matplotlib" / "mpl-data" / "fonts" / "ttf"
    names = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold")
    face = ImageFont.truetype(folder / f"{names[font % len(names)]}.ttf", size)
    width = round(max(face.getlength(line) for line in lines)) + size
    pitch = size * 3 // 2
    image = Image.new("RGB", (width, pitch * len(lines)), "white")
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((size // 2, i * pitch + size // 8), line, "black", face)
    return image


def _line_feed(image: Image.Image, width: int | None = None) -> Feed:
    """A line scaled to 48 pixels in height, and cut or padded to a width if one is given."""
    natural = round(image.width * 48 / image.height)
    pixels = np.asarray(image.resize((min(natural, width or natural), 48)), np.float32)
    padded = np.zeros((1, 3, 48, max(natural, 320) if width is None else width), np.float32)
    padded[0, :, :, : pixels.shape[1]] = pixels.transpose(2, 0, 1) / 127.5 - 1
    return {"x": padded}


def _page_feed(image: Image.Image) -> Feed:
    """A page, in a size that is a multiple of 32."""
    size = (image.width // 32 * 32, image.height // 32 * 32)
    pixels = np.asarray(image.resize(size), np.float32).transpose(2, 0, 1)[None]
    return {"x": pixels / 127.5 - 1}


def ocr_feeds(kind: Literal["det", "rec", "cls"], split: Split, n: int = 95) -> list[Feed]:
    """Inputs of a PP-OCR model: pages (``det``), lines (``rec``), lines half of them turned."""
    if kind == "det":
        lines = text_lines(split, 16 * n)
        pages = [lines[start : start + 16] for start in range(0, len(lines), 16)]
        return [_page_feed(render(page, font)) for font, page in enumerate(pages)]
    images = [render([line], font) for font, line in enumerate(text_lines(split, n))]
    if kind == "rec":
        return [_line_feed(image) for image in images]
    return [_line_feed(image.rotate(180 * (i % 2)), 192) for i, image in enumerate(images)]


@functools.cache
def _characters() -> tuple[str, ...]:
    """The alphabet of the recognition model: a blank, the embedded list, a space."""
    model = onnx.load(zoo.ppocr("rec"))
    (listed,) = (entry.value for entry in model.metadata_props if entry.key == "character")
    return ("", *listed.splitlines(), " ")


def ctc_text(scores: Array) -> str:
    """Greedy CTC decoding of ``(time, characters)``: merge repeats, drop blanks."""
    best = scores.argmax(-1)
    kept = best[np.append(True, best[1:] != best[:-1])]
    return "".join(_characters()[i] for i in kept).strip()


def rec_cer(runner: Runner) -> float:
    """Character error rate on 95 rendered lines."""
    lines = text_lines("eval")
    read = [ctc_text(runner(feed)[0][0]) for feed in ocr_feeds("rec", "eval")]
    return sum(map(edit_distance, lines, read)) / sum(map(len, lines))


def det_iou(reference: Runner, runner: Runner) -> float:
    """Overlap of the two maps of text pixels (over union) on six rendered pages."""
    overlap = union = 0
    for feed in ocr_feeds("det", "eval", 6):
        a, b = reference(feed)[0] > 0.3, runner(feed)[0] > 0.3
        overlap, union = overlap + int((a & b).sum()), union + int((a | b).sum())
    return overlap / union


def cls_accuracy(runner: Runner) -> float:
    """The share of lines whose orientation, upright or turned by 180 degrees, is told right."""
    scores = _first_outputs(runner, ocr_feeds("cls", "eval"))
    return float(np.mean(scores.argmax(-1) == np.arange(len(scores)) % 2))


# ------------------------------------------------------------------------------ speech: Silero

_FRAME, _CONTEXT = 512, 64  # samples at 16 kHz


def prompt_at_16khz(path: Path) -> Array:
    """A recording at 8 kHz as whole frames at 16 kHz, with a peak of about one half."""
    with wave.open(str(path)) as recording:
        assert recording.getframerate() == 8000
        samples = np.frombuffer(recording.readframes(recording.getnframes()), np.int16)
    samples = samples[: len(samples) // (_FRAME // 2) * (_FRAME // 2)]
    spectrum = np.fft.rfft(samples / np.abs(samples).max())
    return np.fft.irfft(spectrum, 2 * len(samples))  # twice as long, so half as high


@functools.cache
def speech(split: Split, prompts: int = 40) -> tuple[Array, Array]:
    """Spoken prompts in noise at 16 kHz, and a label for each frame: 1 speech, 0 none, -1 unsure.

    The prompts are Asterisk's.  Unsure are the pauses in a prompt and a quarter of a second around
    it.  The noise swells up to a fifth of the voice's peak: without it nothing could be told wrong.
    """
    sounds = sorted(zoo.debian_package("asterisk-core-sounds-en-wav").rglob("*.wav"))
    spoken = [path for path in sounds if "silence" not in path.parts and "tt-" not in path.name]
    chosen = spread([path for path in spoken if path.stat().st_size > 16_000], 2 * prompts)
    random = np.random.default_rng(["eval", "calibration"].index(split))
    audio: list[Array] = []
    labels: list[Array] = []
    for path in chosen[0 if split == "eval" else 1 :: 2]:
        voice = prompt_at_16khz(path)
        power = np.square(voice).reshape(-1, _FRAME).mean(1)
        silent = int(random.integers(20, 60))
        unsure = np.full(silent, -1)
        unsure[8:-8] = 0
        audio += [voice, np.zeros(silent * _FRAME)]
        labels += [np.where(power > power.max() / 100, 1, -1), unsure]
    clean = np.concatenate(audio)
    noise = random.normal(0, 0.06, len(clean)) * (1 + np.sin(np.arange(len(clean)) / 50_000))
    return (clean + noise).astype(np.float32), np.concatenate(labels)


def silero_feeds(runner: Runner, audio: Array) -> Iterable[tuple[Feed, Array]]:
    """Each frame's feed, with the state that the frames before left, and the runner's outputs."""
    state = np.zeros((2, 1, 128), np.float32)
    padded = np.concatenate([np.zeros(_CONTEXT, np.float32), audio])
    for start in range(0, len(audio) - _FRAME + 1, _FRAME):
        frame = padded[start : start + _CONTEXT + _FRAME][None]
        feed = {"input": frame, "state": state, "sr": np.array(16_000)}
        output, state = runner(feed)[:2]
        yield feed, output


def silero_auc(runner: Runner) -> float:
    """Area under the curve of the speech probability against the frame labels."""
    audio, labels = speech("eval")
    scores = np.array([output.item() for _, output in silero_feeds(runner, audio)])
    return roc_auc(scores[labels >= 0], labels[labels >= 0])


def silero_calibration(path: Path, n: int = 256) -> list[Feed]:
    """Evenly spread frames of other prompts, with the states the float model really passes on."""
    audio, _ = speech("calibration")
    feeds = [feed for feed, _ in silero_feeds(session(path), audio)]
    shapes = input_shapes(path)
    return [fit(feed, shapes) for feed in spread(feeds, n)]


# ------------------------------------------------------------------------- file types: Magika

_FILE_TYPES = {
    ".py": "python", ".html": "html", ".png": "png", ".jpg": "jpeg", ".wav": "wav", ".ogg": "ogg",
    ".svg": "svg", ".so": "elf", ".css": "css", ".ttf": "ttf", ".npy": "npy", ".pdf": "pdf",
    ".h": "c",
}  # fmt: skip


def _magika_features(content: bytes) -> Array | None:
    """Magika's own features: 1,024 bytes from either end, without outer white space."""
    head, tail = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
    if len(head) < 8:
        return None
    features = np.full(2048, 256, np.int32)
    features[: len(head)] = np.frombuffer(head, np.uint8)
    features[2048 - len(tail) :] = np.frombuffer(tail, np.uint8)
    return features


@functools.cache
def magika_files(split: Split, per_type: int = 20) -> tuple[tuple[Feed, str], ...]:
    """Files of the zoo's own packages, at most so many of a type, and their types."""
    roots = [
        zoo.package("matplotlib", "3.10.0"),
        zoo.package("gensim", "4.4.0"),
        zoo.package("foolbox", "3.3.4"),
        zoo.debian_package("debian-handbook"),
        zoo.debian_package("asterisk-core-sounds-en-wav"),
        _stamps(),
    ]
    paths = sorted(path for root in roots for path in root.rglob("*") if path.is_file())
    found: list[tuple[Feed, str]] = []
    for suffix, label in _FILE_TYPES.items():
        of_type = [path for path in paths if path.suffix == suffix]
        half = spread(of_type, 2 * per_type)[0 if split == "eval" else 1 :: 2]
        for path in half:
            features = _magika_features(path.read_bytes())
            if features is not None:
                found.append(({"bytes": features[None]}, label))
    return tuple(found)


def magika_accuracy(runner: Runner) -> float:
    """The share of files whose type is told right (the network's own answer, no thresholds)."""
    config = json.loads((zoo.magika().parent / "config.min.json").read_text())
    names = config["target_labels_space"]
    files = magika_files("eval")
    return float(np.mean([names[int(runner(feed)[0].argmax())] == label for feed, label in files]))


def magika_calibration(n: int = 128) -> list[Feed]:
    """Other files of the same types."""
    return [feed for feed, _ in spread(magika_files("calibration"), n)]


# ------------------------------------------------------------------------- language: SmolLM2

HEAD_SIZE = 64  # of SmolLM2: the ONNX file leaves it open


@functools.cache
def _smollm2_tokens(text: Text) -> Array:
    """A whole text as tokens."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = Tokenizer.from_file(str(zoo.smollm2_hf() / "tokenizer.json"))
    if text == "lee":
        prose = "\n\n".join(zoo.lee_documents())
    else:
        prose = zoo.handbook_prose() if text == "handbook" else zoo.kjv()
    parts = tokenizer.encode_batch(re.findall(r"(?s).{1,100000}", prose))
    return np.concatenate([np.array(part.ids, np.int64) for part in parts])


def smollm2_chunks(
    split: Split = "eval",
    text: Text = "handbook",
    n: int = 12,
    length: int = 512,
) -> Array:
    """Evenly spread chunks ``(n, length)``; evaluation has a text's first half to itself."""
    tokens = _smollm2_tokens(text)
    half = len(tokens) // 2
    part = tokens[:half] if split == "eval" else tokens[half:]
    starts = np.arange(n) * (len(part) // n)
    if len(part) // n < length:
        raise ValueError(f"{text} has no {n} x {length} tokens for {split}")
    return np.stack([part[start : start + length] for start in starts])


def perplexity(runner: Runner, chunks: Array) -> float:
    """Perplexity of the first output's logits; every chunk starts without context."""
    losses = []
    for chunk in chunks:
        logits = runner({"input_ids": chunk[None]})[0][0]
        losses.append(cross_entropy(logits[:-1], chunk[1:]))
    return float(np.exp(np.mean(losses)))


def smollm2_calibration(
    path: Path, n: int = 16, length: int = 512, text: Text = "handbook"
) -> list[Feed]:
    """Chunks of a text's second half, with every input that the model at ``path`` takes."""
    shapes = input_shapes(path)
    chunks = smollm2_chunks("calibration", text, n, length)
    return [fit({"input_ids": chunk[None]}, shapes) for chunk in chunks]
