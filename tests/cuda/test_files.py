"""Compiled models on disk: one copy of every weight, for ONNX and for safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

import qgraph
from qgraph.cli import main
from qgraph.errors import ModelError, QGraphError
from qgraph.io.session import open_session, run
from tests import models

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[qgraph.CompiledModel, Path]:
    """A compiled model, and the file that it was written to."""
    model = models.transformer_block(width=64)
    feeds = [models.feed(model, seed) for seed in range(3)]
    compiled = qgraph.compile(model, "w8a8", feeds, "cuda")
    return compiled, compiled.save(tmp_path / "out.onnx")


def test_both_read_one_file(saved: tuple[qgraph.CompiledModel, Path]) -> None:
    compiled, path = saved
    assert sorted(p.name for p in path.parent.iterdir()) == ["out.onnx", "out.safetensors"]
    held = safetensors.load_file(path.with_suffix(".safetensors"))
    values = compiled.model.graph.initializers
    for name, tensor in held.items():
        value = values[name].const_value
        assert value is not None
        np.testing.assert_array_equal(tensor.numpy(), value.numpy())
    integers = {n for n, v in values.items() if v.dtype == ir.DataType.INT8}
    assert integers <= held.keys()
    assert len(integers) == 7
    feed = models.feed(compiled.model, 5)
    for optimized in (False, True):
        found = run(open_session(path, optimized=optimized), feed)
        wanted = run(open_session(compiled.model, optimized=optimized), feed)
        np.testing.assert_array_equal(found[0], wanted[0])


def test_nothing_is_stored_twice(saved: tuple[qgraph.CompiledModel, Path]) -> None:
    compiled, path = saved
    tensors = [v.const_value for v in compiled.model.graph.initializers.values()]
    weights = sum(t.nbytes for t in tensors if t is not None)
    data = path.with_suffix(".safetensors").stat().st_size
    header = int.from_bytes(path.with_suffix(".safetensors").read_bytes()[:8], "little") + 8
    assert data - header <= weights
    assert path.stat().st_size < 16000


def test_a_module_is_loaded(saved: tuple[qgraph.CompiledModel, Path]) -> None:
    compiled, path = saved
    given = [torch.from_numpy(a) for a in models.feed(compiled.model, 5).values()]
    module = qgraph.load_module(path)
    wanted = compiled.module.state_dict()
    assert module.state_dict().keys() == wanted.keys()
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name])
    assert torch.equal(module(*given), compiled.module(*given))


def test_a_model_is_replaced_with_its_weights(saved: tuple[qgraph.CompiledModel, Path]) -> None:
    _, path = saved
    other = qgraph.compile(models.mlp(), "dynamic", target="cuda:bf16")
    for data in ("out.1.safetensors", "out.safetensors"):
        other.save(path)
        assert sorted(p.name for p in path.parent.iterdir()) == sorted(["out.onnx", data])
    x = torch.randn(2, 16)
    assert torch.equal(qgraph.load_module(path)(x), other(x))


def test_damaged_files(saved: tuple[qgraph.CompiledModel, Path]) -> None:
    _, path = saved
    data = path.with_suffix(".safetensors")
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=r"is cut off in out\.safetensors"):
        qgraph.load_module(path)
    data.unlink()
    with pytest.raises(ModelError, match=r"is missing: put out\.safetensors into"):
        qgraph.load_module(path)


def test_scales_that_are_not_finite(saved: tuple[qgraph.CompiledModel, Path]) -> None:
    _, path = saved
    file = path.with_suffix(".safetensors")
    with safetensors.safe_open(file, "pt") as opened:
        name = next(key for key in opened.keys() if key.endswith("_rows_scale"))  # noqa: SIM118
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    infinite = np.full((end - begin) // 4, np.inf, "f4").tobytes()
    content[8 + length + begin : 8 + length + end] = infinite
    file.write_bytes(content)
    with pytest.raises(ModelError, match="scales or its bias are not finite"):
        qgraph.load_module(path)


def test_other_files_and_devices(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    ir.save(models.mlp(), path)
    with pytest.raises(ModelError, match="was not compiled for torch: compile it with target cuda"):
        qgraph.load_module(path)
    qgraph.compile(models.mlp(), "dynamic", target="cuda").save(tmp_path / "out.onnx")
    with pytest.raises(QGraphError, match="device 'gpu' is unknown"):
        qgraph.load_module(tmp_path / "out.onnx", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(QGraphError, match="torch sees 0 NVIDIA GPUs here"):
            qgraph.load_module(tmp_path / "out.onnx", device="cuda")


def test_the_command_line_writes_both(tmp_path: Path) -> None:
    model, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    ir.save(models.mlp(), model)
    assert main(["compile", str(model), "-r", "dynamic", "-t", "cuda:f16", "-o", str(out)]) == 0
    assert out.with_suffix(".safetensors").is_file()
    assert qgraph.load_module(out)(torch.zeros(1, 16)).dtype == torch.float16
