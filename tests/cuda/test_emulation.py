"""The kernels on a CPU, one fiber a CUDA thread, through the real launch code."""

from __future__ import annotations

import pytest
import torch

from qgraph.backends.cuda import launches
from qgraph.errors import QGraphError
from tests.cuda import checks
from tests.cuda.cases import Case, cases, named
from tests.cuda.engines import SCHEDULES, Emulated, launching_on


@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_every_case_has_the_bits_of_the_reference(case: Case) -> None:
    for schedule in SCHEDULES:
        assert not case.failure(Emulated(schedule))


COUNTED = [*named("quantize 24", "w8a8 32x33", "w8a8 257"), *(c for c in cases() if c.once)]


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_no_bank_conflict_no_broken_sector_and_weights_are_read_once(case: Case) -> None:
    assert not checks.counters([case], {})


def test_the_same_bits_in_any_order() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(5, 200), torch.randint(-127, 128, (40, 256), dtype=torch.int8)
    found = []
    for schedule in SCHEDULES:
        with launching_on(Emulated(schedule)):
            q, largest = launches.quantize_per_token(x, 1 / 127, 128, 2.0**-60)
            y = launches.int8_linear(
                q, largest, w, torch.rand(40) * 0 + 1, None, None, 128, x.dtype
            )
        found.append(y)
    assert all(torch.equal(y, found[0]) for y in found)


def test_leading_axes_are_tokens() -> None:
    x = torch.randn(2, 3, 100, dtype=torch.float16)
    with launching_on(Emulated()):
        q, largest = launches.quantize_per_token(x.transpose(0, 1), 1 / 127, 128, 2.0**-60)
        flat = launches.quantize_per_token(
            x.transpose(0, 1).reshape(6, 100), 1 / 127, 128, 2.0**-60
        )
    assert torch.equal(q, flat[0])
    assert torch.equal(largest, flat[1])


def test_weights_of_another_width_are_refused() -> None:
    q, w, ones = torch.zeros(1, 64, dtype=torch.int8), torch.zeros(2, 128), torch.ones(2)
    with launching_on(Emulated()), pytest.raises(QGraphError, match=r"64 columns .* of 128"):
        launches.int8_linear(q, ones[:1], w.to(torch.int8), ones, None, None, 128, torch.float32)
