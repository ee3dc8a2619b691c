"""A pipeline with the passes that a user left out."""

from __future__ import annotations

from collections.abc import Sequence

from qgraph.graph.annotation import Stage
from qgraph.pipeline.pass_manager import Pass


def complete(steps: Sequence[Pass], *, calibrated: bool) -> list[Pass]:
    """The pipeline with what its passes need before them, where they do not stand there already.

    So that `smooth,insert-qdq` may be written for what takes six passes: a missing annotation is
    that of the recipe `static` where there is calibration data, of `dynamic` where there is none or
    where `smooth` or `split-outliers` use it, which help scales found token by token most.

    Args:
        steps: a pipeline, complete or not.
        calibrated: whether there is calibration data.
    """
    from qgraph.passes.annotate import Annotate
    from qgraph.passes.calibrate import Calibrate
    from qgraph.passes.canonicalize import Canonicalize
    from qgraph.passes.guard_static import GuardStatic
    from qgraph.passes.insert_observers import InsertObservers
    from qgraph.passes.insert_qdq import InsertQDQ
    from qgraph.passes.smooth import Smooth
    from qgraph.passes.split_outliers import SplitOutliers

    by_channel = any(isinstance(step, Smooth | SplitOutliers) for step in steps)
    observe = InsertObservers(channel_ranges=by_channel)
    annotate: tuple[Pass, ...] = (Annotate(scheme="dynamic"),)
    if calibrated and not by_channel:
        annotate = (Annotate(scheme="static"), observe, Calibrate(), GuardStatic())
    providers: dict[Stage, tuple[Pass, ...]] = {
        Stage.CANONICAL: (Canonicalize(),),
        Stage.ANNOTATED: annotate,
        Stage.OBSERVED: (observe,),
        Stage.CALIBRATED: (observe, Calibrate()),
        Stage.COMMITTED: (InsertQDQ(),),
    }
    result: list[Pass] = []
    holding: set[Stage] = set()

    def add(step: Pass) -> None:
        nonlocal holding
        for stage in Stage:  # from the first to the last, so that each finds its own needs met
            if stage in step.requires - holding and stage in providers:
                for needed in providers[stage]:
                    add(needed)
        result.append(step)
        holding = (holding - step.invalidates) | step.provides

    for step in steps:
        add(step)
    return result
