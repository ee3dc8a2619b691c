"""Weights and activations as the kernels read them: row-major, rows of whole 64-byte pieces."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64


def aligned(columns: int) -> int:
    """The least multiple of 64 that holds so many columns."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


def pad_columns(matrix: NDArray[np.int8]) -> NDArray[np.int8]:
    """(N, K) filled up with zeros to (N, K up to a multiple of 64); itself where K is one."""
    rows, columns = matrix.shape
    if columns == aligned(columns):
        return np.ascontiguousarray(matrix)
    padded = np.zeros((rows, aligned(columns)), np.int8)
    padded[:, :columns] = matrix
    return padded


def row_sums(weight: NDArray[np.int8]) -> NDArray[np.int32]:
    """(N,): what a zero point other than 128 is multiplied with."""
    sums: NDArray[np.int32] = weight.sum(1, dtype=np.int32)
    return sums
