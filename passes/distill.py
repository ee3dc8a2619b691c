"""ZeroQuant's layer-by-layer distillation: integer weights that imitate the float layer on data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.calibration.capture import Rows, captured
from qgraph.errors import check_counts
from qgraph.graph.annotation import (
    Stage,
    annotated_weight_spec,
    data_spec,
    product_groups,
    weight_spec,
)
from qgraph.graph.editing import remove_dead
from qgraph.graph.ops import lowest_value
from qgraph.graph.reading import constant_array, release
from qgraph.graph.sites import Site, reduction_rows
from qgraph.numerics.blocks import lowest
from qgraph.numerics.noise import relative_noise, unit_power
from qgraph.numerics.quantized import Quantized
from qgraph.numerics.reference import Int
from qgraph.numerics.saturation import can_saturate
from qgraph.numerics.spec import QuantSpec
from qgraph.numerics.tokens import rounded_data
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass
from qgraph.pipeline.target import Target
from qgraph.weights.site_weight import quantize_site, replace_weight

TOKENS = 2048
"""About so many tokens are captured of each product's data."""
HELD_OUT = 8
"""One token in so many is not learned from, but judges what was learned."""
DAMPING = 1.0
"""Weight of staying near the float weights, in units of the mean power of a data channel. Without
it, the integers fit what is accidental in so few tokens: on others, half of the gain is lost."""
STRIP = 32
"""Rows of weights whose changes reach all other rows together, in one product of matrices."""
COLUMNS = 2048
"""Columns that are worked on together."""


@dataclass(frozen=True)
class Distill(Pass):
    """Choose the integers of each product so that it imitates the float product on real tokens.

    The problem: rounding to nearest serves every single weight, but what counts is x · W, over data
    whose channels are neither equal nor independent, and are rounded too. Some weights rounded the
    other way make up for the errors of the others::

        teacher      x  ── MatMul(W) ──── y
        student    Q(x) ── MatMul(Q(W)) ─ y'      integers Q(W) that minimize the sum of |y' - y|²

    at the scales that rounding to nearest has. Tokens count alike, whatever their magnitude. Given
    by Q(x)ᵀQ(x) and Q(x)ᵀx, the sum is a quadratic function, descended row by row of the weights:
    each weight moves to the integer that is best while the others stay. insert-qdq takes the
    integers as they are.

    Products stay as they were where that does not serve tokens that were not learned from; so do
    weights that others read too (an embedding table tied to the output projection), and columns
    whose new integers could overflow int16 in pairs.

    Attributes:
        sweeps: how often each weight is visited.

    Source: Yao et al. 2022, "ZeroQuant", section 4.3 (LKD). Their layer is a transformer block with
    latent float weights that gradients train; ours is the single product, where descent over the
    integers themselves is exact and has no learning rate.
    """

    name: ClassVar[str] = "distill"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})

    sweeps: int = 3

    def __post_init__(self) -> None:
        check_counts(sweeps=self.sweeps)

    def run(self, model: ir.Model, context: Context) -> bool:
        students = {
            x: chosen
            for x, sites in product_groups(model).items()
            if (chosen := [site for site in sites if self._may_learn(site, context)])
        }
        if not students:
            return False
        # Everything is learned from float data, so weights are replaced when all has been seen.
        learned: list[tuple[Site, Quantized]] = []
        work = captured(model, list(students), context, TOKENS)
        for x, tokens in context.progress(work, "distilling", len(students)):
            for site in students[x]:
                learned += [(site, student) for student in self._learn(site, tokens, context)]
        for site, student in learned:
            replace_weight(model, site, student, "distilled")
        remove_dead(model)
        return bool(learned)

    def _may_learn(self, site: Site, context: Context) -> bool:
        data, weight = data_spec(site), weight_spec(site)
        if weight is None or data is None or not data.dynamic:
            return False
        why = None
        if len(site.weight.uses()) > 1:
            why = "others read its weight too, and need it as it is"
        elif not weight.symmetric or weight.qmin >= 0:
            why = "its weight has a zero point"
        if why is not None:
            self.remark(context, site, "declined", f"not distilled: {why}")
        return why is None

    def _learn(self, site: Site, tokens: Rows, context: Context) -> list[Quantized]:
        """The weight as it was learned; empty where rounding to nearest is as good."""
        spec, data = annotated_weight_spec(site), data_spec(site)
        assert data is not None
        target = context.target
        nearest = quantize_site(site, spec, target.saturates)
        seen = rounded_data(tokens, data, lowest=lowest_value(site.x))
        test = slice(HELD_OUT - 1, None, HELD_OUT) if len(tokens) >= HELD_OUT else slice(None)
        learners = np.ones(len(tokens), np.bool_)
        learners[test] = len(tokens) < HELD_OUT
        gram, cross = normal_equations(tokens[learners], seen[learners])

        weight = constant_array(site.weight)
        w = np.asarray(reduction_rows(weight, site), np.float32)
        steps = reduction_rows(np.broadcast_to(nearest.steps(), nearest.q.shape), site)
        first = reduction_rows(nearest.q, site)
        q = np.empty(w.shape, first.dtype)
        for start in range(0, w.shape[1], COLUMNS):
            part = (slice(None), slice(start, start + COLUMNS))
            moved = distilled(w[part], first[part], steps[part], gram, cross, spec, self.sweeps)
            q[part] = _safe(moved, first[part], nearest, spec, target)

        y = tokens[test] @ w
        before, after = (relative_noise(y, seen[test] @ (i * steps)) for i in (first, q))
        release(site.weight)
        numbers = {"noise": after, "undistilled": before}
        if after >= before:
            why = "not distilled: rounding to nearest serves unseen tokens as well"
            self.remark(context, site, "declined", why, **numbers)
            return []
        self.remark(context, site, "applied", "distilled", **numbers)
        return [replace(nearest, q=np.ascontiguousarray(q.T) if site.axis == 0 else q)]


def _safe(q: Int, first: Int, nearest: Quantized, spec: QuantSpec, target: Target) -> Int:
    """`q`, but `first` in columns where u8·s8 products could overflow; blocks are narrow enough."""
    if not target.saturates or nearest.block or spec.width < 8:
        return q
    bad = can_saturate(q.astype(np.int32), 255).any(axis=0)
    return np.where(bad, first, q)


def normal_equations(teacher: NDArray[Any], student: NDArray[Any]) -> tuple[Any, Any]:
    """What the sum of squared errors over tokens depends on, each token at unit power.

    Of a sample that is there at once, and of x itself: :func:`qgraph.weights.gptq.gram_matrices`
    adds up all tokens, feed by feed, and those of x - x'.

    Args:
        teacher, student: data x and Q(x), (tokens, K).

    Returns:
        Q(x)ᵀQ(x) and Q(x)ᵀx, (K, K) each.
    """
    even = unit_power(teacher)
    x, qx = teacher * even, student * even
    return qx.T @ qx, qx.T @ x


def distilled(
    w: NDArray[Any],
    q: NDArray[Any],
    steps: NDArray[Any],
    gram: NDArray[Any],
    cross: NDArray[Any],
    spec: QuantSpec,
    sweeps: int = 3,
    damping: float = DAMPING,
) -> NDArray[Any]:
    """Integers at which Q(x) · (q · steps) is nearer to x · w: coordinate descent from `q`.

    With v = q · steps, the error of a column is vᵀGv - 2vᵀCw + wᵀxᵀxw, damped by d·|v - w|². Along
    one weight v_k it is least where its derivative is 0, at v_k + (Cw - Gv)_k / G_kk.

    Args:
        w: float weights, (K, N).
        q, steps: integers to start from, and what one step of each is worth, (K, N).
        gram, cross: G = Q(x)ᵀQ(x) and C = Q(x)ᵀx, (K, K).
        spec: gives the range of the integers.
        sweeps: how often each weight is visited.
        damping: d, in units of the mean diagonal of G.

    Returns:
        integers like `q`; the error of no column, without damping, is larger than with `q`.
    """
    qmin = lowest(spec)
    ridge = damping * gram.diagonal().mean()
    goal = cross @ w
    damped = gram + ridge * np.eye(len(gram), dtype=gram.dtype)
    curvature = np.maximum(damped.diagonal(), np.finfo(gram.dtype).tiny)
    new = q.astype(gram.dtype)
    residual = goal + ridge * w - damped @ (new * steps)
    for _ in range(sweeps):
        for start in range(0, len(q), STRIP):
            strip = slice(start, start + STRIP)
            old, here, local = new[strip].copy(), residual[strip].copy(), damped[strip, strip]
            for k, row in enumerate(range(start, start + len(here))):
                best = np.rint(new[row] + here[k] / (curvature[row] * steps[row]))
                best = np.clip(best, qmin, spec.qmax)
                here -= np.outer(local[:, k], (best - new[row]) * steps[row])
                new[row] = best
            residual -= damped[:, strip] @ ((new[strip] - old) * steps[strip])
    errors = [(v * (gram @ v - 2 * goal)).sum(axis=0) for v in (q * steps, new * steps)]
    return np.where(errors[1] < errors[0], new, q).astype(q.dtype)
