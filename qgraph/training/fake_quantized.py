"""A raised model with quantizers in it: when they observe, and when they round."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from qgraph.errors import QGraphError
from qgraph.training.insert_quantizers import quantized_weights
from qgraph.training.quantizers import DataQuantizer, Mode, Phase


class FakeQuantizedModule(nn.Module):
    """Passes data unrounded and observes it, until scales are chosen; rounds it from there on.

    Attributes:
        model: the raised model.
        observe: so many batches are observed in training mode, then scales are chosen.
        observed: so many were.
        frozen: whether scales are chosen.
    """

    observed: Tensor
    frozen: Tensor

    def __init__(self, model: fx.GraphModule, phase: Phase, observe: int) -> None:
        """
        Args:
            model: what :class:`InsertQuantizers` gives.
            phase: of its quantizers.
        """
        super().__init__()
        self.observe, self._phase = observe, phase
        self.register_buffer("observed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self.model = model

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

    def observe_batch(self, feed: dict[str, Tensor]) -> None:
        """Observe these inputs, by name, whatever the mode."""
        self._phase.mode = Mode.OBSERVE
        self.observed += 1
        self.model(**feed)

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
        for _, quantizer, weight, _ in quantized_weights(self.model):
            quantizer.freeze(weight)
        self.frozen.fill_(True)
