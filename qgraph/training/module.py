"""Quantization-aware training: an annotated model as a torch module with quantizers in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from qgraph.errors import QGraphError
from qgraph.graph.annotation import copied
from qgraph.io.feeds import open_calibration
from qgraph.pipeline.pass_manager import Pass
from qgraph.pipeline.progress import Progress, silent
from qgraph.pipeline.remarks import Remarks
from qgraph.torch.to_module import raise_model, write_back
from qgraph.training.distillation import compared_nodes, distance, distances
from qgraph.training.fake_quantized import FakeQuantizedModule
from qgraph.training.first_rounding import adarounded
from qgraph.training.insert_quantizers import InsertQuantizers, quantized_weights
from qgraph.training.match_channels import MatchChannels, Recorder, in_order, layers
from qgraph.training.quantizers import Mode, Phase
from qgraph.training.results import annotate, copy_weights


@dataclass(frozen=True, eq=False)
class Origin:
    """What a module came from; copies of the module share it, for it never changes.

    Attributes:
        source: the float model as it was given.
        model: the annotated model that is trained.
        remarks: what preparation did to each site.
        rest: the passes that follow training.
    """

    source: ir.Model
    model: ir.Model
    remarks: Remarks
    rest: tuple[Pass, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self


class QuantizedModule(FakeQuantizedModule):
    """A model in training whose weights and activations are rounded as they will be once compiled.

    Train it with any optimizer, as any module. The first `observe` batches in training mode pass
    unrounded and are observed; then scales are chosen, and from there on everything is rounded, in
    evaluation mode too. Weights are trained in float, straight through the rounding; scales are
    trained with them (LSQ). `state_dict` holds all of that, so that training can resume.

    `forward` takes the inputs of the model, by position or by name, and returns what it returns.
    """

    def __init__(self, origin: Origin, *, learn_scales: bool, observe: int) -> None:
        phase = Phase()
        inserted = InsertQuantizers(origin.model, phase, learn_scales, max(observe, 1))
        super().__init__(inserted.module(), phase, observe)
        self.origin = origin
        self._teacher: list[fx.GraphModule] = []

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
            self.observe_batch({name: torch.as_tensor(a).to(device) for name, a in feed.items()})
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
        model = copied(self.origin.model)
        write_back(self.model, model)
        feeds = list(open_calibration(batches, self.source, samples))
        learned = adarounded(model, feeds, steps, progress)
        for name, quantizer, weight, _ in quantized_weights(self.model):
            if name in learned:
                quantizer.take(learned[name], weight)
        return list(learned)

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
        names, ordered = list(layers(self.model)), in_order(self.model, inputs, named)
        teacher = Recorder(self.teacher, set(names))
        teacher.run(*ordered)
        self._phase.mode = Mode.QUANTIZE
        MatchChannels(self.model, teacher.outputs).run(*ordered)
        return names

    # ------------------------------------------------------------------------- distillation

    @property
    def teacher(self) -> fx.GraphModule:
        """The float model as it was given, with weights that stay; made when it is first used."""
        if not self._teacher:
            device = next(iter(self.parameters())).device
            teacher = raise_model(self.origin.model).to(device).eval()
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
                target = self.teacher(*inputs, **named)
            return distances(self(*inputs, **named), target, temperature)
        sites = [name for name, *_ in quantized_weights(self.model)]
        names = compared_nodes(self.origin.model, sites)
        teacher, student = Recorder(self.teacher, names), Recorder(self.model, names)
        ordered = in_order(self.model, inputs, named)
        with torch.no_grad():
            target = teacher.run(*ordered)
        self._next_phase()
        loss = distances(student.run(*ordered), target, temperature)
        # In the order of the graph: that of a set of names differs from process to process.
        inside = [distance(y, teacher.outputs[name], 0.0) for name, y in student.outputs.items()]
        return loss + features * torch.stack(inside).mean()

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        for teacher in self._teacher:
            teacher._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        return super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]

    # ------------------------------------------------------------------------- and back

    @property
    def source(self) -> ir.Model:
        """The float model as it was given."""
        return self.origin.source

    @property
    def remarks(self) -> Remarks:
        """What preparation did to each site."""
        return Remarks(self.origin.remarks)

    @property
    def rest(self) -> tuple[Pass, ...]:
        """The passes that follow training."""
        return self.origin.rest

    @torch.no_grad()
    def annotated(self) -> ir.Model:
        """The model with trained weights, annotated with the integers and scales of training.

        Raises:
            QGraphError: no scales were chosen yet.
        """
        if not self.frozen:
            self.freeze()
        model = copied(self.origin.model)
        annotate(model, self.model)
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
        return copy_weights(self.model, self.origin.model, module)
