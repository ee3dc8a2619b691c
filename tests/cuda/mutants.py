"""Random small changes of the kernels: how much of them do the checks hold?"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from qgraph.backends.cuda.variants import SOURCES
from tests.cuda import checks
from tests.cuda.build import BuildError
from tests.cuda.cases import Case, named
from tests.cuda.engines import SCHEDULES, Emulated, Sanitized

SWAPS = (
    (" < ", " <= "),
    (" >= ", " > "),
    (" && ", " || "),
    (" + ", " - "),
    (" - ", " + "),
    (" % ", " / "),
    (" / ", " % "),
    (" * ", " + "),
    ("^", "|"),
    (">> ", "<< "),
    ("STAGES - 1", "STAGES"),
    ("STAGES - 2", "STAGES - 1"),
    ("__syncthreads();", ""),
    ("cp_async_commit();", ""),
    ("lo[", "hi["),
    (".x", ".y"),
    (".z", ".w"),
    ("M - 1", "M"),
    ("N - 1", "N"),
    (" ? ", " && 0 ? "),
    ("largest[m]", "largest[0]"),
    ("scale[n]", "scale[0]"),
    ("scale[c]", "scale[n0]"),
    ("sums ?", "!sums ?"),
)
CASES = {
    "quantize.cu": ("quantize",),
    "gemm_w8a8.cu": ("w8a8 70", "w8a8 65", "w8a8 66", "w8a8 257x130"),
    "gemm_w8a8_small.cu": ("w8a8 1x48", "w8a8 7x", "w8a8 13", "w8a8 32"),
    "epilogue.cu": ("library", "w8a8 257x1160", "w8a8 130x256"),
}
"""Beginnings of the names of those that run a file."""


@dataclass(frozen=True)
class Mutant:
    """A file with one change."""

    file: str
    line: int
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"

    def seen(self) -> str | None:
        """What sees it; empty if nothing does, None if it does not compile."""
        cases, changed = named(*CASES[self.file]), {self.file: self.text}
        try:
            for schedule in SCHEDULES[:3]:
                engine = Sanitized((), schedule, changed, timeout=20)
                for case in cases:
                    if failure := case.failure(engine):
                        return failure
            return (
                checks.address(cases, changed, timeout=20)
                or checks.thread(cases, changed, timeout=20)
                or _counts(cases, changed)
            )
        except BuildError:
            return None


def _counts(cases: list[Case], changed: dict[str, str]) -> str:
    """Other counters than those of the kernel as it is: what is right but slower."""
    for case in cases:
        plain, mutant = Emulated(), Emulated(changed=changed)
        case.run(plain)
        if failure := case.failure(mutant):
            return failure
        if plain.counters != mutant.counters:
            return f"{case.name}: {mutant.counters}"
    return ""


def mutants(file: str, count: int, seed: int) -> list[Mutant]:
    """So many of a file, at random."""
    text = (SOURCES / file).read_text()
    code = re.sub(r"//[^\n]*", lambda match: " " * len(match[0]), text)  # not in comments
    first = min(text.index(word) for word in ("__device__", "__global__") if word in text)
    found: list[tuple[int, int, str]] = []
    for match in re.finditer(r"(?<![\w.<\"])\d+(?![\w.\"])", code):
        line = code[code.rfind("\n", 0, match.start()) + 1 : match.start()]
        if not line.lstrip().startswith("#"):
            found.append((match.start(), match.end(), str(int(match[0]) + 1)))
    for old, new in SWAPS:
        for match in re.finditer(re.escape(old), code):
            found.append((match.start(), match.end(), new))
    found = [(start, end, new) for start, end, new in found if start > first]
    random.Random(seed).shuffle(found)
    return [
        Mutant(
            file,
            text.count("\n", 0, start) + 1,
            f"{text[start:end].strip()} -> {new.strip() or 'nothing'}",
            text[:start] + new + text[end:],
        )
        for start, end, new in found[:count]
    ]
