"""Integers of few bits in bytes and words."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def pack(q: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Values of 1 to 8 bits as one stream of bits, the first in the low ones; each row ends with
    its byte.

    Args:
        q: (rows, count), values below 2^bits.

    Returns:
        (rows, ceil(count · bits / 8)).
    """
    rows, count = q.shape
    padded = np.pad(q, [(0, 0), (0, -count % 8)])
    streams = np.zeros((rows, padded.shape[1] // 8), "<u8")  # eight values fill `bits` bytes
    for place in range(8):
        streams |= padded[:, place::8].astype("<u8") << np.uint64(place * bits)
    packed = streams.view(np.uint8).reshape(rows, -1, 8)[:, :, :bits].reshape(rows, -1)
    return np.ascontiguousarray(packed[:, : -(-count * bits // 8)])


def byte_table(bits: int, zero: int = 0) -> NDArray[np.float32]:
    """What each byte holds, less `zero`: float32 (256, 8 / bits), as :func:`pack` fills them."""
    places = np.arange(256)[:, np.newaxis] >> np.arange(0, 8, bits)
    return (places % (1 << bits) - zero).astype(np.float32)


Array = NDArray[Any]
Codes = NDArray[np.uint8]

WORD = 32
"""Bits of the words that GPTQ and AWQ pack integers into."""
_COLUMNS = 512
"""Columns that are unpacked together."""


def unpack(words: Array, bits: int) -> Codes:
    """The integers in the words of each column, which are one stream of bits, the lowest first.

    Integers of 3 bits run over from one word into the next.

    Args:
        words: int32 (rows, N).

    Returns:
        uint8 (rows · 32 // bits, N).
    """
    first = np.arange(len(words) * WORD // bits) * bits
    word, shift = first // WORD, (first % WORD).astype(np.uint64)[:, np.newaxis]
    result = np.empty((len(first), words.shape[1]), np.uint8)
    for start in range(0, words.shape[1], _COLUMNS):
        part = (slice(None), slice(start, start + _COLUMNS))
        low = np.ascontiguousarray(words[part]).view(np.uint32).astype(np.uint64)
        high = np.concatenate([low[1:], np.zeros_like(low[:1])]) << np.uint64(WORD)
        result[part] = ((low | high)[word] >> shift) & np.uint64((1 << bits) - 1)
    return result
