"""Target `cpu`: what the host is, what was measured on it, and the verdicts that follow."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qgraph.backends import TARGETS, cpu, get_target
from qgraph.backends.cpu import isa, table
from qgraph.backends.cpu.case import Case, Lowering, rounded
from qgraph.backends.cpu.probes import build as probe
from qgraph.backends.cpu.table import Table
from qgraph.backends.cpu.target import CpuTarget
from qgraph.errors import QGraphError
from qgraph.graph.sites import Site, sites
from qgraph.io.session import open_session, run
from qgraph.numerics.spec import PER_RUN, PER_TOKEN, WEIGHT, QuantSpec
from tests.models import build, weight

STATIC = QuantSpec()
FLAGS = "flags\t\t: fpu sse4_1 "


@pytest.fixture(autouse=True)
def _fresh_host() -> object:
    """No test sees what another one pretended the host to be."""
    functions = (isa.host_isa, isa.host_model, cpu.host_table)
    for function in functions:
        function.cache_clear()
    yield None
    for function in functions:
        function.cache_clear()


def pretend(
    monkeypatch: pytest.MonkeyPatch, text: str, machine: str = "x86_64", system: str = "Linux"
) -> None:
    monkeypatch.setattr(isa, "_cpuinfo", text.splitlines)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr("platform.processor", lambda: "")


# --- the instruction set --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "machine", "expected"),
    [
        (FLAGS + "avx2 avx512f avx512bw avx512_vnni", "x86_64", "avx512-vnni"),
        (FLAGS + "avx2 avx_vnni", "x86_64", "avx-vnni"),
        (FLAGS + "avx2 avx512f avx512bw", "x86_64", "avx512"),
        (FLAGS + "avx2 avx512f", "x86_64", "avx2"),
        (FLAGS + "avx", "x86_64", "generic"),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp", "aarch64", "neon-dot"),
        ("Features\t: fp asimd", "aarch64", "neon"),
        ("", "x86_64", "generic"),
        ("flags", "x86_64", "generic"),
        ("isa\t: rv64imafdc", "riscv64", "generic"),
    ],
)
def test_the_isa_from_cpuinfo(
    monkeypatch: pytest.MonkeyPatch, text: str, machine: str, expected: str
) -> None:
    pretend(monkeypatch, text, machine)
    assert isa.host_isa() == expected


def test_a_mac_has_no_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "", "arm64", "Darwin")
    assert isa.host_isa() == "neon-dot"


def test_the_name_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "processor : 0\nmodel name\t: Some: CPU @ 2 GHz\nmodel name : Other")
    assert isa.host_model() == "Some: CPU @ 2 GHz"
    isa.host_model.cache_clear()
    pretend(monkeypatch, "")
    assert isa.host_model() == "x86_64"


def test_the_real_host_is_known() -> None:
    assert isa.host_isa() in isa.ISAS
    assert isa.host_model()


@pytest.mark.parametrize("name", isa.ISAS)
def test_products_saturate_without_dot_product_instructions(name: str) -> None:
    assert CpuTarget("cpu", name).saturates is (name in ("avx512", "avx2", "generic"))


# --- names ----------------------------------------------------------------------------------------


def test_every_listed_target_can_be_made() -> None:
    for name, description in TARGETS:
        assert get_target(name).name == name
        assert description


@pytest.mark.parametrize("name", ["gpu", "cpu:avx9", "cpu:", "cpux", "", "CPU", "onnx:13"])
def test_unknown_targets(name: str) -> None:
    with pytest.raises(QGraphError, match=f"unknown target '{name}': use .*cpu:avx2") as error:
        get_target(name)
    assert "\n" not in str(error.value)


# --- the table ------------------------------------------------------------------------------------


@given(st.integers(0, 10**6))
def test_sizes_are_rounded_to_powers_of_two(size: int) -> None:
    found = rounded(size)
    assert found in [2**i for i in range(3, 12)]
    if 8 <= size <= 2048:
        assert 0.7 < found / size < 1.42


def fake_measure(monkeypatch: pytest.MonkeyPatch, speedup: float = 1.5) -> list[Case]:
    """Replace measuring; the list fills with what was to be measured."""
    measured: list[Case] = []

    def measure(case: Case) -> float:
        measured.append(case)
        return speedup

    monkeypatch.setattr(table, "measure", measure)
    return measured


CASE = Case("per-token", 64, 64, 1)


def test_entries_are_measured_once_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QGRAPH_CACHE", str(tmp_path))
    measured = fake_measure(monkeypatch)
    first = Table.of_host()
    assert [first.speedup(CASE) for _ in range(2)] == [1.5, 1.5]
    assert measured == [CASE]
    again = Table.of_host()
    assert again.speedup(CASE) == 1.5
    assert measured == [CASE]
    assert list(again) == [(str(CASE), 1.5)]
    assert [p.suffix for p in tmp_path.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"null", b'{"a": "fast"}', b'{"a": null}', b"\xff\xfe",
     b'{"per-token 64x64 m=1": 0}', b'{"per-token 64x64 m=1": -2}',
     b'{"per-token 64x64 m=1": NaN}', b'{"per-token 64x64 m=1": Infinity}'],
)  # fmt: skip
def test_a_corrupt_table_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes
) -> None:
    monkeypatch.setenv("QGRAPH_CACHE", str(tmp_path))
    measured = fake_measure(monkeypatch)
    path = Table.of_host().path
    path.write_bytes(content)
    assert Table.of_host().speedup(CASE) == 1.5
    assert measured == [CASE]
    assert json.loads(path.read_text())[str(CASE)] == 1.5


def test_a_folder_that_cannot_be_written_costs_only_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QGRAPH_CACHE", str(tmp_path / "file"))
    measured = fake_measure(monkeypatch)
    assert Table.of_host().speedup(CASE) == 1.5
    assert measured == [CASE]


def test_an_interrupted_write_leaves_the_table_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QGRAPH_CACHE", str(tmp_path))
    fake_measure(monkeypatch)
    Table.of_host().speedup(CASE)

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    assert Table.of_host().speedup(replace(CASE, m=128)) == 1.5
    monkeypatch.undo()
    monkeypatch.setenv("QGRAPH_CACHE", str(tmp_path))
    assert dict(Table.of_host()) == {str(CASE): 1.5}


def test_two_processes_keep_what_both_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("QGRAPH_CACHE", str(tmp_path))
    fake_measure(monkeypatch)
    one, two = Table.of_host(), Table.of_host()
    one.speedup(CASE)
    two.speedup(replace(CASE, m=128))
    assert len(dict(Table.of_host())) == 2


def test_where_the_table_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QGRAPH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table.cache_folder() == tmp_path / "qgraph"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert table.cache_folder() == tmp_path / ".cache" / "qgraph"
    pretend(monkeypatch, "model name : A/B (C) @ 2\n" + FLAGS + "avx2")
    name = Table.of_host().path.name
    assert name.startswith(f"cpu-v{table.VERSION}-A-B-C-2-avx2-ort-")
    assert os.sep not in name


LOWERINGS: tuple[Lowering, ...] = (
    "per-token", "per-run", "static", "conv", "pointwise", "depthwise", "norm", "rms-norm",
)  # fmt: skip


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_probes_run_and_their_integer_form_is_integer(lowering: Lowering) -> None:
    kinds = []
    for quantized in (False, True):
        model, given_ = probe(Case(lowering, 16, 32, 16), quantized)
        (y,) = run(open_session(model, threads=1), given_)
        assert np.isfinite(y).all()
        kinds.append({n.op_type for n in model.graph})
    assert kinds[0] != kinds[1]
    if "norm" not in lowering:
        assert any("Quantize" in kind or "Integer" in kind for kind in kinds[1])
        assert not any("Quantize" in kind or "Integer" in kind for kind in kinds[0])


def test_measuring_gives_a_plausible_ratio() -> None:
    assert 0.01 < table.measure(Case("per-token", 8, 8, 1)) < 100


# --- verdicts -------------------------------------------------------------------------------------


def one(text: str, *shape: int) -> Site:
    (site,) = sites(build(f"g {text}", weight("w", *shape)))
    return site


SITES = {
    "matmul": one("(float[N,64] x) => (y) { y = MatMul (x, w) }", 64, 256),
    "conv": one("(float[1,16,8,8] x) => (y) { y = Conv (x, w) }", 32, 16, 3, 3),
    "pointwise": one("(float[1,16,8,8] x) => (y) { y = Conv (x, w) }", 32, 16, 1, 1),
    "depthwise": one("(float[1,16,8,8] x) => (y) { y = Conv <group = 16> (x, w) }", 16, 1, 3, 3),
    "grouped": one("(float[1,16,8,8] x) => (y) { y = Conv <group = 4> (x, w) }", 32, 4, 3, 3),
    "transposed": one("(float[1,16,8,8] x) => (y) { y = ConvTranspose (x, w) }", 16, 8, 3, 3),
    "gather": one("(int64[N] x) => (y) { y = Gather (w, x) }", 256, 64),
}


def host(monkeypatch: pytest.MonkeyPatch, speedup: float) -> tuple[CpuTarget, list[Case]]:
    """A target of this host whose table says `speedup` of everything."""
    asked: list[Case] = []

    class Fake(Table):
        def speedup(self, case: Case) -> float:
            asked.append(case)
            return speedup

    monkeypatch.setattr(cpu.target, "host_table", lambda: Fake(Path("nowhere")))
    return CpuTarget("cpu", isa.host_isa()), asked


@pytest.mark.parametrize("speedup", [0.3, 1.0, 1.3, 4.0])
@pytest.mark.parametrize("spec", [PER_TOKEN, PER_RUN, STATIC], ids=str)
def test_products_follow_the_measured_table(
    monkeypatch: pytest.MonkeyPatch, speedup: float, spec: QuantSpec
) -> None:
    target, asked = host(monkeypatch, speedup)
    verdict = target.supports(SITES["matmul"], spec, WEIGHT)
    assert verdict.ok is (speedup > 1.02)
    assert verdict.speedup == pytest.approx(speedup)
    assert f"{speedup:.2f}x float on this host" in verdict.reason
    assert {(c.k, c.n) for c in asked} == {(64, 256)}
    assert {c.m for c in asked} == {1, 128}


def test_what_the_model_is_optimized_for_decides_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    target, asked = host(monkeypatch, 2.0)
    for purpose, rows in (("prompt", {128}), ("decode", {1}), ("both", {1, 128})):
        asked.clear()
        target = replace(target, optimize_for=purpose)  # type: ignore[arg-type]
        target.supports(SITES["matmul"], PER_TOKEN, WEIGHT)
        assert {c.m for c in asked} == rows


@pytest.mark.parametrize("name", ["conv", "pointwise", "depthwise", "grouped"])
def test_convolutions_are_asked_by_their_kind(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    target, asked = host(monkeypatch, 2.0)
    assert target.supports(SITES[name], STATIC, WEIGHT).ok
    assert {c.lowering for c in asked} == {"conv" if name == "grouped" else name}
    assert all(8 <= c.k <= 512 and 8 <= c.n <= 512 for c in asked)


@pytest.mark.parametrize(
    ("name", "spec", "ok", "why"),
    [
        ("gather", None, True, "rows are dequantized as they are gathered"),
        ("matmul", None, False, "no fast kernel with float activations"),
        ("conv", PER_RUN, False, "no dynamic int8 Conv on CPU"),
        ("transposed", STATIC, False, "no int8 ConvTranspose on CPU"),
    ],
)
def test_verdicts_that_need_no_measurement(
    monkeypatch: pytest.MonkeyPatch, name: str, spec: QuantSpec | None, ok: bool, why: str
) -> None:
    target, asked = host(monkeypatch, 9.0)
    verdict = target.supports(SITES[name], spec, WEIGHT)
    assert verdict.ok is ok
    assert why in verdict.reason
    assert not asked


def test_another_cpu_goes_by_the_shipped_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    _, asked = host(monkeypatch, 9.0)
    name = next(i for i in ("avx2", "avx512-vnni") if i != isa.host_isa())
    target = get_target(f"cpu:{name}")
    assert isinstance(target, CpuTarget)
    assert not target.measured
    verdict = target.supports(SITES["matmul"], PER_TOKEN, WEIGHT)
    assert verdict.ok
    assert verdict.reason.endswith(f"on {name} (shipped figures)")
    assert target.supports(SITES["conv"], STATIC, WEIGHT).ok
    assert not asked


def test_the_host_under_its_own_name_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, FLAGS + "avx2")
    _, asked = host(monkeypatch, 9.0)
    for name in ("cpu", "cpu:avx2"):
        asked.clear()
        get_target(name).supports(SITES["matmul"], PER_TOKEN, WEIGHT)
        assert asked


def test_glue() -> None:
    model = build("""
    g (float[1,2,4,4] x) => (y) {
      a = Add (x, x)
      m = MaxPool <kernel_shape = [2,2]> (a)
      y = Exp (m)
    }""")
    assert [CPU.supports_glue(n) for n in model.graph] == [True, True, False]


CPU = CpuTarget("cpu", "avx2")


def test_the_description_of_the_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QGRAPH_CACHE", str(tmp_path))
    assert "nothing measured yet" in cpu.describe()
    cpu.host_table.cache_clear()
    fake_measure(monkeypatch, 2.5)
    cpu.host_table().speedup(CASE)
    assert "   2.50x float  per-token 64x64 m=1" in cpu.describe().splitlines()
    assert cpu.describe().startswith(f"host: {isa.host_model()}, {isa.host_isa()}")


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QGRAPH_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert table.cache_folder().is_absolute()


@pytest.mark.parametrize(("ratio", "rounds"), [(3.0, table.ROUNDS), (1.05, table.MOST_ROUNDS)])
def test_close_ratios_are_measured_in_more_rounds(
    ratio: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[int] = []

    def time(session: int, feed: object, repeats: int) -> float:
        times.append(session)
        return ratio if session == 0 else 1.0

    sessions = iter((0, 1))
    monkeypatch.setattr("qgraph.io.session.open_session", lambda *_, **__: next(sessions))
    monkeypatch.setattr(table, "_time", time)
    monkeypatch.setattr(table, "_repeats", lambda *_: 1)
    assert table.measure(CASE) == pytest.approx(ratio)
    assert len(times) == 2 * rounds


def test_verdicts_say_how_close_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    for speedup, close in ((1.0, True), (1.05, True), (0.9, False), (1.2, False)):
        target, _ = host(monkeypatch, speedup)
        reason = target.supports(SITES["matmul"], PER_TOKEN, WEIGHT).reason
        assert ("close to the 1.02x that decide" in reason) is close
