"""Files and texts damaged at random: one line, or a result; never a traceback, nor a long wait.

`python -m tests.end_to_end.test_damage 1000` tries that many, and prints what went wrong.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from google.protobuf.message import Message  # type: ignore[import-untyped]

from qgraph.cli import main
from tests.models import feed, if_model, mlp, small_convnet, transformer_block
from tests.passes.test_load_checkpoint import floats, graph, saved

COUNT = 150
SECONDS = 10
PIPELINE = "canonicalize,fuse,annotate,insert-observers{channel_means=true},calibrate,insert-qdq"
COMMAND = "compile model.onnx -o out.onnx -t onnx -c data.npz --cache cache -r "
MODELS: tuple[Callable[[], ir.Model], ...] = (mlp, small_convnet, transformer_block, if_model)


# --- what is damaged, and how ---------------------------------------------------------------------


def _bytes(path: Path, random: Random) -> None:
    """Bytes that are other ones, gone, there twice, or in front."""
    data = bytearray(path.read_bytes())
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(len(data)) if data else 0
        size = random.choice((1, 4, 64))
        match random.randrange(5):
            case 0:
                data[at : at + size] = random.randbytes(size)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[at : at + size]
            case _:
                data[at : at + size] = bytes(size)
    path.write_bytes(data)


def _message(path: Path, random: Random) -> None:
    """A field of the model that is another one."""
    proto = onnx.load(path, load_external_data=False)
    for _ in range(random.choice((1, 1, 2))):
        message: Message = proto
        while True:
            field, value = random.choice(message.ListFields())
            items = value if field.is_repeated else [value]
            inner = [m for m in items if isinstance(m, Message) and m.ListFields()]
            if inner and random.random() < 0.9:
                message = random.choice(inner)
                continue
            break
        with contextlib.suppress(ValueError):  # out of the field's range
            _change(message, field.name, value, field.is_repeated, random)
    path.write_bytes(proto.SerializeToString())


def _change(message: Message, name: str, value: object, several: bool, random: Random) -> None:
    numbers = (0, 1, -1, 2, 3, 7, 99, 1 << 31, (1 << 63) - 1, -(1 << 62))
    if several:
        items = getattr(message, name)
        at = random.randrange(len(items))
        if isinstance(items[at], Message):
            random.choice((lambda: items.pop(at), lambda: items.add().CopyFrom(items[at])))()
        elif random.random() < 0.4:
            items.pop(at)
        else:
            items[at] = _other(items[at], numbers, random)
        return
    if isinstance(value, Message) or random.random() < 0.3:
        message.ClearField(name)
        return
    setattr(message, name, _other(value, numbers, random))


def _other(value: object, numbers: tuple[int, ...], random: Random) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice(numbers) if random.random() < 0.7 else value + random.choice((1, -1))
    if isinstance(value, float):
        return random.choice((0.0, -1.0, 1e38, float("nan"), float("inf")))
    if isinstance(value, bytes):
        return random.choice((b"", value[:-1], value + b"x", random.randbytes(len(value))))
    return random.choice(("", "x", "y", "w0", f"{value}x", "Relu", "MatMul", "é\n\0"))


def _json(path: Path, random: Random) -> None:
    """A value of a JSON file that is another one."""
    told = json.loads(path.read_text())
    place = told
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = random.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and random.random() < 0.8:
            place = place[key]
            continue
        break
    deep: object = []
    for _ in range(300):
        deep = [deep]
    others: list[object] = [None, -1, 0, 3, 1e400, "", "../x", [], {}, {"a": 1}, [1], True, 1 << 70]
    place[key] = random.choice([*others, deep])
    path.write_text(json.dumps(told))


def _text(text: str, random: Random) -> str:
    for _ in range(random.choice((1, 2, 5))):
        at = random.randrange(len(text) + 1)
        piece = random.choice(
            ("{", "}", "=", ",", '"', "\\", "é", "\n", ":", "none", "-1", "1e999")
        )
        text = random.choice((text[:at] + piece + text[at:], text[:at] + text[at + 3 :], text[:at]))
    return text


# --- commands over it -----------------------------------------------------------------------------


def _model(folder: Path, random: Random) -> str:
    model = random.choice(MODELS)()
    ir.save(model, folder / "model.onnx")
    _data(model, folder)
    random.choice((_bytes, _message, _message, _message))(folder / "model.onnx", random)
    return COMMAND + random.choice(("static", "dynamic", "gptq", "smoothquant", "awq", "rtn"))


def _data(model: ir.Model, folder: Path) -> None:
    np.savez(folder / "data.npz", **feed(model))  # type: ignore[arg-type]


def _npz(folder: Path, random: Random) -> str:
    ir.save(mlp(), folder / "model.onnx")
    x = np.zeros((4, 16), np.float32) + np.arange(16, dtype=np.float32)
    random.choice((np.savez, np.savez_compressed))(folder / "data.npz", x=x)
    _bytes(folder / "data.npz", random)
    return COMMAND + "static"


def _checkpoint(folder: Path, random: Random) -> str:
    kind = random.choice(("gptq", "awq", "nf4"))
    saved(folder / "ck", kind)
    ir.save(graph(floats()), folder / "model.onnx")
    parts = sorted((folder / "ck").iterdir())
    part = random.choice(parts)
    damage = _json if part.suffix == ".json" and random.random() < 0.7 else _bytes
    damage(part, random)
    return "compile model.onnx -o out.onnx -t onnx -r checkpoint --set path=ck"


def _folder(folder: Path, random: Random) -> str:
    (folder / "in").mkdir()
    ir.save(mlp(), folder / "in/model.onnx")
    names = {"inputs": {"input_ids": "x"}, "outputs": {"logits": "y"}}
    decoder = {"filename": "model.onnx", "head_size": 4, "num_key_value_heads": 2, **names}
    config = {"model": {"decoder": decoder, "type": "x"}}
    (folder / "in/genai_config.json").write_text(json.dumps(config))
    random.choice((_json, _bytes))(folder / "in/genai_config.json", random)
    return "compile in -o out -t onnx -r dynamic"


def _caches(folder: Path, random: Random) -> str:
    recipe = random.choice(("static", "gptq", "awq"))
    model = mlp()
    ir.save(model, folder / "model.onnx")
    _data(model, folder)
    command = COMMAND + recipe
    assert main(command.split()) == 0
    kept = [path for path in (folder / "cache").rglob("*") if path.is_file()]
    for path in kept:
        _bytes(path, random)
    return command


def _pipeline(folder: Path, random: Random) -> str:
    ir.save(mlp(), folder / "model.onnx")
    _data(mlp(), folder)
    (folder / "text").write_text(_text(PIPELINE, random))
    return "opt model.onnx -o out.onnx -t onnx -c data.npz -p"


KINDS: dict[str, tuple[int, Callable[[Path, Random], str]]] = {
    "model": (10, _model),
    "npz": (5, _npz),
    "checkpoint": (4, _checkpoint),
    "folder": (3, _folder),
    "caches": (4, _caches),
    "pipeline": (4, _pipeline),
}
"""What is damaged, in which share."""


def _cases(count: int) -> Iterator[tuple[str, int]]:
    whole = sum(share for share, _ in KINDS.values())
    for kind, (share, _) in KINDS.items():
        yield from ((kind, seed) for seed in range(count * share // whole))


def _run(kind: str, seed: int, folder: Path) -> tuple[int, float]:
    """Status and seconds of a command over damaged files in the current, empty folder."""
    command = KINDS[kind][1](folder, Random(f"{kind} {seed}")).split()
    if kind == "pipeline":
        command.append((folder / "text").read_text())
    began = time.monotonic()
    return main(command), time.monotonic() - began


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_one_line_or_no_matter(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, seed in _cases(COUNT):
        if name != kind:
            continue
        folder = tmp_path / str(seed)
        folder.mkdir()
        monkeypatch.chdir(folder)
        status, seconds = _run(kind, seed, folder)
        told = capfd.readouterr().err
        assert status in ((0,) if kind == "caches" else (0, 2)), (kind, seed, told)
        assert told.count("\n") == (status == 2), (kind, seed, told)
        assert seconds < SECONDS, (kind, seed)
        left = {path.name for path in folder.iterdir() if path.name.startswith((".", "out"))}
        assert not left - ({"out.onnx", "out", "out.onnx.data"} if status == 0 else set()), seed


if __name__ == "__main__":
    import io
    import os
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    only = sys.argv[2:] or list(KINDS)
    for kind, seed in _cases(int(sys.argv[1])):
        if kind not in only:
            continue
        folder = Path(tempfile.mkdtemp())
        os.chdir(folder)
        told = io.StringIO()
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            status, seconds = _run(kind, seed, folder)
        lines = told.getvalue().splitlines()
        fine = status in ((0,) if kind == "caches" else (0, 2)) and len(lines) == (status == 2)
        if not fine or seconds > SECONDS:
            print(kind, seed, status, f"{seconds:.1f} s", lines[-1:], flush=True)
        shutil.rmtree(folder)
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, "MB")
