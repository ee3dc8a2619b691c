"""AntiBERTy's task: amino acids of antibodies are masked, and guessed from the others.

Every amino acid is masked once, an eighth of a sequence at a time, which is about how densely such
models are masked in training.
"""

from __future__ import annotations

import functools

import numpy as np

from benchmarks import zoo
from benchmarks.metrics import accuracy, cross_entropy
from benchmarks.tasks import Feed, Runner, Split, spread
from benchmarks.zoo import Array

CLS, SEP, MASK, FIRST = 2, 3, 4, 5
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
"""The amino acids: the letter at place i is token `FIRST + i`."""
TURNS = 8


def masked(sequence: str) -> Feed:
    """One feed of `TURNS` copies of a sequence; each amino acid is masked in one of them."""
    letters = [FIRST + LETTERS.index(letter) for letter in sequence]
    ids = np.tile(np.array([CLS, *letters, SEP], np.int64), (TURNS, 1))
    ids[:, 1:-1][_hidden(len(sequence))] = MASK
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def _hidden(length: int) -> Array:
    """Where amino acids are masked, `(TURNS, length)`: once in each column."""
    hidden: Array = np.arange(length) % TURNS == np.arange(TURNS)[:, None]
    return hidden


@functools.cache
def sequences(split: Split, n: int) -> list[str]:
    """Evenly spread antibodies; every other one of all serves calibration."""
    return spread(zoo.antibodies()[0 if split == "eval" else 1 :: 2], n)


def feeds(split: Split = "eval", n: int = 48) -> list[Feed]:
    """A feed for each of `n` antibodies."""
    return [masked(sequence) for sequence in sequences(split, n)]


@functools.lru_cache(maxsize=1)  # two metrics of one runner
def guesses(runner: Runner, n: int = 48) -> tuple[Array, Array]:
    """Logits of the amino acids `(masks, 20)` and which is right `(masks,)`, for `n` antibodies."""
    logits, right = [], []
    for sequence in sequences("eval", n):
        rows, places = np.nonzero(_hidden(len(sequence)))
        logits.append(runner(masked(sequence))[0][rows, 1 + places, FIRST:])
        right.append(np.array([LETTERS.index(sequence[place]) for place in places]))
    return np.concatenate(logits), np.concatenate(right)


def masked_accuracy(runner: Runner) -> float:
    """The share of masked amino acids that are guessed right."""
    return accuracy(*guesses(runner))


def masked_perplexity(runner: Runner) -> float:
    """The perplexity of the masked amino acids."""
    return float(np.exp(np.mean(cross_entropy(*guesses(runner)))))
