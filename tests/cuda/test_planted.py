"""Every bug that was put in on purpose is seen by the check that is there for its kind."""

from __future__ import annotations

import pytest

from tests.cuda.cases import named
from tests.cuda.checks import CHECKS
from tests.cuda.planted import PLANTED, Bug


def _seen(bug: Bug) -> str:
    given = [bug.cases] if bug.check == "code" else named(bug.cases)
    assert given
    return CHECKS[bug.check](given, bug.changed())


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: f"{bug.check}-{bug.what}")
def test_a_planted_bug_is_seen(bug: Bug) -> None:
    assert _seen(bug), bug.what


def test_there_are_bugs_for_every_check() -> None:
    assert {bug.check for bug in PLANTED} == set(CHECKS)
    assert len(PLANTED) >= 20


def test_a_bug_in_the_assembly_is_seen() -> None:
    """Two kinds that take no compiler of C++; the others are slow."""
    for bug in (b for b in PLANTED if b.check == "ptx"):
        assert _seen(bug), bug.what
