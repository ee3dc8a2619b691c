"""Running IR in stock onnxruntime without copying its weights."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from qgraph.errors import ModelError
from qgraph.graph.reading import INLINE_BYTES, initializers
from qgraph.graph.types import to_proto
from qgraph.io.external_data import in_memory

if TYPE_CHECKING:
    import onnx
    import onnxruntime

OpenSession = Callable[..., "onnxruntime.InferenceSession"]
"""How a target opens sessions: :func:`open_session`, or one that takes the same arguments."""


_LIBRARIES: list[str] = []
"""Libraries of operators that every session of this process knows."""


def use_custom_ops(library: str | Path) -> None:
    """Let all sessions of this process know the operators of a library (.so, .dll, .dylib).

    Raises:
        ModelError: onnxruntime cannot load it.
    """
    import onnxruntime as ort

    path = str(Path(library).resolve())
    try:
        ort.SessionOptions().register_custom_ops_library(path)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{library} is no library of operators: {reason}") from error
    if path not in _LIBRARIES:
        _LIBRARIES.append(path)


def session_options(optimized: bool = True, threads: int = 0) -> onnxruntime.SessionOptions:
    """Options of a quiet session: all optimizations or none; 0 threads = onnxruntime's choice."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    for library in _LIBRARIES:
        options.register_custom_ops_library(library)
    return options


def open_session(
    model: ir.Model | Path,
    *,
    optimized: bool = True,
    threads: int = 0,
    prepack: bool = True,
    arena: bool = True,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> onnxruntime.InferenceSession:
    """A session on `model` as it stands; large initializers are lent to it, not copied.

    Args:
        model: or a file of one, for onnxruntime to read.
        prepack: let kernels rearrange weights for speed, which takes their size again in memory.
        arena: keep activations' memory between runs, grown in powers of two, instead of giving it
            back after each run.
        providers: of onnxruntime, the one to be preferred first.

    Raises:
        ModelError: onnxruntime refuses the model; the message holds its reason.
    """
    import onnxruntime as ort

    options = session_options(optimized, threads)
    options.enable_cpu_mem_arena = arena
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    proto, lent = _lending(model) if isinstance(model, ir.Model) else (None, {})
    values = [ort.OrtValue.ortvalue_from_numpy(a) for a in lent.values()]
    options.add_external_initializers(list(lent), values)
    try:
        source = str(model) if proto is None else proto.SerializeToString()
        session = ort.InferenceSession(source, options, providers=list(providers))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"onnxruntime cannot run this model: {reason}") from error
    session.qgraph_lent = (lent, values)
    if prepack:
        for array in lent.values():
            _forget(array)
    return session


def _lending(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The model without its large initializers, and these by name."""
    lent: dict[str, np.ndarray] = {}
    copy = model.clone()  # the model given is never changed, as other threads may be at it
    for value in initializers(copy):
        tensor = value.const_value
        if tensor is not None and _lendable(value, tensor, copy.graph):
            name = str(value.name)
            lent[name] = np.ascontiguousarray(tensor.numpy())
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor(
                "lent", 0, tensor.nbytes, tensor.dtype, name=name, shape=shape
            )
        elif isinstance(tensor, ir.ExternalTensor):
            value.const_value = in_memory(tensor)
    return to_proto(copy), lent


def _forget(array: np.ndarray) -> None:
    """Give back the pages of a memory-mapped array; the next read brings them in again.

    Kernels have packed copies of their weights by now, and few ever look at the originals.
    """
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def _lendable(value: ir.Value, tensor: ir.TensorProtocol, main: ir.Graph) -> bool:
    # onnxruntime drops what nothing uses, and then cannot find it.
    if tensor.nbytes <= INLINE_BYTES or value.graph is not main or not value.uses():
        return False
    try:
        kind = np.dtype(tensor.dtype.numpy())
        return kind.isbuiltin == 1 and kind.kind in "fiub" and tensor.dtype.bitwidth >= 8
    except TypeError:
        return False


def run(session: Any, feed: Mapping[str, np.ndarray]) -> list[Any]:
    """All outputs for one feed; inputs that the session does not have are left out."""
    names = {i.name for i in session.get_inputs()}
    return list(session.run(None, {k: v for k, v in feed.items() if k in names}))
