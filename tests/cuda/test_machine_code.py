"""Budgets of the machine code that comes with the package, for six architectures."""

from __future__ import annotations

import pytest

from qgraph.backends.cuda.choice import PRODUCTS
from qgraph.backends.cuda.images import ARCHITECTURES, image
from qgraph.backends.cuda.variants import ELEMENTS, KINDS
from tests.cuda.machine_code import blocks, over_budget

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
