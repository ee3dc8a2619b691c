"""The ONNX backend test cases through torch: right, or refused by the operator's name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

pytest.importorskip("torch")

import torch
from onnx_ir.tensor_adapters import TorchTensor

from qgraph.errors import ModelError
from qgraph.io.models import load
from qgraph.torch.ops.types import NARROW
from qgraph.torch.parameters import to_torch
from qgraph.torch.to_module import raise_model
from tests.end_to_end.test_conformance import (
    CHUNKS,
    Case,
    close,
    expected,
    generated,
    node_cases,
    on_disk,
    run,
)


def plain(data: Any) -> Any:
    """An array; some cases carry protobuf tensors."""
    return numpy_helper.to_array(data) if isinstance(data, onnx.TensorProto) else data


def to_array(x: torch.Tensor) -> np.ndarray:
    return TorchTensor(x.detach()).numpy()


def held(wanted: Any) -> Any:
    """Integers of less than a byte as torch holds them."""
    kind = ir.DataType.from_numpy(wanted.dtype) if isinstance(wanted, np.ndarray) else None
    if kind is None or int(kind) not in NARROW:
        return wanted
    return wanted.astype(np.int8 if kind.is_signed() else np.uint8)


def noise(wanted: Any) -> float:
    """What sums in another order may differ by: four units in the last place of the largest."""
    array = np.asarray(wanted)
    if array.dtype.kind in "biuOUS" or array.itemsize == 1 or not array.size:
        return 0.0
    largest = np.abs(np.nan_to_num(array.astype(np.float64), posinf=0, neginf=0)).max()
    return float(4 * ml_dtypes.finfo(array.dtype).eps * largest)  # type: ignore[no-untyped-call]


_TO_NARROW = re.compile(r"test_cast(?:like)?_FLOAT(?:16)?_to_(U?INT[24])(_expanded)?")


def in_range(case: Case, inputs: Mapping[str, Any]) -> np.ndarray | None:
    """Where the data of a cast to a few bits fits into them; None for other cases. What becomes of
    the rest ONNX leaves open, and its cases follow ml_dtypes, whose releases differ."""
    match = _TO_NARROW.fullmatch(case.name)
    if match is None:
        return None
    _, low, high = NARROW[int(ir.DataType[match[1]])]
    x = np.asarray(plain(next(iter(inputs.values()))))
    return np.asarray((x >= low) & (x <= high))


def raised(case: Case) -> None:
    module = raise_model(load(case.path))
    for inputs, wanted in case.data:
        got = module(*(to_torch(ir.tensor(np.asarray(plain(x)))) for x in inputs.values()))
        results = [to_array(x) for x in (got if isinstance(got, tuple) else (got,))]
        for want, result in zip(wanted, results, strict=True):
            want = held(plain(want))
            if (defined := in_range(case, inputs)) is not None:
                want, result = want[defined], result[defined]
            assert close(want, result, case.rtol, max(case.atol, noise(want))), "other result"


OTHER_VALUES = ("String", "Sequence", "Optional", "RegexFullMatch", "SplitToSequence", "ConcatFrom")
"""Beginnings of the operators on strings, sequences and optional values."""
DISPUTED = {
    "test_resize_downsample_scales_cubic_align_corners",
    "test_resize_downsample_scales_linear_align_corners",
}
"""They divide by a length that is not whole; onnxruntime does not, and what it gives is wanted."""
RANDOM = ("test_bernoulli", "test_training_dropout")
"""Their results are drawn."""


def in_scope(case: Case) -> bool:
    """Whether the case is about numbers in tensors, outside of training."""
    model = load(case.path)
    values = (*model.graph.inputs, *model.graph.outputs)
    if any(not isinstance(v.type, ir.TensorType) or v.dtype == ir.DataType.STRING for v in values):
        return False
    nodes = [node for graph in model.graphs() for node in graph]
    return not any(n.op_type.startswith(OTHER_VALUES) or "training" in n.domain for n in nodes)


def expected_of_numbers(case: Case) -> bool:
    """Whether onnxruntime runs the case and passes it, within the same noise."""
    data = [
        ({name: plain(x) for name, x in inputs.items()}, [plain(x) for x in wanted])
        for inputs, wanted in case.data
    ]
    floats = [noise(x) for _, wanted in data for x in wanted if isinstance(x, np.ndarray)]
    return expected(replace(case, data=data, atol=max([case.atol, *floats])))


def outcomes(cases: Iterator[Case]) -> tuple[Counter[str], list[str]]:
    """How many cases in scope pass and are refused, and all that are wrong, in scope or not."""
    counts: Counter[str] = Counter()
    wrong = []
    for case in cases:
        counted = in_scope(case) and expected_of_numbers(case)
        if case.name.startswith(RANDOM):
            continue
        if case.name in DISPUTED:
            results = run(case.path, case, optimized=False)
            case = replace(
                case, data=[(i, r) for (i, _), r in zip(case.data, results, strict=True)]
            )
        try:
            raised(case)
        except ModelError:
            counts["refused"] += counted
        except Exception as error:
            lines = str(error).splitlines() or [""]
            wrong.append(f"{case.name}: {type(error).__name__}: {lines[0][:200]}")
        else:
            counts["passed"] += counted
    return counts, wrong


@pytest.mark.parametrize("group", ["simple", "pytorch-operator"])
def test_models_on_disk(group: str) -> None:
    _, wrong = outcomes(on_disk(group))
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_converted_models_on_disk() -> None:
    counts, wrong = outcomes(on_disk("pytorch-converted"))
    assert not wrong, "\n".join(wrong)
    assert counts["passed"] >= 50


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_node_cases(chunk: int, tmp_path: Path) -> None:
    """What torch does not refuse is right, and it refuses next to nothing."""
    counts, wrong = outcomes(node_cases(generated()[chunk::CHUNKS], tmp_path))
    assert not wrong, "\n".join(wrong)
    assert counts["passed"] > 200
    assert counts["passed"] >= 0.97 * counts.total()
