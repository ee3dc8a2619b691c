"""A recipe, and what recipes have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qgraph.errors import QGraphError
from qgraph.passes.balance_tables import BalanceTables
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.convert_opset import ConvertOpset
from qgraph.passes.fold_batch_norm import FoldBatchNorm
from qgraph.passes.fold_qdq import FoldQDQ
from qgraph.passes.fuse import Fuse
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.passes.lower import Lower
from qgraph.pipeline.pass_manager import Pass


@dataclass(frozen=True)
class Recipe:
    """A pipeline with a name.

    Attributes:
        name: as the user writes it.
        passes: in order; the last one lowers to the target.
        calibrates: whether it needs calibration data.
        trains: whether it is for training, see :func:`qgraph.prepare_qat`.
    """

    name: str
    passes: tuple[Pass, ...]
    calibrates: bool = False
    trains: bool = False

    def insert(self, new: Pass, *, before: str) -> Recipe:
        """The recipe with one more pass, just before the first pass called `before`.

        Raises:
            QGraphError: the recipe has no such pass.
        """
        names = [p.name for p in self.passes]
        if before not in names:
            raise QGraphError(
                f"recipe '{self.name}' has no pass '{before}': it has {', '.join(names)}"
            )
        at = names.index(before)
        return replace(self, passes=(*self.passes[:at], new, *self.passes[at:]))


FLOAT_STAGE: tuple[Pass, ...] = (Canonicalize(), FoldBatchNorm(), Fuse(), ConvertOpset(13))
"""What every recipe starts with: the graph made uniform, still float."""


def commit(*rounding: Pass) -> tuple[Pass, ...]:
    """From annotations to the target, through passes that round weights themselves. A table tied
    to a product must be found before they do."""
    return BalanceTables(), *rounding, InsertQDQ(), FoldQDQ(), Lower()
