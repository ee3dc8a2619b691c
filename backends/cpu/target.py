"""The CPU through stock onnxruntime: kernels are chosen by what they cost here."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qgraph.backends.cpu.case import Case, Lowering, rounded
from qgraph.backends.cpu.isa import SATURATING, host_isa
from qgraph.backends.cpu.norms import part_norms, part_rms_norms
from qgraph.backends.cpu.table import Decisions, Table
from qgraph.backends.cpu.tokens import defer_scales, lower_quantizers
from qgraph.backends.lowering.block_products import lower_block_products
from qgraph.backends.lowering.block_tables import lower_block_tables
from qgraph.backends.lowering.codebook_products import lower_codebook_products
from qgraph.backends.lowering.columns import unpack_weights
from qgraph.backends.lowering.functions import inline_functions
from qgraph.backends.lowering.match import INT8_BLOCKS
from qgraph.backends.lowering.products import lower_products
from qgraph.backends.lowering.shield import shield_float
from qgraph.backends.lowering.tables import lower_tables
from qgraph.graph.ops import MOVES, dilated_average
from qgraph.graph.reading import attribute, dims, is_op
from qgraph.graph.sites import Site
from qgraph.io.session import open_session
from qgraph.numerics.spec import FLOAT8, PerBlock, PerToken, QuantSpec
from qgraph.pipeline.target import BlockProduct, Purpose, Verdict

GLUE = MOVES | {
    "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu",
}  # fmt: skip
"""Operators between quantized ones for which onnxruntime has integer kernels on CPU."""

ROWS: dict[Purpose, tuple[int, ...]] = {"prompt": (128,), "decode": (1,), "both": (1, 128)}
"""Rows of a product that count, by what the model is optimized for."""
PIXELS = 196
MARGIN = 1.02
"""A quantized operator must beat float by this much: below it, noise decides."""
NEAR = 0.05
"""Verdicts within this share of it say so."""

WORTH, CLOSE = 1.15, 0.95
"""A second body must make prompts this much faster; columns must come so near to blocks for one row
to take both kinds of runs."""
BETWEEN = (2, 4, 8, 16, 32, 64)
ASSUMED_CROSSOVER = 16
"""Rows from which int8 columns beat blocks on other CPUs: assumed, not measured."""

FINER = 6
"""Blocks of at most so many bits can be rounded again to int8 columns at little loss."""
PAIRED = 64
"""The largest integer in these columns on CPUs that add two products with u8 in an int16."""

CHAIN = 3
"""So many convolutions in a row are measured, to tell their time from that of the conversions
before the first and after the last."""

SHIPPED: dict[str, dict[int, float]] = {
    "blocks-2": {1: 5.9, 128: 0.8},
    "blocks-4": {1: 5.4, 128: 0.9},
    "blocks-8": {1: 2.9, 128: 0.65},
    "per-token": {1: 4.6, 128: 1.9},
    "per-run": {1: 3.8, 128: 1.85},
    "static": {1: 4.1, 128: 1.85},
}
"""For CPUs other than this host: speedups of K=N=2048 products measured on AVX2 without VNNI
(AMD EPYC, onnxruntime 1.31), the slowest integer products of any x86 server."""

NORM_WIDTH = 512
ASSUMED_CONVOLUTION = (1.5, 0.5)
"""Speedup and conversions of a convolution on other CPUs: assumed, not measured."""


@functools.cache
def host_table() -> Table:
    """The measured table of this machine."""
    return Table.of_host()


@dataclass(frozen=True)
class CpuTarget:
    """Stock onnxruntime on a CPU.

    On this host's own instruction set, each kind and size of site is timed once against float; a
    site stays float where nothing wins. For another instruction set the shipped figures decide.

    Attributes:
        name: `cpu` or `cpu:<isa>`.
        isa: one of :data:`isa.ISAS`.
        optimize_for: which numbers of rows count, see :data:`ROWS`.
        decisions: file with the figures to decide by; those that it lacks are added to it.
    """

    name: str = "cpu"
    isa: str = field(default_factory=host_isa)
    optimize_for: Purpose = "both"
    decisions: Path | None = None

    open_session = staticmethod(open_session)

    @property
    def saturates(self) -> bool:
        return self.isa in SATURATING

    @property
    def measured(self) -> bool:
        """Whether verdicts come from this machine."""
        return self.isa == host_isa()

    def supports(self, site: Site, activation: QuantSpec | None, weight: QuantSpec) -> Verdict:
        if site.kind == "gather" and isinstance(weight.granularity, PerBlock):
            size = weight.granularity.size
            known = weight.width <= 8 and size in INT8_BLOCKS[4]
            return Verdict(known, f"rows in blocks of {size} are dequantized as they are gathered")
        if site.kind == "gather" and activation is None:
            return Verdict(True, "rows are dequantized as they are gathered")
        if activation is not None and isinstance(activation.granularity, PerBlock):
            return self._blocks(site, activation.granularity, weight)
        if weight.dtype in FLOAT8 or (activation is None and weight.codebook):
            return Verdict(True, "computed in float, as fast as float")
        if activation is None:
            return Verdict(False, "onnxruntime has no fast kernel with float activations here")
        if isinstance(weight.granularity, PerBlock) and weight.width > FINER:
            return Verdict(False, f"int8 columns have no room for blocks of {weight.width} bits")
        lowering = _lowering(site, activation)
        if lowering is None:
            how = "dynamic " if activation.dynamic else ""
            return Verdict(
                False, f"onnxruntime has no {how}int8 {site.node.op_type} on CPU that is faster"
            )
        k, n = site.kn
        if site.kind == "conv":
            k = dims(site.weight)[1] or k
            if lowering == "depthwise":
                k = n
        if site.kind == "conv":
            return self._convolution(lowering, k, n)
        speedup = _mean(self._speedups(Case(lowering, k, n, 0)))
        where = "on this host" if self.measured else f"on {self.isa} (shipped figures)"
        if abs(speedup / MARGIN - 1) < NEAR:
            where += f", close to the {MARGIN}x that decide"
        if speedup < MARGIN:
            return Verdict(
                False, f"int8 {lowering} is {speedup:.2f}x float {where} at this size", speedup
            )
        return Verdict(True, f"{speedup:.2f}x float {where}", speedup)

    def _blocks(self, site: Site, blocks: PerBlock, weight: QuantSpec) -> Verdict:
        """A product of activations in blocks and weights in the same ones, on MatMulNBits."""
        k, n = site.kn
        size, own = blocks.size, weight.granularity
        fits = own.size == size if isinstance(own, PerBlock) else weight.width < 8
        if not fits:
            return Verdict(False, "activations in blocks need weights in blocks of that size")
        least = 8 if weight.codebook else weight.width  # levels of codebooks run as int8
        bits = next((b for b in (2, 4, 8) if b >= least and size in INT8_BLOCKS[b]), None)
        if bits is None:
            known = ", ".join(map(str, INT8_BLOCKS[8]))
            return Verdict(False, f"blocks of {size} have no kernel: only those of {known}")
        speedups = self._speedups(Case("blocks", k, n, 0, bits=bits, block=size))
        where = "on this host" if self.measured else f"on {self.isa} (shipped figures)"
        mean = _mean(speedups)
        # Weights of 8 bits can be columns instead, which are faster than float for prompts too.
        if (speedups.min() if weight.width == 8 else mean) < MARGIN:
            return Verdict(
                False, f"int{bits} blocks of {size} are {speedups.min():.2f}x float {where}"
            )
        figures = ", ".join(
            f"{speedup:.2f}x for {rows} rows" if rows > 1 else f"{speedup:.2f}x for one"
            for rows, speedup in zip(ROWS[self.optimize_for], speedups, strict=True)
        )
        slowest = float(speedups.min()) if len(speedups) > 1 else float("inf")
        return Verdict(True, f"{figures} {where}", mean, slowest=slowest)

    def _convolution(self, lowering: Lowering, k: int, n: int) -> Verdict:
        """A convolution's own speedup and what conversions around it cost, see
        `qgraph.graph.islands`."""
        if not self.measured:
            return Verdict(True, f"assumed for {self.isa}", *ASSUMED_CONVOLUTION)
        size = (rounded(k, 512), rounded(n, 512), PIXELS)
        alone, chained = (
            chain / self._figure(Case(lowering, *size, chain=chain)) for chain in (1, CHAIN)
        )
        integer = max((chained - alone) / (CHAIN - 1), 0.05)
        return Verdict(True, "measured on this host", 1 / integer, max(alone - integer, 0.0))

    def _speedups(self, case: Case) -> np.ndarray:
        """One for each number of rows that counts, for a product with k and n as they are."""
        return np.array([self._speedup(case, rows) for rows in ROWS[self.optimize_for]])

    def _speedup(self, case: Case, rows: int) -> float:
        if not self.measured:
            return SHIPPED[f"blocks-{case.bits}" if case.block else case.lowering][rows]
        return self._figure(replace(case, k=rounded(case.k), n=rounded(case.n), m=rows))

    def _figure(self, case: Case) -> float:
        """Float time / quantized time of a case on this host."""
        if self.decisions is None:
            return host_table().speedup(case)
        return Decisions(self.decisions).speedup(case, host_table())

    def crossover(self, products: Sequence[BlockProduct]) -> int | None:
        if self.optimize_for != "both" or self._gain(products, ROWS["prompt"][0]) < WORTH:
            return None
        if self._gain(products, 1) > CLOSE:
            return 1
        if not self.measured:
            return ASSUMED_CROSSOVER
        heaviest = [max(products, key=lambda p: p.k * p.n)]
        return next((m for m in BETWEEN if self._gain(heaviest, m) > 1), ROWS["prompt"][0])

    def _gain(self, products: Sequence[BlockProduct], rows: int) -> float:
        """Time of these products in blocks / as int8 columns, for so many rows of data."""
        blocks = columns = 0.0
        for product in products:
            work = product.k * product.n
            kinds = Case("blocks", product.k, product.n, 0, bits=product.bits, block=product.size)
            blocks += work / self._speedup(kinds, rows)
            columns += work / self._speedup(Case("per-token", product.k, product.n, 0), rows)
        return blocks / columns if columns else 0.0

    def _apart_is_faster(self, norm: Lowering) -> bool:
        """Whether a residual norm in two operators wins for one token as well as for many."""
        if not self.measured:
            return False
        cases = [Case(norm, NORM_WIDTH, NORM_WIDTH, m) for m in ROWS[self.optimize_for]]
        return all(self._figure(case) > MARGIN for case in cases)

    def supports_glue(self, node: ir.Node) -> bool:
        return is_op(node, *GLUE) and not dilated_average(node)

    def legalize(self, model: ir.Model) -> bool:
        packed = lower_block_products(model)
        changed = bool(packed)
        changed |= lower_codebook_products(model)
        changed |= lower_block_tables(model)
        changed |= unpack_weights(model, PAIRED if self.saturates else 127, packed)
        changed |= lower_tables(model, packed)
        changed |= lower_products(model, "onnxruntime")
        changed |= defer_scales(model)
        changed |= lower_quantizers(model)
        changed |= shield_float(model)
        if self._apart_is_faster("norm"):
            changed |= part_norms(model)
        if self._apart_is_faster("rms-norm"):
            changed |= part_rms_norms(model)
        return inline_functions(model) or changed


def _mean(speedups: np.ndarray) -> float:
    return float(np.exp(np.log(speedups).mean()))


def _lowering(site: Site, activation: QuantSpec) -> Lowering | None:
    """The row of the table that this site belongs to."""
    dynamic = activation.dynamic
    if site.is_product:
        if not dynamic:
            return "static"
        return "per-token" if isinstance(activation.granularity, PerToken) else "per-run"
    if site.kind != "conv" or dynamic:
        return None
    shape = dims(site.weight)
    if attribute(site.node, "group", 1) > 1:
        return "depthwise" if shape[1] == 1 else "conv"
    return "pointwise" if all(d == 1 for d in shape[2:]) else "conv"
