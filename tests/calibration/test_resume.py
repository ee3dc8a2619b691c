"""Results and states of a long pass, kept in a folder."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qgraph.backends.onnx import OnnxTarget
from qgraph.calibration import collect as collecting
from qgraph.calibration import resume
from qgraph.calibration.resume import Resumable, key
from qgraph.graph.annotation import INTEGERS, set_integers, set_trained_scale
from qgraph.numerics.quantized import Arrays, Quantized, from_arrays, to_arrays
from qgraph.numerics.reference import Int
from qgraph.numerics.spec import PerBlock, QuantSpec
from qgraph.numerics.stats import Stats
from qgraph.passes import calibrate as calibrating
from qgraph.passes.adaround import AdaRound
from qgraph.passes.annotate import Rule
from qgraph.passes.autoround import AutoRound
from qgraph.passes.awq import AWQ
from qgraph.passes.calibrate import Calibrate
from qgraph.passes.clip_weights import ClipWeights
from qgraph.passes.gptq import GPTQ
from qgraph.passes.hqq import HQQ
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Pass, PassManager
from tests.models import feed, mlp, transformer_block
from tests.pipelines import ONNX, Impatient, annotate


def resumable(folder: Path | None) -> Resumable:
    return Resumable(folder, "gptq", Context(ONNX))


def test_results_and_states_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "OVERHEAD", 1e9)
    kept = resumable(tmp_path / "new")
    assert kept.result(0) is None
    assert kept.state() is None
    kept.keep_result(0, {"a/b": np.arange(3)})
    kept.keep_state(lambda: {"x": np.ones(2)})
    kept.keep_state(lambda: {"x": np.zeros(2)})
    again = resumable(tmp_path / "new")
    found, state = again.result(0), again.state()
    assert found is not None
    assert state is not None
    assert found["a/b"].tolist() == [0, 1, 2]
    assert state["x"].tolist() == [0, 0]
    kept.finish()
    assert again.state() is None
    assert again.result(0) is not None
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["0.npz"]


def test_states_cost_a_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 15.0, 60.0, 66.0, 66.0])
    monkeypatch.setattr(resume, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    kept = resumable(tmp_path)
    states = iter(range(9))
    state = lambda: {"x": np.array(next(states))}  # noqa: E731
    kept.keep_state(state)  # takes 5 s: until the 65th, no other
    kept.keep_state(state)
    kept.keep_state(state)
    found = kept.state()
    assert found is not None
    assert found["x"] == 1


def test_without_a_folder_nothing_is_kept() -> None:
    kept = resumable(None)
    kept.keep_result(0, {})
    kept.keep_state(dict)
    kept.finish()
    assert kept.result(0) is None
    assert kept.state() is None


def test_what_is_damaged_is_not_there_and_a_warning(tmp_path: Path) -> None:
    kept = resumable(tmp_path)
    assert kept.result(0) is None
    kept.keep_result(0, {"x": np.arange(4), "empty": np.zeros((0, 2), np.float32)})
    whole = (tmp_path / "0.npz").read_bytes()
    kept.keep_result(0, {"x": np.arange(4)})
    np.savez(tmp_path / "foreign.npz", x=np.arange(4))
    foreign = (tmp_path / "foreign.npz").read_bytes()
    changed = whole.replace(np.arange(4).tobytes(), np.arange(1, 5).tobytes())
    damaged = (b"", b"PK\x03\x04 cut off", b"\x93NUMPY", whole[:-9], foreign, changed)
    for count, content in enumerate(damaged, 1):
        (tmp_path / "0.npz").write_bytes(content)
        assert kept.result(0) is None
        assert len(kept.context.remarks.warnings()) == count
        assert "it is computed anew" in str(kept.context.remarks[-1])
    (tmp_path / "0.npz").write_bytes(whole)
    found = kept.result(0)
    assert found is not None
    assert list(found) == ["x", "empty"]


def test_arrays_of_every_type_come_back(tmp_path: Path) -> None:
    types = (np.bool_, np.int8, np.float16, np.float32, np.complex64, ml_dtypes.float8_e4m3fn)
    arrays = {str(i): np.ones((2, 3), type_) for i, type_ in enumerate(types)} | {
        "0-D": np.array(1)
    }
    resume.write(tmp_path / "a.npz", arrays)
    found = resume.read(tmp_path / "a.npz")
    assert found is not None
    assert all(found[name].tobytes() == data.tobytes() for name, data in arrays.items())


def test_what_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = resumable(tmp_path / "file" / "folder")
    kept.keep_result(0, {})
    kept.keep_result(1, {})
    assert kept.failure is not None
    assert "cannot be written" in kept.failure


def test_only_what_is_missing_is_computed(tmp_path: Path) -> None:
    computed: list[int] = []

    def square(x: int) -> Arrays:
        computed.append(x)
        return {"square": np.array(x * x)}

    first = resumable(tmp_path).steps([3, 4, 5], square)
    assert [(x, int(arrays["square"])) for x, arrays in islice(first, 2)] == [(3, 9), (4, 16)]
    (tmp_path / "0.npz").write_bytes(b"cut off")
    again = resumable(tmp_path).steps([3, 4, 5], square)
    assert [(x, int(arrays["square"])) for x, arrays in again] == [(3, 9), (4, 16), (5, 25)]
    assert computed == [3, 4, 3, 5]


def test_a_state_is_kept_with_each_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "OVERHEAD", 1e9)
    states = iter(range(9))

    def run(after: int) -> None:
        kept = resumable(tmp_path)
        steps = kept.steps(
            Impatient(after)("abc", ""), lambda _: {}, lambda: {"at": np.array(next(states))}
        )
        assert len(list(steps)) == 3

    with pytest.raises(KeyboardInterrupt):
        run(after=2)
    state = resumable(tmp_path).state()
    assert state is not None
    assert state["at"] == 1
    run(after=3)
    assert next(states) == 3  # none for what was known
    assert resumable(tmp_path).state() is None


# --- keys -----------------------------------------------------------------------------------------

LARGE = np.zeros((500, 300), np.float32)


def other(*index: int) -> np.ndarray:
    """`LARGE` but for the least bit of one element."""
    data = LARGE.copy()
    data.view(np.uint32)[index] = 1
    return data


def in_memory(data: np.ndarray, folder: Path) -> ir.TensorProtocol:
    return ir.Tensor(data, name="w0")


def in_a_file(data: np.ndarray, folder: Path) -> ir.TensorProtocol:
    path = folder / f"{len(list(folder.iterdir()))}.bin"
    data.tofile(path)
    return ir.ExternalTensor(
        path, 0, data.nbytes, ir.DataType.from_numpy(data.dtype), shape=ir.Shape(data.shape),
        name="w0",
    )  # fmt: skip


def evaluated(data: np.ndarray, folder: Path) -> ir.TensorProtocol:
    return ir.LazyTensor(
        lambda: in_a_file(data, folder), ir.DataType.from_numpy(data.dtype), ir.Shape(data.shape),
        name="w0",
    )  # fmt: skip


def holding(weight: ir.TensorProtocol) -> ir.Model:
    model = mlp((4, 4))
    model.graph.initializers["w0"].const_value = weight
    return model


@pytest.mark.parametrize("store", [in_memory, in_a_file, evaluated])
def test_every_element_dtype_and_shape_count(
    store: Callable[[np.ndarray, Path], ir.TensorProtocol], tmp_path: Path
) -> None:
    contents = [
        LARGE, other(0, 0), other(250, 7), other(250, 8), other(499, 299),
        LARGE.view(np.int32), LARGE.reshape(300, 500), LARGE.reshape(-1),
        LARGE[:2, :3], LARGE[:3, :2], other(0, 0)[:2, :3],
    ]  # fmt: skip
    keys = [key(HQQ(), holding(store(data, tmp_path)), ()) for data in contents]
    assert len(set(keys)) == len(contents)
    assert {len(bytes.fromhex(k)) for k in keys} == {16}
    assert keys == [key(HQQ(), holding(in_memory(data, tmp_path)), ()) for data in contents]


def test_weights_in_files_are_not_held(tmp_path: Path) -> None:
    model = transformer_block()
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "m.onnx")
    tensors = [value.const_value for value in model.graph.initializers.values()]
    files = [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
    assert len(files) > 5
    assert key(HQQ(), model, ()) == key(HQQ(), transformer_block(), ())
    assert not any(tensor.raw for tensor in files)


def test_all_else_that_counts() -> None:
    data = feed(mlp())["x"]
    changed = data.copy()
    changed.reshape(-1)[-1] += 1

    def annotated(dtype: ir.DataType) -> ir.Model:
        model = mlp()
        rule = Rule(("matmul",), QuantSpec(dtype, PerBlock(0, 8), observer="absmax"), (None,))
        PassManager(annotate(rules=(rule,))).run(model, Context(ONNX))
        return model

    def trained(scale: float) -> ir.Model:
        model = mlp()
        zero = np.array(0, np.int32)
        set_trained_scale(model.graph.inputs[0], np.array(scale, np.float32), zero)
        return model

    def rounded(integer: int) -> ir.Model:
        model = mlp()
        q = np.full((16, 32), integer, np.int8)
        weight = Quantized(q, np.array(1, np.float32), np.array(0, np.int32), None)
        set_integers(model.graph.initializers["w0"], QuantSpec(), weight)
        return model

    keys = [
        key(GPTQ(), mlp(), [{"x": data}]),
        key(GPTQ(damping=0.2), mlp(), [{"x": data}]),
        key(AWQ(), mlp(), [{"x": data}]),
        key(GPTQ(), mlp(seed=1), [{"x": data}]),
        key(GPTQ(), annotated(ir.DataType.INT4), [{"x": data}]),
        key(GPTQ(), annotated(ir.DataType.UINT4), [{"x": data}]),
        key(GPTQ(), mlp(), [{"x": changed}]),
        key(GPTQ(), mlp(), [{"x": data.T}]),
        key(GPTQ(), mlp(), [{"x": data.view(np.int32)}]),
        key(GPTQ(), mlp(), [{"z": data}]),
        key(GPTQ(), mlp(), [{"x": data, "z": data}]),
        key(GPTQ(), mlp(), [{"x": data}, {"z": data}]),
        key(GPTQ(), mlp(), [{"x": np.array(["one", "two"])}]),
        key(GPTQ(), mlp(), [{"x": np.array(["one", "too"])}]),
        key(GPTQ(), mlp(), [{"x": data}], Context(ONNX)),
        key(GPTQ(), mlp(), [{"x": data}], Context(ONNX, seed=1)),
        key(GPTQ(), mlp(), [{"x": data}], Context(OnnxTarget(saturates=False))),
        *(key(GPTQ(), trained(scale), [{"x": data}]) for scale in (1, 2)),
        *(key(GPTQ(), rounded(integer), [{"x": data}]) for integer in (1, 2)),
    ]
    assert len(set(keys)) == len(keys)
    assert key(GPTQ(), mlp(), iter([{"x": data.copy()}])) == keys[0]


# --- passes ---------------------------------------------------------------------------------------

WORKS = pytest.mark.parametrize(
    "work",
    [AWQ(), ClipWeights(), GPTQ(), HQQ(), AdaRound(steps=5), AutoRound(steps=5)],
    ids=lambda work: work.name,
)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that were computed."""
    steps: list[str] = []
    keep = Resumable.keep_result

    def counted(self: Resumable, step: int, arrays: Arrays) -> None:
        steps.append(str(step))
        keep(self, step, arrays)

    monkeypatch.setattr(Resumable, "keep_result", counted)
    return steps


def attempt(work: Pass, cache: Path | None, after: int = 99) -> tuple[list[str], dict[str, Int]]:
    """The remarks of a pass, and the weights that it leaves."""
    model = transformer_block()
    context = Context(
        ONNX, [feed(model, s) for s in range(3)], cache=cache, progress=Impatient(after)
    )
    spec = QuantSpec(ir.DataType.INT4, PerBlock(0, 16), observer="absmax")
    few_bits = Rule(("matmul", "gemm"), spec, (None,))
    PassManager((*annotate(rules=(few_bits,)), work)).run(model, context)
    remarks = [str(r) for r in context.remarks if r.pass_name == work.name]
    initializers = model.graph.initializers.values()
    found = {str(v.name): v.meta[INTEGERS][1].q for v in initializers if INTEGERS in v.meta}
    floats = {str(v.name): v.const_value.numpy() for v in initializers if v.const_value}
    return remarks, found | floats


@WORKS
def test_an_interrupted_pass_goes_on(work: Pass, tmp_path: Path, fresh: list[str]) -> None:
    said, wanted = attempt(work, None)
    steps = list(fresh)
    fresh.clear()
    with pytest.raises(KeyboardInterrupt):
        attempt(work, tmp_path, after=2)
    done = list(fresh)
    for expected in ([step for step in steps if step not in done], []):
        fresh.clear()
        remarks, found = attempt(work, tmp_path)
        assert fresh == expected  # the second time, all is known
        assert remarks == said
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[name], data) for name, data in wanted.items())
    assert done
    assert len(done) < len(steps)


@pytest.mark.parametrize("work", [AWQ(), ClipWeights(), GPTQ()], ids=lambda work: work.name)
def test_where_all_is_kept_the_model_does_not_run(
    work: Pass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt(work, tmp_path)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr("qgraph.calibration.walk.open_session", never)
    attempt(work, tmp_path)


@WORKS
def test_a_new_version_takes_nothing_from_the_cache(
    work: Pass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: list[str]
) -> None:
    attempt(work, tmp_path)
    steps = list(fresh)
    monkeypatch.setattr(type(work), "version", 2)
    attempt(work, tmp_path)
    assert fresh == steps * 2


@pytest.mark.parametrize("owner", [Stats, Calibrate])
def test_statistics_of_another_version_do_not_count(
    owner: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[ir.Model] = []

    def collect(model: ir.Model, *rest: Any) -> dict[str, Stats]:
        runs.append(model)
        return collecting.collect(model, *rest)

    monkeypatch.setattr(calibrating, "collect", collect)

    def run(seed: int = 0) -> None:
        model = mlp()
        context = Context(ONNX, [feed(model)], seed, cache=tmp_path)
        PassManager(annotate("static")).run(model, context)

    run()
    run(seed=1)  # is not asked for
    assert len(runs) == 1
    monkeypatch.setattr(owner, "version", 2)
    run()
    assert len(runs) == 2
    run()
    assert len(runs) == 2


# --- what is kept ---------------------------------------------------------------------------------


def test_weights_as_they_were() -> None:
    q, scale, zero = np.ones((4, 6), np.int8), np.ones((2, 6), np.float32), np.zeros((2, 6), "i4")
    kept = to_arrays([None, Quantized(q, scale, zero, 0, block=2), Quantized(q, scale, zero, None)])
    nothing, blocks, whole = from_arrays(kept)
    assert nothing is None
    assert blocks is not None
    assert whole is not None
    assert (blocks.axis, blocks.block, whole.axis, whole.block) == (0, 2, None, 0)
    np.testing.assert_array_equal(blocks.q, q)
    np.testing.assert_array_equal(blocks.scale, scale)
