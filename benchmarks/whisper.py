"""Whisper's task: spoken prompts are written down.

A runner under test is one half of Whisper, the encoder or the decoder; the other half is float.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks import tasks, zoo
from benchmarks.metrics import common_beginning, cross_entropy, edit_distance, mean_cosine
from benchmarks.tables import cores
from benchmarks.tasks import Feed, Runner, Split, spread
from benchmarks.zoo import Array

START = np.array([50258, 50259, 50359, 50363])
"""The start of a transcript; it is English, of what was said, and without times."""
END = 50257
LONGEST = 192
"""Tokens of a transcript at most: no prompt needs half as many."""
PROMPTS: dict[Split, int] = {"eval": 30, "calibration": 48}


# ------------------------------------------------------------------------------- the recordings


@dataclass(frozen=True)
class Prompt:
    """A recording.

    Attributes:
        text: what is said.
        features: log-mel spectrum of half a minute, `(1, 80, 3000)` in float32.
    """

    text: str
    features: Array


def words(text: str) -> list[str]:
    """The words as OpenAI compares them: lower case, no punctuation, "isn't" as "is not"."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    normalized: str = EnglishTextNormalizer({})(text)  # type: ignore[no-untyped-call]
    return normalized.split()


@functools.cache
def prompts(split: Split) -> list[Prompt]:
    """Evenly spread prompts, every other one of all for calibration; there is one speaker only."""
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor()  # type: ignore[no-untyped-call]
    found = []
    for path, text in spread(_sentences()[0 if split == "eval" else 1 :: 2], PROMPTS[split]):
        sound = tasks.prompt_at_16khz(path)
        features = extract(sound, sampling_rate=16_000, return_tensors="np").input_features
        found.append(Prompt(text, features.astype(np.float32)))
    return found


def _sentences() -> list[tuple[Path, str]]:
    """Recordings of at least eight words in at most half a minute; no text comes twice.

    Texts with signs are left out, for one cannot know how they were read.
    """
    half_a_minute = 30 * 8000 * 2  # bytes
    by_words = {
        tuple(words(text)): (path, text)
        for path, text in zoo.spoken_prompts().items()
        if not re.search(r"[\[(*#]", text) and path.stat().st_size < half_a_minute
    }
    return [found for said, found in by_words.items() if len(said) >= 8]


# ------------------------------------------------------------------------------------- decoding


@functools.cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(zoo.whisper_file("tokenizer.json")))


@functools.cache
def _suppressed(key: str) -> list[int]:
    found: list[int] = json.loads(zoo.whisper_file("config.json").read_text())[key]
    return found


def likeliest(logits: Array) -> Array:
    """The best token of each row of logits `(places, vocabulary)`, from the first place on.

    As everywhere, Whisper may not answer with signs that stand for no word, nor with nothing.
    """
    allowed = logits.copy()
    allowed[:, _suppressed("suppress_ids")] = -np.inf
    allowed[0, _suppressed("suppress_ids_begin")] = -np.inf
    best: Array = allowed.argmax(-1)
    return best


def decoder_feed(tokens: Array, states: Array) -> Feed:
    """The inputs for a transcript so far and the encoder's states `(1, 1500, 512)`."""
    return {"input_ids": np.concatenate([START, tokens])[None], "encoder_hidden_states": states}


def logits_after(decoder: Runner, tokens: Array, states: Array) -> Array:
    """What follows each beginning of a transcript: `(len(tokens) + 1, vocabulary)`."""
    return decoder(decoder_feed(tokens, states))[0][0, len(START) - 1 :]


def greedy(decoder: Runner, states: Array, draft: Array) -> Array:
    """The likeliest token after the likeliest tokens before, up to END or `LONGEST` of them.

    Without a cache a call computes all places anyway, so it may as well check a draft: one call
    confirms all tokens up to the first that differs. The draft does not change what is found.
    """
    tokens, done = draft, 0
    while done < LONGEST:
        tokens = tokens[: LONGEST - 1]
        best = likeliest(logits_after(decoder, tokens, states))
        done += common_beginning(best[done:-1], tokens[done:]) + 1
        tokens = np.concatenate([tokens[: done - 1], best[done - 1 :]])
        if END in tokens[:done]:
            return tokens[: list(tokens).index(END) + 1]
    return tokens


def write_down(decoder: Runner, states: Iterable[Array], drafts: Iterable[Array]) -> list[Array]:
    """The tokens of each prompt."""
    return [greedy(decoder, *one) for one in zip(states, drafts, strict=True)]


# --------------------------------------------------------------------------- float's two halves


@functools.cache
def _float_encoder() -> Runner:
    return tasks.session(zoo.whisper_encoder(), threads=cores())


@functools.cache
def _float_decoder() -> Runner:
    return tasks.session(zoo.whisper_decoder(), threads=cores())


def _heard(split: Split) -> Path:
    """A folder with what float Whisper makes of the prompts: it takes minutes."""

    def build(out: Path) -> None:
        texts = [f" {prompt.text}" for prompt in prompts(split)]
        said = _tokenizer().encode_batch(texts, add_special_tokens=False)
        states = [_float_encoder()(feed)[0] for feed in encoder_feeds(split, PROMPTS[split])]
        tokens = write_down(_float_decoder(), states, [np.array(one.ids) for one in said])
        out.mkdir()
        np.save(out / "states.npy", np.stack(states))
        (out / "tokens.json").write_text(json.dumps([one.tolist() for one in tokens]))

    return zoo.cached(f"whisper-heard-{split}", build)


def float_states(split: Split) -> list[Array]:
    """The states of each prompt by float's encoder, on disk until they are read."""
    return list(np.load(_heard(split) / "states.npy", mmap_mode="r"))


def float_tokens(split: Split) -> list[Array]:
    """The transcript of each prompt by both float halves."""
    return [np.array(one) for one in json.loads((_heard(split) / "tokens.json").read_text())]


# ---------------------------------------------------------------------------------------- feeds


def encoder_feeds(split: Split = "eval", n: int = PROMPTS["eval"]) -> list[Feed]:
    """A feed for each of at most `n` prompts."""
    return [{"input_features": prompt.features} for prompt in spread(prompts(split), n)]


def decoder_feeds(split: Split = "eval", n: int = PROMPTS["eval"]) -> list[Feed]:
    """A feed for each of at most `n` prompts: float's states, and all of float's transcript."""
    feeds = list(map(decoder_feed, float_tokens(split), float_states(split)))
    return spread(feeds, n)


# -------------------------------------------------------------------------------------- metrics


def word_errors(transcripts: Iterable[Array]) -> float:
    """Words wrong, missing or too many, in per cent of those said."""
    said = [words(prompt.text) for prompt in prompts("eval")]
    read = [words(_tokenizer().decode(tokens.tolist())) for tokens in transcripts]
    return 100 * sum(map(edit_distance, said, read)) / sum(map(len, said))


def logits_along(decoder: Runner, states: Iterable[Array]) -> Iterator[Array]:
    """For each prompt the logits of float's tokens, given float's tokens before."""
    for tokens, of_one in zip(float_tokens("eval"), states, strict=True):
        yield logits_after(decoder, tokens[:-1], of_one)


def perplexity(decoder: Runner, states: Iterable[Array]) -> float:
    """Of float's transcripts: it tells more finely than word errors what became of the answers."""
    along = zip(logits_along(decoder, states), float_tokens("eval"), strict=True)
    return float(np.exp(np.mean(np.concatenate([cross_entropy(*one) for one in along]))))


def _cosine(expected: Iterable[Array], found: Iterable[Array]) -> float:
    return float(np.mean([mean_cosine(*pair) for pair in zip(expected, found, strict=True)]))


@functools.lru_cache(maxsize=1)  # three metrics of one runner
def _states(encoder: Runner) -> list[Array]:
    return [encoder(feed)[0] for feed in encoder_feeds()]


def encoder_word_errors(encoder: Runner) -> float:
    """:func:`word_errors` of this encoder and float's decoder."""
    return word_errors(write_down(_float_decoder(), _states(encoder), float_tokens("eval")))


def encoder_perplexity(encoder: Runner) -> float:
    """:func:`perplexity` of this encoder and float's decoder."""
    return perplexity(_float_decoder(), _states(encoder))


def encoder_cosine(_: Runner, encoder: Runner) -> float:
    """The mean cosine between this encoder's states and float's, which are known."""
    return _cosine(float_states("eval"), _states(encoder))


def decoder_word_errors(decoder: Runner) -> float:
    """:func:`word_errors` of float's encoder and this decoder."""
    return word_errors(write_down(decoder, float_states("eval"), float_tokens("eval")))


def decoder_perplexity(decoder: Runner) -> float:
    """:func:`perplexity` of float's encoder and this decoder."""
    return perplexity(decoder, float_states("eval"))


def decoder_cosine(reference: Runner, decoder: Runner) -> float:
    """The mean cosine between two decoders' logits along float's transcripts."""
    return _cosine(*(logits_along(run, float_states("eval")) for run in (reference, decoder)))
