"""Passes, and the manager that runs them in order, checks them and times them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar

import onnx_ir as ir

from qgraph.errors import PipelineError, QGraphError, VerificationError
from qgraph.graph.annotation import Stage, stages_of
from qgraph.graph.sites import Site
from qgraph.numerics.spec import QuantSpec
from qgraph.pipeline.context import Context
from qgraph.pipeline.remarks import Kind
from qgraph.pipeline.verify import NumericProbe, check_structure


class Contract(StrEnum):
    """What a pass promises about the function that the model computes."""

    EQUIVALENT = "equivalent"
    """Same float function up to float rounding (folding, smoothing, equalization)."""
    EXACT = "exact"
    """Same integers as the reference numerics (QDQ folding, packing, lowering)."""
    LOSSY = "lossy"
    """Changes the function on purpose (quantization)."""


@dataclass(frozen=True)
class Pass:
    """One rewrite of a model. Subclass it as a frozen dataclass whose fields are its parameters.

    Class attributes:
        name: as written in a pipeline, kebab-case.
        contract: what the pass promises, see :class:`Contract`; checked when verification is on.
        requires: stages that must hold before it runs; checked when the pipeline is built.
        provides: stages that hold after it.
        invalidates: stages that no longer hold after it.
    """

    name: ClassVar[str]
    contract: ClassVar[Contract]
    requires: ClassVar[frozenset[Stage]] = frozenset()
    provides: ClassVar[frozenset[Stage]] = frozenset()
    invalidates: ClassVar[frozenset[Stage]] = frozenset()

    def run(self, model: ir.Model, context: Context) -> bool:
        """Rewrite `model` in place. Returns whether anything changed."""
        raise NotImplementedError

    def remark(
        self,
        context: Context,
        site: Site | Iterable[Site],
        kind: Kind,
        message: str,
        **numbers: float,
    ) -> None:
        """Leave a remark about a site, or the same one about each of several."""
        for one in (site,) if isinstance(site, Site) else site:
            context.remark(kind, self.name, one.name, one.node.op_type, message, **numbers)

    def __str__(self) -> str:
        """As written in a pipeline: its name, and in braces the parameters that are not defaults.

        Passes from elsewhere are called `module:Class`. A parameter that cannot be written as text
        is shown as `...`, which no pipeline accepts.
        """
        kind = type(self)
        shown = [
            f"{f.name}={_written(getattr(self, f.name))}"
            for f in fields(self)
            if f.init and f.repr and getattr(self, f.name) != _default(f)
        ]
        own = kind.__module__.startswith("qgraph.passes.")
        name = self.name if own else f"{kind.__module__}:{kind.__qualname__}"
        return name + ("{" + ",".join(shown) + "}" if shown else "")


def _default(parameter: Field[Any]) -> object:
    if parameter.default_factory is not MISSING:
        return parameter.default_factory()
    return parameter.default


def _written(value: object) -> str:
    if isinstance(value, bool | None):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if not isinstance(value, str | QuantSpec):
        return "..."
    text = str(value)
    plain = re.fullmatch(r"[\w./:*+-]+", text) and text.lower() != "none"
    return text if plain else json.dumps(text)


def _run(step: Pass, model: ir.Model, context: Context) -> bool:
    """`step.run`, with one line for what passes from elsewhere do wrong.

    Raises:
        PipelineError: it failed, or did not say whether it changed anything.
    """
    try:
        changed = step.run(model, context)
    except QGraphError:
        raise
    except Exception as error:
        if type(step).__module__.startswith("qgraph."):
            raise
        kind = type(error).__name__
        raise PipelineError(f"pass '{step.name}' failed: {kind}: {error}") from error
    if changed is None:
        raise PipelineError(f"pass '{step.name}' returned None: return whether it changed anything")
    return bool(changed)


Hook = Callable[[Pass, ir.Model, Context], None]


@dataclass(frozen=True)
class PassTiming:
    """How long one pass took, and whether it changed the model."""

    name: str
    seconds: float
    changed: bool


@dataclass
class PassManager:
    """Runs a pipeline.

    Args:
        passes: in the order in which they run.
        verify: check structure and, by probe inputs, the contract of each pass.
        before, after: called around each pass with `(pass, model, context)`.
        given: stages that already hold for the models it will be given.

    Raises:
        PipelineError: a pass requires a stage that no pass before it provides.
    """

    passes: Sequence[Pass]
    verify: bool = False
    before: Sequence[Hook] = ()
    after: Sequence[Hook] = ()
    given: frozenset[Stage] = frozenset()
    timings: list[PassTiming] = field(default_factory=list)

    def __post_init__(self) -> None:
        holding = set(self.given)
        for step in self.passes:
            if missing := sorted(step.requires - holding):
                providers = ", ".join(missing)
                raise PipelineError(
                    f"pass '{step.name}' needs a model that is {providers}: "
                    f"put a pass that provides it before '{step.name}' in the pipeline"
                )
            holding = (holding - step.invalidates) | step.provides

    def run(self, model: ir.Model, context: Context) -> bool:
        """Run every pass on `model` in place. Returns whether anything changed.

        Raises:
            VerificationError: with `verify`, a pass broke its contract.
        """
        changed = False
        probe = NumericProbe(model, context) if self.verify else None
        given = set(check_structure(model)) if self.verify else set()
        for step in self.passes:
            for hook in self.before:
                hook(step, model, context)
            began = time.perf_counter()
            step_changed = _run(step, model, context)
            self.timings.append(PassTiming(step.name, time.perf_counter() - began, step_changed))
            held = stages_of(model)
            held -= step.invalidates
            held |= step.provides
            changed |= step_changed
            if probe is not None:
                self._check(step, model, probe, given)
            for hook in self.after:
                hook(step, model, context)
        return changed

    def _check(self, step: Pass, model: ir.Model, probe: NumericProbe, given: set[str]) -> None:
        if problems := [p for p in check_structure(model) if p not in given]:
            raise VerificationError(f"pass '{step.name}' left an invalid model: {problems[0]}")
        if problem := probe.compare(model, step.contract.value):
            raise VerificationError(f"pass '{step.name}' promised {step.contract.value}: {problem}")

    def __str__(self) -> str:
        return ",".join(str(step) for step in self.passes)
