"""Modules of plain torch, one for each family of layers that people stack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]
BATCH, WORDS, WIDTH = 2, 96, 64


class Tagger(nn.Module):
    """Words, a recurrent layer in both directions, a tag for each word."""

    def __init__(self, recurrent: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.recurrent = recurrent
        self.head = nn.Linear(64, 9)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of tags, (batch, length, 9)."""
        hidden, _ = self.recurrent(self.embed(ids))
        scores: Tensor = self.head(hidden)
        return scores


class UNet(nn.Module):
    """Down and up again with a shortcut: strided, dilated and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=2, dilation=2))
        self.norm = nn.GroupNorm(4, 32)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.last = nn.Conv2d(32, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        """A mask for each class, (batch, 2, height, width)."""
        first = self.first(image)
        middle = nn.functional.silu(self.norm(self.down(first)))
        mask: Tensor = self.last(torch.cat([first, self.up(middle)], dim=1))
        return mask


class EinsumAttention(nn.Module):
    """Attention whose projections are einsums with weights of rank 3, as in Flax or TensorFlow."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (
            nn.Parameter(torch.randn(WIDTH, 4, 16) / 8) for _ in range(3)
        )
        self.out = nn.Parameter(torch.randn(4, 16, WIDTH) / 8)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width), as `x`."""
        q, k, v = (
            torch.einsum("bte,ehd->bhtd", x, w) for w in (self.queries, self.keys, self.values)
        )
        weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / 4, dim=-1)
        return torch.einsum("bhtd,hde->bte", torch.einsum("bhqk,bhkd->bhqd", weights, v), self.out)


class Translator(nn.Module):
    """nn.Transformer, told that its mask is causal: it would look into the mask to find out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 1, 1, 128, batch_first=True)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Scores of words, (batch, length, words)."""
        length = target.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        hidden = self.transformer(
            self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=True
        )
        scores: Tensor = self.head(hidden)
        return scores


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(48, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64), nn.Tanh(),
        nn.Linear(64, 10),
    )  # fmt: skip


def _separable() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.Hardswish(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 32, 1), nn.PReLU(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    )  # fmt: skip


def _waves() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 16, 8, stride=4), nn.LeakyReLU(0.1), nn.Conv1d(16, 16, 3, dilation=4),
        nn.InstanceNorm1d(16, affine=True), nn.ELU(), nn.ConvTranspose1d(16, 1, 4, stride=2),
    )  # fmt: skip


def _volumes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.AvgPool3d(2), nn.Flatten(),
        nn.Linear(8 * 27, 4),
    )  # fmt: skip


def _super_resolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.Mish(), nn.Conv2d(32, 12, 3, padding=1),
        nn.PixelShuffle(2), nn.Upsample(scale_factor=2, mode="bilinear"),
    )  # fmt: skip


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _floats(name: str, *shape: int) -> Callable[[], Inputs]:
    return lambda: {name: torch.randn(BATCH, *shape)}


def _words(*lengths: tuple[str, int]) -> Callable[[], Inputs]:
    return lambda: {name: torch.randint(0, WORDS, (BATCH, length)) for name, length in lengths}


_BOTH_WAYS: dict[str, bool] = {"batch_first": True, "bidirectional": True}
_BATCH = {0: "batch"}
_TOKENS = {0: "batch", 1: "length"}

PLAIN: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], Inputs], dict[str, Any]]] = {
    "mlp": (_mlp, _floats("input", 48), {"input": _BATCH}),
    "separable convolutions": (_separable, _floats("input", 3, 33, 33), {"input": _BATCH}),
    "convolutions in 1 dimension": (_waves, _floats("input", 1, 256), {"input": _BATCH}),
    "convolutions in 3 dimensions": (_volumes, _floats("input", 1, 8, 8, 8), {"input": _BATCH}),
    "super-resolution": (_super_resolution, _floats("input", 3, 12, 12), {"input": _BATCH}),
    "u-net": (UNet, _floats("image", 3, 16, 16), {"image": {0: "batch", 2: "h", 3: "w"}}),
    "lstm": (
        lambda: Tagger(nn.LSTM(WIDTH, 32, **_BOTH_WAYS)),
        _words(("ids", 9)),
        {"ids": _TOKENS},
    ),
    "gru": (lambda: Tagger(nn.GRU(WIDTH, 32, **_BOTH_WAYS)), _words(("ids", 9)), {"ids": _TOKENS}),
    "nn.TransformerEncoder": (_encoder, _floats("src", 9, WIDTH), {"src": _TOKENS}),
    "nn.Transformer": (
        Translator,
        _words(("source", 9), ("target", 7)),
        {"source": _TOKENS, "target": {0: "batch", 1: "target"}},
    ),
    "attention by einsum": (EinsumAttention, _floats("x", 9, WIDTH), {"x": _TOKENS}),
}
"""By name: the module, its inputs, the axes that may change."""
