"""The ONNX backend test cases that the onnx package carries: qgraph keeps every result."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

import qgraph
from qgraph.io.models import load
from qgraph.io.session import session_options
from qgraph.passes.canonicalize import Canonicalize
from qgraph.passes.fold_batch_norm import FoldBatchNorm
from qgraph.passes.fuse import Fuse
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import PassManager
from qgraph.pipeline.target import Target

FOLDERS = ("simple", "pytorch-operator", "pytorch-converted")
"""Cases on disk."""
CHUNKS = 6
"""The cases of the node group, which the onnx package generates, are run in so many tests."""


@dataclass(frozen=True)
class Case:
    """One model with inputs and the outputs that it must give."""

    name: str
    path: Path
    data: list[tuple[dict[str, Any], list[Any]]]
    rtol: float
    atol: float


def read(path: Path, kind: onnx.TypeProto) -> Any:
    """A test's input or output as onnxruntime takes it."""
    data = path.read_bytes()
    match kind.WhichOneof("value"):
        case "sequence_type":
            return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
        case "optional_type":
            return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return numpy_helper.to_array(onnx.TensorProto.FromString(data))


def on_disk(group: str) -> Iterator[Case]:
    """The cases of a folder of the onnx package."""
    from onnx.backend.test.loader import load_model_tests

    for test in sorted(load_model_tests(kind=group), key=lambda test: test.name):
        folder = Path(test.model_dir or "")
        graph = onnx.load(folder / "model.onnx").graph
        data = []
        for feed in sorted(folder.glob("test_data_set_*")):
            count = len(list(feed.glob("input_*.pb")))
            inputs = {
                v.name: read(feed / f"input_{i}.pb", v.type)
                for i, v in enumerate(graph.input[:count])
            }
            outputs = [read(feed / f"output_{i}.pb", v.type) for i, v in enumerate(graph.output)]
            data.append((inputs, outputs))
        yield Case(test.name, folder / "model.onnx", data, test.rtol, test.atol)


@cache
def generated() -> list[Any]:
    """The node cases, about 1,900."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sorted(load_model_tests(kind="node"), key=lambda test: test.name)


def node_cases(tests: list[Any], folder: Path) -> Iterator[Case]:
    """Generated cases, their models written to `folder`."""
    for test in tests:
        path = folder / f"{test.name}.onnx"
        onnx.save(test.model, path)
        names = [v.name for v in test.model.graph.input]
        data = [
            (dict(zip(names, inputs, strict=True)), outputs) for inputs, outputs in test.data_sets
        ]
        yield Case(test.name, path, data, test.rtol, test.atol)
        path.unlink()


def run(path: Path, case: Case, optimized: bool) -> list[list[Any]]:
    """All outputs for all data sets."""
    import onnxruntime

    options = session_options(optimized, threads=1)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [session.run(None, inputs) for inputs, _ in case.data]


def close(a: Any, b: Any, rtol: float, atol: float) -> bool:
    """Whether two results agree: arrays of any kind, lists, maps, None."""
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(close(x, y, rtol, atol) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key], rtol, atol) for key in a)
    if a is None or b is None:
        return a is b
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype.kind in "OUS" or b.dtype.kind in "OUS":
        return bool(a.shape == b.shape and a.tolist() == b.tolist())
    if a.dtype != b.dtype:
        return False
    if a.dtype.kind == "c":
        return bool(np.allclose(a, b, rtol, atol, equal_nan=True))
    return bool(np.allclose(a.astype(float), b.astype(float), rtol, atol, equal_nan=True))


def expected(case: Case) -> bool:
    """Whether onnxruntime itself can run the case and passes it."""
    try:
        results = run(case.path, case, optimized=False)
    except Exception:
        return False
    return all(
        close(wanted, got, case.rtol, case.atol)
        for (_, wanted), got in zip(case.data, results, strict=True)
    )


def canonicalized(case: Case, folder: Path) -> None:
    """Load, canonicalize, fold, save, run: raises or finds another result."""
    model = load(case.path)
    signature = [v.name for v in (*model.graph.inputs, *model.graph.outputs)]
    PassManager([Canonicalize(), FoldBatchNorm(), Fuse()]).run(
        model, Context(target=Mock(spec=Target))
    )
    if (model.ir_version or 0) >= 4:
        kept = [v.name for v in (*model.graph.inputs, *model.graph.outputs)]
        fed = {name for inputs, _ in case.data for name in inputs}
        assert [n for n in signature if n in fed or n in kept] == kept
    path = folder / "out.onnx"
    ir.save(model, path)
    for optimized in (False, True):
        for (_, wanted), got in zip(case.data, run(path, case, optimized), strict=True):
            assert close(wanted, got, case.rtol, case.atol), f"optimized={optimized}: other result"


def failures(cases: Iterator[Case], check: Callable[[Case], None]) -> tuple[int, list[str]]:
    """How many cases onnxruntime passes, and what is wrong with those that fail `check`."""
    count, problems = 0, []
    for case in cases:
        if not expected(case):
            continue
        count += 1
        try:
            check(case)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            problems.append(f"{case.name}: {type(error).__name__}: {lines[0][:200]}")
    return count, problems


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize(
    "group",
    [pytest.param(g, marks=pytest.mark.slow if g == "pytorch-converted" else ()) for g in FOLDERS],
)
def test_canonical_models_on_disk_keep_their_results(group: str, tmp_path: Path) -> None:
    count, problems = failures(on_disk(group), lambda case: canonicalized(case, tmp_path))
    assert not problems, "\n".join(problems)
    assert count >= {"simple": 17, "pytorch-operator": 20, "pytorch-converted": 50}[group]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_canonical_nodes_keep_their_results(chunk: int, tmp_path: Path) -> None:
    cases = node_cases(generated()[chunk::CHUNKS], tmp_path)
    count, problems = failures(cases, lambda case: canonicalized(case, tmp_path))
    assert not problems, "\n".join(problems)
    assert count > 200


def compiled(case: Case, folder: Path) -> None:
    """Compile with recipe `dynamic`, save, run: raises."""
    path = folder / "dynamic.onnx"
    path.unlink(missing_ok=True)
    qgraph.compile(case.path, recipe="dynamic").save(path)
    for optimized in (False, True):
        run(path, case, optimized)


@pytest.mark.slow
@pytest.mark.parametrize("group", [*FOLDERS, *range(CHUNKS)])
def test_dynamic_never_crashes(group: str | int, tmp_path: Path) -> None:
    if isinstance(group, str):
        cases = on_disk(group)
    else:
        cases = node_cases(generated()[group::CHUNKS], tmp_path)
    _, problems = failures(cases, lambda case: compiled(case, tmp_path))
    assert not problems, "\n".join(problems)
