"""The operators of torch: equal to the references bit for bit, and opaque to torch's compilers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qgraph.backends.cuda import ops, references
from qgraph.backends.cuda.modules import Int8Linear, QuantizePerToken

STEP, FLOOR = float(np.float32(1 / 127)), 2.0**-60
NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}
DTYPES = pytest.mark.parametrize("dtype", NUMPY, ids=str)


def array(tensor: Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def tokens(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random ones, with zeros, multiples of a half step, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    rows = x.view(-1, shape[-1]) if x.numel() else x
    for row, kind in enumerate(rows[:6] if shape[-1] else ()):
        if row == 1:
            kind.zero_()
        if row == 2:  # next to ties
            kind.copy_(torch.arange(shape[-1]) % 255 / 2 - 63.5).nan_to_num_()
            kind[0] = 127
        if row in (3, 4, 5):
            kind[row % shape[-1]] = (float("inf"), float("nan"), 1e-30)[row - 3]
    return x.to(dtype)


def linear(columns: int, channels: int, zero: int, bias: bool, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    w = rng.integers(-128, 128, (channels, columns)).astype(np.int8)
    w[:1] = 127
    return {
        "w": np.pad(w, [(0, 0), (0, -columns % 64)]),
        "scale": (rng.random(channels) / 1e4).astype(np.float32),
        "sums": None if zero == 128 else w.sum(1, dtype=np.int32),
        "bias": rng.standard_normal(channels).astype(np.float32) if bias else None,
    }


def tensors(arrays: dict[str, Any]) -> list[Tensor | None]:
    return [None if a is None else torch.from_numpy(a) for a in arrays.values()]


@DTYPES
@pytest.mark.parametrize("zero", [128, 32, 0])
@pytest.mark.parametrize("shape", [(7, 5), (1, 64), (2, 3, 131), (0, 4), (3, 0), (9,), (5, 1100)])
def test_they_are_the_references(dtype: torch.dtype, zero: int, shape: tuple[int, ...]) -> None:
    x = tokens(shape, dtype)
    step = float(np.float32(1 / (255 - zero))) if zero != 128 else STEP
    q, largest = torch.ops.qgraph.quantize_per_token(x, step, zero, FLOOR)
    q_wanted, largest_wanted = references.quantize_per_token(array(x), step, zero, FLOOR)
    np.testing.assert_array_equal(q.numpy(), q_wanted)
    np.testing.assert_array_equal(largest.numpy(), largest_wanted)
    for bias in (False, True):
        held = linear(shape[-1], 33, zero, bias)
        y = torch.ops.qgraph.int8_linear(q, largest, *tensors(held), zero, dtype)
        wanted = references.int8_linear(
            q_wanted, largest_wanted, **held, zero=zero, dtype=np.dtype(NUMPY[dtype])
        )
        np.testing.assert_array_equal(array(y), wanted)


def test_the_largest_sums_are_exact() -> None:
    q = torch.full((1, 131008), -128, dtype=torch.int8)
    for w in (-128, 127):
        acc = ops.product(q, torch.full((2, 131008), w, dtype=torch.int8))
        assert acc.tolist() == [[-128 * w * 131008] * 2]


@DTYPES
def test_autocast_leaves_them_as_they_are(dtype: torch.dtype) -> None:
    x, held = tokens((6, 70), torch.float32), tensors(linear(70, 8, 128, True))
    q, largest = torch.ops.qgraph.quantize_per_token(x, STEP, 128, FLOOR)
    plain = torch.ops.qgraph.int8_linear(q, largest, *held, 128, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.ops.qgraph.int8_linear(q, largest, *held, 128, dtype)
    torch.testing.assert_close(inside, plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("zero", [128, 0])
def test_torch_finds_nothing_wrong_with_them(zero: int) -> None:
    x = torch.randn(3, 2, 70, dtype=torch.float16)
    torch.library.opcheck(torch.ops.qgraph.quantize_per_token, (x, STEP, zero, FLOOR))
    q, largest = torch.ops.qgraph.quantize_per_token(x, STEP, zero, FLOOR)
    held = tensors(linear(70, 5, zero, zero == 0))
    torch.library.opcheck(torch.ops.qgraph.int8_linear, (q, largest, *held, zero, torch.float16))


def test_they_get_their_arguments_as_they_are_stored() -> None:
    for name in ops.SCHEMAS:
        assert torch.Tag.needs_fixed_stride_order in getattr(torch.ops.qgraph, name).default.tags


class Net(nn.Module):
    """Two products with an activation function between them."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        self.first, self.second = (
            QuantizePerToken(STEP, 128, FLOOR),
            QuantizePerToken(float(np.float32(1 / 255)), 0, FLOOR),
        )
        w = [rng.integers(-127, 128, size).astype(np.int8) for size in ((24, 16), (8, 24))]
        self.up = Int8Linear(w[0], np.full(24, 1e-4, np.float32), 128)
        self.down = Int8Linear(w[1], np.full(8, 1e-4, np.float32), 0, np.ones(8, np.float32))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(*self.second(torch.relu(self.up(*self.first(x)))))
        return y


def test_exports_keep_each_as_one_node_for_any_number_of_tokens() -> None:
    net, x = Net(), torch.randn(5, 16)
    free = ({0: torch.export.Dim("tokens", min=2, max=4096)},)
    exported = torch.export.export(net, (x,), dynamic_shapes=free)
    kept = [str(n.target) for n in exported.graph.nodes if "qgraph" in str(n.target)]
    assert (
        sorted(kept)
        == ["qgraph.int8_linear.default"] * 2 + ["qgraph.quantize_per_token.default"] * 2
    )
    for count in (5, 9):
        given = torch.randn(count, 16)
        torch.testing.assert_close(exported.module()(given), net(given), rtol=0, atol=0)


def test_compilers_of_torch_take_them_whole() -> None:
    net = Net()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((5, 16), (2, 3, 16), (4, 3, 16)):
        given = torch.randn(shape)
        torch.testing.assert_close(compiled(given), net(given), rtol=0, atol=0)
