"""Reading and writing models, and everything that can go wrong with files."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qgraph.errors import ModelError
from qgraph.io import models as model_io
from qgraph.io.models import DATA, FOLDER, SOURCE, check_output, check_reload, load, save
from tests.killing import killed_at

WEIGHT = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((2, 32)).astype(np.float32)


def build(
    weight: np.ndarray | ir.TensorProtocol = WEIGHT, op: str = "MatMul", domain: str = ""
) -> ir.Model:
    """y = x @ w."""
    tensor = ir.Tensor(weight, name="w") if isinstance(weight, np.ndarray) else weight
    x = ir.Value(name="x", shape=ir.Shape(["n", 32]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype))
    w.const_value = tensor
    node = ir.node(op, [x, w], domain=domain, name="linear")
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape(["n", 32]), ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 21} | ({domain: 1} if domain else {})
    graph = ir.Graph([x], [y], nodes=[node], initializers=[w], opset_imports=opsets, name="g")
    return ir.Model(graph, ir_version=10)


def run(path: Path) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": X})[0])


def external_model(folder: Path, name: str = "model.onnx", location: str = "w.bin") -> Path:
    """A file whose weight lies in `location`; the data file is always `folder`/w.bin."""
    folder.mkdir(parents=True, exist_ok=True)
    WEIGHT.tofile(folder / "w.bin")
    tensor = ir.ExternalTensor(
        location, 0, WEIGHT.nbytes, ir.DataType.FLOAT, shape=ir.Shape([32, 32]), name="w"
    )
    ir.save(build(tensor), folder / name)
    return folder / name


def genai_folder(folder: Path) -> Path:
    external_model(folder, "decoder.onnx")
    config = {"model": {"decoder": {"filename": "decoder.onnx"}}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "vocab.txt").write_text("a\nb\n")
    (folder / ".cache").write_text("not part of the model")
    return folder


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too: nothing half-written may be left."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """External data from 2 kB on, so that tests stay small."""
    monkeypatch.setattr(model_io, "EXTERNAL_BYTES", 2048)


# Reading


def test_file_stays_mapped_and_remembers_where_it_came_from(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    model = load(path)
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert model.meta[SOURCE] == path
    assert model.meta[FOLDER] is None
    assert model.meta[DATA] == (tmp_path / "w.bin",)


def test_relative_path_survives_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    external_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = load("model.onnx")
    monkeypatch.chdir("/")
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    assert np.array_equal(tensor.numpy(), WEIGHT)


def test_genai_folder(tmp_path: Path) -> None:
    model = load(genai_folder(tmp_path / "m"))
    assert model.meta[SOURCE] == tmp_path / "m" / "decoder.onnx"
    assert model.meta[FOLDER] == tmp_path / "m"


def test_folder_without_config(tmp_path: Path) -> None:
    external_model(tmp_path / "named", "model.onnx")
    shutil.copy(tmp_path / "named" / "model.onnx", tmp_path / "named" / "other.onnx")
    assert load(tmp_path / "named").meta[SOURCE].name == "model.onnx"
    external_model(tmp_path / "single", "net.onnx")
    assert load(tmp_path / "single").meta[SOURCE].name == "net.onnx"


def test_links_of_a_download_cache(tmp_path: Path) -> None:
    external_model(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name, blob in (("model.onnx", "0123"), ("w.bin", "4567")):
        (tmp_path / "blobs" / name).rename(tmp_path / "blobs" / blob)
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{blob}")
    save(load(tmp_path / "snapshot" / "model.onnx"), tmp_path / "out.onnx")
    assert np.array_equal(run(tmp_path / "out.onnx"), X @ WEIGHT)


def test_hard_links_of_an_installer(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    os.link(tmp_path / "w.bin", tmp_path / "again.bin")
    save(load(path), tmp_path / "out.onnx")
    assert np.array_equal(run(tmp_path / "out.onnx"), X @ WEIGHT)


def test_external_constants_and_small_weights_are_read(tmp_path: Path) -> None:
    WEIGHT.tofile(tmp_path / "w.bin")
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", 32]) for n in "xy")

    def stored(name: str, size: int, shape: list[int]) -> onnx.TensorProto:
        tensor = ir.ExternalTensor(
            "w.bin", 0, size, ir.DataType.FLOAT, shape=ir.Shape(shape), name=name
        )
        return ir.to_proto(tensor)

    nodes = [
        onnx.helper.make_node("Constant", [], ["w"], value=stored("w", WEIGHT.nbytes, [32, 32])),
        onnx.helper.make_node("MatMul", ["x", "w"], ["z"]),
        onnx.helper.make_node("Add", ["z", "b"], ["y"]),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], [stored("b", 128, [32])])
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx"
    )
    model = load(tmp_path / "m.onnx")
    assert not isinstance(model.graph.initializers["b"].const_value, ir.ExternalTensor)
    (tmp_path / "elsewhere").mkdir()
    save(model, tmp_path / "elsewhere" / "out.onnx")
    assert np.allclose(run(tmp_path / "elsewhere" / "out.onnx"), X @ WEIGHT + WEIGHT[0], atol=1e-5)


def broken(make: Callable[[Path], Path | None], tmp_path: Path) -> str:
    path = make(tmp_path) or tmp_path / "model.onnx"
    with pytest.raises(ModelError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path) in message
    return message


def _truncated(folder: Path) -> None:
    ir.save(build(), folder / "model.onnx")
    content = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(content[: len(content) // 2])


def _without_outputs(folder: Path) -> None:
    model = build()
    model.graph.outputs.clear()
    ir.save(model, folder / "model.onnx")


def _cut_data(folder: Path) -> None:
    external_model(folder)
    with open(folder / "w.bin", "r+b") as file:
        file.truncate(WEIGHT.nbytes - 1)


def _missing_data(folder: Path) -> None:
    external_model(folder)
    (folder / "w.bin").unlink()


def _link_out(folder: Path) -> Path:
    path = external_model(folder / "m")
    (folder / "m" / "w.bin").rename(folder / "secret.bin")
    (folder / "m" / "w.bin").symlink_to(folder / "secret.bin")
    return path


def _climbing(folder: Path) -> Path:
    external_model(folder)
    return external_model(folder / "m", location="../w.bin")


def _absolute(folder: Path) -> Path:
    return external_model(folder, location=str(folder / "w.bin"))


def _unreadable_config(folder: Path) -> Path:
    (genai_folder(folder / "m") / "genai_config.json").write_text('{"model": {}}')
    return folder / "m"


def _climbing_config(folder: Path) -> Path:
    config = {"model": {"decoder": {"filename": "../model.onnx"}}}
    (genai_folder(folder / "m") / "genai_config.json").write_text(json.dumps(config))
    return folder / "m"


def _dangling_config(folder: Path) -> Path:
    (genai_folder(folder / "m") / "decoder.onnx").unlink()
    return folder / "m"


def _two_models(folder: Path) -> Path:
    external_model(folder, "a.onnx")
    external_model(folder, "b.onnx")
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder, "holds no model"),
        (_two_models, "give one of a.onnx, b.onnx"),
        (lambda folder: (folder / "model.onnx").write_bytes(b"") and None, "is empty"),
        (
            lambda folder: (folder / "model.onnx").write_text("hello\n") and None,
            "not an ONNX model",
        ),
        (lambda folder: (folder / "model.onnx").write_bytes(b"\x08\x08") and None, "no outputs"),
        (_truncated, "truncated"),
        (_without_outputs, "no outputs"),
        (_missing_data, "put w.bin into"),
        (_cut_data, "cut off in w.bin"),
        (_climbing, "outside the model's folder (../w.bin)"),
        (_absolute, "outside the model's folder"),
        (_link_out, "link out of the model's folder"),
        (_unreadable_config, "names no model.decoder.filename"),
        (_climbing_config, "outside its folder"),
        (_dangling_config, "decoder.onnx does not exist"),
    ],
)
def test_bad_input_ends_in_one_line(
    make: Callable[[Path], Path | None], says: str, tmp_path: Path
) -> None:
    assert says in broken(make, tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_ends_in_an_error_or_a_model(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(ir.to_proto(build()).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 120))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damage") / "model.onnx"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        load(path)
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017


# Writing


def test_small_model_is_one_file(tmp_path: Path) -> None:
    save(build(), tmp_path / "out.onnx")
    assert list(listing(tmp_path)) == ["out.onnx"]
    assert np.array_equal(run(tmp_path / "out.onnx"), X @ WEIGHT)


@pytest.mark.usefixtures("small_limit")
def test_large_model_gets_external_data(tmp_path: Path) -> None:
    model = build()
    tensor = model.graph.initializers["w"].const_value
    save(model, tmp_path / "out.onnx")
    assert sorted(listing(tmp_path)) == ["out.onnx", "out.onnx.data"]
    assert model.graph.initializers["w"].const_value is tensor
    assert np.array_equal(run(tmp_path / "out.onnx"), X @ WEIGHT)


@pytest.mark.usefixtures("small_limit")
def test_external_weights_are_copied_to_another_folder(tmp_path: Path) -> None:
    model = load(external_model(tmp_path / "in"))
    (tmp_path / "out").mkdir()
    save(model, tmp_path / "out" / "m.onnx")
    shutil.rmtree(tmp_path / "in")
    assert np.array_equal(run(tmp_path / "out" / "m.onnx"), X @ WEIGHT)


def test_external_weights_of_a_small_model_come_inside(tmp_path: Path) -> None:
    model = load(external_model(tmp_path / "in"))
    save(model, tmp_path / "m.onnx")
    shutil.rmtree(tmp_path / "in")
    assert np.array_equal(run(tmp_path / "m.onnx"), X @ WEIGHT)


@pytest.mark.usefixtures("small_limit")
def test_replacing_a_model_replaces_its_data(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    for factor in (1, 2, 3):
        save(build(WEIGHT * factor), out)
        assert len(listing(tmp_path)) == 2
        assert np.array_equal(run(out), X @ (WEIGHT * factor))


def test_replacing_a_large_model_by_a_small_one_removes_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(model_io, "EXTERNAL_BYTES", 0)
        save(build(), tmp_path / "out.onnx")
    save(build(), tmp_path / "out.onnx")
    assert list(listing(tmp_path)) == ["out.onnx"]


@pytest.mark.usefixtures("small_limit")
def test_saving_is_deterministic(tmp_path: Path) -> None:
    contents = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        save(build(), folder / "out.onnx")
        contents.append(listing(folder))
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    "dtype", [ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.FLOAT16]
)
@pytest.mark.usefixtures("small_limit")
def test_dtypes_survive(dtype: ir.DataType, tmp_path: Path) -> None:
    values = np.arange(65 * 99).reshape(65, 99) % 8
    model = build()
    extra = ir.Value(name="q", const_value=ir.Tensor(values.astype(dtype.numpy()), name="q"))
    extra.shape, extra.type = ir.Shape([65, 99]), ir.TensorType(dtype)
    model.graph.register_initializer(extra)
    for step in ("first", "second"):
        (tmp_path / step).mkdir()
        save(model, tmp_path / step / "out.onnx")
        model = load(tmp_path / step / "out.onnx")
        tensor = model.graph.initializers["q"].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.dtype == dtype
        assert np.array_equal(tensor.numpy().astype(np.int64), values)


@pytest.mark.usefixtures("small_limit")
def test_strings_stay_inside(tmp_path: Path) -> None:
    model = build()
    words = ir.StringTensor([b"a" * 3000, b"b"], shape=ir.Shape([2]), name="words")
    value = ir.Value(name="words", const_value=words, type=ir.TensorType(ir.DataType.STRING))
    model.graph.register_initializer(value)
    save(model, tmp_path / "out.onnx")
    kept = load(tmp_path / "out.onnx").graph.initializers["words"].const_value
    assert isinstance(kept, ir.StringTensor)
    assert kept.string_data()[0] == b"a" * 3000


@pytest.mark.usefixtures("small_limit")
def test_weights_of_control_flow_bodies(tmp_path: Path) -> None:
    numbers = ", ".join(map(str, WEIGHT.ravel().tolist()))
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (bool c, float[n, 32] x) => (float[n, 32] y) {{
      y = If (c) <
        then_branch = t () => (float[n, 32] a) <float[32, 32] w = {{{numbers}}}>
          {{ a = MatMul(x, w) }},
        else_branch = e () => (float[n, 32] b) {{ b = Identity(x) }}>
    }}"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "in.onnx")
    save(load(tmp_path / "in.onnx"), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").stat().st_size == WEIGHT.nbytes
    session = ort.InferenceSession(str(tmp_path / "out.onnx"))
    (y,) = session.run(None, {"x": X, "c": np.array(True)})
    assert np.allclose(y, X @ WEIGHT, atol=1e-5)


def test_foreign_operators_need_no_runtime(tmp_path: Path) -> None:
    model = build(op="Warp", domain="com.example")
    with pytest.raises(ModelError, match="onnxruntime cannot load the result"):
        save(model, tmp_path / "out.onnx")
    assert not listing(tmp_path)
    save(model, tmp_path / "out.onnx", run_check=False)
    assert [node.domain for node in load(tmp_path / "out.onnx").graph] == ["com.example"]


def test_check_reload_finds_missing_data(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    check_reload(path)
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match="is missing"):
        check_reload(path, run=False)


def test_permissions_are_the_usual_ones(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    save(build(), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").stat().st_mode == (tmp_path / "usual").stat().st_mode


# Folders


@pytest.mark.usefixtures("small_limit")
def test_folder_goes_in_and_comes_out(tmp_path: Path) -> None:
    before = listing(genai_folder(tmp_path / "in"))
    model = load(tmp_path / "in")
    expected = [
        "decoder.onnx",
        "decoder.onnx.data",
        "extra/vocab.txt",
        "genai_config.json",
        "tokenizer.json",
    ]
    save(model, tmp_path / "out")
    assert sorted(listing(tmp_path / "out")) == expected
    save(model, tmp_path / "out")  # over itself
    assert len(listing(tmp_path / "out")) == len(expected)
    assert np.array_equal(run(tmp_path / "out" / "decoder.onnx"), X @ WEIGHT)
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")
    assert sorted(listing(tmp_path / "empty")) == expected
    assert listing(tmp_path / "in") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "in", "out"]


def test_folder_saved_as_a_file(tmp_path: Path) -> None:
    save(load(genai_folder(tmp_path / "in")), tmp_path / "out.onnx")
    assert np.array_equal(run(tmp_path / "out.onnx"), X @ WEIGHT)


# Bad output


def _refused(model: ir.Model, out: Path, says: str) -> None:
    for action in (check_output, save):
        with pytest.raises(ModelError) as caught:
            action(model, out)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_input_is_never_overwritten(tmp_path: Path) -> None:
    model = load(external_model(tmp_path))
    before = listing(tmp_path)
    (tmp_path / "link.onnx").symlink_to("model.onnx")
    _refused(model, tmp_path / "model.onnx", "belongs to the input model")
    _refused(model, tmp_path / "w.bin", "belongs to the input model")
    _refused(model, tmp_path / "link.onnx", "belongs to the input model")
    (tmp_path / "link.onnx").unlink()
    assert listing(tmp_path) == before


def test_outputs_that_hold_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.onnx").write_text("dear diary\n")
    (tmp_path / "folder").mkdir()
    _refused(build(), tmp_path / "notes.onnx", "not a model")
    _refused(build(), tmp_path / "folder", "is a folder")
    _refused(build(), tmp_path / "nowhere" / "out.onnx", "does not exist")
    folder_model = load(genai_folder(tmp_path / "in"))
    (tmp_path / "folder" / "diary.txt").write_text("dear diary\n")
    _refused(folder_model, tmp_path / "folder", "holds other files")
    _refused(folder_model, tmp_path / "notes.onnx", "not a model")
    (tmp_path / "file").write_text("")
    _refused(folder_model, tmp_path / "file", "is a file")
    _refused(folder_model, tmp_path / "in", "overlaps the input folder")
    _refused(folder_model, tmp_path / "in" / "out", "overlaps the input folder")
    _refused(folder_model, tmp_path, "overlaps the input folder")


def test_folder_without_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **kwargs: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("os.mkdir", denied)
    _refused(build(), tmp_path / "out.onnx", "Permission denied")


def _lazy(function: Callable[[], np.ndarray]) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: ir.Tensor(function()), ir.DataType.FLOAT, ir.Shape([32, 32]), name="w"
    )


@pytest.mark.usefixtures("small_limit")
def test_lazy_weights_are_computed_while_saving(tmp_path: Path) -> None:
    model = build(_lazy(lambda: WEIGHT * 2))
    save(model, tmp_path / "out.onnx")
    assert np.array_equal(run(tmp_path / "out.onnx"), X @ (WEIGHT * 2))


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_interrupt_leaves_what_was_there(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_io, "EXTERNAL_BYTES", limit)
    save(build(), tmp_path / "out.onnx")
    before = listing(tmp_path)

    def interrupt() -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(build(_lazy(interrupt)), tmp_path / "out.onnx")
    assert listing(tmp_path) == before
    with pytest.raises(KeyboardInterrupt):
        save(build(_lazy(interrupt)), tmp_path / "new.onnx")
    assert listing(tmp_path) == before


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("call", [1, 2])
def test_interrupt_while_files_are_moved(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.onnx"
    save(build(), out)
    before = listing(tmp_path)
    calls = 0
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        nonlocal calls
        calls += Path(target).parent == tmp_path
        if calls == call:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(build(WEIGHT * 2), out)
    assert listing(tmp_path) == before


def _full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "function",
    ["pathlib.Path.write_bytes", "onnx_ir.external_data.convert_tensors_to_external", "os.replace"],
)
@pytest.mark.usefixtures("small_limit")
def test_full_disk_at_any_step(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(external_model(tmp_path))
    save(model, tmp_path / "out.onnx")
    before = listing(tmp_path)
    monkeypatch.setattr(function, _full)
    with pytest.raises(ModelError, match="No space left on device"):
        save(model, tmp_path / "out.onnx")
    assert listing(tmp_path) == before


def test_full_disk_while_the_folder_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(genai_folder(tmp_path / "in"))
    monkeypatch.setattr("shutil.copy2", _full)
    monkeypatch.setattr("shutil.copytree.__defaults__", (False, None, _full, False, False))
    with pytest.raises(ModelError, match="No space left on device"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_limit")
def test_file_size_limit(tmp_path: Path) -> None:
    """The kernel itself refuses to write on, as it does on a full disk."""
    model = build()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, old[1]))
    try:
        with pytest.raises(ModelError, match="no space left"):
            save(model, tmp_path / "out.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not listing(tmp_path)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_tiny_disk(limit: int, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_io, "EXTERNAL_BYTES", limit)
    save(build(), tiny_disk / "out.onnx")
    before = listing(tiny_disk)
    large = np.zeros((32, 32 * 64), np.float32)
    with pytest.raises(ModelError, match=r"(?i)no space left on device"):
        save(build(large), tiny_disk / "out.onnx")
    assert listing(tiny_disk) == before


# Memory


_SCRIPT = """
import resource, sys
import numpy as np
import onnx_ir as ir
from qgraph.io.models import load, save

def quantized(tensor):
    weight = tensor.numpy()
    result = np.round(weight * 100).astype(np.int8)
    del weight
    tensor.release()
    return ir.Tensor(result)

source, out, quantize = sys.argv[1:]
model = load(source)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for value in list(model.graph.initializers.values()):
    tensor = value.const_value
    if quantize == "yes" and isinstance(tensor, ir.ExternalTensor):
        value.const_value = ir.LazyTensor(
            lambda tensor=tensor: quantized(tensor), ir.DataType.INT8, tensor.shape, name=value.name
        )
save(model, out, run_check=quantize == "no")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)
"""


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["no", "yes"])
def test_memory_does_not_grow_with_the_model(quantize: str, tmp_path: Path) -> None:
    """430 MB of weights, 12 MB each, are copied or quantized while saving."""
    model = build()
    (tmp_path / "in").mkdir()
    with open(tmp_path / "in" / "w.bin", "wb") as file:
        for i in range(36):
            np.full((3 << 20,), i, np.float32).tofile(file)
    for i in range(36):
        tensor = ir.ExternalTensor(
            "w.bin",
            i * (12 << 20),
            12 << 20,
            ir.DataType.FLOAT,
            shape=ir.Shape([3 << 20]),
            name=f"v{i}",
        )
        value = ir.Value(name=f"v{i}", const_value=tensor, type=ir.TensorType(ir.DataType.FLOAT))
        model.graph.register_initializer(value)
    ir.save(model, tmp_path / "in" / "model.onnx")
    arguments = [str(tmp_path / "in" / "model.onnx"), str(tmp_path / "out.onnx"), quantize]
    command = [sys.executable, "-c", textwrap.dedent(_SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 120 << 10, "kB; an import of onnxruntime is about half of it"


# Dying at any moment


def test_a_process_that_died_leaves_nothing(tmp_path: Path, small_limit: None) -> None:
    """Killed at each operation on files in turn, then run to its end."""
    for moment in range(1, 99):
        out = tmp_path / str(moment) / "out.onnx"
        out.parent.mkdir()
        save(build(), out)
        write = partial(save, build(2 * WEIGHT), out, run_check=False)
        died = killed_at(moment, write, signal.SIGKILL) == -signal.SIGKILL
        assert any(np.array_equal(run(out), factor * (X @ WEIGHT)) for factor in (1, 2))
        save(build(4 * WEIGHT), out)
        assert np.array_equal(run(out), 4 * (X @ WEIGHT))
        assert len(listing(out.parent)) == 2
        if not died:
            break
    assert moment > 8
