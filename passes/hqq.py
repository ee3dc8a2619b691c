"""HQQ: ranges of blocks that suit most of their weights, found from the weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.calibration.resume import Resumable
from qgraph.errors import QGraphError, check_counts
from qgraph.graph.annotation import Stage, product_groups
from qgraph.graph.editing import remove_dead
from qgraph.graph.sites import Site
from qgraph.numerics.blocks import Scales, block_sums, full_range, lowest, rounding_error, spread
from qgraph.numerics.quantized import Arrays, from_arrays, to_arrays
from qgraph.numerics.reference import Float, Int
from qgraph.numerics.spec import QuantSpec
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass
from qgraph.weights.search import rounded_site, searchable
from qgraph.weights.site_weight import replace_weight

BETA, KAPPA = 10.0, 1.01
"""How strongly the two problems are coupled, errors in units of a step, and how that grows."""


@dataclass(frozen=True)
class HQQ(Pass):
    """Choose scale and zero point of each block so that most weights have small errors.

    The problem: rounding to nearest covers the range of a block, so its largest weight decides how
    well the others do. Its error may be large if theirs become small, which is what a norm with an
    exponent p below 1 says::

        min over s, z of  Σ |w - s · (q - z)|^p,    q = round(w / s) + z, clipped

    That is neither convex nor smooth. With an auxiliary error e for each weight, it becomes two
    problems that are easy in turn: min Σ |e|^p + β/2 · (e - (w - s · (q - z)))², where e follows by
    shrinkage, and then z, or s, by least squares of w - e. It needs no data.

    The paper's zero points are floats. Kernels with float zero points are many times slower on
    CPUs, so here the zero point is rounded once it is found, and then the scale is fitted in the
    same way. Blocks that gain nothing by the criterion itself stay as rounding to nearest has them.
    With a cache folder in the context, what is found is kept, and an interrupted run goes on there.

    Attributes:
        p: the exponent, above 0 and at most 2.
        iterations: how often each of zero point and scale is improved.

    Source: Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models".
    """

    name: ClassVar[str] = "hqq"
    version: ClassVar[int] = 1
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})

    p: float = 1.0
    iterations: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.p <= 2:
            raise QGraphError(f"p={self.p} is out of range: use more than 0, and at most 2")
        check_counts(iterations=self.iterations)

    def run(self, model: ir.Model, context: Context) -> bool:
        products = chain.from_iterable(product_groups(model, "weight").values())
        otherwise = "stays rounded to nearest"
        chosen = [site for site in products if searchable(site, self, context, otherwise)]
        if not chosen:
            return False
        resumable = Resumable.of(self, model, (), context)
        progress = context.progress(chosen, "half-quadratic", len(chosen))
        for site, arrays in resumable.steps(progress, self._quantize):
            (weight,) = from_arrays(arrays)
            assert weight is not None
            replace_weight(model, site, weight, "hqq")
            why = "quantized half-quadratically: most weights of a block have smaller errors"
            self.remark(context, site, "applied", why, norm_ratio=float(arrays["ratio"]))
        remove_dead(model)
        return True

    def _quantize(self, site: Site) -> Arrays:
        """The rounded weight, and what is left of the norm of its errors."""
        norms = np.zeros(2)

        def search(w: Float, spec: QuantSpec) -> Scales:
            fitted = half_quadratic(w, spec, self.p, self.iterations)
            for i, scales in enumerate((full_range(w, spec), fitted)):
                norms[i] += lp_norm(rounding_error(w, *scales, spec), spec, self.p).sum()
            return fitted

        weight = rounded_site(site, search)
        ratio = norms[1] / norms[0] if norms[0] else 1.0
        return {**to_arrays([weight]), "ratio": np.array(ratio)}


def half_quadratic(w: Float, spec: QuantSpec, p: float = 1.0, iterations: int = 10) -> Scales:
    """Scale and zero point of each block by half-quadratic splitting.

    Args:
        w: float32 (K, N).
        spec: size of the blocks, integer range and symmetry: symmetric ones only get scales.
        p: exponent of the norm.
        iterations: of the zero point, then of the scale.

    Returns:
        scale (float32) and zero point (int32), (blocks, N). The norm of no block's errors is larger
        than at the full range.
    """
    nearest = full_range(w, spec)
    scale, zero = nearest
    if not spec.symmetric:
        zero = _fitted_zeros(w, scale, zero, spec, p, iterations)
    scale = _fitted_scales(w, scale, zero, spec, p, iterations)
    norms = [lp_norm(rounding_error(w, *s, spec), spec, p) for s in (nearest, (scale, zero))]
    better = norms[1] < norms[0]
    return np.where(better, scale, nearest[0]), np.where(better, zero, nearest[1])


def _fitted_zeros(
    w: Float, scale: Float, zero: Int, spec: QuantSpec, p: float, iterations: int
) -> Int:
    """Zero points by least squares of w - e, rounded in the end."""
    wide, _ = spread((scale, zero), spec, len(w))
    steps, count = w / wide, block_sums(np.ones_like(w), spec)
    z = zero.astype(np.float32)
    for i in range(iterations):
        shift, _ = spread((z, zero), spec, len(w))
        q = np.clip(np.rint(steps + shift), lowest(spec), spec.qmax)
        e = shrink(steps - (q - shift), BETA * KAPPA**i, p)
        z = block_sums(q - steps + e, spec) / count
    return np.clip(np.rint(z), lowest(spec), spec.qmax).astype(np.int32)


def _fitted_scales(
    w: Float, scale: Float, zero: Int, spec: QuantSpec, p: float, iterations: int
) -> Float:
    """Scales by least squares of w - e, with integer zero points."""
    for i in range(iterations):
        step, shift = spread((scale, zero), spec, len(w))
        v = np.clip(np.rint(w / step), lowest(spec) - shift, spec.qmax - shift).astype(np.float32)
        e = shrink(w / step - v, BETA * KAPPA**i, p) * step
        top, bottom = block_sums((w - e) * v, spec), block_sums(v * v, spec)
        fitted = np.divide(top, bottom, where=bottom > 0, out=scale.copy())
        scale = np.where(fitted * scale > 0, fitted, scale).astype(np.float32)
    return scale


def shrink(x: NDArray[Any], beta: float, p: float) -> NDArray[Any]:
    """The e of least |e|^p + β/2 · (e - x)², about: sign(x) · max(|x| - |x|^(p-1) / β, 0)."""
    size = np.abs(x)
    with np.errstate(divide="ignore"):
        less = size - size ** (p - 1) / beta
    return np.asarray(np.copysign(np.maximum(less, 0), x), x.dtype)


def lp_norm(error: Float, spec: QuantSpec, p: float) -> Float:
    """Sum of |error|^p over each block, (blocks, N)."""
    return block_sums(np.abs(error) ** np.float32(p), spec)
