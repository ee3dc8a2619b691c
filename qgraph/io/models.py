"""Models on disk: ONNX files with their external data, and folders of onnxruntime-genai."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from qgraph.errors import ModelError
from qgraph.graph.maps import hide_maps, remember_maps
from qgraph.graph.reading import INLINE_BYTES, initializers
from qgraph.graph.types import to_proto
from qgraph.io import safe_tensors
from qgraph.io.external_data import in_memory, settle
from qgraph.io.files import check_writable, read_json, same
from qgraph.io.publication import publish, stage
from qgraph.io.session import OpenSession, open_session
from qgraph.io.soundness import is_sorted, problems
from qgraph.io.sparse import make_dense

SOURCE = "qgraph.source"
"""Where a loaded model remembers its file, a Path, in `model.meta`."""
FOLDER = "qgraph.folder"
"""The folder that was loaded, a Path, or None for a lone file."""
DATA = "qgraph.data"
"""The external data files that belong to the loaded file, a tuple of Paths."""

EXTERNAL_BYTES = 100 << 20
"""Models whose weights take more than this are saved with external data."""

GENAI_CONFIG = "genai_config.json"
_ALIGNMENT = 4096


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read a model; weights in external data stay memory-mapped, so its size does not matter.

    Every opset loads; passes are written for opset 11 and newer. Operators of foreign domains,
    functions and control-flow bodies are kept as they are. The model remembers where it came
    from, see :func:`source_files`.

    Args:
        path: an ONNX file, or a folder with `genai_config.json` and the decoder it names, with a
            `model.onnx`, or with just one `.onnx` file.

    Raises:
        ModelError: there is no model, it cannot be parsed, or its external data is missing, too
            short or outside its folder.
    """
    # Not resolved: in a folder of symbolic links, external data lies beside the link.
    given = Path(os.path.abspath(path))
    folder = given if given.is_dir() else None
    file = _model_in(folder) if folder else given
    model = _read(file)
    model.meta[SOURCE] = file
    model.meta[FOLDER] = folder
    model.meta[DATA] = settle(model, file, INLINE_BYTES)
    return model


def _model_in(folder: Path) -> Path:
    """The model file of a folder."""
    config = folder / GENAI_CONFIG
    if config.is_file():
        return folder / _decoder_name(config)
    if (folder / "model.onnx").is_file():
        return folder / "model.onnx"
    names = sorted(path.name for path in folder.glob("*.onnx"))
    if not names:
        raise ModelError(
            f"{folder} holds no model: give an .onnx file or a folder with a model.onnx"
        )
    if len(names) > 1:
        raise ModelError(f"{folder} holds several models: give one of {', '.join(names)}")
    return folder / names[0]


def _decoder_name(config: Path) -> Path:
    try:
        name = Path(read_json(config)["model"]["decoder"]["filename"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{config} names no model.decoder.filename: repair it") from error
    if name.is_absolute() or ".." in name.parts:
        raise ModelError(f"{config} names {name}, outside its folder: move the model into it")
    return name


def _read(file: Path) -> ir.Model:
    if not file.exists():
        raise ModelError(f"{file} does not exist: check the path")
    if not file.is_file():
        raise ModelError(f"{file} is not a file: give an .onnx file")
    try:
        if file.stat().st_size == 0:
            raise ModelError(f"{file} is empty: export or download it again")
        proto = onnx.load(file, load_external_data=False)
        _check(proto, file)
        make_dense(proto)
        maps = hide_maps(proto)
        model = ir.from_proto(proto)
        remember_maps(model, maps)
        ir.external_data.set_base_dir(model.graph, file.parent)
        if not is_sorted(proto.graph):
            _sort(model, file)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}") from error
    except ModelError:
        raise
    except Exception as error:  # the parsers raise whatever the damage leads to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{file} is not an ONNX model, or is truncated: {reason}") from error
    return model


def _check(proto: onnx.ModelProto, file: Path) -> None:
    if not proto.graph.output or not proto.opset_import:
        missing = "outputs" if not proto.graph.output else "opset"
        raise ModelError(
            f"{file} is not a complete ONNX model, it has no {missing}: export it again"
        )
    if (problem := next(problems(proto), None)) is not None:
        raise ModelError(f"{file} is not a sound ONNX model: {problem}: export it again")


def _sort(model: ir.Model, file: Path) -> None:
    try:
        model.graph.sort()
    except ValueError as error:
        raise ModelError(
            f"{file} is not a sound ONNX model: nodes wait for each other: export it again"
        ) from error


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    run_check: bool = True,
    open_session: OpenSession = open_session,
    safetensors: bool = False,
    examine: Callable[[Any], None] | None = None,
) -> None:
    """Write a model; it appears at `path` complete and checked, or not at all.

    Weights go into `<name>.data` beside the model where they take more than 100 MB, one after the
    other: lazy tensors are computed and external ones copied in their turn. A model that was
    loaded from a folder becomes a folder with the other files of that one, unless `path` ends in
    `.onnx`. A model that already stands at `path` is replaced; the input never is.

    Args:
        model: left as it is.
        path: a file; for a model that came as a folder, a folder that is new or holds such a model.
        run_check: whether onnxruntime must be able to load the result. Turn it off for models that
            it could not load before either, because of operators that it does not know.
        open_session: of the target that the model is for.
        safetensors: all weights go into `<stem>.safetensors`, which tools of that name read, too.
        examine: is given a session on what was written, at each optimization level; it raises a
            ModelError if it finds fault.

    Raises:
        ModelError: `path` cannot be used (see :func:`check_output`), the disk is full, or the
            result does not load. Nothing is left behind then, and what stood at `path` still does.
    """
    check_output(model, path)
    out = Path(os.path.abspath(path))
    name = _name_in_folder(model, out)
    root = out if name else out.parent
    name = name or Path(out.name)
    file = root / name
    with _os_errors(out), stage(out) as staged:
        if root == out:
            _copy_companions(model, staged)
        new = staged / name
        new.parent.mkdir(parents=True, exist_ok=True)
        _write(model, new, _free_data_name(file, safetensors), safetensors)
        check_reload(new, run=run_check, open_session=open_session, examine=examine)
        with suppress(FileNotFoundError):
            shutil.copymode(file, new)
        given = {path.resolve() for path in model.meta.get(DATA, ())}
        stale = {str(path.relative_to(root.resolve())) for path in _own_data(file) - given}
        publish(staged, root, name, stale)


def source_files(model: ir.Model) -> list[Path]:
    """The file that `model` was loaded from, then its external data; empty if it was not loaded."""
    file: Path | None = model.meta.get(SOURCE)
    return [] if file is None else [file, *model.meta[DATA]]


def files_read(model: ir.Model) -> Iterator[Path]:
    """The files of the model that `model` was loaded from, and those that come with it."""
    yield from source_files(model)
    folder: Path | None = model.meta.get(FOLDER)
    if folder is not None:
        yield from (path for path in folder.rglob("*") if path.is_file())


def files_written(model: ir.Model, path: str | os.PathLike[str]) -> Callable[[Path], bool]:
    """Whether :func:`save` may write a file when it writes `model` to `path`."""
    out = Path(os.path.abspath(path))
    if _name_in_folder(model, out):
        return lambda other: other.resolve().is_relative_to(out.resolve())
    data = _data_names(out)

    def written(other: Path) -> bool:
        place = other.resolve()
        beside = place.parent == out.parent.resolve()
        return same(other, out) or (beside and data.fullmatch(place.name) is not None)

    return written


def check_output(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Whether :func:`save` can write `model` to `path`, to be asked before long work.

    Raises:
        ModelError: `path` is the input or holds something else than such a model, its folder does
            not exist or cannot be written.
    """
    out = Path(os.path.abspath(path))
    name = _name_in_folder(model, out)
    if name:
        folder = model.meta[FOLDER].resolve()
        resolved = out.resolve()
        if resolved.is_relative_to(folder) or folder.is_relative_to(resolved):
            raise ModelError(f"{out} overlaps the input folder {folder}: give another folder")
        if out.exists() and not out.is_dir():
            raise ModelError(f"{out} is a file, but this model is a folder: give another name")
        if out.is_dir() and any(out.iterdir()) and not (out / name).is_file():
            raise ModelError(f"{out} holds other files: give a new folder or an empty one")
    else:
        if out.is_dir():
            raise ModelError(f"{out} is a folder: give a file name, such as {out / 'model.onnx'}")
        if out.exists() and any(same(out, path) for path in files_read(model)):
            raise ModelError(f"{out} belongs to the input model: give another name")
        if out.exists() and not _is_model(out):
            raise ModelError(f"{out} exists and is not a model: remove it or give another name")
        check_writable(out)
    if not out.parent.is_dir():
        raise ModelError(f"{out.parent} does not exist: create that folder first")
    with _os_errors(out), stage(out):
        pass


def _name_in_folder(model: ir.Model, out: Path) -> Path | None:
    """Where the model lies in its folder, None if it is to be a lone file."""
    folder: Path | None = model.meta.get(FOLDER)
    if folder is None or out.suffix == ".onnx":
        return None
    return Path(model.meta[SOURCE]).relative_to(folder)


@contextmanager
def _os_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except shutil.Error as error:
        raise ModelError(f"cannot write {out}: {error.args[0][0][-1]}") from error
    except OSError as error:
        # numpy counts the elements that it could not write, but drops the system's reason.
        reason = error.strerror or f"{error} (no space left on device?)"
        raise ModelError(f"cannot write {out}: {reason}") from error


def _is_model(file: Path) -> bool:
    try:
        _read(file)
    except ModelError:
        return False
    return True


def _own_data(file: Path) -> set[Path]:
    """The data files that :func:`save` wrote beside the model in `file`, if there is one."""
    if not file.is_file():
        return set()
    tensors = (value.const_value for value in initializers(_read(file)))
    locations = {str(t.location) for t in tensors if isinstance(t, ir.ExternalTensor)}
    own = _data_names(file)
    folder = file.parent.resolve()
    return {folder / n for n in locations if own.fullmatch(n) and (folder / n).is_file()}


def _data_names(file: Path) -> re.Pattern[str]:
    """The names of its data that a model in `file` may have."""
    name, stem = re.escape(file.name), re.escape(file.stem)
    return re.compile(rf"{name}(\.\d+)?\.data|{stem}(\.\d+)?\.safetensors")


def _free_data_name(file: Path, safetensors: bool) -> str:
    """A name that no file has: the model that is to be replaced keeps its data until then."""
    base, ending = (file.stem, "safetensors") if safetensors else (file.name, "data")
    name, count = f"{base}.{ending}", 0
    while (file.parent / name).exists():
        count += 1
        name = f"{base}.{count}.{ending}"
    return name


def _copy_companions(model: ir.Model, stage: Path) -> None:
    """Copy the input folder (tokenizer, configuration) without the model and hidden files."""
    replaced = source_files(model)

    def ignored(folder: str, names: list[str]) -> list[str]:
        return [n for n in names if n.startswith(".") or Path(folder, n) in replaced]

    shutil.copytree(model.meta[FOLDER], stage, ignore=ignored, dirs_exist_ok=True)


def _write(model: ir.Model, file: Path, data_name: str, safetensors: bool) -> None:
    """Serialise `model`, with its larger weights in `data_name` if they are many."""
    copy = model.clone()
    pairs = [(v, v.const_value) for v in initializers(copy) if v.const_value is not None]
    large = [
        (value, tensor)
        for value, tensor in pairs
        if tensor.dtype != ir.DataType.STRING and tensor.nbytes > INLINE_BYTES
    ]
    for value, tensor in pairs:
        tensor.name = value.name  # serialisation goes by the tensor's name
    outside = large if sum(tensor.nbytes for _, tensor in large) > EXTERNAL_BYTES else []
    if safetensors:
        outside = [(value, tensor) for value, tensor in pairs if safe_tensors.is_weight(tensor)]
        written = safe_tensors.write([tensor for _, tensor in outside], file.parent / data_name)
    elif outside:
        tensors = [tensor for _, tensor in outside]
        written = ir.external_data.convert_tensors_to_external(
            tensors, file.parent, data_name, alignment=_ALIGNMENT
        )
    for (value, _), external in zip(outside, written, strict=True) if outside else ():
        value.const_value = external
    for value, tensor in pairs:
        if value.const_value is tensor and isinstance(tensor, ir.ExternalTensor):
            value.const_value = in_memory(tensor)
    file.write_bytes(to_proto(copy).SerializeToString())


def check_reload(
    path: str | os.PathLike[str],
    *,
    run: bool = True,
    open_session: OpenSession = open_session,
    examine: Callable[[Any], None] | None = None,
) -> None:
    """Open a written model: that it parses, that its data is there, with `run` also in onnxruntime,
    without optimizations and with all of them.

    Raises:
        ModelError: it cannot be opened; the message holds the reason.
    """
    load(path)
    for optimized in (False, True) if run else ():
        try:  # without packing, which would copy the weights
            session = open_session(Path(path), optimized=optimized, prepack=False)
        except ModelError as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise ModelError(f"onnxruntime cannot load the result: {reason}") from error
        if examine is not None:
            examine(session)
