"""What tests of the quantizing passes share: targets that need no clock, and one short pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from textwrap import dedent

import numpy as np
import onnx_ir as ir

from qgraph.backends.cpu.target import CpuTarget
from qgraph.backends.onnx import OnnxTarget
from qgraph.graph.annotation import IN, stages_of
from qgraph.graph.sites import Site
from qgraph.graph.text.printer import to_text
from qgraph.io.feeds import Feed
from qgraph.io.session import open_session, run
from qgraph.numerics.spec import QuantSpec
from qgraph.passes.annotate import Annotate, Scheme
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.fold_qdq import FoldQDQ
from qgraph.passes.guard_static import GuardStatic
from qgraph.passes.insert_observers import InsertObservers
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.passes.lower import Lower
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Pass, PassManager
from qgraph.pipeline.progress import Item
from qgraph.pipeline.target import Target, Verdict
from tests.models import feed


@dataclass(frozen=True)
class Shipped(CpuTarget):
    """Target `cpu` whose verdicts follow the shipped figures: every product and convolution wins.

    Conversions cost nothing, so that this holds for a convolution on its own too.
    """

    name: str = "cpu"
    isa: str = "avx2"

    @property
    def measured(self) -> bool:
        return False

    def supports(self, site: Site, activation: QuantSpec | None, weight: QuantSpec) -> Verdict:
        return replace(super().supports(site, activation, weight), conversions=0.0)


ONNX, CPU = OnnxTarget(), Shipped()
TARGETS: tuple[Target, ...] = (ONNX, CPU)
COMMIT: tuple[Pass, ...] = (InsertQDQ(), FoldQDQ(), Lower())


@dataclass(frozen=True)
class Impatient:
    """A progress display whose user loses patience after so many steps."""

    after: int

    def __call__(
        self, items: Iterable[Item], title: str, total: int | None = None
    ) -> Iterator[Item]:
        for count, item in enumerate(items):
            if count == self.after:
                raise KeyboardInterrupt
            yield item


def annotate(scheme: Scheme = "dynamic", **parameters: object) -> tuple[Pass, ...]:
    """The passes up to annotation, and calibration where the scheme needs it."""
    first = (Canonicalize(), Annotate(scheme, **parameters))  # type: ignore[arg-type]
    return first if scheme == "dynamic" else (*first, InsertObservers(), Calibrate())


def by_channel(scheme: Scheme = "dynamic", **parameters: object) -> tuple[Pass, ...]:
    """The passes up to calibration of the channels of each product's data."""
    first = (Canonicalize(), Annotate(scheme, **parameters))  # type: ignore[arg-type]
    return (*first, InsertObservers(channel_ranges=True), Calibrate())


def static(**parameters: object) -> tuple[Pass, ...]:
    """A static pipeline without bias correction."""
    return (*annotate("static", **parameters), GuardStatic(), *COMMIT)


def dynamic(**parameters: object) -> tuple[Pass, ...]:
    """A dynamic pipeline."""
    return (*annotate("dynamic", **parameters), *COMMIT)


def apply(
    model: ir.Model,
    passes: Sequence[Pass],
    feeds: Iterable[Feed] | None = None,
    target: Target = ONNX,
    verify: bool = True,
) -> Context:
    """Run `passes` on `model` in place, verified; returns the context with its remarks.

    Args:
        feeds: calibration data; None: two random feeds.
    """
    data = [feed(model, seed) for seed in range(2)] if feeds is None else feeds
    context = Context(target, data)
    PassManager(passes, verify=verify, given=frozenset(stages_of(model))).run(model, context)
    return context


def body(model: ir.Model, *, weights: bool = False) -> str:
    """The nodes of the main graph as text, with or without the weights before them."""
    lines = to_text(model).split("\ngraph")[1].split("\n}")[0].splitlines()[1:]
    left_out = ("  opset", "  input", "  output", *(() if weights else ("  weight",)))
    return "\n".join(line[2:] for line in lines if not line.startswith(left_out))


def golden(text: str) -> str:
    """A triple-quoted text without its indentation."""
    return dedent(text).strip("\n")


def both(model: ir.Model, given: Feed) -> list[np.ndarray]:
    """The outputs with onnxruntime's optimizations off; those of a run with them must agree.

    Raises:
        AssertionError: they differ by more than float rounding, or by steps of the output.
    """
    plain, optimized = (
        run(open_session(model, optimized=level, threads=1), given) for level in (False, True)
    )
    for a, b in zip(plain, optimized, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2 * max(np.abs(a).max(initial=0), 1e-6))
    return plain


def node(model: ir.Model, name: str) -> ir.Node:
    """The node called `name`, in any graph."""
    return next(n for n in model.graph.all_nodes() if n.name == name)


def specs(model: ir.Model) -> dict[str, dict[int, str]]:
    """The annotations of inputs by node name, as text."""
    return {
        str(n.name): {index: str(spec) for index, spec in n.meta[IN].items()}
        for n in model.graph.all_nodes()
        if IN in n.meta
    }


def initializer(model: ir.Model, name: str) -> np.ndarray:
    """The array of an initializer of the main graph."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()
