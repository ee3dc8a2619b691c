"""Results and states of a long pass, kept in a folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from qgraph.calibration import resume as resumable
from qgraph.calibration.resume import Resumable
from qgraph.graph.annotation import INTEGERS
from qgraph.numerics.quantized import Arrays, Quantized, from_arrays, to_arrays
from qgraph.numerics.reference import Int
from qgraph.numerics.spec import PerBlock, QuantSpec
from qgraph.passes.adaround import AdaRound
from qgraph.passes.annotate import Rule
from qgraph.passes.autoround import AutoRound
from qgraph.passes.awq import AWQ
from qgraph.passes.clip_weights import ClipWeights
from qgraph.passes.gptq import GPTQ
from qgraph.passes.hqq import HQQ
from qgraph.pipeline.context import Context
from qgraph.pipeline.pass_manager import Pass, PassManager
from tests.models import feed, transformer_block
from tests.pipelines import ONNX, Impatient, annotate


def test_results_and_states_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "OVERHEAD", 1e9)
    kept = Resumable(tmp_path / "new")
    assert kept.result(0) is None
    assert kept.state() is None
    kept.keep_result(0, {"a/b": np.arange(3)})
    kept.keep_state(lambda: {"x": np.ones(2)})
    kept.keep_state(lambda: {"x": np.zeros(2)})
    again = Resumable(tmp_path / "new")
    found, state = again.result(0), again.state()
    assert found is not None
    assert state is not None
    assert found["a/b"].tolist() == [0, 1, 2]
    assert state["x"].tolist() == [0, 0]
    kept.finish("gptq", Context(ONNX))
    assert again.state() is None
    assert again.result(0) is not None
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["0.npz"]


def test_states_cost_a_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 15.0, 60.0, 66.0, 66.0])
    monkeypatch.setattr(resumable, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    kept = Resumable(tmp_path)
    states = iter(range(9))
    state = lambda: {"x": np.array(next(states))}  # noqa: E731
    kept.keep_state(state)  # takes 5 s: until the 65th, no other
    kept.keep_state(state)
    kept.keep_state(state)
    found = kept.state()
    assert found is not None
    assert found["x"] == 1


def test_without_a_folder_nothing_is_kept() -> None:
    kept = Resumable(None)
    kept.keep_result(0, {})
    kept.keep_state(dict)
    kept.finish("gptq", Context(ONNX))
    assert kept.result(0) is None
    assert kept.state() is None


def test_what_cannot_be_read_is_not_there(tmp_path: Path) -> None:
    kept = Resumable(tmp_path)
    for content in (b"", b"PK\x03\x04 cut off", b"\x93NUMPY"):
        (tmp_path / "0.npz").write_bytes(content)
        assert kept.result(0) is None


def test_what_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = Resumable(tmp_path / "file" / "folder")
    kept.keep_result(0, {})
    kept.keep_result(1, {})
    assert kept.failure is not None
    assert "cannot be written" in kept.failure


# --- passes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "work",
    [AWQ(), ClipWeights(), GPTQ(), HQQ(), AdaRound(steps=5), AutoRound(steps=5)],
    ids=lambda work: work.name,
)
def test_an_interrupted_pass_goes_on(
    work: Pass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh: list[str] = []
    keep = Resumable.keep_result

    def counted(self: Resumable, step: int, arrays: Arrays) -> None:
        fresh.append(str(step))
        keep(self, step, arrays)

    monkeypatch.setattr(Resumable, "keep_result", counted)
    spec = QuantSpec(ir.DataType.INT4, PerBlock(0, 16), observer="absmax")

    def attempt(cache: Path | None, after: int = 99) -> tuple[list[str], dict[str, Int]]:
        fresh.clear()
        model = transformer_block()
        context = Context(
            ONNX, [feed(model, s) for s in range(3)], cache=cache, progress=Impatient(after)
        )
        few_bits = Rule(("matmul", "gemm"), spec, (None,))
        PassManager((*annotate(rules=(few_bits,)), work)).run(model, context)
        remarks = [str(r) for r in context.remarks if r.pass_name == work.name]
        initializers = model.graph.initializers.values()
        found = {str(v.name): v.meta[INTEGERS][1].q for v in initializers if INTEGERS in v.meta}
        floats = {str(v.name): v.const_value.numpy() for v in initializers if v.const_value}
        return remarks, found | floats

    said, wanted = attempt(None)
    steps = list(fresh)
    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path, after=2)
    done = list(fresh)
    for expected in ([step for step in steps if step not in done], []):
        remarks, found = attempt(tmp_path)
        assert fresh == expected  # the second time, all is known
        assert remarks == said
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[name], data) for name, data in wanted.items())
    assert done
    assert len(done) < len(steps)


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
