"""What quantization costs in accuracy: qgraph's recipes beside onnxruntime's own quantizers.

    python -m benchmarks.accuracy [--models minilm ppocr ...] [--json FILE] [--markdown]

Each model is measured on its own task and against its float outputs, and held to two promises: it
gives the same results with onnxruntime's optimizations off and on, and the remarks account for
every MatMul, Gemm, Conv, ConvTranspose and Gather on a weight.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks import tasks
from benchmarks.subjects import Subject, chosen, outputs, sqnr
from benchmarks.tables import Cell, Report, cores, parser
from benchmarks.variants import VARIANTS, Variant, make, must_have_a_verdict, size, unaccounted

COLUMNS = ("model", "variant", "task", "score", "alike", "to float", "SQNR dB", "off/on dB", "size",
           "quantized", "accounted", "note")  # fmt: skip
STYLES = {"score": ".4f", "to float": ".4f", "SQNR dB": ".1f", "off/on dB": ".1f", "size": ".2f",
          "quantized": "", "accounted": ""}  # fmt: skip


def measure(subject: Subject, variant: Variant, model: Path) -> dict[str, Cell]:
    """One row of the table: `variant` of the float `model`."""
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
    if subject.metric is not None:
        found["task"], found["score"] = subject.metric.name, float(subject.metric.measure(run))
    if subject.likeness is not None and variant.name != "float":
        found["alike"] = subject.likeness.name
        found["to float"] = subject.likeness.measure(reference, run)
    if variant.remarks is not None:
        found |= _remarks(variant, model)
    return found


def _remarks(variant: Variant, model: Path) -> dict[str, Cell]:
    assert variant.remarks is not None
    recipe = variant.name.removeprefix("qgraph ")
    verdicts = variant.remarks.verdicts().values()
    wanted = must_have_a_verdict(model, recipe)
    missing = unaccounted(model, recipe, variant.remarks)
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
            for name in arguments.variants:
                report.add(measure(subject, make(name, subject, model, folder), model))
    report.show(arguments)


if __name__ == "__main__":
    main()
