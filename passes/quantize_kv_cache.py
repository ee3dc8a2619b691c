"""The cache of attention in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qgraph.calibration.data import calibration_feeds, not_finite
from qgraph.errors import CalibrationError, PipelineError, QGraphError
from qgraph.graph.annotation import Stage
from qgraph.graph.attention import ATTENTION, PAST, PRESENT, SCALES
from qgraph.graph.editing import add_constant
from qgraph.graph.reading import MICROSOFT, attribute, dims, input_of, is_op, node_name
from qgraph.io.kv_cache import Completer
from qgraph.numerics.caches import cache_scales, key_peaks, value_peaks
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Contract, Pass

COSINES = 7
"""The input that holds the cosines of rotary embedding."""


@dataclass(frozen=True)
class QuantizeKVCache(Pass):
    """Store the keys and values of past positions as integers.

    At long contexts a token reads more cache than weights, and the cache is what fills the memory.
    onnxruntime's attention reads it in 8 bits, or two integers of 4 bits to a byte, and rounds what
    it adds to it::

        past:f32 ── GroupQueryAttention ── present:f32
        past:s8 ─── GroupQueryAttention ── present:s8       with a scale for each channel

    Scales come from calibration. Those of keys must hold beyond the positions that it has seen:
    rotary embedding turns pairs of channels into each other, so a pair shares the largest length
    that it had as a vector.

    The model's inputs and outputs of past and present change their type, and with 4 bits their last
    axis. Caches that are windows of the last positions, and attention whose past is no input of the
    model, stay float.

    Attributes:
        bits: 8 or 4.

    Source: Liu et al. 2024, "KIVI" (keys by channel); the envelope is not in the paper.
    """

    name: ClassVar[str] = "quantize-kv-cache"
    contract: ClassVar[Contract] = Contract.LOSSY
    requires: ClassVar[frozenset[Stage]] = frozenset({Stage.COMMITTED})

    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise PipelineError(f"bits={self.bits} is out of range for a cache: use 8 or 4")

    def run(self, model: ir.Model, context: Context) -> bool:
        caches = list(_caches(model, context))
        if not caches:
            raise QGraphError(
                f"kv_bits={self.bits} needs attention with a cache ({ATTENTION} whose past is an "
                "input of the model): leave it out for this model"
            )
        peaks = _peaks(model, caches, context)
        before = sum(4 * peak.size for peak in peaks.values())
        for cache in caches:
            self._quantize(model, cache, peaks)
        context.remark(
            "applied", self.name, "", ATTENTION,
            f"the caches of {len(caches)} layers in {self.bits} bits: {before / 1024:.1f} kB for "
            f"each position become {before * self.bits / 32 / 1024:.1f} kB",
            bits=self.bits, bytes=before * self.bits / 32,
        )  # fmt: skip
        return True

    def _quantize(self, model: ir.Model, node: ir.Node, peaks: dict[str, np.ndarray]) -> None:
        if len(node.inputs) < SCALES + 2:
            node.resize_inputs(SCALES + 2)
        dtype = ir.DataType.INT8 if self.bits == 8 else ir.DataType.UINT8
        for place in range(2):
            past, present = input_of(node, PAST + place), node.outputs[PRESENT + place]
            scales = cache_scales(peaks[str(present.name)], self.bits)
            scale = add_constant(model, f"{present.name}_scale", scales)
            node.replace_input_with(SCALES + place, scale)
            for value in (past, present):
                value.type = ir.TensorType(dtype)
                if self.bits == 4 and value.shape is not None:
                    size = value.shape[3]
                    halved = size // 2 if isinstance(size, int) else None
                    value.shape = ir.Shape([*value.shape[:3], halved])
        for key in ("k_quant_type", "v_quant_type"):
            node.attributes[key] = ir.AttrString(key, "PER_CHANNEL")
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", self.bits)


def _caches(model: ir.Model, context: Context) -> Iterator[ir.Node]:
    """The attention whose past and present are float inputs and outputs of the model."""
    for node in model.graph:
        if not is_op(node, ATTENTION, domain=MICROSOFT):
            continue
        pasts = [node.inputs[PAST + place] for place in range(2)]
        presents = node.outputs[PRESENT : PRESENT + 2]
        floats = (v is not None and v.dtype == ir.DataType.FLOAT for v in pasts)
        inputs = (v is not None and v.is_graph_input() and len(v.uses()) == 1 for v in pasts)
        outputs = (v.is_graph_output() and not v.uses() for v in presents)
        why = None
        if attribute(node, "sliding_window_cache", 0):
            why = "its cache is a window of the last positions, which has no integer form"
        elif not all(floats):
            why = "its cache is not float32"
        elif not (all(inputs) and len(presents) == 2 and all(outputs)):
            why = "its past is computed, or read elsewhere, too"
        if why is None:
            yield node
        else:
            message = f"the cache stays as it is: {why}"
            context.remark("declined", QuantizeKVCache.name, node_name(node), ATTENTION, message)


def _peaks(model: ir.Model, caches: list[ir.Node], context: Context) -> dict[str, np.ndarray]:
    """The largest magnitudes of each channel of what is cached, (heads, size), by output."""
    names = [str(node.outputs[PRESENT + place].name) for node in caches for place in range(2)]
    keys = {str(node.outputs[PRESENT].name): node for node in caches}
    session, complete = context.target.open_session(model), Completer(model)
    found: dict[str, np.ndarray] = {}
    for feed in context.progress(calibration_feeds(context), "ranges of caches", None):
        for name, array in zip(names, session.run(names, complete(feed)), strict=True):
            if not array.size:
                continue
            node = keys.get(name)
            peaks = value_peaks(array) if node is None else key_peaks(array, *_rotation(node))
            found[name] = np.maximum(found.get(name, peaks), peaks)
    for name in names:
        if name not in found:
            raise CalibrationError(f"calibration data left nothing in the cache '{name}'")
        if not np.isfinite(found[name]).all():
            raise not_finite(f"'{name}'")
    return found


def _rotation(node: ir.Node) -> tuple[int, bool]:
    """How many channels of a key are turned by rotary embedding, and whether in pairs of
    neighbours."""
    cosines = node.inputs[COSINES] if len(node.inputs) > COSINES else None
    size = dims(input_of(node, PAST))[3] or 0
    if not attribute(node, "do_rotary", 0):
        return size, False  # it may have been done before: both ways to pair channels are usual
    width = dims(cosines)[-1:] or [None]
    return min(size, 2 * (width[0] or size // 2)), bool(attribute(node, "rotary_interleaved", 0))
