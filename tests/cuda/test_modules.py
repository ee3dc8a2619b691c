"""Lowered models as torch modules."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, fx, nn

import qgraph
from qgraph.backends.cuda import modules
from qgraph.backends.cuda.modules import Int8Linear
from qgraph.errors import ModelError, QGraphError
from qgraph.io.session import open_session, run
from tests import models

NOISE = {None: 1e-9, torch.float16: 0.03, torch.bfloat16: 0.15}
PRECISIONS = {"cuda": None, "cuda:f16": torch.float16, "cuda:bf16": torch.bfloat16}


def compiled(
    model: ir.Model, recipe: str = "dynamic", target: str = "cuda"
) -> qgraph.CompiledModel:
    feeds = [models.feed(model, seed) for seed in range(4)]
    return qgraph.compile(model, recipe, feeds, target, verify=True)


def tensors(model: ir.Model, seed: int = 9) -> dict[str, Tensor]:
    return {name: torch.from_numpy(a) for name, a in models.feed(model, seed).items()}


@pytest.mark.parametrize("recipe", ["w8a8", "dynamic"])
@pytest.mark.parametrize("build", [models.mlp, models.transformer_block, models.if_model])
def test_a_module_computes_what_onnxruntime_does(
    recipe: str, build: Callable[[], ir.Model]
) -> None:
    model = build()
    result, given = compiled(model, recipe), tensors(model)
    assert isinstance(result.module, fx.GraphModule)
    found = result(given)
    assert isinstance(found, Tensor)
    feed = {name: t.numpy() for name, t in given.items()}
    wanted = run(open_session(result.model, optimized=False), feed)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    array = result(feed)  # arrays in, arrays out, in onnxruntime
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, wanted)


def test_products_alone_are_equal_to_onnxruntime_bit_for_bit() -> None:
    model = models.mlp((48, 96, 32, 8))
    result = compiled(model)
    given = torch.randn(64, 48)
    wanted = run(open_session(result.model), {"x": given.numpy()})[0]
    np.testing.assert_array_equal(result(given), wanted)


@pytest.mark.parametrize(("target", "precision"), PRECISIONS.items())
@pytest.mark.parametrize("recipe", ["w8a8", "dynamic"])
def test_what_stays_float_is_multiplied_in_the_targets_precision(
    target: str, precision: torch.dtype | None, recipe: str
) -> None:
    model = models.transformer_block(outlier=20.0)
    result, given = compiled(model, recipe, target), tensors(model)
    wanted = compiled(model, recipe)(given)
    noise = (result(given) - wanted).norm() / wanted.norm()
    assert noise < NOISE[precision]
    kinds = {t.dtype for name, t in result.module.state_dict().items() if "outliers" in name}
    kinds -= {torch.int64}
    assert kinds <= {precision or torch.float32}
    assert kinds or recipe == "dynamic"


def test_a_bias_behind_outliers_has_a_place_of_its_own() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    model = qgraph.trace(net, torch.zeros(2, 3, 16), {"input": {0: "batch"}})
    x = torch.randn(8, 3, 16) * torch.tensor([50.0, *[1.0] * 15])
    result = qgraph.compile(model, "llm-int8", [{"input": x.numpy()}], "cuda", share=0.1)
    assert any("outliers" in str(n.name) for n in result.model.graph)
    wanted = run(open_session(result.model), {"input": x.numpy()})[0]
    np.testing.assert_allclose(result(x), wanted, rtol=1e-5, atol=1e-5)


def test_outliers_survive_float16() -> None:
    """Factors that hush them in float32 are beyond float16."""
    model = models.transformer_block(outlier=1000.0)
    for target in PRECISIONS:
        for value in compiled(model, "w8a8", target).model.graph.initializers.values():
            array = value.const_value.numpy() if value.const_value is not None else np.zeros(0)
            if array.dtype.kind == "f":
                assert np.abs(array.astype(np.float32)).max(initial=0) < 2**20, value.name


def test_peaks_beyond_float16_are_told() -> None:
    model = models.mlp()
    feeds = [{"x": np.full((2, 16), 70000.0, np.float32)}]
    for target, told in (("cuda", False), ("cuda:f16", True), ("cuda:bf16", False)):
        remarks = qgraph.compile(model, "w8a8", feeds, target).remarks
        assert any("bfloat16" in r.message for r in remarks.warnings()) == told


# ---------------------------------------------------------------------------- what is kept

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "to bfloat16": lambda m: m.to(torch.bfloat16),
    "type": lambda m: m.type(torch.float16),
    "double and back": lambda m: m.double().float(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "half, then deepcopy": lambda m: copy.deepcopy(m.half()),
}


def bits(module: nn.Module) -> dict[str, bytes]:
    """Everything that int8 layers hold, byte by byte."""
    return {
        f"{path}.{name}: {value.dtype} {tuple(value.shape)}": value.numpy().tobytes()
        for path, part in module.named_modules()
        if isinstance(part, Int8Linear)
        for name, value in part.state_dict().items()
    }


@pytest.mark.parametrize("how", COPIES)
def test_quantized_weights_and_scales_keep_their_bits(how: str) -> None:
    module = compiled(models.mlp()).module
    before = bits(module)
    assert len(before) == 7  # the second layer has sums, too
    assert bits(COPIES[how](module)) == before


@pytest.mark.parametrize("target", PRECISIONS)
def test_copies_compute_the_same(target: str) -> None:
    model = models.transformer_block()
    module, given = compiled(model, "w8a8", target).module, [*tensors(model).values()]
    wanted = module(*given)
    for how in ("deepcopy", "pickle"):
        assert torch.equal(COPIES[how](module)(*given), wanted)
    empty = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    assert bits(empty).keys() == bits(module).keys()
    empty.load_state_dict(module.state_dict())
    assert bits(empty) == bits(module)
    assert torch.equal(empty(*given), wanted)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(module).to("meta")
    other.load_state_dict(torch.load(file), assign=True)
    assert torch.equal(other(*given), wanted)


@pytest.mark.parametrize(("kind", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_results_have_the_type_that_the_module_was_given(kind: str, dtype: torch.dtype) -> None:
    layer = compiled(models.mlp()).module.m0
    assert isinstance(layer, Int8Linear)
    getattr(layer, kind)()
    q, largest = torch.ops.qgraph.quantize_per_token(torch.randn(2, 16), 1 / 127, 128, 1e-9)
    assert layer(q, largest).dtype == dtype
    assert layer.float()(q, largest).dtype == torch.float32
    assert layer.double()(q, largest).dtype == torch.float32


# ------------------------------------------------------------------------------ bad input


def moved(module: nn.Module, device: int) -> nn.Module:
    """What `.to("cuda")` does, on tensors that only say that they are there."""

    class There:
        dtype, is_cuda = torch.float32, True

        def get_device(self) -> int:
            return device

    apply: Any = module._apply
    result: nn.Module = apply(lambda tensor: There())
    return result


def test_a_device_is_asked_before_anything_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: int, dtype: torch.dtype) -> None:
        raise QGraphError(f"device {device} is sm_75")

    monkeypatch.setattr(modules, "prepare", refuse)
    module = compiled(models.mlp()).module
    before = bits(module)
    for part in (module, module.m0):
        with pytest.raises(QGraphError, match="device 3 is sm_75"):
            moved(part, 3)  # type: ignore[arg-type]
    assert bits(module) == before


def test_kernels_are_loaded_for_the_type_of_results(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, torch.dtype]] = []
    monkeypatch.setattr(modules, "prepare", lambda *what: asked.append(what))
    for target, precision in PRECISIONS.items():
        module = compiled(models.mlp(), target=target).module
        with pytest.raises(AttributeError):
            moved(module, 0)
        assert asked[0] == (0, precision or torch.float32)
        asked.clear()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": torch.zeros(2, 15)}, r"'x' has shape \[2, 15\]"),
        ({"x": torch.zeros(2, 16, dtype=torch.int64)}, "'x' is torch.int64"),
        ({"x": torch.zeros(16)}, "'x' has shape"),
        ({"z": torch.zeros(2, 16)}, "no input 'z'"),
    ],
)
def test_inputs_that_do_not_fit(given: dict[str, Tensor], message: str) -> None:
    with pytest.raises(QGraphError, match=message):
        compiled(models.mlp())(given)


def test_inputs_on_several_devices() -> None:
    model = models.if_model()
    given = tensors(model)
    with pytest.raises(QGraphError, match=r"'flag' is on meta and 'x' on cpu"):
        compiled(model)({**given, "flag": given["flag"].to("meta")})


def test_layers_name_their_site() -> None:
    module: Any = compiled(models.mlp()).module
    q, largest = module.x_q(torch.zeros(2, 16))
    with pytest.raises(QGraphError, match=r"'m1' has weights for 32 columns .* got 128"):
        module.m1(torch.nn.functional.pad(q, (0, 64)), largest)
    with pytest.raises(QGraphError, match=r"'x_q' got torch.int64 data: give float32"):
        module.x_q(torch.zeros(2, 16, dtype=torch.int64))
    assert module.x_q(torch.zeros(16))[0].shape == (64,)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda g: _set(g, "_scale", np.full(32, np.nan, np.float32)),
            "'m0' is damaged, .* finite",
        ),
        (
            lambda g: _set(g, "_scale", np.ones(31, np.float32)),
            "'m0' is damaged, .* fit each other",
        ),
        (lambda g: _set(g, "_rows", None), "'m0' is damaged, a tensor is missing"),
    ],
)
def test_damaged_models(spoil: Callable[[ir.Graph], None], message: str) -> None:
    result = compiled(models.mlp())
    spoil(result.model.graph)
    with pytest.raises(ModelError, match=message):
        result.module  # noqa: B018


def _set(graph: ir.Graph, ending: str, array: np.ndarray | None) -> None:
    value = next(v for name, v in graph.initializers.items() if name.endswith(ending))
    value.const_value = None if array is None else ir.tensor(array)


def test_other_formats_and_targets() -> None:
    result = compiled(models.mlp())
    result.model.metadata_props["qgraph.format"] = "99"
    with pytest.raises(ModelError, match="of format 99"):
        result.module  # noqa: B018
    other = qgraph.compile(models.mlp(), "dynamic", target="onnx")
    with pytest.raises(QGraphError, match="target 'onnx' makes no torch modules"):
        other.module  # noqa: B018


def test_torch_loads_when_a_module_is_asked_for() -> None:
    code = "import sys, qgraph; from tests import models\n"
    code += "c = qgraph.compile(models.mlp(), 'dynamic', target='cuda')\n"
    code += "c(models.feed(models.mlp())); assert 'torch' not in sys.modules\n"
    code += "sys.modules['torch'] = None\n"
    code += "try: c.module\nexcept qgraph.QGraphError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "qgraph-compiler[torch]"' in done.stdout
