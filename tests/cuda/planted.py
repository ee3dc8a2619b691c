"""Bugs put into the kernels on purpose, and which check must see each."""

from __future__ import annotations

from typing import NamedTuple

from qgraph.backends.cuda.variants import SOURCES


class Bug(NamedTuple):
    """A text of a source file and what stands in its place."""

    check: str
    file: str
    old: str
    new: str
    what: str
    cases: str
    """How the names of the cases begin that go there; for `code`, a kernel."""

    def changed(self) -> dict[str, str]:
        """The file with the bug."""
        text = (SOURCES / self.file).read_text()
        assert self.old in text, f"no longer applies: {self.what}"
        return {self.file: text.replace(self.old, self.new)}


QUANTIZE, TILES, SMALL, REST = "quantize.cu", "gemm_w8a8.cu", "gemm_w8a8_small.cu", "epilogue.cu"
PLANTED = (
    Bug(
        "thread",
        QUANTIZE,
        "  __syncthreads();\n",
        "",
        "no barrier before the peaks are read",
        "quantize 3x200",
    ),
    Bug(
        "values",
        QUANTIZE,
        "threadIdx.x % 32 == 0)",
        "threadIdx.x % 32 == 0 && threadIdx.x != 224)",
        "a slot that nobody writes",
        "quantize 4x1001",
    ),
    Bug(
        "address",
        QUANTIZE,
        "w < THREADS / 32",
        "w <= THREADS / 32",
        "a slot past shared memory",
        "quantize 3x200",
    ),
    Bug(
        "thread",
        QUANTIZE,
        "if (threadIdx.x == 0) largest[blockIdx.x]",
        "largest[0]",
        "every block writes the same word",
        "quantize 3x200",
    ),
    Bug(
        "address",
        QUANTIZE,
        "v[e] = k + e < K ?",
        "v[e] = true ?",
        "reads past the end of a token",
        "quantize 4x1001",
    ),
    Bug(
        "values",
        QUANTIZE,
        "/ most / step",
        "* (1.f / most) / step",
        "a reciprocal for a division",
        "quantize 24",
    ),
    Bug(
        "values",
        QUANTIZE,
        "if (k + e >= K) continue;",
        "",
        "what fills up is no 0",
        "quantize 4x1001",
    ),
    Bug(
        "counters",
        QUANTIZE,
        " && (u64)x % 16 == 0",
        "",
        "16 bytes at an address that is no multiple",
        "quantize 3x104",
    ),
    Bug(
        "values",
        QUANTIZE,
        "& 0x7fffffffu",
        "& 0x7fffffffu & (v[e] == v[e] ? ~0u : 0u)",
        "a NaN is lost",
        "quantize 5x520",
    ),
    Bug(
        "thread",
        TILES,
        "    __syncthreads();",
        "    //",
        "no barrier in the main loop",
        "w8a8 70",
    ),
    Bug(
        "values",
        TILES,
        "cp_async_wait<STAGES - 2>",
        "cp_async_wait<STAGES - 1>",
        "waits for one copy too few",
        "w8a8 70",
    ),
    Bug(
        "address",
        TILES,
        "const bool valid = row0 + row < rows;",
        "const bool valid = true;",
        "rows past the end",
        "w8a8 70",
    ),
    Bug(
        "values",
        TILES,
        "(lane >> 4) * 8, kk * 2 + (lane >> 3 & 1)",
        "(lane >> 3 & 1) * 8, kk * 2 + (lane >> 4)",
        "weights in the other order of fragments",
        "w8a8 70",
    ),
    Bug(
        "thread",
        TILES,
        "const int next = step + STAGES - 1;",
        "const int next = step + STAGES;",
        "fills the stage that is read",
        "w8a8 65",
    ),
    Bug(
        "counters",
        TILES,
        "piece ^ ((row >> 1) & 3)",
        "piece",
        "no swizzle: right but slow",
        "w8a8 64x128",
    ),
    Bug(
        "address",
        TILES,
        "if (m >= M || n >= N) continue;",
        "if (n >= N) continue;",
        "stores past the last token",
        "w8a8 70",
    ),
    Bug(
        "address",
        TILES,
        "if (n + 1 < N) to[1]",
        "to[1]",
        "stores past an odd last channel",
        "w8a8 65",
    ),
    Bug(
        "code",
        TILES,
        "#pragma unroll\n      for (int i = 0; i < TM; i++)\n        ldmatrix",
        "#pragma unroll 1\n      for (int i = 0; i < TM; i++)\n        ldmatrix",
        "fragments in local memory",
        "w8a8_64_f16",
    ),
    Bug(
        "thread",
        SMALL,
        "  __syncthreads();\n",
        "  __syncwarp();\n",
        "adds up before all warps are done",
        "w8a8 1x48",
    ),
    Bug(
        "address",
        SMALL,
        "const bool in = k + s * 64 < K;",
        "const bool in = true;",
        "reads past the last row",
        "w8a8 1x48",
    ),
    Bug(
        "values",
        SMALL,
        "hi[s].x, lo[s].y",
        "lo[s].y, hi[s].x",
        "registers of a tile in another order",
        "w8a8 1x48",
    ),
    Bug(
        "address",
        SMALL,
        "min(m0 + j * 8 + g, M - 1)",
        "(m0 + j * 8 + g)",
        "tokens past the end",
        "w8a8 1x48",
    ),
    Bug(
        "counters",
        SMALL,
        "lo[s] = in ?",
        "load_once(w0 + (in ? k + s * 64 : 0)), lo[s] = in ?",
        "weights read twice",
        "w8a8 1x48",
    ),
    Bug(
        "code",
        SMALL,
        "__launch_bounds__(WARPS * 32)",
        "__launch_bounds__(WARPS * 32, 8)",
        "registers so few that they spill",
        "w8a8_small_4_f16",
    ),
    Bug(
        "ptx",
        "prims.cuh",
        '"r"(a[3]), "r"(b0), "r"(b1)',
        '"r"(a[3]), "r"(b1), "r"(b0)',
        "registers swapped in the assembly, where no emulator looks",
        "w8a8 1x48",
    ),
    Bug(
        "ptx",
        "prims.cuh",
        'cp.async.wait_group %0;" ::"n"(PENDING)',
        'cp.async.wait_group %0;" ::"n"(PENDING + 1)',
        "a wait for less in the assembly",
        "w8a8 70",
    ),
    Bug(
        "values",
        REST,
        "(float)sum * scale[n + e] * most",
        "(float)sum * (scale[n + e] * most)",
        "another order of two roundings",
        "w8a8 257x1160",
    ),
    Bug(
        "address",
        REST,
        "  if (n >= N) return;\n",
        "",
        "channels past the end",
        "library",
    ),
)
