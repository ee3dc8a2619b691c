"""Budgets of the machine code that comes with the package, for six architectures."""

from __future__ import annotations

import pytest

from benchmarks.cuda_paper import DEVICES, TILES, tensor_share
from qgraph.backends.cuda.choice import PRODUCTS
from qgraph.backends.cuda.images import ARCHITECTURES, image
from qgraph.backends.cuda.variants import ELEMENTS, KINDS
from tests.cuda.machine_code import SMALL_SLOTS, blocks, over_budget

# The element type changes the last few instructions only: it takes turns.
TURNS = [
    (f"{kind}_{ELEMENTS[(i + j) % 3]}", arch)
    for i, kind in enumerate(KINDS)
    for j, arch in enumerate(ARCHITECTURES)
]


@pytest.mark.parametrize(("kernel", "arch"), [turn for turn in TURNS if turn[1] == 90])
def test_budgets_on_hopper(kernel: str, arch: int) -> None:
    assert not over_budget(kernel, image(kernel, arch), arch)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "arch"), [turn for turn in TURNS if turn[1] != 90])
def test_budgets(kernel: str, arch: int) -> None:
    assert not over_budget(kernel, image(kernel, arch), arch)


def test_no_kernel_needs_more_shared_memory_than_any_may_have() -> None:
    assert max(product.shared for product in PRODUCTS) <= 48 * 1024


def test_blocks_by_hand() -> None:
    assert blocks(80, 32, 0, 256) == 8  # 64 warps
    assert blocks(80, 128, 0, 256) == 2  # 65536 registers
    assert blocks(86, 32, 49152, 256) == 2  # 100 KiB


def test_on_paper_the_weights_arrive_no_faster_than_instructions() -> None:
    assert max(SMALL_SLOTS.values()) < min(device.slots for device in DEVICES) / 2
    assert [round(device.microseconds(4096, 4096), 1) for device in DEVICES[:3]] == [9.1, 5.4, 3.8]
    a100, h100 = (d.products for d in DEVICES[:2])
    assert [round(tensor_share(tile, a100), 2) for tile in TILES[:2]] == [0.67, 1.0]
    assert [round(tensor_share(tile, h100), 2) for tile in TILES[:2]] == [0.53, 0.8]
