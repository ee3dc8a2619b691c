"""Recipes: named pipelines. Each function here is one; its keywords are its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_type_hints

from qgraph.errors import QGraphError
from qgraph.pass_manager import Pass
from qgraph.passes.annotate import WEIGHT, Annotate, Rule
from qgraph.passes.balance_tables import BalanceTables
from qgraph.passes.bias_correction import BiasCorrection
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.convert_opset import ConvertOpset
from qgraph.passes.equalize import Equalize
from qgraph.passes.fold_batch_norm import FoldBatchNorm
from qgraph.passes.fold_qdq import FoldQDQ
from qgraph.passes.fuse import Fuse
from qgraph.passes.guard_static import GuardStatic
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.passes.lower import Lower
from qgraph.spec import QuantSpec, RangeMethod


@dataclass(frozen=True)
class Recipe:
    """A pipeline with a name.

    Attributes:
        name: as the user writes it.
        passes: in order; the last one lowers to the target.
        calibrates: whether it needs calibration data.
    """

    name: str
    passes: tuple[Pass, ...]
    calibrates: bool = False

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


def static(
    *,
    observer: RangeMethod | Literal["auto"] = "auto",
    bits: int = 8,
    min_sqnr: float = 25.0,
    equalize: bool = False,
    bias_correction: bool = True,
    rules: Sequence[Rule] = (),
) -> Recipe:
    """INT8 weights and activations, scales fixed by calibration; fastest for convolutional nets.

    Args:
        observer: how activation ranges are found: minmax, percentile, entropy, mse, or auto (mse
            around convolutions, minmax for the data of matrix products).
        bits: bits of the weights, 2 to 8.
        min_sqnr: sites whose median token would keep less than this many dB become dynamic.
        equalize: move ranges between consecutive layers first (Nagel et al. 2019).
        bias_correction: correct the mean shift that rounding the weights causes (same paper).
        rules: which sites to treat otherwise.
    """
    calibrated: tuple[Pass, ...] = (
        Annotate("static", observer, tuple(rules), _weight(bits)),
        InsertObservers(channel_means=bias_correction),
        Calibrate(),
        GuardStatic(min_sqnr=min_sqnr),
        *((BiasCorrection(),) if bias_correction else ()),
        BalanceTables(),
    )
    before = (*FLOAT_STAGE, *((Equalize(),) if equalize else ()))
    return Recipe(
        "static", (*before, *calibrated, InsertQDQ(), FoldQDQ(), Lower()), calibrates=True
    )


def dynamic(*, bits: int = 8, rules: Sequence[Rule] = ()) -> Recipe:
    """INT8 weights, activation scales computed at run time, token by token; needs no data.

    Args:
        bits: bits of the weights, 2 to 8.
        rules: which sites to treat otherwise.
    """
    annotate = Annotate("dynamic", rules=tuple(rules), weight=_weight(bits))
    return Recipe(
        "dynamic", (*FLOAT_STAGE, annotate, BalanceTables(), InsertQDQ(), FoldQDQ(), Lower())
    )


def _weight(bits: int) -> QuantSpec:
    if not 2 <= bits <= 8:
        raise QGraphError(f"bits={bits} is out of range: use 2 to 8")
    return WEIGHT if bits == 8 else WEIGHT.with_(bits=bits)


RECIPES: dict[str, Callable[..., Recipe]] = {"static": static, "dynamic": dynamic}


def get_recipe(name: str, parameters: dict[str, object]) -> Recipe:
    """The recipe called `name` with these parameters.

    Raises:
        QGraphError: unknown recipe or parameter; the message lists the known ones.
    """
    if name not in RECIPES:
        raise QGraphError(f"unknown recipe '{name}': use one of {', '.join(RECIPES)}")
    known, kinds = inspect.signature(RECIPES[name]).parameters, get_type_hints(RECIPES[name])
    if unknown := sorted(set(parameters) - set(known)):
        raise QGraphError(
            f"recipe '{name}' has no parameter '{unknown[0]}': it has {', '.join(known)}"
        )
    for key, value in parameters.items():
        kind = kinds[key]
        accepted = (int, float) if kind is float else kind
        if kind in (int, float, bool) and not isinstance(value, accepted):
            raise QGraphError(f"recipe '{name}': {key}={value!r} is no {kind.__name__}")
    return RECIPES[name](**parameters)
