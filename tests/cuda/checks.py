"""What can be seen of a change to a kernel: planted bugs and mutants are put to these."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from qgraph.backends.cuda.make_cubins import pinned
from tests.cuda.build import text_of
from tests.cuda.cases import Case
from tests.cuda.engines import SCHEDULES, Emulated, Interpreted, Sanitized
from tests.cuda.machine_code import over_budget

Changed = dict[str, str]
WEIGHTS = 1
"""The argument of a product that holds the weights."""


def values(cases: Iterable[Case], changed: Changed, timeout: float = 60) -> str:
    """Other bits, deadlock, divergence or unwritten memory, in any of four schedules."""
    engines = [Sanitized((), schedule, changed, timeout=timeout) for schedule in SCHEDULES]
    return _first(case.failure(engine) for case in cases for engine in engines)


def address(cases: Iterable[Case], changed: Changed, timeout: float = 60) -> str:
    """AddressSanitizer and UBSan: buffers of exact size."""
    engine = Sanitized(("address", "undefined"), SCHEDULES[0], changed, timeout=timeout)
    return _first(case.failure(engine) for case in cases if case.small)


def thread(cases: Iterable[Case], changed: Changed, timeout: float = 60) -> str:
    """ThreadSanitizer: races within and between blocks."""
    engines = [Sanitized(("thread",), schedule, changed, timeout=timeout) for schedule in SCHEDULES]
    return _first(case.failure(engine) for case in cases if case.small for engine in engines[:2])


def counters(cases: Iterable[Case], changed: Changed) -> str:
    """Bank conflicts, parts of sectors, weights read more than once where one block has them."""
    return _first(_waste(case, changed) for case in cases)


def _waste(case: Case, changed: Changed) -> str:
    engine = Emulated(changed=changed, watched=WEIGHTS if case.name.startswith("w8a8") else None)
    if failure := case.failure(engine):
        return failure
    seen = engine.counters
    waves = seen["shared_waves"] - seen["shared_ideal"]
    sectors = seen["global_sectors"] * 32 - seen["global_bytes"]
    if waves or sectors > 0:
        return f"{case.name}: {waves} waves and {sectors} bytes of sectors in vain"
    if case.once and (engine.reads != 1).any():
        times = sorted(set(engine.reads.tolist()))
        return f"{case.name}: bytes of weights are read {times} times"
    return ""


def ptx(cases: Iterable[Case], changed: Changed) -> str:
    """What the compiler makes of it, interpreted."""
    engine = Interpreted(changed)
    return _first(case.failure(engine) for case in cases if case.small)


def code(kernels: Iterable[str], changed: Changed) -> str:
    """Machine code beyond its budget."""
    return _first(
        what
        for kernel in kernels
        for what in over_budget(kernel, pinned().compile(text_of(kernel, changed), "sm_90"), 90)
    )


def _first(found: Iterable[str]) -> str:
    return next(filter(None, found), "")


CHECKS: dict[str, Callable[..., str]] = {
    "values": values,
    "address": address,
    "thread": thread,
    "counters": counters,
    "ptx": ptx,
    "code": code,
}
