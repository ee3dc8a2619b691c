"""The result of a compilation: call it, save it, ask what happened."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from qgraph.errors import ModelError, QGraphError
from qgraph.io.arrays import as_array
from qgraph.io.feeds import Feed
from qgraph.io.kv_cache import Completer, required_inputs
from qgraph.io.models import save
from qgraph.io.random_feed import first_feed
from qgraph.io.session import OpenSession, open_session
from qgraph.io.trial import Trial, check_runs, foreign_domains
from qgraph.pipeline.remarks import Remark, Remarks
from qgraph.pipeline.verify import check_structure

if TYPE_CHECKING:
    import torch

    from qgraph.report.bench import Result


class CompiledModel:
    """A quantized model that runs in stock onnxruntime.

    Attributes:
        model: the lowered IR.
        remarks: what happened to every site, and why.
        recipe, target: names of what it was compiled with.
        source: the float model it came from, or None.
        open_session: how its target opens sessions; `compile` puts that here.
        to_module: how its target makes a torch module of it, None if it does not.
        apply: how its target puts its layers into the module that `source` was traced from.
        feed: what `save` tries the result on; None: a random one.
    """

    def __init__(
        self,
        model: ir.Model,
        remarks: Remarks,
        *,
        recipe: str = "",
        target: str = "",
        source: ir.Model | None = None,
    ) -> None:
        self.model = model
        self.source = source
        self.remarks = remarks
        self.recipe = recipe
        self.target = target
        self.open_session: OpenSession = open_session
        self.to_module: Callable[[ir.Model], torch.nn.Module] | None = None
        self.apply: Callable[[ir.Model, ir.Model, torch.nn.Module], Any] | None = None
        self.feed: Mapping[str, np.ndarray] | None = None

    @cached_property
    def session(self) -> Any:
        """The `onnxruntime.InferenceSession` behind calls, opened on first use."""
        return self.open_session(self.model)

    @cached_property
    def module(self) -> torch.nn.Module:
        """The model as a torch module, made on first use; it takes the inputs in their order.

        Raises:
            QGraphError: the target makes none, or torch cannot run the model.
        """
        if self.to_module is None:
            raise QGraphError(f"target '{self.target}' makes no torch modules: compile for cuda")
        return self.to_module(self.model)

    @cached_property
    def _complete(self) -> Completer:
        return Completer(self.model)

    @cached_property
    def _takes(self) -> dict[str, ir.Value]:
        """Everything that a call may give, by name."""
        return {str(v.name): v for v in self.model.graph.inputs} | self._complete.data

    def __getstate__(self) -> dict[str, Any]:
        """Without the session, which the copy opens for itself when it is called."""
        return {k: v for k, v in vars(self).items() if k not in ("session", "_complete", "_takes")}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, as its module where its target makes one and tensors are given.

        The module runs where the tensors are, and moves there.

        Args:
            *args: inputs in the model's order, or one dict by input name.
            **kwargs: inputs by name. Past key/value inputs, attention mask and position ids of a
                language model are filled in where missing.

        Returns:
            the output, or a list of them: torch tensors if a torch tensor was given, else arrays.

        Raises:
            QGraphError: inputs are missing, unknown, given twice, or of a shape or type that does
                not fit.
        """
        named = self._named(args, kwargs)
        torch = sys.modules.get("torch")
        tensors = torch is not None and any(isinstance(v, torch.Tensor) for v in named.values())
        if tensors and self.to_module is not None:
            from qgraph.torch.calls import call

            results = call(self.module, self.model, self._complete, named)
            return results[0] if len(results) == 1 else results
        types = {name: value.dtype for name, value in self._takes.items()}
        feed = self._complete({k: _array(k, v, types[k]) for k, v in named.items()})
        if (lacking := self._complete.lacking(feed, named)) is not None:
            raise QGraphError(lacking)
        try:
            outputs = self.session.run(None, feed)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise QGraphError(f"the model does not run on these inputs: {reason}") from error
        if tensors and torch is not None:
            outputs = [torch.from_numpy(np.ascontiguousarray(o)) for o in outputs]
        return outputs[0] if len(outputs) == 1 else outputs

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of a call by name."""
        names = [str(v.name) for v in required_inputs(self.model)]
        known = list(self._takes)
        if len(args) == 1 and isinstance(args[0], Mapping):
            named = {str(name): value for name, value in args[0].items()}
        elif len(args) <= len(names):
            named = dict(zip(names, args, strict=False))
        else:
            takes = f"{len(names)}: {', '.join(names)}"
            raise QGraphError(f"{len(args)} inputs given, the model takes {takes}")
        if twice := sorted(named.keys() & kwargs.keys()):
            raise QGraphError(f"input '{twice[0]}' is given twice")
        named |= kwargs
        if unknown := sorted(named.keys() - set(known)):
            raise QGraphError(f"the model has no input '{unknown[0]}', only {', '.join(known)}")
        return named

    def save(self, path: str | Path) -> Path:
        """Write an ONNX file, or a folder if the model came as one; atomic, checked by reloading.

        Where the target makes torch modules, weights lie beside it in a file of safetensors.

        Returns:
            the path written.
        """
        checked = self.source is None or not foreign_domains(self.source) or self._float_runs()
        if not checked and (problems := check_structure(self.model)):
            raise ModelError(f"the result is not sound: {problems[0]}")
        save(
            self.model,
            path,
            run_check=checked,
            open_session=self.open_session,
            safetensors=self.to_module is not None,
            examine=self._trial.examine if checked and self._trial is not None else None,
        )
        return Path(path)

    @cached_property
    def _trial(self) -> Trial | None:
        if self.source is None:
            return None
        feed = self.feed
        if feed is None:
            try:
                feed = first_feed(self.source, None, 0)
            except ModelError:  # an input that cannot be made up
                feed = None
        return Trial(self.source, feed, self.open_session)

    def _float_runs(self) -> bool:
        """Whether onnxruntime knows the operators of the float model; a warning if not."""
        assert self.source is not None
        try:
            check_runs(self.source, self.open_session)
        except ModelError as error:
            why = f"saved without being loaded and run: {error}"
            self.remarks.append(Remark("warning", "compile", "", "", why))
            return False
        return True

    def benchmark(
        self,
        *others: str | Path | CompiledModel,
        feeds: Iterable[Feed] | None = None,
        rounds: int = 15,
    ) -> list[Result]:
        """Time this model against its float source and `others`, interleaved in one process.

        Args:
            others: further models to run beside it.
            feeds: inputs to run with; one random feed if None.
            rounds: how often each model runs.

        Returns:
            one result a model, the float source first: ratios, not absolute times.
        """
        from qgraph.report.bench import benchmark

        rivals = [*([self.source] if self.source is not None else []), self, *others]
        models = [m.model if isinstance(m, CompiledModel) else m for m in rivals]
        if feeds is None:
            given = [first_feed(self.model, None, 0)]
        else:
            given = [{name: as_array(x) for name, x in feed.items()} for feed in feeds]
        return benchmark(models, given, rounds=rounds, open_session=self.open_session)

    def __repr__(self) -> str:
        title = f"CompiledModel(recipe={self.recipe!r}, target={self.target!r})"
        return f"{title}\n{self.remarks.summary()}"


def _array(name: str, content: Any, expected: ir.DataType | None) -> np.ndarray:
    """The array behind `content`; wide floats, as Python and numpy make them, are narrowed, and
    those of torch's bfloat16 are what the model takes."""
    try:
        array = as_array(content)
    except ValueError as error:
        raise QGraphError(f"input '{name}' is not an array: {error}") from error
    wide = array.dtype == np.float64 or str(getattr(content, "dtype", "")) == "torch.bfloat16"
    if wide and expected is not None and expected.is_floating_point():
        return array.astype(expected.numpy(), copy=False)
    return array
