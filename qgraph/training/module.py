"""Quantization-aware training: an annotated model as a torch module with quantizers in it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from qgraph.errors import ModelError, QGraphError
from qgraph.graph.annotation import IN, SCALE, STAGES_KEY, annotated, stages
from qgraph.graph.reading import array, node_name
from qgraph.graph.sites import site_of
from qgraph.io.feeds import open_calibration
from qgraph.pipeline.pass_manager import Pass
from qgraph.pipeline.progress import Progress, silent
from qgraph.pipeline.remarks import Remarks
from qgraph.torch.to_module import NODE, VALUE, WEIGHTS, raise_model, write_back
from qgraph.training.distillation import distance, distances, with_residual
from qgraph.training.first_rounding import adarounded
from qgraph.training.insert_quantizers import InsertQuantizers, values
from qgraph.training.match_channels import Floats, MatchChannels, layers
from qgraph.training.quantizers import DataQuantizer, Mode, Phase, WeightQuantizer
from qgraph.weights.site_weight import replace_weight


class QuantizedModule(nn.Module):
    """A model in training whose weights and activations are rounded as they will be once compiled.

    Train it with any optimizer, as any module. The first `observe` batches in training mode pass
    unrounded and are observed; then scales are chosen, and from there on everything is rounded, in
    evaluation mode too. Weights are trained in float, straight through the rounding; scales are
    trained with them (LSQ). `state_dict` holds all of that, so that training can resume.

    `forward` takes the inputs of the model, by position or by name, and returns what it returns.
    """

    observed: Tensor
    frozen: Tensor

    def __init__(
        self,
        source: ir.Model,
        model: ir.Model,
        remarks: Remarks,
        rest: tuple[Pass, ...],
        *,
        learn_scales: bool,
        observe: int,
    ) -> None:
        super().__init__()
        self._kept = _Kept(source, model, remarks, rest)
        self.observe, self._phase = observe, Phase()
        self.register_buffer("observed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        work = InsertQuantizers(model, self._phase, learn_scales, max(observe, 1))
        self.model = work.module()
        self._names: dict[str, tuple[str, bool]] = dict(self.model.meta[WEIGHTS])
        self._teacher: list[nn.Module] = []

    def forward(self, *inputs: Any, **named: Any) -> Any:
        self._next_phase()
        return self.model(*inputs, **named)

    def _next_phase(self) -> None:
        if not self.frozen and self.training and 0 < self.observe <= int(self.observed):
            self.freeze()
        observes = self.training and not self.frozen
        if observes:
            self.observed += 1
        self._phase.mode = Mode.QUANTIZE if self.frozen else Mode.OBSERVE if observes else Mode.PASS

    @torch.no_grad()
    def calibrate(self, batches: Any, samples: int | None = None) -> None:
        """Observe these batches now instead of the first ones of training, and choose scales.

        Args:
            batches: typical inputs, as `calibration` of :func:`qgraph.compile`.
            samples: use only so many.

        Raises:
            QGraphError: scales are chosen already, or the data does not fit.
        """
        if self.frozen:
            raise QGraphError("scales are chosen already: calibrate before training")
        device = next(iter(self.parameters())).device
        for feed in open_calibration(batches, self.source, samples):
            self._phase.mode = Mode.OBSERVE
            self.observed += 1
            self.model(**{name: torch.as_tensor(a).to(device) for name, a in feed.items()})
        self.freeze()

    def learn_rounding(
        self,
        batches: Any,
        samples: int | None = None,
        *,
        steps: int = 200,
        progress: Progress = silent,
    ) -> list[str]:
        """Round each layer's weights so that its outputs come near to the float model's (AdaRound).

        A start for models that collapse when they are rounded to nearest, after `calibrate` and
        before training; needs no labels. Layers learn one after the other, on what the rounded
        layers before them give; data stays float meanwhile.

        Args:
            batches: typical inputs, as `calibration` of :func:`qgraph.compile`.
            samples: use only so many.
            steps: of learning, for each layer.
            progress: display, see :mod:`qgraph.cli.progress`.

        Returns:
            names of the layers that were rounded so; the others stay as they are.

        Raises:
            QGraphError: no scales were chosen yet, or the data does not fit.
        """
        if not self.frozen:
            raise QGraphError("scales are not chosen yet: calibrate before learn_rounding")
        model = _copied(self._kept.model)
        write_back(self.model, model)
        feeds = list(open_calibration(batches, self.source, samples))
        found = adarounded(model, feeds, steps, progress)
        for name, module, weight, _ in self._weights():
            if name in found:
                module.take(found[name], weight)
        return list(found)

    @torch.no_grad()
    def match_channels(self, *inputs: Any, **named: Any) -> list[str]:
        """Correct each layer's output channels towards the float model's, by gain and offset.

        For models that collapse when they are rounded, after `calibrate` and before training: it
        costs one run of each model. Gains go into scales, offsets into biases, layer after layer.

        Args:
            inputs, named: one typical batch, as large as memory allows: the outputs that all
                layers of the float model have for it are held at once.

        Returns:
            names of the layers that were corrected: those with a bias, and a scale for each channel
            of their own.

        Raises:
            QGraphError: no scales were chosen yet.
        """
        if not self.frozen:
            raise QGraphError("scales are not chosen yet: calibrate before match_channels")
        names = list(layers(self.model))
        floats = Floats(self.teacher, set(names))  # type: ignore[arg-type]
        floats.run(*self._ordered(inputs, named))
        self._phase.mode = Mode.QUANTIZE
        MatchChannels(self.model, floats.found).run(*self._ordered(inputs, named))
        return names

    def _ordered(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
        """The inputs as `fx.Interpreter` takes them."""
        return list(inspect.signature(self.model.forward).bind(*inputs, **named).arguments.values())

    @torch.no_grad()
    def freeze(self) -> None:
        """Choose scales by what was observed, and round from now on.

        Raises:
            QGraphError: nothing was observed.
        """
        if not self.observed:
            raise QGraphError(
                "nothing was observed yet: run some batches in training mode, or calibrate"
            )
        for module in self.model.modules():
            if isinstance(module, DataQuantizer):
                module.freeze()
        for _, module, weight, _ in self._weights():
            module.freeze(weight)
        self.frozen.fill_(True)

    def _weights(self) -> Iterator[tuple[str, WeightQuantizer, Tensor, Tensor | None]]:
        """Each site's name and quantizer, its weight and its bias."""
        for node in self.model.graph.nodes:
            if node.op != "call_module":
                continue
            module = self.model.get_submodule(node.target)
            if isinstance(module, WeightQuantizer):
                held = [_held(self.model, argument) for argument in node.args]
                yield node.meta[NODE], module, held[0], held[1] if len(held) > 1 else None

    # ------------------------------------------------------------------------- distillation

    @property
    def teacher(self) -> nn.Module:
        """The float model as it was given, with weights that stay; made when it is first used."""
        if not self._teacher:
            device = next(iter(self.parameters())).device
            teacher = raise_model(self._kept.model).to(device).eval()
            self._teacher.append(teacher.requires_grad_(False))
        return self._teacher[0]

    def distillation_loss(
        self, *inputs: Any, temperature: float = 0.0, features: float = 0.0, **named: Any
    ) -> Tensor:
        """How far the outputs for these inputs are from the teacher's: needs no labels.

        Args:
            temperature: 0: squared error over the teacher's mean square, the mean over outputs.
                Above: outputs are logits along the last axis, and the loss is the Kullback-Leibler
                divergence of both at this temperature (Hinton et al. 2015), times its square.
            features: weight of the same for what each layer with weights puts out, by squared
                error; where that is added to what flows past the layer, for the sum. With it, few
                images are enough, for each of them says much more.
        """
        if not features:
            with torch.no_grad():
                wanted = self.teacher(*inputs, **named)
            return distances(self(*inputs, **named), wanted, temperature)
        names = self._features()
        teacher, student = (Floats(m, names) for m in (self.teacher, self.model))  # type: ignore[arg-type]
        ordered = self._ordered(inputs, named)
        with torch.no_grad():
            wanted = teacher.run(*ordered)
        self._next_phase()
        loss = distances(student.run(*ordered), wanted, temperature)
        # In the order of the graph: that of a set of names differs from process to process.
        inside = [distance(y, teacher.found[name], 0.0) for name, y in student.found.items()]
        return loss + features * torch.stack(inside).mean()

    def _features(self) -> set[str]:
        """The nodes whose outputs are compared. What a residual branch adds counts no more than it
        shows in the sum: by itself it may be small, and its errors large, and not matter."""
        nodes = {node_name(node): node for node in self._kept.model.graph}
        return {node_name(with_residual(nodes[name])) for name, *_ in self._weights()}

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        for teacher in self._teacher:
            teacher._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        return super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------------------- and back

    @property
    def source(self) -> ir.Model:
        """The float model as it was given."""
        return self._kept.source

    @property
    def remarks(self) -> Remarks:
        """What preparation did to each site."""
        return Remarks(self._kept.remarks)

    @property
    def rest(self) -> tuple[Pass, ...]:
        """The passes that follow training."""
        return self._kept.rest

    @torch.no_grad()
    def annotated(self) -> ir.Model:
        """The model with trained weights, annotated with the integers and scales of training.

        Raises:
            QGraphError: no scales were chosen yet.
        """
        if not self.frozen:
            self.freeze()
        model = _copied(self._kept.model)
        write_back(self.model, model)
        nodes = {node_name(node): node for node in model.graph}
        for name, module, weight, bias in self._weights():
            site = site_of(nodes[name])
            assert site is not None
            replace_weight(model, site, module.integers(weight, bias), "trained")
        named = {str(value.name): value for value in values(model)}
        for node in self.model.graph.nodes:
            if node.op == "call_module":
                quantizer = self.model.get_submodule(node.target)
                if isinstance(quantizer, DataQuantizer):
                    scale, zero = (a.cpu().numpy() for a in (quantizer.scale, quantizer.zero))
                    named[node.meta[VALUE]].meta[SCALE] = (scale, zero)
        return model

    @torch.no_grad()
    def write_back(self, module: nn.Module) -> list[str]:
        """Copy the trained float weights into the module that this one was made of.

        Which parameter a weight came from is found by what both held before training, so `module`
        must have the weights that it had then.

        Returns:
            names of the parameters that were written.

        Raises:
            ModelError: some trained weight has no counterpart: it was merged with a batch
                normalization or a constant factor, or `module` is another one. Nothing is written.
        """
        parameters = dict(module.named_parameters())
        found: dict[str, Tensor] = {}
        for path, (name, turned) in self._names.items():
            trained, before = attrgetter(path)(self.model), _constant(self._kept.model, name)
            if before is None or not isinstance(trained, nn.Parameter):
                continue
            target = next(_counterparts(before.T if turned else before, parameters, found), None)
            if target is None:
                raise ModelError(
                    f"no parameter holds what '{path}' held before training: it was merged with a "
                    "batch normalization or factor; nothing was written"
                )
            key, transposed = target
            found[key] = trained.T if transposed else trained
        for key, value in found.items():
            parameters[key].copy_(value)
        return list(found)


class _Kept:
    """What a module came from; copies of the module share it, for it never changes."""

    def __init__(
        self, source: ir.Model, model: ir.Model, remarks: Remarks, rest: tuple[Pass, ...]
    ) -> None:
        self.source, self.model, self.remarks, self.rest = source, model, remarks, rest

    def __deepcopy__(self, memo: dict[int, Any]) -> _Kept:
        return self


def _held(module: nn.Module, node: fx.Node) -> Tensor:
    """What a node stands for that reads a weight, transposed or not."""
    if node.op == "get_attr":
        found = attrgetter(str(node.target))(module)
        assert isinstance(found, Tensor)
        return found
    assert node.target is torch.t
    assert isinstance(node.args[0], fx.Node)
    return _held(module, node.args[0]).t()


def _copied(model: ir.Model) -> ir.Model:
    """A copy with annotations of its own."""
    copy = model.clone()
    copy.meta.update(model.meta)
    copy.meta[STAGES_KEY] = set(stages(model))
    copy.meta.pop("qgraph.names", None)
    for node, specs in annotated(copy):
        node.meta[IN] = dict(specs)
    return copy


def _constant(model: ir.Model, name: str) -> np.ndarray | None:
    """The initializer, or result of a Constant node, of this name."""
    value = model.graph.initializers.get(name)
    return array(value or next((v for v in values(model) if v.name == name), None))


def _counterparts(
    before: np.ndarray, parameters: dict[str, nn.Parameter], taken: dict[str, Tensor]
) -> Iterator[tuple[str, bool]]:
    """Names of the parameters that hold the same numbers, and whether transposed."""
    for name, parameter in parameters.items():
        if name in taken or parameter.numel() != before.size:
            continue
        data = parameter.detach().cpu().numpy()
        if np.array_equal(data, before):
            yield name, False
        elif data.ndim == 2 and np.array_equal(data.T, before):
            yield name, True
