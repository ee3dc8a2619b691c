"""What a recipe is, and what recipes have in common.

A recipe is a function whose keywords are its parameters and whose result is a pipeline::

    @listed
    def dynamic(*, bits: int = 8, rules: Sequence[Rule] = ()) -> Recipe:
        annotate = Annotate("dynamic", rules=tuple(rules), weight=int8_weight(bits))
        return Recipe("dynamic", (*FLOAT_STAGE, annotate, *commit()))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from qgraph.errors import QGraphError
from qgraph.numerics.spec import SMALL_INTEGERS, WEIGHT, QuantSpec
from qgraph.passes.annotate import Annotate, Rule
from qgraph.passes.balance_tables import BalanceTables
from qgraph.passes.branch_on_rows import BranchOnRows
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.convert_opset import ConvertOpset
from qgraph.passes.fold_batch_norm import FoldBatchNorm
from qgraph.passes.fold_qdq import FoldQDQ
from qgraph.passes.fuse import Fuse
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.passes.lower import Lower
from qgraph.passes.quantize_kv_cache import QuantizeKVCache
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


_Make = TypeVar("_Make", bound=Callable[..., Recipe])
RECIPES: dict[str, Callable[..., Recipe]] = {}
"""The recipes by name, in the order in which users see them."""


def listed(make: _Make) -> _Make:
    """A decorator: puts a function that makes a recipe into :data:`RECIPES`."""
    RECIPES[make.__name__.replace("_", "-")] = make
    return make


FLOAT_STAGE: tuple[Pass, ...] = (Canonicalize(), FoldBatchNorm(), Fuse(), ConvertOpset(13))
"""What every recipe starts with: the graph made uniform, still float."""


def small_integers(rules: Sequence[Rule], weight: QuantSpec = WEIGHT) -> tuple[Pass, ...]:
    """Annotation by these rules, in an opset that has blocks and integers of few bits."""
    return ConvertOpset(SMALL_INTEGERS), Annotate("dynamic", rules=tuple(rules), weight=weight)


def commit(
    *rounding: Pass,
    tables: bool = True,
    rewrites: tuple[Pass, ...] = (),
    bodies: int | None = None,
    kv_bits: int = 0,
) -> tuple[Pass, ...]:
    """What every recipe ends with: from annotations to integers in the target's operators.

    Args:
        rounding: passes that round weights themselves.
        tables: look for tables tied to a product first, while both weights are still float.
        rewrites: of the graph with its integers, before the target has its turn.
        bodies: at most so many for prompts and single tokens, see `branch-on-rows`; None where
            there is nothing to choose.
        kv_bits: of the cache of attention, 0 = float.
    """
    balance = (BalanceTables(),) if tables else ()
    cache = (QuantizeKVCache(kv_bits),) if kv_bits else ()
    branch = () if bodies is None else (BranchOnRows(bodies),)
    return *balance, *rounding, InsertQDQ(), FoldQDQ(), *cache, *rewrites, *branch, Lower()
