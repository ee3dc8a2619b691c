"""Recipes of 8-bit integers for any model: scales by calibration, or found at run time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from qgraph.numerics.spec import RangeMethod
from qgraph.passes.annotate import Annotate, Rule
from qgraph.passes.bias_correction import BiasCorrection
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.equalize import Equalize
from qgraph.passes.guard_static import GuardStatic
from qgraph.passes.insert_observers import InsertObservers
from qgraph.recipes.recipe import FLOAT_STAGE, Recipe, commit, listed
from qgraph.recipes.specs import int8_weight


@listed
def static(
    *,
    observer: RangeMethod | Literal["auto"] = "auto",
    bits: int = 8,
    min_sqnr: float = 25.0,
    equalize: bool = False,
    bias_correction: bool = True,
    kv_bits: int = 0,
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
        kv_bits: 8 or 4 bits for the cache of attention, 0 = float; needs calibration data.
        rules: which sites to treat otherwise.
    """
    steps = (
        *((Equalize(),) if equalize else ()),
        Annotate("static", observer, tuple(rules), int8_weight(bits)),
        InsertObservers(channel_means=bias_correction),
        Calibrate(),
        GuardStatic(min_sqnr=min_sqnr),
        *((BiasCorrection(),) if bias_correction else ()),
    )
    passes = (*FLOAT_STAGE, *steps, *commit(kv_bits=kv_bits))
    return Recipe("static", passes, calibrates=True)


@listed
def dynamic(
    *, bits: int = 8, bodies: int = 2, kv_bits: int = 0, rules: Sequence[Rule] = ()
) -> Recipe:
    """INT8 weights, activation scales computed at run time, token by token; needs no data.

    Args:
        bits: bits of the weights, 2 to 8.
        bodies: 2 lets the number of rows of a run choose between two bodies of the model, where
            prompts and single tokens want different kernels; 1 keeps one, in less memory.
        kv_bits: 8 or 4 bits for the cache of attention, 0 = float; needs calibration data.
        rules: which sites to treat otherwise.
    """
    annotate = Annotate("dynamic", rules=tuple(rules), weight=int8_weight(bits))
    return Recipe(
        "dynamic",
        (*FLOAT_STAGE, annotate, *commit(bodies=bodies, kv_bits=kv_bits)),
        calibrates=bool(kv_bits),
    )
