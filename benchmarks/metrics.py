"""General metrics: pure functions of arrays or strings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.zoo import Array


def sqnr_db(reference: Array, other: Array) -> float:
    """Signal-to-noise ratio in decibels: the energy of the reference over that of the error."""
    noise = np.square(reference.astype(np.float64) - other).sum()
    signal = np.square(reference.astype(np.float64)).sum()
    return float("inf") if noise == 0 else float(10 * np.log10(signal / noise))


def accuracy(logits: Array, targets: Array) -> float:
    """The share of rows whose largest entry is at the target."""
    return float(np.mean(logits.argmax(-1) == targets))


def agreement(reference: Array, other: Array) -> float:
    """The share of rows whose largest entry is at the same place."""
    return accuracy(reference, other.argmax(-1))


def mean_cosine(reference: Array, other: Array) -> float:
    """The mean cosine between rows."""
    norms = np.linalg.norm(reference, axis=-1) * np.linalg.norm(other, axis=-1)
    return float(np.mean((reference * other).sum(-1) / norms))


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Minus the logarithm of what each row of logits gives to its target, in nats."""
    logits = logits.astype(np.float32)
    shifted = logits - logits.max(-1, keepdims=True)
    of_targets = np.take_along_axis(shifted, targets[:, None], 1)[:, 0]
    entropy: Array = np.log(np.exp(shifted).sum(-1)) - of_targets
    return entropy


def common_beginning(a: Array, b: Array) -> int:
    """How many entries are the same before the first that differs."""
    return int(np.logical_and.accumulate(a == b).sum())


def roc_auc(scores: Array, labels: Array) -> float:
    """The probability that a positive scores above a negative; ties count half."""
    positives, negatives = scores[labels == 1], np.sort(scores[labels == 0])
    below = np.searchsorted(negatives, positives, "left")
    up_to = np.searchsorted(negatives, positives, "right")
    return float((below + up_to).mean() / 2 / len(negatives))


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein's distance, in characters of strings or in words of lists."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]
