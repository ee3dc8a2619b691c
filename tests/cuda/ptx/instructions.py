"""What each instruction does, for many threads at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.cuda.ptx.parse import PtxError
from tests.cuda.ptx.state import Array, State, names_in, type_of


def execute(s: State, op: list[str], o: list[str], i: Array) -> None:
    """One instruction, `op` in its parts and `o` its operands, for the threads `i`."""
    with np.errstate(all="ignore"):
        if op[-1] == "pred":
            _on_predicates(s, op[0], o, i)
        elif op[0] in SPECIAL:
            SPECIAL[op[0]](s, op, o, i)
        else:
            dtype = type_of(op[-1])
            value = ARITHMETIC[op[0]](dtype, *(s.get(x, dtype, i) for x in o[1:]))
            s.put(o[0], value.astype(dtype), i)


def _whole_warps(i: Array) -> None:
    lanes = i.reshape(-1, 32) if len(i) % 32 == 0 else None
    if lanes is None or (lanes != lanes[:, :1] // 32 * 32 + np.arange(32)).any():
        raise PtxError("a warp collective with lanes missing")


def _to_bf16(x: Array) -> Array:
    bits = x.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint16(0x7FFF), rounded)


def _on_predicates(s: State, name: str, o: list[str], i: Array) -> None:
    x = [s.predicates[p][i] if p[0] == "%" else np.full(len(i), int(p, 0) != 0) for p in o[1:]]
    s.put_predicate(o[0], x[0] if name == "mov" else ARITHMETIC[name](None, *x), i)


def _setp(s: State, op: list[str], o: list[str], i: Array) -> None:
    dtype = type_of(op[-1])
    x, y = s.get(o[1], dtype, i), s.get(o[2], dtype, i)
    value = {"lt": x < y, "gt": x > y, "ge": x >= y, "eq": x == y, "ne": x != y}[op[1]]
    s.put_predicate(o[0], value, i)


def _selp(s: State, op: list[str], o: list[str], i: Array) -> None:
    dtype = type_of(op[-1])
    s.put(
        o[0],
        np.where(s.predicates[o[3]][i], s.get(o[1], dtype, i), s.get(o[2], dtype, i)),
        i,
    )


def _ld(s: State, op: list[str], o: list[str], i: Array) -> None:
    dtype = type_of(op[-1])
    if op[1] == "param":
        raw = s.values[o[1].strip("[] ")]
        if len(raw) != dtype.itemsize:
            raise PtxError("a parameter of another size than the argument")
        s.put(o[0], np.full(len(i), np.frombuffer(raw, dtype)[0]), i)
        return
    names = names_in(o[0])
    buffer, offset = s.memory(op[1] == "shared", s.address(o[1], i), dtype.itemsize * len(names))
    for n, register in enumerate(names):
        at = offset[:, None] + n * dtype.itemsize + np.arange(dtype.itemsize)
        s.put(register, buffer[at].view(dtype).reshape(-1), i)


def _st(s: State, op: list[str], o: list[str], i: Array) -> None:
    dtype, names = type_of(op[-1]), names_in(o[1])
    buffer, offset = s.memory(op[1] == "shared", s.address(o[0], i), dtype.itemsize * len(names))
    for n, register in enumerate(names):
        at = offset[:, None] + n * dtype.itemsize + np.arange(dtype.itemsize)
        buffer[at] = (
            np.ascontiguousarray(s.get(register, dtype, i))
            .view(np.uint8)
            .reshape(-1, dtype.itemsize)
        )


def _cvta(s: State, op: list[str], o: list[str], i: Array) -> None:
    s.put(o[0], s.get(o[1], type_of(op[-1]), i), i)


def _mov(s: State, op: list[str], o: list[str], i: Array) -> None:
    dtype = type_of(op[-1])
    if o[1][0] == "{":
        parts = [s.get(x, f"u{dtype.itemsize // len(names_in(o[1]))}", i) for x in names_in(o[1])]
        s.put(o[0], np.ascontiguousarray(np.stack(parts, 1)).view(dtype).reshape(-1), i)
    elif o[0][0] == "{":
        names = names_in(o[0])
        both = s.get(o[1], dtype, i).view(f"u{dtype.itemsize // len(names)}").reshape(len(i), -1)
        for n, register in enumerate(names):
            s.put(register, both[:, n], i)
    else:
        s.put(o[0], s.get(o[1], dtype, i), i)


def _cvt(s: State, op: list[str], o: list[str], i: Array) -> None:
    source, target = op[-1], op[-2]
    if source == "f16":
        s.put(o[0], s.get(o[1], "f2", i).astype(np.float32), i)
        return
    x = s.get(o[1], type_of(source), i)
    if target in ("f16", "bf16"):
        s.put(o[0], _to_bf16(x) if target == "bf16" else x.astype(np.float16), i)
        return
    if source == "f32":
        x = np.rint(x) if op[1] == "rni" else np.trunc(x)
        if target == "s32":
            x = np.clip(np.nan_to_num(x.astype(np.float64), nan=0.0), -(2.0**31), 2.0**31 - 1)
    s.put(o[0], x.astype(type_of(target)), i)


def _mul(s: State, op: list[str], o: list[str], i: Array) -> None:
    dtype = type_of(op[-1])
    wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}") if op[1] == "wide" else dtype
    product = s.get(o[1], dtype, i).astype(wide) * s.get(o[2], dtype, i).astype(wide)
    s.put(o[0], product + s.get(o[3], wide, i) if op[0] == "mad" else product, i)


_mad = _mul


def _shift(s: State, op: list[str], o: list[str], i: Array) -> None:
    dtype = type_of(op[-1])
    x, by = s.get(o[1], dtype, i), s.get(o[2], "u4", i).astype(np.int64)
    bits = 8 * dtype.itemsize
    shift = np.minimum(by, bits - 1).astype(dtype)
    value = x << shift if op[0] == "shl" else x >> shift
    s.put(
        o[0],
        np.where((by < bits) | ((op[0] == "shr") & (dtype.kind == "i")), value, 0).astype(dtype),
        i,
    )


_shl = _shr = _shift


def _bfe(s: State, op: list[str], o: list[str], i: Array) -> None:
    x, at, width = (s.get(y, "u4", i).astype(np.uint64) for y in o[1:])
    field = x >> at & ((np.uint64(1) << width) - np.uint64(1))
    if op[1] == "s32":  # the sign is the field's highest bit
        field |= np.where(field >> (width - np.uint64(1)) & np.uint64(1), ~np.uint64(0) << width, 0)
    s.put(o[0], field.astype(np.uint32), i)


def _bfi(s: State, op: list[str], o: list[str], i: Array) -> None:
    x, into, at, width = (s.get(y, "u4", i).astype(np.uint64) for y in o[1:])
    mask = ((np.uint64(1) << width) - np.uint64(1)) << at
    s.put(o[0], (into & ~mask | x << at & mask).astype(np.uint32), i)


def _prmt(s: State, op: list[str], o: list[str], i: Array) -> None:
    low, high, select = (s.get(x, "u4", i).astype(np.uint64) for x in o[1:])
    both, value = high << np.uint64(32) | low, np.zeros(len(i), np.uint64)
    for n in range(4):
        pick = select >> np.uint64(4 * n)
        byte = both >> (pick & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        value |= np.where(pick & np.uint64(8), sign, byte) << np.uint64(8 * n)
    s.put(o[0], value.astype(np.uint32), i)


def _shfl(s: State, op: list[str], o: list[str], i: Array) -> None:
    _whole_warps(i)
    x = s.get(o[1], "u4", i).reshape(-1, 32)
    lanes = s.get(o[2], "u4", i).reshape(-1, 32)
    s.put(o[0].split("|")[0], np.take_along_axis(x, np.arange(32) ^ lanes, 1).reshape(-1), i)


def _bar(s: State, op: list[str], o: list[str], i: Array) -> None:
    _whole_warps(i)


def _ldmatrix(s: State, op: list[str], o: list[str], i: Array) -> None:
    _whole_warps(i)
    buffer, offset = s.memory(True, s.address(o[1], i), 16)
    offset, lane = offset.reshape(-1, 32), np.arange(32)
    for m, register in enumerate(names_in(o[0])):
        at = (offset[:, m * 8 + lane // 4] + 4 * (lane % 4))[:, :, None] + np.arange(4)
        s.put(register, buffer[at].view(np.uint32).reshape(-1), i)


def _cp(s: State, op: list[str], o: list[str], i: Array) -> None:
    if op[2] == "commit_group":
        s.commits[i] += 1
    elif op[2] == "wait_group":
        left = []
        for thread, group, offset, data in s.copies:
            landed = np.isin(thread, i) & (group < s.commits[thread] - int(o[0]))
            s.shared[offset[landed][:, None] + np.arange(16)] = data[landed]
            left.append((thread[~landed], group[~landed], offset[~landed], data[~landed]))
        s.copies = [copy for copy in left if len(copy[0])]
    else:
        size = s.get(o[3], "i4", i) if len(o) > 3 else np.full(len(i), 16)
        _, to = s.memory(True, s.address(o[0], i), 16)
        source, data = s.address(o[1], i), np.zeros((len(i), 16), np.uint8)
        full = size > 0
        if full.any():
            buffer, offset = s.memory(False, source[full], 16)
            data[full] = buffer[offset[:, None] + np.arange(16)]
        s.shared[to[:, None] + np.arange(16)] = 0xA5
        s.copies.append((i, s.commits[i].copy(), to, data))


def _mma(s: State, op: list[str], o: list[str], i: Array) -> None:
    """16 x 32 by 32 x 8, of int8."""
    _whole_warps(i)
    d, a, b, c = (names_in(x) for x in o)
    lane, warps = np.arange(32), len(i) // 32
    g, t = lane // 4, lane % 4
    left, right = np.zeros((warps, 16, 32)), np.zeros((warps, 32, 8))
    for n, register in enumerate(a):
        elements = s.get(register, "u4", i).view(np.int8).reshape(warps, 32, 4)
        for e in range(4):
            left[:, g + 8 * (n & 1), 4 * t + e + 16 * (n >> 1)] = elements[:, :, e]
    for n, register in enumerate(b):
        elements = s.get(register, "u4", i).view(np.int8).reshape(warps, 32, 4)
        for e in range(4):
            right[:, 4 * t + e + 16 * n, g] = elements[:, :, e]
    product = left @ right
    for n in range(4):
        added = product[:, g + 8 * (n >> 1), 2 * t + (n & 1)].reshape(-1)
        s.put(d[n], (s.get(c[n], "i4", i) + added).astype(np.int32), i)


ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": lambda t, x, y: x + y,
    "sub": lambda t, x, y: x - y,
    "mul": lambda t, x, y: x * y,
    "div": lambda t, x, y: x / y,
    "and": lambda t, x, y: x & y,
    "or": lambda t, x, y: x | y,
    "not": lambda t, x: ~x,
    "xor": lambda t, x, y: x ^ y,
    "neg": lambda t, x: -x,
    "min": lambda t, x, y: np.fmin(x, y) if t.kind == "f" else np.minimum(x, y),
    "max": lambda t, x, y: np.fmax(x, y) if t.kind == "f" else np.maximum(x, y),
}

SPECIAL: dict[str, Callable[[State, list[str], list[str], Array], None]] = {
    "setp": _setp,
    "selp": _selp,
    "ld": _ld,
    "st": _st,
    "cvta": _cvta,
    "mov": _mov,
    "cvt": _cvt,
    "mul": _mul,
    "bfe": _bfe,
    "bfi": _bfi,
    "prmt": _prmt,
    "shfl": _shfl,
    "bar": _bar,
    "ldmatrix": _ldmatrix,
    "cp": _cp,
    "mma": _mma,
    "mad": _mul,
    "shl": _shift,
    "shr": _shift,
}
