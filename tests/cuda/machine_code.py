"""What the machine code of a kernel costs: registers, spills, instructions of its main loop."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from qgraph.backends.cuda.choice import PRODUCTS

SMALL_SLOTS = {1: 24, 2: 31, 4: 45}
"""Issue slots for 512 bytes of weights by tiles of tokens: an H200 has 107 while they arrive."""
BLOCKS = {"quantize": 4, "epilogue": 4, "w8a8_small": 2, "w8a8_64": 3, "w8a8_128": 1}
"""How many of a kernel's blocks are to fit a multiprocessor at once, on every architecture."""
LIMITS = {
    80: (65536, 167936, 64, 32),
    86: (65536, 102400, 48, 16),
    89: (65536, 102400, 48, 24),
    90: (65536, 233472, 64, 32),
    100: (65536, 233472, 64, 32),
    120: (65536, 102400, 48, 24),
}
"""Registers, bytes of shared memory, warps and blocks of a multiprocessor."""
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)")


@dataclass(frozen=True)
class Code:
    """Of one kernel."""

    registers: int
    stack: int
    local: int
    loop: Counter[str]
    """Of the loop with the most tensor instructions, or the longest."""

    def count(self, *parts: str) -> int:
        """Instructions of the loop whose name starts with the first part and has the others."""
        return sum(
            n
            for op, n in self.loop.items()
            if op.startswith(parts[0]) and all(part in op for part in parts[1:])
        )


def disassemble(cubin: bytes) -> Code:
    """What is in a cubin of one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
        lines = _output("nvdisasm", "-c", file.name).splitlines()
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    labels = {m[1]: n for n, line in enumerate(lines) if (m := re.match(r"(\.L_x_\d+):", line))}
    loops = [
        (labels[m[1]], n)
        for n, line in enumerate(lines)
        if (m := re.search(r"BRA.*`\((\.L_x_\d+)\)", line)) and labels.get(m[1], n) < n
    ]
    names = [m[1] if (m := _INSTRUCTION.match(line)) else "" for line in lines]

    def weight(loop: tuple[int, int]) -> tuple[int, int]:
        return sum("MMA" in op for op in names[slice(*loop)]), loop[0] - loop[1]

    start, end = max(loops, key=weight, default=(0, 0))
    inner = Counter(op for op in names[start : end + 1] if op)
    return Code(used["REG"], used["STACK"], used["LOCAL"], inner)


def over_budget(kernel: str, cubin: bytes, arch: int) -> list[str]:
    """What a kernel costs more than it may."""
    code, kind = disassemble(cubin), kernel.rpartition("_")[0]
    wrong = []
    if code.stack or code.local:
        wrong.append(f"stack {code.stack}, local memory {code.local}")
    product = next((p for p in PRODUCTS if p.kernel == kind), None)
    threads, shared = (product.threads, product.shared) if product else (256, 32)
    fit = blocks(arch, code.registers, shared, threads)
    if fit < next(n for prefix, n in BLOCKS.items() if kind.startswith(prefix)):
        wrong.append(f"{fit} blocks a multiprocessor: {code.registers} registers")
    if product and not code.count("IMMA"):
        wrong.append("no tensor instruction in the main loop")
    if kind.startswith("w8a8_small"):
        tiles = int(kind[-1])
        loads = code.count("LDG", "128")
        turns = loads // (8 + 4 * tiles)  # of two rows and the tokens, in spans of 4
        if not turns or code.count("LDG") != turns * (8 + 4 * tiles):
            wrong.append(f"{loads} loads of 16 bytes of {code.count('LDG')}")
        slots = code.loop.total() / max(1, 8 * turns)  # a load of weights by a warp is 512 bytes
        if slots > SMALL_SLOTS[tiles]:
            wrong.append(f"{slots:.1f} issue slots for 512 bytes of weights")
    return [f"{kernel} on sm_{arch}: {what}" for what in wrong]


def blocks(arch: int, registers: int, shared: int, threads: int) -> int:
    """Blocks of a kernel that fit a multiprocessor at the same time."""
    file, memory, warps, most = LIMITS[arch]
    own = -(-threads // 32)
    by_registers = file // (-(-registers * 32 // 256) * 256) // 4 * 4 // own
    by_shared = memory // (-(-(shared + 1024) // 128) * 128)
    return min(by_registers, by_shared, warps // own, most)


@functools.cache
def _tool(name: str) -> str:
    spec = importlib.util.find_spec("nvidia")
    for root in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(root).glob(f"*/bin/{name}")):
            return str(path)
    return shutil.which(name) or name


def _output(tool: str, *arguments: str) -> str:
    command = [_tool(tool), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
    return done.stdout
