"""One float model in many ways: as it is, by qgraph's recipes, by the quantizers of others."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir

import qgraph
from benchmarks import zoo
from benchmarks.memory import write_feeds
from benchmarks.subjects import Subject, model_file
from benchmarks.tasks import Feed
from qgraph.backends import get_target
from qgraph.graph.ops import FLOATS
from qgraph.graph.reading import MICROSOFT, constant, dims, is_op, node_name, nodes
from qgraph.io.models import source_files
from qgraph.recipes import get_recipe
from qgraph.recipes.recipe import FLOAT_STAGE


@dataclass(frozen=True)
class Variant:
    """One way that worked out, or did not.

    Attributes:
        name: one of :data:`VARIANTS`.
        path: the model, None where `note` says why there is none.
        remarks: of qgraph.
        note: what went wrong.
    """

    name: str
    path: Path | None = None
    remarks: qgraph.Remarks | None = None
    note: str = ""


def make(name: str, subject: Subject, model: Path, folder: Path) -> Variant:
    """Make one variant of the float `model` in `folder`; a failure becomes a note."""
    try:
        with quiet():
            made = VARIANTS[name](subject, model, folder / re.sub(r"\W+", "-", name))
    except Exception as error:
        return Variant(name, note=_reason(error))
    return replace(made, name=name)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def size(path: Path) -> int:
    """Bytes of a model's file and of its external data."""
    model = qgraph.load(path)
    return sum(file.stat().st_size for file in source_files(model))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the log messages, prints and warnings of onnxruntime's quantizers."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


# ------------------------------------------------------------------------------------- the ways

Way = Callable[[Subject, Path, Path], Variant]
"""Makes a variant of a subject's float model; the last path is where to put it."""


def recipe(name: str, **parameters: object) -> Way:
    """A recipe of qgraph with these parameters, calibrated if it wants to be."""

    def way(subject: Subject, model: Path, out: Path) -> Variant:
        chosen = get_recipe(name, parameters)
        feeds = subject.calibration(model) if chosen.calibrates else None
        compiled = qgraph.compile(model, chosen, feeds)
        return Variant("", compiled.save(_like(model, out)), compiled.remarks)

    return way


def _float(_: Subject, model: Path, out: Path) -> Variant:
    return Variant("", model)


def _ort_static(subject: Subject, model: Path, out: Path) -> Variant:
    """`quantize_static` as its documentation recommends it: pre-processed, QDQ, per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, feeds: list[Feed]) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> Feed | None:
            return next(self.feeds, None)

    feeds, path = subject.calibration(model), _beside(model, out)

    def quantize(prepared: Path, per_channel: bool) -> None:
        quantize_static(
            prepared,
            model_file(path),
            Reader(feeds),
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            use_external_data_format=model.is_dir(),
        )

    with _prepared(model, out) as prepared:
        try:
            quantize(prepared, per_channel=True)
        except Exception as error:
            quantize(prepared, per_channel=False)
            return Variant("", path, note=f"per tensor, since per channel fails: {_reason(error)}")
    return Variant("", path)


def _ort_dynamic(_: Subject, model: Path, out: Path) -> Variant:
    """`quantize_dynamic` with a scale for each channel of a weight."""
    from onnxruntime.quantization import quantize_dynamic

    path = _beside(model, out)
    quantize_dynamic(
        model_file(model),
        model_file(path),
        per_channel=True,
        use_external_data_format=model.is_dir(),
    )
    return Variant("", path)


def _nncf(subject: Subject, model: Path, out: Path) -> Variant:
    """NNCF's `quantize`, in an environment of its own; with SmoothQuant for transformers."""
    python = zoo.environment("nncf==3.4.0", "onnx==1.23.2", "onnxruntime==1.32.0")
    script = Path(__file__).with_name("nncf_quantize.py")
    path = _beside(model, out)
    feeds = write_feeds(subject.calibration(model), out.with_suffix(".feeds"))
    with _prepared(model, out) as prepared:
        command = (python, script, prepared, feeds, model_file(path))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(feeds)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1])
    return Variant("", path)


def _ort_few_bits(algorithm: Literal["rtn", "hqq"], group_size: int) -> Way:
    """onnxruntime's own weight-only quantizer at 4 bits: `rtn` symmetric, `hqq` not, as they are.

    The accuracy level is the one that is fast; by default results run at a fifth of that speed.
    """

    def way(_: Subject, model: Path, out: Path) -> Variant:
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits

        config = None
        if algorithm == "hqq":
            config = nbits.HQQWeightOnlyQuantConfig(block_size=group_size, bits=4)
        path = _beside(model, out)
        work = nbits.MatMulNBitsQuantizer(
            onnx.load(model_file(model)),
            block_size=group_size,
            is_symmetric=True,
            accuracy_level=4,
            algo_config=config,
        )
        work.process()
        work.model.save_model_to_file(str(model_file(path)), model.is_dir())
        return Variant("", path)

    return way


FEW_BITS: dict[str, Way] = {
    f"qgraph {name} g{size}": recipe(name, group_size=size)
    for name in ("rtn", "awq", "gptq")
    for size in (32, 64, 128)
}
"""The same format, 4 bits symmetric, by three methods."""

VARIANTS: dict[str, Way] = {
    "float": _float,
    "qgraph static": recipe("static"),
    "qgraph dynamic": recipe("dynamic"),
    "qgraph llm-int8": recipe("llm-int8"),
    "qgraph llm-int8 plain": recipe("llm-int8", share=0.0),
    "qgraph smoothquant O1": recipe("smoothquant"),
    "qgraph smoothquant O2": recipe("smoothquant", level="O2"),
    "qgraph smoothquant O3": recipe("smoothquant", level="O3"),
    "qgraph smoothquant O3 plain": recipe("smoothquant", level="O3", min_sqnr=-100.0),
    "qgraph zeroquant": recipe("zeroquant"),
    "qgraph zeroquant plain": recipe("zeroquant", alpha=0.0),
    "qgraph zeroquant W4/8": recipe("zeroquant", mlp_bits=4),
    "qgraph zeroquant W4/8 lkd": recipe("zeroquant", mlp_bits=4, lkd=True),
    "qgraph w8a8": recipe("w8a8"),
    **FEW_BITS,
    "qgraph rtn per-channel": recipe("rtn", group_size=0, observer="mse"),
    "qgraph gptq per-channel": recipe("gptq", group_size=0),
    "qgraph adaround": recipe("adaround"),
    "qgraph autoround": recipe("autoround"),
    "qgraph rtn g128 tied": recipe("rtn", group_size=128, embedding_bits=4),
    "qgraph nf4": recipe("nf4"),
    "qgraph nf4 plain": recipe("nf4", double_quant=False),
    "qgraph nf4 absmax": recipe("nf4", observer="absmax"),
    "qgraph fp4": recipe("fp4"),
    "qgraph hqq": recipe("hqq"),
    "qgraph fp8": recipe("fp8"),
    "onnxruntime static": _ort_static,
    "onnxruntime dynamic": _ort_dynamic,
    "onnxruntime rtn g32": _ort_few_bits("rtn", 32),
    "onnxruntime rtn g64": _ort_few_bits("rtn", 64),
    "onnxruntime rtn g128": _ort_few_bits("rtn", 128),
    "onnxruntime hqq g64": _ort_few_bits("hqq", 64),
    "nncf": _nncf,
}


def _like(model: Path, out: Path) -> Path:
    """`out` as a folder where the model is one, else as a file."""
    return out if model.is_dir() else out.with_suffix(".onnx")


def _beside(model: Path, out: Path) -> Path:
    """Like :func:`_like`; a folder is made, with the companions of the model."""
    if model.is_dir():
        shutil.copytree(model, out, ignore=shutil.ignore_patterns("model.onnx*"))
    return _like(model, out)


@contextlib.contextmanager
def _prepared(model: Path, out: Path) -> Iterator[Path]:
    """The float model after onnxruntime's pre-processing, at opset 13 or newer.

    Per-channel scales need opset 13. A model that the pre-processing refuses is given as it is.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folder = out.with_suffix(".work")
    folder.mkdir()
    try:
        source, prepared = model_file(model), folder / "prepared.onnx"
        if _opset(source) < 13:
            converted = onnx.version_converter.convert_version(onnx.load(source), 13)
            source = folder / "converted.onnx"
            onnx.save(converted, source)
        try:
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
        except Exception:
            prepared = source
        yield prepared
    finally:
        shutil.rmtree(folder)


def _opset(path: Path) -> int:
    imports = onnx.load(path, load_external_data=False).opset_import
    return min((i.version for i in imports if i.domain in ("", "ai.onnx")), default=13)


# -------------------------------------------------------------------------------- the remarks


def must_have_a_verdict(model: ir.Model) -> list[str]:
    """Names of the operators that a compilation's remarks have to account for.

    Everything linear on floats and every Gather on a float weight with rows, bodies of control flow
    included, as they are after the stage that all recipes start with. Found without
    `qgraph.graph.sites`, which is under test here.
    """
    prepared = model.clone()
    qgraph.PassManager(FLOAT_STAGE).run(prepared, qgraph.Context(get_target("cpu")))
    return [node_name(node) for node in nodes(prepared) if _counts(node)]


_LINEAR = ("Conv", "ConvTranspose", "Einsum", "Gemm", "GRU", "LSTM", "MatMul", "RNN")
_FUSED = (
    "Attention", "FusedConv", "FusedGemm", "FusedMatMul", "MatMulNBits", "MoE", "QMoE",
)  # fmt: skip


def _counts(node: ir.Node) -> bool:
    if is_op(node, "Gather"):
        table = constant(node.inputs[0])
        return table is not None and table.dtype in FLOATS and len(dims(node.inputs[0])) >= 2
    if is_op(node, *_FUSED, domain=MICROSOFT):
        return True
    if not is_op(node, *_LINEAR) or len(node.inputs) == 1:
        return False
    data = node.inputs[0]
    return data is None or data.dtype is None or data.dtype in FLOATS


def unaccounted(wanted: list[str], remarks: qgraph.Remarks) -> list[str]:
    """Those of the operators that ought to have a verdict but have none."""
    verdicts = remarks.verdicts()
    return [name for name in wanted if name not in verdicts]
