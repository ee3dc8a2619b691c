"""The command line through its entry point: what it prints, writes and refuses."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qgraph
from qgraph.backends.onnx import OnnxTarget
from qgraph.cli import main
from qgraph.graph.editing import insert
from qgraph.graph.functions import OBSERVER, declare
from tests import models
from tests.killing import killed_at


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with `model.onnx` (x: batch x 16) and `data.npz`."""
    monkeypatch.chdir(tmp_path)
    ir.save(models.mlp((16, 32, 8)), "model.onnx")
    rng = np.random.default_rng(0)
    np.savez("data.npz", x=rng.standard_normal((8, 16)).astype(np.float32))
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file below `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# -------------------------------------------------------------------------------- it works


@pytest.mark.parametrize("recipe", ["static", "dynamic"])
def test_compile_saves_a_model_that_runs(
    here: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["compile", "model.onnx", "-o", "out.onnx", "-r", recipe, "-c", "data.npz"])
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    assert "saved as out.onnx" in printed.out
    x = np.load("data.npz")["x"]
    ours = models.outputs(qgraph.load("out.onnx"), {"x": x})
    theirs = models.outputs(qgraph.load("model.onnx"), {"x": x})
    np.testing.assert_allclose(ours[0], theirs[0], atol=0.05 * np.abs(theirs[0]).max())


def test_compile_writes_a_report_and_json(here: Path) -> None:
    command = ["compile", "model.onnx", "-o", "out.onnx", "-r", "dynamic", "--set", "bits=4"]
    assert (
        main(
            [
                *command,
                "--set",
                "optimize_for=prompt",
                "--report",
                "r.html",
                "--json",
                "r.json",
                "--verify",
            ]
        )
        == 0
    )
    told = json.loads(Path("r.json").read_text())
    assert told["parameters"] == {"bits": 4, "optimize_for": "prompt"}
    assert told["bytes_before"] == Path("model.onnx").stat().st_size
    assert told["bytes_after"] == Path("out.onnx").stat().st_size
    sites = {r["site"] for r in told["remarks"] if r["kind"] in ("quantized", "float")}
    page = Path("r.html").read_text()
    assert sites
    assert all(site in page for site in sites)
    assert "<script" not in page


def test_the_report_escapes_what_it_shows() -> None:
    from qgraph.pipeline.remarks import Remark, Remarks
    from qgraph.report.page import Compilation, to_html, to_json

    evil = "<script>alert('&')</script>"
    remarks = Remarks(
        Remark("quantized", "p", f"{evil}{i}", evil, evil, {"a": float("nan"), "b": float("inf")})
        for i in range(2)
    )
    remarks += [Remark("warning", "p", "", "", evil), Remark("note", evil, f"{evil}0", "", evil)]
    told = Compilation(evil, evil, evil, evil, 1, 2, remarks, {evil: float("inf")})
    assert "<script" not in to_html(told)
    assert json.loads(to_json(told))["remarks"][0]["numbers"] == {"a": None, "b": None}


def test_opt_runs_a_pipeline_and_prints_after_passes(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["opt", "model.onnx", "-p", "canonicalize,annotate,insert-qdq", "-o", "out.onnx"]
    options = ["--print-after", "insert-qdq", "--verify", "-t", "onnx"]
    assert main([*command, *options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("// after") == 1
    assert "DequantizeLinear" in printed
    operators = {node.op_type for node in qgraph.load("out.onnx").graph}
    assert "DequantizeLinear" in operators


def test_opt_prints_after_all_passes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = ["-p", "canonicalize,fold-constants", "--print-after", "all"]
    assert main(["opt", "model.onnx", *pipeline, "-o", "out.onnx"]) == 0
    assert capsys.readouterr().out.count("// after") == 2


def test_opt_runs_a_pass_of_the_users_own(here: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "keep_sensitive.py"
    shutil.copy(example, here / "my_passes.py")
    pipeline = "canonicalize,annotate,my_passes:KeepSensitive{min_sqnr=30},insert-qdq"
    assert main(["opt", "model.onnx", "-p", pipeline, "-o", "out.onnx", "--verify"]) == 0


def test_inspect_shows_inputs_operators_and_sites(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", "model.onnx"]) == 0
    shown = capsys.readouterr().out
    for part in ("opsets ai.onnx 21", "float[batch, 16]", "MatMul", "float[16, 32]", "2.0 kB"):
        assert part in shown


def test_recipes_passes_and_targets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for command, parts in {
        "recipes": ("static", "dynamic", "observer=auto", "bits=8"),
        "passes": ("canonicalize", "insert-qdq", "lossy"),
        "targets": ("cpu:avx512-vnni", "onnx", "host:"),
    }.items():
        assert main([command]) == 0
        shown = capsys.readouterr().out
        assert all(part in shown for part in parts), command


def test_bench_compares_with_the_first(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "model.onnx", "-o", "out.onnx", "-r", "dynamic"]) == 0
    capsys.readouterr()
    assert main(["bench", "model.onnx", "out.onnx", "-c", "data.npz", "--rounds", "2"]) == 0
    shown = capsys.readouterr().out
    assert "model.onnx" in shown
    assert "out.onnx" in shown
    assert "inf dB" in shown  # the first against itself
    assert main(["bench", "model.onnx", "--rounds", "1"]) == 0


def test_bench_runs_in_sessions_of_the_target(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []

    def opening(*args: Any, **kwargs: Any) -> Any:
        opened.append(args[0])
        return OnnxTarget.open_session(*args, **kwargs)

    class Own(OnnxTarget):
        open_session = staticmethod(opening)

    monkeypatch.setattr("qgraph.backends.get_target", lambda name: Own())
    command = "bench model.onnx -t onnx -c data.npz --samples 9999999999999999999 --rounds 1"
    assert main(command.split()) == 0
    assert len(opened) == 1


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "compile" in capsys.readouterr().out
    assert main(["compile", "--help"]) == 0
    assert "--max-memory" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("qgraph-compiler ")


def test_an_output_that_is_a_model_is_replaced(here: Path) -> None:
    command = ["compile", "model.onnx", "-o", "out.onnx", "-r", "dynamic"]
    assert main(command) == 0
    first = contents(here)
    assert main(command) == 0
    assert contents(here) == first


# ------------------------------------------------------------------------- bad input


def _truncate(here: Path) -> None:
    data = (here / "model.onnx").read_bytes()
    (here / "bad.onnx").write_bytes(data[: len(data) // 2])


def _no_model(here: Path) -> None:
    (here / "bad.onnx").write_bytes(b"this is no model at all" * 10)


def _external(here: Path, location: str) -> None:
    model = onnx.load("model.onnx")
    tensor = next(t for t in model.graph.initializer if t.name == "w0")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    onnx.save(model, "bad.onnx")


def _save(**arrays: np.ndarray) -> Callable[[Path], None]:
    return lambda here: np.savez(here / "bad.npz", **arrays)  # type: ignore[arg-type]


def _folder_of_others(here: Path) -> None:
    (here / "full").mkdir()
    (here / "full/file").touch()


def _folder(here: Path) -> None:
    (here / "folder").mkdir()
    for name in ("model", "encoder"):
        shutil.copy(here / "model.onnx", here / f"folder/{name}.onnx")
    shutil.copy(here / "data.npz", here / "folder/0.npz")
    (here / "folder/tokenizer.json").write_text("{}")


def _own_passes(here: Path) -> None:
    text = "from qgraph import Contract, Pass\n"
    for name, body in (("silent", "pass"), ("failing", "raise KeyError('why')")):
        text += f"class {name.title()}(Pass):\n    name, contract = '{name}', Contract.EXACT\n"
        text += f"    def run(self, model, context):\n        {body}\n"
    (here / "mine.py").write_text(text)
    sys.modules.pop("mine", None)


def _saved_observers(here: Path) -> None:
    model = qgraph.load("model.onnx")
    declare(model, OBSERVER)
    observed = model.graph[1].outputs[0]
    node = insert(
        model, model.graph[1], OBSERVER, [observed], base="o", domain="qgraph", after=True
    )
    for use in [use for use in observed.uses() if use.node is not node]:
        use.node.replace_input_with(use.idx, node.outputs[0])
    ir.save(model, "o.onnx")


X = np.zeros((4, 16), np.float32)
COMPILE = "compile model.onnx -o out.onnx "
STATIC = COMPILE + "-r static -c bad.npz"

BAD: dict[str, tuple[Callable[[Path], object] | None, str, str]] = {
    "no command": (None, "frobnicate", "No such command 'frobnicate'"),
    "no model": (None, "compile -o out.onnx", "Missing argument 'MODEL'"),
    "no output": (None, "compile model.onnx", "Missing option '--output'"),
    "unknown option": (None, COMPILE + "--frobnicate", "--frobnicate"),
    "missing file": (None, "compile none.onnx -o out.onnx", "none.onnx"),
    "missing folder": (None, "compile no/model.onnx -o out.onnx", "model.onnx"),
    "folder without a model": (
        lambda h: (h / "empty").mkdir(), "compile empty -o out.onnx", "empty"
    ),
    "truncated": (_truncate, "compile bad.onnx -o out.onnx", "bad.onnx"),
    "not ONNX": (_no_model, "compile bad.onnx -o out.onnx", "bad.onnx"),
    "empty file": (lambda h: (h / "e.onnx").touch(), "compile e.onnx -o out.onnx", "e.onnx"),
    "no external data": (
        lambda h: _external(h, "none.data"), "compile bad.onnx -o out.onnx -r dynamic", "none.data"
    ),
    "external data climbs out": (
        lambda h: _external(h, "../../etc/passwd"), "compile bad.onnx -o out.onnx -r dynamic", "../"
    ),
    "inspect not ONNX": (_no_model, "inspect bad.onnx", "bad.onnx"),
    "bench not ONNX": (_no_model, "bench model.onnx bad.onnx", "bad.onnx"),
    "no calibration": (None, COMPILE + "-r static", "needs calibration data"),
    "calibration missing": (None, STATIC, "bad.npz"),
    "calibration is no npz": (lambda h: (h / "bad.npz").write_text("x"), STATIC, "bad.npz"),
    "calibration is empty": (_save(), STATIC, "no feeds"),
    "calibration without samples": (_save(x=X[:0]), STATIC, "no feeds"),
    "wrong names": (_save(x=X, z=X), STATIC, "'z'"),
    "missing names": (_save(z=X), STATIC, "z"),
    "wrong shapes": (_save(x=X[:, :3]), STATIC, "16"),
    "wrong dtypes": (_save(x=np.full((4, 16), "a")), STATIC, "x"),
    "not a number": (_save(x=np.full((4, 16), np.nan, np.float32)), STATIC, "NaN"),
    "unknown recipe": (None, COMPILE + "-r statik", "use one of static"),
    "unknown parameter": (None, COMPILE + "-r dynamic --set bitz=4", "it has bits"),
    "parameter without value": (None, COMPILE + "-r dynamic --set bits", "key=value"),
    "parameter of another type": (None, COMPILE + "-r dynamic --set bits=many", "an integer"),
    "parameter out of range": (None, COMPILE + "-r dynamic --set bits=99", "bits=99"),
    "parameter not among the choices": (None, COMPILE + "--set observer=best", "minmax"),
    "level not among the choices": (None, COMPILE + "-r smoothquant --set level=O4", "O1, O2, O3"),
    "alpha out of range": (None, COMPILE + "-r smoothquant --set alpha=2", "use 0 to 1, or search"),
    "alpha is no number": (None, COMPILE + "-r smoothquant --set alpha=foo", "search"),
    "optimized for nothing known": (
        None, COMPILE + "-r dynamic --set optimize_for=fun", "prompt, decode, both"
    ),
    "unknown target": (None, COMPILE + "-r dynamic -t tpu", "use one of cpu"),
    "unknown instruction set": (None, COMPILE + "-r dynamic -t cpu:mmx", "cpu:avx2"),
    "bad size": (None, COMPILE + "-r dynamic --max-memory much", "2G"),
    "bad seed": (None, COMPILE + "-r dynamic --seed x", "--seed"),
    "no samples": (None, COMPILE + "-r dynamic --samples 0", "--samples"),
    "output folder missing": (None, "compile model.onnx -r dynamic -o no/out.onnx", "no"),
    "output is a folder": (
        _folder_of_others,
        "compile model.onnx -r dynamic -o full", "full"
    ),
    "output is something else": (None, "compile model.onnx -r dynamic -o data.npz", "data.npz"),
    "output is the input": (None, "compile model.onnx -r dynamic -o model.onnx", "model.onnx"),
    "output on a device": (None, "compile model.onnx -r dynamic -o /proc/out.onnx", "/proc"),
    "report cannot be written": (None, COMPILE + "-r dynamic --report no/r.html", "no/r.html"),
    "report is a folder": (
        lambda h: (h / "r").mkdir(), COMPILE + "-r dynamic --report r", "folder"
    ),
    "report over the model": (None, COMPILE + "-r dynamic --report model.onnx", "own file"),
    "report over the output": (None, COMPILE + "-r dynamic --json out.onnx", "own file"),
    "report over data of the output": (
        None, COMPILE + "-r dynamic --json out.onnx.1.data", "own file"
    ),
    "report over calibration data": (
        None, COMPILE + "-r static -c data.npz --json ./data.npz", "data.npz"
    ),
    "report over a model in a folder": (
        _folder, "compile folder -o out -r dynamic --report folder/model.onnx", "own file"
    ),
    "report over the tokenizer": (
        _folder, "compile folder -o out -r dynamic --report folder/tokenizer.json", "own file"
    ),
    "report in the output folder": (
        _folder, "compile folder -o out -r dynamic --report out/r.html", "own file"
    ),
    "report over calibration data in a folder": (
        _folder, COMPILE + "-r static -c folder --json folder/0.npz", "own file"
    ),
    "report over a link to the model": (
        lambda h: (h / "r").symlink_to("model.onnx"), COMPILE + "-r dynamic --json r", "own file"
    ),
    "one report over the other": (
        None, COMPILE + "-r dynamic --json r --report ../{here}/r", "own file"
    ),
    "output over a companion of the input": (
        _folder, "compile folder -o folder/encoder.onnx -r dynamic", "belongs to the input"
    ),
    "output is read-only": (
        lambda h: Path(shutil.copy(h / "model.onnx", h / "out.onnx")).chmod(0o444),
        COMPILE + "-r dynamic", "read-only"
    ),
    "pipeline misspelt": (None, "opt model.onnx -p canonicalise -o out.onnx", "canonicalize"),
    "pipeline without module": (None, "opt model.onnx -p no_such:Pass -o out.onnx", "no_such"),
    "seed below zero": (None, COMPILE + "-r dynamic --seed -1", "--seed"),
    "blocks of no size": (
        None, COMPILE + "-r rtn --set group_size=99999999999999999999", "99999999999999999999"
    ),
    "pass that says nothing": (_own_passes, "opt model.onnx -o o -p mine:Silent", "returned None"),
    "pass that fails": (
        _own_passes, "opt model.onnx -o o -p mine:Failing", "'failing' failed: KeyError: 'why'"
    ),
    "observers without what they collect": (
        _saved_observers, "opt o.onnx -o p.onnx -c data.npz -p calibrate", "in one pipeline"
    ),
    "decisions that are none": (
        lambda h: (h / "d").write_text("mine"),
        COMPILE + "-r dynamic --decisions d", "holds no decisions"
    ),
    "decisions where nothing is measured": (
        None, COMPILE + "-r dynamic -t onnx --decisions d", "measures nothing"
    ),
    "decisions over the model": (
        None, COMPILE + "-r dynamic --decisions model.onnx", "own file"
    ),
    "printing after no pass": (
        None, "opt model.onnx -p canonicalize -o out.onnx --print-after lower", "lower"
    ),
    "no rounds": (None, "bench model.onnx --rounds 0", "--rounds"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prepare, command, reason = BAD[case]
    if prepare is not None:
        prepare(here)
    before = contents(here)
    status = main(command.format(here=here.name).split())
    printed = capfd.readouterr()
    assert status == 2, printed
    assert printed.out == ""
    assert printed.err.startswith("qgraph: ")
    assert printed.err.count("\n") == 1
    assert printed.err.endswith("\n")
    assert reason in printed.err
    assert contents(here) == before


def shell(*arguments: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process, with files limited to so many bytes."""

    def confine() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-m", "qgraph", *arguments],
        capture_output=True, text=True, check=False, preexec_fn=confine,
    )  # fmt: skip


def test_a_bad_input_in_a_process_of_its_own(here: Path) -> None:
    done = shell("compile", "none.onnx", "-o", "out.onnx")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_a_file_that_cannot_grow_leaves_nothing(here: Path) -> None:
    before = contents(here)
    done = shell("compile", "model.onnx", "-o", "out.onnx", "-r", "dynamic", limit=1000)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert contents(here) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> object:
    """A disk of 64 kB, where the system lets us make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_nothing(here: Path, small_disk: Path) -> None:
    ir.save(models.mlp((256, 512, 256)), "large.onnx")
    done = shell("compile", "large.onnx", "-o", str(small_disk / "out.onnx"), "-r", "dynamic")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "space" in done.stderr
    assert contents(small_disk) == {}


SLOW_PASS = """
import time
from dataclasses import dataclass
from pathlib import Path
from qgraph import Contract, Pass

@dataclass(frozen=True)
class Slow(Pass):
    name = "slow"
    contract = Contract.EQUIVALENT
    def run(self, model, context):
        Path("running").touch()
        time.sleep(60)
        return False
"""


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGINT, 130, "qgraph: interrupted\n"),
        (signal.SIGTERM, 143, "qgraph: terminated\n"),
        (signal.SIGHUP, 129, "qgraph: terminated\n"),
    ],
)
def test_signals_end_with_their_status_and_leave_nothing(
    number: signal.Signals, status: int, said: str, here: Path
) -> None:
    (here / "slow_pass.py").write_text(SLOW_PASS)
    before = contents(here)
    command = ["-B", "-m", "qgraph", "opt", "model.onnx", "-p", "slow_pass:Slow", "-o", "out.onnx"]
    # Where tests run in the background, SIGINT is ignored, which a child would inherit.
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    previous = signal.signal(number, usual)
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    signal.signal(number, previous)
    deadline = time.monotonic() + 60
    while not (here / "running").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    (here / "running").unlink()
    assert (process.returncode, out, err) == (status, "", said)
    assert contents(here) == before


COMPILED = (
    "compile model.onnx -t onnx -o out.onnx -c data.npz --cache cache --report r.html --json r.json"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_at_any_operation_on_files_nothing_is_left_after_the_next_run(
    number: signal.Signals, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qgraph.io.models.EXTERNAL_BYTES", 1024)
    ir.save(models.mlp((16, 128, 8)), "model.onnx")
    command = COMPILED.split()
    assert main([*command, "-r", "dynamic"]) == 0
    for moment in range(1, 99, 2):
        status = killed_at(moment, lambda: main(command), number)
        if number == signal.SIGTERM:
            assert not [path for path in here.rglob(".*") if path.is_file()]
        if status == 0:
            break
        assert status == (143 if number == signal.SIGTERM else -number)
    assert moment > 20
    assert main(command) == 0
    names = {path.name for path in here.iterdir()}
    assert len(names) == 7, names
    assert len(list((here / "cache").iterdir())) == 1


def test_what_onnxruntime_raises_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    def fail(*_: object) -> None:
        raise Fail("Failed to allocate memory for requested buffer of size 9\nmore")

    monkeypatch.setattr("qgraph.report.inspection.describe", fail)
    assert main(["inspect", "model.onnx"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("qgraph: onnxruntime: Failed to allocate memory")
    assert told.count("\n") == 1


@pytest.mark.parametrize("recipe", ["dynamic", "static", "gptq"])
def test_names_in_any_script(recipe: str, here: Path) -> None:
    model = models.mlp((16, 32, 8))
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *model.graph.outputs):
        value.name = f"{value.name} \u2603\u00e9/\n"
    ir.save(model, "\u2603.onnx")
    command = f"compile \u2603.onnx -o \u00e9.onnx -r {recipe} -t onnx -c data.npz --report r.html"
    np.savez("data.npz", np.zeros((3, 16), np.float32))
    assert main(command.split()) == 0
    assert "\u2603" in Path("r.html").read_text(encoding="utf-8")


def test_names_that_are_no_text_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = Path("model.onnx").read_bytes()
    Path("bad.onnx").write_bytes(content.replace(b"w0", b"\xff\xfe"))
    assert main(["compile", "bad.onnx", "-o", "out.onnx", "-r", "dynamic"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_error_in_training_shows_where(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    text = "def at_once(model):\n    raise KeyError('why')\ndef later(model):\n    yield 1 / 0\n"
    (here / "losses.py").write_text(text)
    for name, why in (("at_once", "KeyError: 'why'"), ("later", "ZeroDivisionError")):
        assert (
            main(
                [
                    *["compile", "model.onnx", "-r", "qat", "-o", "o.onnx", "--train"],
                    f"losses:{name}",
                ]
            )
            == 2
        )
        *told, line = capsys.readouterr().err.splitlines()
        assert told[0].startswith("Traceback")
        assert f", in {name}" in "".join(told)
        assert line.startswith(f"qgraph: --train losses:{name}: it failed: {why}")


def test_very_many_samples_are_all(here: Path) -> None:
    command = "compile model.onnx -o o.onnx -t onnx -c data.npz --samples 9999999999999999999"
    assert main(command.split()) == 0


def test_nothing_but_results_is_written_at_home(here: Path) -> None:
    (here / "home").mkdir()
    paths = {"HOME": str(here / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment = {**os.environ, **paths}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    command = ["compile", "model.onnx", "-o", "o.onnx", "-t", "onnx", "-r", "dynamic"]
    subprocess.run([sys.executable, "-m", "qgraph", *command], env=environment, check=True)
    assert not contents(here / "home")


def test_decisions_are_kept_in_a_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(speedup: float, *options: str) -> str:
        class Fake:
            def speedup(self, case: object) -> float:
                return speedup

        monkeypatch.setattr("qgraph.backends.cpu.target.host_table", Fake)
        command = ["compile", "model.onnx", "-o", "out.onnx", "-r", "dynamic", *options]
        assert main(command) == 0
        return contents(here)["out.onnx"]

    fast, slow = compiled(3.0, "--decisions", "d.json"), compiled(0.5)
    assert fast != slow
    assert compiled(0.5, "--decisions", "d.json") == fast
    assert set(json.loads(Path("d.json").read_text()).values()) == {3.0}


def test_what_nobody_has_foreseen_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("two\nlines")

    monkeypatch.setattr("qgraph.report.inspection.describe", fail)
    assert main(["inspect", "model.onnx"]) == 70
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "unforeseen KeyError" in told
    assert main(["inspect", "--traceback", "model.onnx"]) == 70
    assert capsys.readouterr().err.startswith("Traceback")
