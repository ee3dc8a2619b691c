"""What quantization costs in accuracy: qgraph's recipes beside onnxruntime's own quantizers.

    python -m benchmarks.accuracy [--models minilm ppocr ...] [--json FILE] [--markdown]

Each model is measured on its own task and against its float outputs, and held to two promises: it
gives the same results with onnxruntime's optimizations off and on, and the remarks account for
every MatMul, Gemm, Conv, ConvTranspose and Gather on a weight. Perplexities are also told in per
cent over those of the float model, which is measured in the same run. A language model generates,
too: "same tokens" is how many of the first 32 greedy tokens are float's until the texts part.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import qgraph
from benchmarks import generation, tasks
from benchmarks.subjects import Metric, Subject, chosen, outputs, sqnr
from benchmarks.tables import Cell, Report, cores, parser
from benchmarks.tasks import Runner
from benchmarks.variants import VARIANTS, Variant, make, must_have_a_verdict, size, unaccounted

COLUMNS = ("model", "variant", "task", "score", "over float %", "second task", "second score",
           "second over float %", "alike", "to float", "same tokens", "SQNR dB", "off/on dB",
           "size", "quantized", "accounted", "note")  # fmt: skip
STYLES = {"score": ".4f", "over float %": ".2f", "second score": ".4f",
          "second over float %": ".2f", "to float": ".4f", "same tokens": ".1f", "SQNR dB": ".1f",
          "off/on dB": ".1f", "size": ".2f", "quantized": "", "accounted": ""}  # fmt: skip


def measure(
    subject: Subject, variant: Variant, model: Path, base: dict[str, Cell]
) -> dict[str, Cell]:
    """One row of the table: `variant` of the float `model`, whose own row is `base`."""
    found: dict[str, Cell] = {"model": subject.name, "variant": variant.name, "note": variant.note}
    if variant.path is None:
        return found
    threads = cores()
    try:
        run = tasks.session(variant.path, threads=threads)
        plain = tasks.session(variant.path, optimized=False, threads=threads)
    except Exception as error:
        return {**found, "note": f"does not load: {str(error).splitlines()[0][:200]}"}
    reference = tasks.session(model, threads=threads)
    feeds = subject.evaluation(model)
    expected, got = outputs(reference, feeds), outputs(run, feeds)
    found["off/on dB"] = sqnr(outputs(plain, feeds), got)
    found["size"] = size(variant.path) / size(model)
    if variant.name != "float":
        found["SQNR dB"] = sqnr(expected, got)
    found |= _scores("", subject.metric, run, base) | _scores("second ", subject.second, run, base)
    if subject.likeness is not None and variant.name != "float":
        found["alike"] = subject.likeness.name
        found["to float"] = subject.likeness.measure(reference, run)
    if model.is_dir() and variant.name != "float":
        found["same tokens"] = generation.same_tokens(model, variant.path, threads)
    if variant.remarks is not None:
        found |= _remarks(variant, variant.remarks, model)
    return found


def _scores(
    prefix: str, metric: Metric | None, run: Runner, base: dict[str, Cell]
) -> dict[str, Cell]:
    """The cells of a metric, in the columns that start with `prefix`."""
    if metric is None:
        return {}
    score = float(metric.measure(run))
    found: dict[str, Cell] = {f"{prefix}task": metric.name, f"{prefix}score": score}
    of_float = base.get(f"{prefix}score")
    if metric.relative and isinstance(of_float, float):
        found[f"{prefix}over float %"] = 100 * (score / of_float - 1)
    return found


def _remarks(variant: Variant, remarks: qgraph.Remarks, model: Path) -> dict[str, Cell]:
    verdicts = remarks.verdicts().values()
    wanted = must_have_a_verdict(qgraph.load(model))
    missing = unaccounted(wanted, remarks)
    return {
        "quantized": f"{sum(r.kind == 'quantized' for r in verdicts)} of {len(verdicts)}",
        "accounted": f"{len(wanted) - len(missing)} of {len(wanted)}",
        "note": f"no verdict: {', '.join(missing[:3])}" if missing else variant.note,
    }


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--models", nargs="+", metavar="NAME", help="only these (or what starts so)")
    made.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = made.parse_args()
    report = Report("Accuracy", COLUMNS, STYLES)
    for subject in chosen(arguments.models):
        with tempfile.TemporaryDirectory(prefix="qgraph-accuracy-") as scratch:
            folder = Path(scratch)
            model = subject.build(folder)
            base: dict[str, Cell] = {}
            for name in dict.fromkeys(["float", *arguments.variants]):
                cells = measure(subject, make(name, subject, model, folder), model, base)
                base = base or cells
                report.add(cells)
    report.show(arguments)


if __name__ == "__main__":
    main()
