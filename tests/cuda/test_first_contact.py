"""The script for the first GPU, on the stub driver with the calls that need CUDA replaced."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import cuda_first_contact, cuda_stages
from benchmarks.cuda_first_contact import run_all, run_stage, summary
from benchmarks.cuda_stages import STAGES, Gpu
from tests.cuda import cases
from tests.cuda.stub import stub_driver

SIZES: dict[str, Any] = {
    "SHAPES": ((64, 48), (128, 64)),
    "TOKENS": (1, 40),
    "CROSSING": (8, 40),
    "RUNS": 8,
    "BEYOND_L2": 2**12,
    "SIDE": 64,
    "DECODER": (1, 64, 128, 100),
}


class Stub(Gpu):
    """A device on which tensors of the CPU are launched."""

    name, index = "cpu", -1

    def synchronize(self) -> None:
        pass

    def captured(self, call: Callable[[], object]) -> Callable[[], object]:
        return call

    def side_stream(self) -> Any:
        return nullcontext()

    def seconds(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def timed(self, calls: list[Callable[[], object]], replays: int = 20) -> float:
        return super().timed(calls[:2], 1)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    for name, value in SIZES.items():
        monkeypatch.setattr(cuda_stages, name, value)
    host = cuda_stages.host_microseconds
    monkeypatch.setattr(
        cuda_stages, "host_microseconds", lambda gpu, call, calls=0: host(gpu, call, 2)
    )
    compile = torch.compile

    def eager(function: Any, **options: Any) -> Any:
        return compile(function, fullgraph=True, backend="eager")

    monkeypatch.setattr(torch, "compile", eager)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with stub_driver():
        yield Stub(tmp_path)


@pytest.mark.slow
def test_all_stages_run(gpu: Stub) -> None:
    for name in (*STAGES, *cuda_stages.HELPERS):
        run_stage(gpu, name)
    found = json.loads((gpu.out / "results.json").read_text())
    assert set(found["cases"]) == {case.name for case in cases.cases()}
    assert set(found["cases"].values()) == {"ok"}
    assert found["environment"]["arch"] == 90
    assert set(found["torch"].values()) == {True}
    assert found["end to end"]["words as on the CPU"]
    assert found["end to end"]["captured steps/s"] > 0
    for row in (*found["speed"].values(), *found["crossover"].values()):
        assert min(us for us in row.values() if not isinstance(us, str)) > 0
    assert {len(row) for row in found["crossover"].values()} == {5, 6}
    text = summary(gpu.out)
    assert text.startswith(f"cases: {len(found['cases'])} ok, 0 not")
    assert len(text) < cuda_first_contact.LONGEST
    assert len(list(gpu.out.iterdir())) <= 6


def test_answers_that_differ_are_kept(gpu: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_stages, "cases", lambda: cases.named("primitives", "quantize 0x64"))
    answers = np.loadtxt(cases.ANSWERS, np.int32)
    answers[5, 3] += 1
    np.savetxt(gpu.out / "others.txt", answers, "%d")
    monkeypatch.setattr(cases, "ANSWERS", gpu.out / "others.txt")
    run_stage(gpu, "cases")
    found = json.loads((gpu.out / "results.json").read_text())["cases"]
    assert found["quantize 0x64 f16 zero 128"] == "ok"
    assert "words [3]" in found["primitives"]
    assert (gpu.out / "answers.npz").exists()
    assert "1 ok, 1 not" in summary(gpu.out)


def test_it_wants_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["cuda_first_contact", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^cuda_first_contact: torch sees no CUDA device here"):
        cuda_first_contact.main()


def test_every_stage_has_a_process_and_an_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run_all(tmp_path, 0, []) == [f"{name}: no time left" for name in STAGES]
    monkeypatch.setitem(STAGES, "environment", (0.01, cuda_stages.environment))
    assert run_all(tmp_path, 99, ["environment"]) == ["environment: no end after 0 s"]
    monkeypatch.setattr(sys, "executable", "false")
    assert run_all(tmp_path, 99, ["torch"]) == ["torch: rc 1 after 0 s"]
    assert "---- torch" in (tmp_path / "log.txt").read_text()
