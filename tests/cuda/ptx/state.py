"""Registers and memory of a block of threads."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.cuda.ptx.parse import PtxError

Array = NDArray[Any]
Type = np.dtype[Any]


def type_of(name: str) -> Type:
    """`s32`, `b64`, ... as numpy has it."""
    kind = {"f": "f", "s": "i", "u": "u", "b": "u"}[name[0]]
    return np.dtype(f"{kind}{int(name[1:]) // 8}")


def names_in(operand: str) -> list[str]:
    """The registers of `{a, b}`, or of one."""
    return [name.strip() for name in operand.strip("{}").split(",")]


@dataclass
class State:
    """What the threads of a block have; `i` are always the threads that an instruction is for."""

    threads: int
    shared: Array
    """Bytes."""
    buffers: list[tuple[int, Array]]
    """Address and bytes of each argument that is a buffer."""
    values: dict[str, bytes]
    """Of the parameters."""
    special: dict[str, Array]
    symbols: list[str]
    """Names of shared memory."""
    registers: dict[str, Array] = field(default_factory=dict)
    written: dict[str, Array] = field(default_factory=dict)
    predicates: dict[str, Array] = field(default_factory=dict)
    copies: list[tuple[Array, Array, Array, Array]] = field(default_factory=list)
    """Thread, group, offset and bytes of those under way."""
    commits: Array = field(init=False)

    def __post_init__(self) -> None:
        self.commits = np.zeros(self.threads, int)

    def get(self, operand: str, dtype: Type | str, i: Array) -> Array:
        """Value of a register or a constant."""
        dtype = np.dtype(dtype)
        if operand in self.special:
            return self.special[operand][i].astype(dtype)
        if operand[0] == "%":
            if operand not in self.registers or not self.written[operand][i].all():
                raise PtxError(f"{operand} is read before it was written")
            raw = self.registers[operand][i].view(np.uint8).reshape(-1, 8)[:, : dtype.itemsize]
            return np.ascontiguousarray(raw).view(dtype).reshape(-1)
        if operand[:2] == "0f":
            return np.full(len(i), struct.unpack(">f", bytes.fromhex(operand[2:]))[0], dtype)
        if operand in self.symbols:
            return np.zeros(len(i), dtype)
        mask = (1 << dtype.itemsize * 8) - 1
        number = int(operand.rstrip("U"), 0) & mask
        return np.full(len(i), number, f"u{dtype.itemsize}").view(dtype)

    def put(self, register: str, value: Array, i: Array) -> None:
        """Write a register."""
        if register == "_":
            return
        if register not in self.registers:
            self.registers[register] = np.zeros(self.threads, np.uint64)
            self.written[register] = np.zeros(self.threads, bool)
        wide = np.zeros((len(i), 8), np.uint8)
        raw = np.ascontiguousarray(value).view(np.uint8).reshape(-1, value.dtype.itemsize)
        wide[:, : value.dtype.itemsize] = raw
        self.registers[register][i] = wide.view(np.uint64).reshape(-1)
        self.written[register][i] = True

    def put_predicate(self, register: str, value: Array, i: Array) -> None:
        """Write a predicate."""
        self.predicates.setdefault(register, np.zeros(self.threads, bool))[i] = value

    def address(self, operand: str, i: Array) -> Array:
        """Of `[register+offset]`."""
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        dtype = "i8" if base.startswith("%rd") else "u4"
        return self.get(base, dtype, i).astype(np.int64) + (int(offset) if offset else 0)

    def memory(self, shared: bool, address: Array, size: int) -> tuple[Array, Array]:
        """The buffer that all these addresses lie in, and the offsets in it."""
        if (address % size).any():
            raise PtxError(f"misaligned for {size} bytes")
        if shared:
            if (address < 0).any() or (address + size > len(self.shared)).any():
                last = int(address.max()) + size
                raise PtxError(f"shared memory ends at {len(self.shared)}, not {last}")
            return self.shared, address
        for base, buffer in self.buffers:
            inside = (address >= base) & (address + size <= base + len(buffer))
            if inside.all():
                return buffer, address - base
            if inside.any():
                raise PtxError("an address beyond its buffer")
        raise PtxError("an address in no buffer")
