"""How fast the variants run against float: ratios of neighbouring runs in one process.

    python -m benchmarks.speed [--models minilm ppocr ...] [--rounds 15] [--threads 2]

Every round runs every variant once on the same input, in an order that turns; a ratio compares a
variant with float in the same round. Above 1 is faster. All variants have the same number of
threads. A language model also generates: tokens a second by onnxruntime-genai after a prompt.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from benchmarks import generation, tasks
from benchmarks.subjects import Subject, chosen
from benchmarks.tables import Cell, Report, cores, parser
from benchmarks.variants import VARIANTS, Variant, make

COLUMNS = ("model", "input", "variant", "speed", "low", "high", "ms here and now", "note")
STYLES = dict.fromkeys(("speed", "low", "high", "ms here and now"), ".2f")
SHORTEST = 0.02
"""A timing repeats its call for about so many seconds."""
PROMPT, GENERATED = 128, 64
"""Tokens given to onnxruntime-genai, and tokens that it then generates."""

Call = Callable[[int], float]
"""The seconds that one call takes in round n."""


def timed(run: Callable[[int], object], repeats: int = 1) -> Call:
    """Seconds of one of `repeats` calls of `run(round)` in a row."""

    def call(number: int) -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            run(number)
        return (time.perf_counter() - began) / repeats

    return call


def interleaved(calls: Sequence[Call], rounds: int) -> np.ndarray:
    """Seconds, shape (calls, rounds). A first round warms up; the order turns."""
    seconds = np.empty((len(calls), rounds + 1))
    for number in range(rounds + 1):
        for i in range(len(calls)):
            index = (number + i) % len(calls)
            seconds[index, number] = calls[index](number)
    return seconds[:, 1:]


def sessions(feeds: list[tasks.Feed], variants: list[Variant], threads: int) -> list[Call]:
    """Calls that run one feed a round in onnxruntime."""
    runners = [tasks.session(v.path, threads=threads) for v in variants if v.path]

    def on_feeds(run: tasks.Runner) -> Callable[[int], object]:
        return lambda number: run(feeds[number % len(feeds)])

    runs = [on_feeds(run) for run in runners]
    slow = timed(runs[0])
    slow(0)
    repeats = max(1, round(SHORTEST / slow(0)))
    return [timed(run, repeats) for run in runs]


def generators(variants: list[Variant], threads: int) -> list[Call]:
    """Calls that take a prompt, not timed, and generate tokens: seconds a token."""
    prompt = tasks.smollm2_chunks("eval", n=1, length=PROMPT)[0]

    def generate(path: Path) -> Call:
        model = generation.load(path, threads)

        def call(_: int) -> float:
            generator = generation.begin(model, prompt, GENERATED + 1)
            generator.generate_next_token()  # from the logits of the prompt
            began = time.perf_counter()
            for _ in range(GENERATED):
                generator.generate_next_token()
            return (time.perf_counter() - began) / GENERATED

        return call

    return [generate(v.path) for v in variants if v.path]


def measure(
    report: Report,
    subject: Subject,
    variants: list[Variant],
    model: Path,
    threads: int,
    rounds: int,
) -> None:
    """Add the rows of one model; the first variant is float."""
    broken = [v for v in variants if v.path is None]
    working = [v for v in variants if v.path is not None]
    for variant in broken:
        report.add({"model": subject.name, "variant": variant.name, "note": variant.note})
    for name, feeds in subject.timed(model).items():
        runnable = _runnable(report, subject, working, feeds[0], threads)
        seconds = interleaved(sessions(feeds, runnable, threads), rounds)
        _add(report, subject, name, runnable, seconds)
    if model.is_dir():
        seconds = interleaved(generators(working, threads), rounds)
        _add(report, subject, f"a token after {PROMPT}", working, seconds)


def _runnable(
    report: Report, subject: Subject, variants: list[Variant], feed: tasks.Feed, threads: int
) -> list[Variant]:
    """The variants that onnxruntime runs; a row for each of the others says why not."""
    found = []
    for variant in variants:
        assert variant.path is not None
        try:
            tasks.session(variant.path, threads=threads)(feed)
            found.append(variant)
        except Exception as error:
            note = f"does not run: {str(error).splitlines()[0][:200]}"
            report.add({"model": subject.name, "variant": variant.name, "note": note})
    return found


def _add(
    report: Report, subject: Subject, name: str, variants: list[Variant], seconds: np.ndarray
) -> None:
    for variant, mine in zip(variants, seconds, strict=True):
        low, middle, high = (float(q) for q in np.percentile(seconds[0] / mine, [25, 50, 75]))
        cells: dict[str, Cell] = {"model": subject.name, "input": name, "variant": variant.name}
        cells |= {"speed": middle, "low": low, "high": high}
        cells["ms here and now"] = 1e3 * float(np.median(mine))
        cells["note"] = _verdict(middle, high) or variant.note
        report.add(cells)


def _verdict(middle: float, high: float) -> str:
    if high < 1:
        return "slower than float"
    return "slower, or noise" if middle < 0.98 else ""


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", metavar="NAME", help="only these (or what starts so)")
    made.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    made.add_argument("--rounds", type=int, default=15)
    made.add_argument("--threads", type=int, default=cores(), help="of every variant")
    arguments = made.parse_args()
    report = Report(f"Speed against float, {arguments.threads} threads", COLUMNS, STYLES)
    names = dict.fromkeys(["float", *arguments.variants])
    for subject in chosen(arguments.models):
        with tempfile.TemporaryDirectory(prefix="qgraph-speed-") as scratch:
            folder = Path(scratch)
            model = subject.build(folder)
            variants = [make(name, subject, model, folder) for name in names]
            measure(report, subject, variants, model, arguments.threads, arguments.rounds)
    report.show(arguments)


if __name__ == "__main__":
    main()
