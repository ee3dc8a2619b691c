"""What the compiler made of a kernel, run instruction by instruction.

numpy over the threads of a block; of the threads that can run, those at the least program counter
run together. It traps on an instruction that nobody modelled, on a register read before it was
written, on an address outside every buffer or misaligned, on a warp collective with lanes missing
and on a barrier after some threads have left. Shared memory starts as 0xCD; cp.async lands at the
wait that covers it. It does not look for races: the emulator does.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence

import numpy as np

from tests.cuda.ptx.instructions import execute
from tests.cuda.ptx.parse import PtxError, parse
from tests.cuda.ptx.state import Array, State


class Machine:
    """A kernel of a PTX file."""

    def __init__(self, text: str, entry: str) -> None:
        self.parameters, self.code, self.labels = parse(text, entry)
        self.symbols = re.findall(r"\.extern \.shared[^;]*?(\w+)\[\]", text)
        limit = re.search(r"\.maxntid (\d+)", text)
        self.max_threads = int(limit[1]) if limit else 1024

    def launch(
        self,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        arguments: Sequence[Array | int | float | None],
    ) -> None:
        """Run all blocks. Arrays are the bytes of buffers and are written in place.

        Raises:
            PtxError: a trap.
        """
        if threads > self.max_threads or len(arguments) != len(self.parameters):
            raise PtxError("more threads or other arguments than the kernel was compiled for")
        buffers, values, base = [], {}, 0x7_0000_0000
        for name, a in zip(self.parameters, arguments, strict=True):
            if isinstance(a, np.ndarray):
                buffers.append((base, a))
                values[name] = struct.pack("<Q", base)
                base += -(-a.nbytes // 0x10000) * 0x10000 + 0x10000
            elif isinstance(a, float):
                values[name] = struct.pack("<f", a)
            else:
                values[name] = struct.pack("<Q", 0) if a is None else struct.pack("<i", a)
        for y in range(grid[1]):
            for x in range(grid[0]):
                one = np.ones(threads, int)
                special = {"%ntid.x": threads * one, "%nctaid.x": grid[0] * one}
                special |= {"%nctaid.y": grid[1] * one, "%tid.x": np.arange(threads)}
                special |= {"%ctaid.x": x * one, "%ctaid.y": y * one}
                memory = np.full(shared, 0xCD, np.uint8)
                state = State(threads, memory, buffers, values, special, self.symbols)
                self._block(state, f"block ({x}, {y})")

    def _block(self, state: State, where: str) -> None:
        pc, waiting = np.zeros(state.threads, int), np.zeros(state.threads, bool)
        end = len(self.code)
        while (pc < end).any():
            ready = (pc < end) & ~waiting
            if not ready.any():
                if (pc >= end).any():
                    raise PtxError("a barrier after some threads have left")
                waiting[:] = False
                continue
            here = pc[ready].min()
            active = np.flatnonzero(ready & (pc == here))
            instruction = self.code[here]
            pc[active] = here + 1
            if instruction.predicate:
                register, negated = instruction.predicate
                active = active[state.predicates[register][active] ^ negated]
                if not len(active):
                    continue
            if instruction.op.startswith("bra"):
                pc[active] = self.labels[instruction.operands[0]]
            elif instruction.op == "ret":
                pc[active] = end
            elif instruction.op == "bar.sync":
                waiting[active] = True
            else:
                try:
                    execute(state, instruction.op.split("."), instruction.operands, active)
                except PtxError as trap:
                    text = f"{trap} -- {instruction.text} -- {where}, thread {active[0]}"
                    raise PtxError(text) from None
        if any(len(thread) for thread, *_ in state.copies):
            raise PtxError("a cp.async that nobody waits for")
