"""The first minutes on a GPU: as much truth as they allow, the most important first.

    python3 -m benchmarks.cuda_first_contact --out FOLDER [--seconds 420] [--only STAGE]

Runs from the source tree on a machine with one GPU, `python3` with torch for CUDA, no internet
and nothing installed. What qgraph imports can be brought along:

    pip install --no-deps --target first-contact-packages onnx onnx-ir ml_dtypes protobuf packaging
    PYTHONPATH=first-contact-packages python3 -m benchmarks.cuda_first_contact --out FOLDER

Each stage is a process with a limit, so that a fault does not end the rest, and adds what it finds
to FOLDER/results.json at once; its output goes to FOLDER/log.txt. Compiled models in
`first-contact-models/` are run too; tools and libraries that are not there are named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.cuda_stages import HELPERS, STAGES, Found, Gpu

LONGEST = 10000
"""Characters of the summary."""


def keep(out: Path, name: str, found: Found) -> None:
    """Put what a stage has found into results.json, which is whole at every moment."""
    path = out / "results.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    unfinished = path.with_suffix(".new")
    unfinished.write_text(json.dumps(known | {name: found}, indent=1))
    unfinished.replace(path)


def run_stage(gpu: Gpu, name: str) -> None:
    """One stage, in this process."""
    stage = HELPERS.get(name) or STAGES[name][1]
    keep(gpu.out, name, stage(gpu, partial(keep, gpu.out, name)))


def run_all(out: Path, seconds: float, only: list[str]) -> list[str]:
    """Every stage in a process of its own; a line of each."""
    start, lines = time.monotonic(), []
    for name, (limit, _) in STAGES.items():
        left = seconds - (time.monotonic() - start)
        if only and name not in only:
            continue
        if left < 5:
            lines.append(f"{name}: no time left")
            continue
        begun = time.monotonic()
        command = [sys.executable, "-m", "benchmarks.cuda_first_contact"]
        command += ["--out", str(out), "--stage", name]
        with (out / "log.txt").open("a") as log:
            log.write(f"---- {name}\n")
            log.flush()
            try:
                done = subprocess.run(command, stdout=log, stderr=log, timeout=min(limit, left))
                end = f"rc {done.returncode}"
            except subprocess.TimeoutExpired:
                end = "no end"
        lines.append(f"{name}: {end} after {time.monotonic() - begun:.0f} s")
        print(lines[-1], flush=True)
    return lines


def summary(out: Path) -> str:
    """What was found, in few characters."""
    path = out / "results.json"
    results: Found = json.loads(path.read_text()) if path.exists() else {}
    cases = results.pop("cases", {})
    bad = {name: text for name, text in cases.items() if text != "ok"}
    lines = [f"cases: {len(cases) - len(bad)} ok, {len(bad)} not {json.dumps(bad)[:1500]}"]
    for name, found in results.items():
        if name in ("speed", "crossover"):
            lines += [f"{name} {size}: {json.dumps(row)[:200]}" for size, row in found.items()]
        else:
            lines.append(f"{name}: {json.dumps(found)[:1200]}")
    return "\n".join(lines)[: LONGEST - 1000]


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--only", action="append", default=[], choices=STAGES)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("cuda_first_contact: torch sees no CUDA device here, which this is for")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage:
        run_stage(Gpu(options.out), options.stage)
    else:
        run_all(options.out, options.seconds, options.only)
        print(summary(options.out))


if __name__ == "__main__":
    main()
