"""Bias correction: take back the mean error that rounding the weights adds to every channel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qgraph.calibration.data import Batch, first_samples
from qgraph.errors import CalibrationError
from qgraph.graph.annotation import Stage, calibrated_stats, stats_of, weight_spec
from qgraph.graph.editing import add_constant, remove_dead
from qgraph.graph.reading import array, attribute, constant_array, dims, release
from qgraph.graph.sites import Site, bias_use, by_input_channel, site_of
from qgraph.io.kv_cache import complete_feed
from qgraph.io.session import open_session, run
from qgraph.numerics.noise import decibels, relative_energy
from qgraph.numerics.spec import PerAxis, PerTensor, QuantSpec
from qgraph.passes.insert_qdq import InsertQDQ
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass
from qgraph.pipeline.progress import silent
from qgraph.pipeline.remarks import Remarks
from qgraph.weights.site_weight import quantize_site

Double = NDArray[np.float64]


@dataclass(frozen=True)
class BiasCorrection(Pass):
    """Correct the biases of linear operators for the weights they are about to get.

    The problem: the rounding errors of one output channel's weights do not cancel, and where the
    inputs have a mean (behind a Relu they all do), the output shifts by (Wq - W)·E[x]: an error
    that is the same for every sample, adds up from layer to layer, and is known beforehand::

        y = Conv (x, W, b)        y = Conv (x, W, b - (Wq - W)·E[x])

    It runs between calibrate and insert-qdq: E[x] is the mean of each input channel as calibrated
    (`insert-observers{channel_means=true}`), Wq the weight exactly as insert-qdq
    will write it, and the bias is still float. A Conv or Gemm without a bias gets one; a MatMul is
    corrected in the Add that follows it, and left alone without one: an Add of its own would cost
    more than it brings.
    At the borders of a padded convolution the shift is smaller than assumed, as in the paper.

    The mean error of every layer shrinks, but not always that of the model: on images that are
    mostly background, as pages of text, the background's mean is not the text's, and uncorrected
    errors of consecutive layers may cancel. So the committed model is run on a few samples with and
    without the corrections, and they stay only where its outputs come nearer to float.

    Attributes:
        trial: samples to compare on; 0 always corrects.

    Source: Nagel et al. 2019, "Data-Free Quantization through Weight Equalization and Bias
    Correction", section 4.2 and appendix D (empirical bias correction), eq. 14-17.
    """

    name: ClassVar[str] = "bias-correction"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.CALIBRATED})

    trial: int = 4

    def run(self, model: ir.Model, context: Context) -> bool:
        if self.trial and context.calibration is not None:
            quiet = replace(context, remarks=Remarks(), progress=silent)
            corrected = model.clone(deep_copy=True)
            if not self._correct_all(corrected, quiet):
                context.remarks.extend(quiet.remarks)
                return False
            gain = self._gain(model, corrected, quiet)
            if gain is not None and gain <= 0:
                why = "the model's outputs are nearer to float without corrections"
                context.remark("declined", self.name, "", "", why, gain_db=gain)
                return False
        return self._correct_all(model, context)

    def _gain(self, plain: ir.Model, corrected: ir.Model, context: Context) -> float | None:
        """How many dB nearer to float the corrected model is, committed; None where unknown."""
        assert context.calibration is not None
        try:
            batches = list(first_samples(iter(context.calibration), self.trial))
        except CalibrationError:  # the data can be read once only, and has been
            return None
        ideal = _outputs(plain, batches)
        noise = []
        for model in (plain.clone(deep_copy=True), corrected):
            InsertQDQ().run(model, context)
            actual = _outputs(model, batches)
            noise.append(sum(map(relative_energy, ideal, actual)))
        if not all(np.isfinite(noise)) or 0.0 in noise:
            return None
        return decibels(noise[0], noise[1])

    def _correct_all(self, model: ir.Model, context: Context) -> bool:
        changed = False
        for node in model.graph:
            site = site_of(node)
            spec = weight_spec(site) if site is not None else None
            if site is None or spec is None:
                continue
            problem = _unfit(site, spec)
            if problem is not None:
                self.remark(context, site, "declined", problem)
                continue
            self._correct(model, site, spec, context)
            changed = True
        if changed:
            remove_dead(model)
        return changed

    def _correct(self, model: ir.Model, site: Site, spec: QuantSpec, context: Context) -> None:
        w, use = constant_array(site.weight), bias_use(site)
        assert use is not None
        mean = calibrated_stats(site.x).channel_mean
        assert mean is not None
        final = quantize_site(site, spec, context.target.saturates)
        shift = expected_shift(site, w, final.float(), mean)
        release(site.weight)
        node, index = use
        old = node.inputs[index] if index < len(node.inputs) else None
        bias = array(old)
        corrected = (0.0 if bias is None else bias.astype(np.float64)) - shift
        new = add_constant(
            model, f"{site.name}_corrected", corrected.astype(w.dtype), site.weight.dtype
        )
        node.resize_inputs(max(len(node.inputs), index + 1))
        node.replace_input_with(index, new)
        message = "corrected its bias" if bias is not None else "gave it a correcting bias"
        largest = float(np.abs(shift).max(initial=0.0))
        self.remark(context, site, "applied", message, largest_shift=largest)


def _outputs(model: ir.Model, batches: list[Batch]) -> list[np.ndarray]:
    """All floating-point outputs, sample after sample."""
    session = open_session(model, arena=False)
    return [
        sample
        for batch in batches
        for y in run(session, complete_feed(model, batch.feed))
        if getattr(y, "dtype", None) == "f4"
        for sample in batch.samples(y)
    ]


def _unfit(site: Site, spec: QuantSpec) -> str | None:
    """Why this site cannot be corrected, or None."""
    if not (site.is_product or site.kind == "conv"):
        return f"the shift of a {site.node.op_type} is not corrected"
    if not isinstance(spec.granularity, PerTensor | PerAxis):
        return f"its weight is quantized {spec.granularity}"
    stats = stats_of(site.x)
    if stats is None or stats.channel_mean is None:
        return "the mean of its input is unknown: set channel_means=true in insert-observers"
    if stats.channel_mean.size != _inputs(site) or not np.isfinite(stats.channel_mean).all():
        return "the calibrated mean of its input has other channels"
    if _mixed(site):
        return "its input is read by convolutions and matrix products, which disagree on channels"
    use = bias_use(site)
    if use is None:
        return "no bias follows this MatMul, and an Add of its own would cost more than it brings"
    node, index = use
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is not None and array(value) is None:
        return "its bias is computed"
    if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
        return "its alpha or beta is not 1: run canonicalize first"
    return None


def _inputs(site: Site) -> int:
    """Number of channels of the data."""
    shape = [d or 0 for d in dims(site.weight)]
    if site.kind == "conv":
        return shape[1] * int(attribute(site.node, "group", 1))
    return shape[1 - site.axis]


def _mixed(site: Site) -> bool:
    """Whether the mean may be along an axis that is not this site's."""
    readers = [site_of(use.node) for use in site.x.uses()]
    return len({s.kind == "conv" for s in readers if s is not None and s.x is site.x}) > 1


def expected_shift(
    site: Site, w: NDArray[Any], quantized: NDArray[Any], mean: NDArray[Any]
) -> Double:
    """(Wq - W)·E[x]: by how much each output channel's mean moves (eq. 16).

    Args:
        site: says which axes of the weight are what, and how many groups there are.
        w, quantized: the weight before and after rounding, of one shape.
        mean: mean of each input channel, 1-D; taken to be the same at every position.

    Returns:
        float64, one shift for each output channel.
    """
    error = np.ascontiguousarray(quantized, np.float64) - w
    taps = by_input_channel(site, error).sum(axis=3)
    means = np.asarray(mean, np.float64).reshape(taps.shape[0], taps.shape[2], 1)
    return np.asarray((taps @ means).reshape(-1))
