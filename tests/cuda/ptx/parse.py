"""PTX as a list of instructions, of an exact list of kinds."""

from __future__ import annotations

import re
from dataclasses import dataclass

KNOWN = """
add.rn.f32 add.s32 add.s64 and.b32 and.b64 and.pred bar.sync bar.warp.sync bfe.s32 bfe.u32
bfi.b32 bra bra.uni cp.async.cg.shared.global cp.async.commit_group cp.async.wait_group
cvt.f32.f16 cvt.rn.bf16.f32 cvt.rn.f16.f32 cvt.rn.f32.s32 cvt.rni.f32.f32 cvt.rzi.s32.f32
cvt.s64.s32 cvt.u16.u32 cvt.u32.u16 cvt.u32.u64 cvt.u64.u32 cvta.to.global.u64 div.rn.f32
ld.global.f32 ld.global.nc.L1::no_allocate.v4.u32 ld.global.nc.f32 ld.global.nc.u32
ld.global.nc.v4.u32 ld.global.u16 ld.global.u32 ld.param.b32 ld.param.b64 ld.param.f32
ld.param.u32 ld.param.u64 ld.shared.u32 ld.shared.v4.b32 ld.shared.v4.u32
ldmatrix.sync.aligned.m8n8.x4.shared.b16 mad.wide.s32 max.f32 max.s32 max.u32 min.f32
min.s32 mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32
mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 mov.b32 mov.f32 mov.pred mov.u32
mov.u64 mul.lo.s32 mul.lo.s64 mul.rn.f32 mul.wide.s32 mul.wide.u32 neg.s32 not.pred or.b32
or.pred prmt.b32 ret selp.b32 selp.b64 setp.eq.b32 setp.eq.s32 setp.eq.s64 setp.ge.s32
setp.gt.s32 setp.lt.s32 setp.ne.s32 shfl.sync.bfly.b32 shl.b32 shl.b64 shr.s32 shr.u32
shr.u64 st.global.f32 st.global.u16 st.global.u32 st.global.v2.u32 st.global.v4.b32
st.global.v4.f32 st.shared.u32 st.shared.v4.b32 sub.s32 xor.b32 xor.pred
"""
"""Those that our kernels and the fixtures have, and no other: `test_ptx.py` compares."""


class PtxError(Exception):
    """A trap: the text is not understood, or it does what a kernel must not do."""


@dataclass
class Instruction:
    """One of a kernel."""

    op: str
    operands: list[str]
    predicate: tuple[str, bool] | None  # register, negated
    text: str


def parse(text: str, entry: str) -> tuple[list[str], list[Instruction], dict[str, int]]:
    """Parameters, instructions, and where labels are.

    Raises:
        PtxError: no such kernel, or an instruction that nobody modelled.
    """
    match = re.search(rf"\.entry\s+{entry}\s*\((.*?)\)(.*?)\{{(.*)\n\}}", text, re.S)
    if not match:
        raise PtxError(f"no entry {entry}")
    parameters = re.findall(r"(\w+_param_\d+)", match[1])
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in (
        re.sub(r"//[^\n]*|^\s*\.(loc|file)[^\n]*", "", match[3], flags=re.M)
        .replace("\n", " ")
        .split(";")
    ):
        statement = (
            statement.strip(" \t{}")
            if not re.search(r"\{[^{}]*\}", statement)
            else statement.lstrip(" \t{}")
        )
        while label := re.match(r"(\$?\w+):\s*", statement):
            labels[label[1]] = len(code)
            statement = statement[label.end() :].lstrip(" \t{}")
        if not statement or statement[0] == ".":
            continue
        guard = re.match(r"@(!?)(%\w+)\s+", statement)
        body = statement[guard.end() :] if guard else statement
        op, _, rest = body.replace("\t", " ").partition(" ")
        if op not in KNOWN.split():
            raise PtxError(f"no model of {op}")
        operands = [o.strip() for o in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
        code.append(
            Instruction(op, operands, (guard[2], guard[1] == "!") if guard else None, statement)
        )
    return parameters, code, labels
