"""The ONNX backend test cases through torch: right, or refused by the operator's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

pytest.importorskip("torch")

import torch
from onnx_ir.tensor_adapters import TorchTensor

from qgraph.backends.torch_fx import raise_model, to_torch
from qgraph.backends.torch_ops.types import NARROW
from qgraph.errors import ModelError
from qgraph.model_io import load
from tests.test_conformance import (
    CHUNKS,
    Case,
    close,
    expected,
    generated,
    node_cases,
    on_disk,
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


def noise(wanted: np.ndarray) -> float:
    """What sums in another order may differ by: some units in the last place of the largest."""
    kind = np.asarray(wanted).dtype
    if kind.kind in "biuOS" or not np.size(wanted):
        return 0.0
    largest = np.nan_to_num(np.asarray(wanted, np.float64), posinf=0, neginf=0)
    return float(
        4 * torch.finfo(to_torch(ir.tensor(np.zeros(1, kind))).dtype).eps * np.abs(largest).max()
    )


def raised(case: Case) -> None:
    module = raise_model(load(case.path))
    for inputs, wanted in case.data:
        got = module(*(to_torch(ir.tensor(np.asarray(plain(x)))) for x in inputs.values()))
        results = [to_array(x) for x in (got if isinstance(got, tuple) else (got,))]
        for want, result in zip(wanted, results, strict=True):
            want = held(plain(want))
            assert close(want, result, case.rtol, max(case.atol, noise(want))), "other result"


OUT_OF_SCOPE = ("string", "sequence", "optional", "training")
MISTAKEN = {"test_resize_downsample_scales_cubic_align_corners"}
MISTAKEN |= {"test_resize_downsample_scales_linear_align_corners"}
"""They divide by a length that is not whole, which onnxruntime does not do either."""
RANDOM = ("test_bernoulli", "test_training_dropout")
"""Their results are drawn."""


def in_scope(case: Case) -> bool:
    """Whether the case is about numbers in tensors."""
    if any(word in case.name for word in OUT_OF_SCOPE):
        return False
    model = onnx.load(case.path)
    text = onnx.printer.to_text(model)
    return not any(word in text for word in ("seq(", "optional(", "string[", "string ", "Sequence"))


def outcomes(cases: Iterator[Case]) -> tuple[Counter[str], list[str]]:
    """How many cases in scope pass and are refused, and all that are wrong, in scope or not."""
    counts: Counter[str] = Counter()
    wrong = []
    for case in cases:
        counted = in_scope(case) and expected(case)
        if case.name in MISTAKEN or case.name.startswith(RANDOM):
            continue
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
