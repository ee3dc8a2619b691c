"""The PTX that NVRTC emits, executed; and the interpreter held to what Triton compiled."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from qgraph.backends.cuda.variants import KERNELS
from tests.cuda.build import PRIMITIVES, text_of
from tests.cuda.cases import Case, cases
from tests.cuda.engines import Interpreted, ptx_of
from tests.cuda.ptx.machine import Machine
from tests.cuda.ptx.parse import KNOWN, PtxError, parse

FIXTURE = (Path(__file__).parent / "fixtures" / "triton_i8.ptx").read_text()
SMALL = [case for case in cases() if case.small]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_small_cases_have_the_bits_of_the_reference(case: Case) -> None:
    assert not case.failure(Interpreted())


@pytest.mark.parametrize("size", [(64, 64, 64), (80, 96, 208)])
def test_the_product_that_triton_compiled(size: tuple[int, int, int]) -> None:
    """Triton's compiler is right on hardware: so is our reading of mma, ldmatrix and cp.async."""
    m, n, k = size
    machine = Machine(FIXTURE, "product")
    found = re.search(r"shared (\d+)", FIXTURE)
    assert found
    r = np.random.default_rng(k)
    a, b = (r.integers(-128, 128, shape).astype(np.int8) for shape in ((m, k), (n, k)))
    c = np.zeros((m, n), np.int32)
    scratch = [None] * (len(machine.parameters) - 6)
    buffers = [x.reshape(-1).view(np.uint8) for x in (a, b, c)]
    machine.launch((-(-n // 64), -(-m // 64)), 128, int(found[1]), [*buffers, m, n, k, *scratch])
    assert np.array_equal(c, a.astype(np.int32) @ b.astype(np.int32).T)


def test_every_instruction_that_has_a_model_is_needed() -> None:
    texts = [(ptx_of(text_of(kernel), 80), kernel) for kernel in (PRIMITIVES, *KERNELS)]
    emitted = {
        i.op for text, kernel in [*texts, (FIXTURE, "product")] for i in parse(text, kernel)[1]
    }
    assert emitted == set(KNOWN.split())


def _run(*body: str, threads: int = 32) -> None:
    lines = "\n".join(f"\t{line};" for line in body)
    text = f".visible .entry k(\n\t.param .u64 k_param_0\n)\n{{\n{lines}\n}}"
    Machine(text, "k").launch((1, 1), threads, 16, [np.zeros(64, np.uint8)])


LOAD = ("ld.param.u64 %rd1, [k_param_0]", "mov.u32 %r1, %tid.x")


@pytest.mark.parametrize(
    ("trap", "body"),
    [
        ("no model of sin.approx.f32", ("sin.approx.f32 %f1, 0f00000000",)),
        ("%r9 is read before it was written", ("add.s32 %r1, %r9, 1",)),
        ("in no buffer", (*LOAD, "st.global.u32 [%rd1+64], %r1")),
        (
            "beyond its buffer",
            (
                *LOAD,
                "mul.wide.u32 %rd2, %r1, 4",
                "add.s64 %rd3, %rd1, %rd2",
                "st.global.u32 [%rd3], %r1",
            ),
        ),
        ("misaligned for 4", (*LOAD, "st.global.u32 [%rd1+2], %r1")),
        ("shared memory ends at 16", (*LOAD, "mov.u32 %r2, 16", "ld.shared.u32 %r3, [%r2]")),
        (
            "lanes missing",
            (
                *LOAD,
                "setp.lt.s32 %p1, %r1, 31",
                "@%p1 shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1",
            ),
        ),
        (
            "after some threads have left",
            (*LOAD, "setp.lt.s32 %p1, %r1, 31", "@%p1 ret", "bar.sync 0", "ret"),
        ),
        (
            "nobody waits for",
            (
                *LOAD,
                "mov.u32 %r2, 0",
                "cp.async.cg.shared.global [%r2], [%rd1], 16",
                "cp.async.commit_group",
            ),
        ),
    ],
)
def test_the_interpreter_traps(trap: str, body: tuple[str, ...]) -> None:
    with pytest.raises(PtxError, match=re.escape(trap)):
        _run(*body)
