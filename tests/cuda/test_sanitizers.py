"""Small cases under ThreadSanitizer, AddressSanitizer and UBSan: no report."""

from __future__ import annotations

import pytest

from tests.cuda import checks
from tests.cuda.cases import Case, cases, named

SMALL = [case for case in cases() if case.small]
SOME = named("quantize 3x200", "w8a8 1x48")


@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_no_race_and_no_byte_beyond_a_buffer(case: Case) -> None:
    assert not checks.thread([case], {})
    assert not checks.address([case], {})


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_no_race(case: Case) -> None:
    assert not checks.thread([case], {})


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_no_byte_beyond_a_buffer_and_nothing_undefined(case: Case) -> None:
    assert not checks.address([case], {})
