"""Compiled layers in the modules that they were made from."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import warnings
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import qgraph
from qgraph.backends.cuda.apply import apply
from qgraph.backends.cuda.modules import QuantizedLinear
from qgraph.errors import QGraphError
from tests import models

transformers = pytest.importorskip("transformers")

RECIPES: dict[str, dict[str, Any]] = {
    "w8a8": {}, "smoothquant": {"lkd": False}, "llm-int8": {"threshold": 1.0}, "zeroquant": {},
}  # fmt: skip


def llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=48, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1,
            eos_token_id=2,
        )
    )  # fmt: skip


def made(build: Any) -> Any:
    """A random model whose norms and biases are not all ones and zeros."""
    torch.manual_seed(0)
    module = build().eval()
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            one = "weight" in name
            nn.init.normal_(parameter, float(one), 0.3)
    return module


def ids(count: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, 48, (2, count), generator=torch.Generator().manual_seed(seed))


@functools.cache
def traced(build: Any) -> ir.Model:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return qgraph.trace(
            made(build), {"input_ids": ids()}, {"input_ids": {0: "batch", 1: "length"}}
        )


def compiled(build: Any, recipe: str = "w8a8", **parameters: Any) -> qgraph.CompiledModel:
    feeds = [{"input_ids": ids(seed=seed).numpy()} for seed in range(1, 4)]
    return qgraph.compile(traced(build), recipe, feeds, "cuda", **parameters)


@pytest.fixture(scope="module")
def compilations() -> dict[Any, tuple[Any, qgraph.CompiledModel]]:
    """By builder: a module and what it was compiled to, by w8a8."""
    return {build: (made(build), compiled(build)) for build in (llama, gpt2)}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_module_then_computes_what_was_compiled(build: Any, recipe: str) -> None:
    module = made(build)
    result = compiled(build, recipe, **RECIPES[recipe])
    wanted, plain = result(input_ids=ids()), module(ids()).logits
    report = qgraph.apply(result, module)
    found = module(ids()).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert 1e-4 < (found - plain).abs().max() < 0.1
    assert len(report.layers) == (15 if build is llama else 9)
    assert str(report).startswith(f"{len(report.layers)} layers quantized")


@pytest.mark.parametrize("build", [llama, gpt2])
def test_no_float_weight_is_left(build: Any, compilations: Any) -> None:
    module, result = copy.deepcopy(compilations[build][0]), compilations[build][1]
    report = qgraph.apply(result, module)
    left = {n for n, p in module.named_parameters() if p.ndim == 2}
    assert left <= {"model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight"}
    for name in report.layers:
        layer = module.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        assert not [*layer.parameters()]
        assert layer.product.weight.dtype == torch.int8
    gc.collect()
    held = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    assert held < sum(p.numel() * 4 for p in compilations[build][0].parameters())


@pytest.mark.parametrize("build", [llama, gpt2])
def test_it_generates_the_tokens_of_the_compiled_module(build: Any, compilations: Any) -> None:
    module, result = copy.deepcopy(compilations[build][0]), compilations[build][1]
    qgraph.apply(result, module)
    tokens = ids(5)[:1]
    found = module.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, min_new_tokens=12,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    for _ in range(12):
        logits = result.module(tokens)[:, -1]
        logits[:, 2] = -torch.inf  # the end of a text, which generate() holds back as well
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert found.tolist() == tokens.tolist()


@pytest.mark.parametrize("build", [llama, gpt2])
def test_compilers_of_torch_find_no_break(build: Any, compilations: Any) -> None:
    module, result = copy.deepcopy(compilations[build][0]), compilations[build][1]
    qgraph.apply(result, module)

    def logits(tokens: Tensor) -> Tensor:
        y: Tensor = module(tokens, use_cache=False).logits
        return y

    with torch.no_grad():
        found = torch.compile(logits, fullgraph=True, backend="aot_eager")(ids())
        torch.testing.assert_close(found, logits(ids()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_modules_keep_their_type(build: Any, dtype: torch.dtype, compilations: Any) -> None:
    module, result = copy.deepcopy(compilations[build][0]).to(dtype), compilations[build][1]
    qgraph.apply(result, module)
    found, wanted = module(ids()).logits, result(input_ids=ids())
    assert found.dtype == dtype
    assert (found.float() - wanted).abs().max() < 0.05
    other = copy.deepcopy(module).float().to(dtype)
    assert torch.equal(other(ids()).logits, found)
    layer = next(part for part in module.modules() if isinstance(part, QuantizedLinear))
    assert layer.product.scale.dtype == torch.float32
    assert torch.equal(pickle.loads(pickle.dumps(module))(ids()).logits, found)


# ---------------------------------------------------------------------------- other graphs


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 8), nn.Linear(16, 4)
        self.v_proj = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"self_attn": Attention()})])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0]["self_attn"](x)  # type: ignore[index]
        return y


def test_layers_that_a_builder_has_packed_get_their_shares() -> None:
    torch.manual_seed(0)
    module = Layered()
    attention = module.layers[0]["self_attn"]  # type: ignore[index]
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    w, b = (torch.cat([getattr(p, n) for p in parts]).detach().numpy() for n in ("weight", "bias"))
    text = "packed (float[n,16] x) => (float[n,16] y) { m = MatMul (x, w) \n y = Add (m, b) }"
    model = models.build(text, ir.tensor(w.T.copy(), name="w"), ir.tensor(b, name="b"))
    model.graph[0].name = "/model/layers.0/attn/qkv_proj/MatMul"
    model.graph[1].name = "/model/layers.0/attn/qkv_proj/Add"
    feeds = [models.feed(model, seed) for seed in range(3)]
    result = qgraph.compile(model, "w8a8", feeds, "cuda", share=0.1)
    x = torch.randn(5, 16)
    wanted = result(x)
    wrapped = nn.ModuleDict({"model": module})
    report = qgraph.apply(result, wrapped)
    assert len(report.layers) == 3
    torch.testing.assert_close(module(x), wanted)


# ------------------------------------------------------------------------------ bad input


def test_it_is_applied_once(compilations: Any) -> None:
    module, result = copy.deepcopy(compilations[llama][0]), compilations[llama][1]
    qgraph.apply(result, module)
    with pytest.raises(QGraphError, match="has quantized layers already"):
        qgraph.apply(result, module)


def spoilt_bias(module: Any) -> None:
    module.lm_head = nn.Linear(32, 48)


def spoilt_norm(module: Any) -> None:
    nn.init.ones_(module.model.norm.weight)


def spoilt_size(module: Any) -> None:
    module.model.layers[1].mlp.up_proj = nn.Linear(32, 65, bias=False)


def spoilt_layer(module: Any) -> None:
    module.model.layers[1].mlp.up_proj = nn.Identity()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoilt_bias, "layer 'lm_head' has a bias"),
        (spoilt_norm, r"'model.norm.weight' is not what the compiled model was made from"),
        (spoilt_size, r"layer 'model.layers.1.mlp.up_proj' has other sizes"),
        (spoilt_layer, r"no linear layer for 'model.layers.1.mlp.up_proj/MatMul'"),
    ],
)
def test_a_module_that_does_not_fit_is_left_alone(
    spoil: Any, message: str, compilations: Any
) -> None:
    module, result = copy.deepcopy(compilations[llama][0]), compilations[llama][1]
    spoil(module)
    before = {name: id(part) for name, part in module.named_modules()}
    values = {name: p.clone() for name, p in module.named_parameters()}
    with pytest.raises(QGraphError, match=message):
        qgraph.apply(result, module)
    assert {name: id(part) for name, part in module.named_modules()} == before
    assert all(torch.equal(p, values[name]) for name, p in module.named_parameters())


def test_other_targets_have_no_layers(compilations: Any) -> None:
    model = models.mlp()
    with pytest.raises(QGraphError, match="target 'onnx' has no layers for torch"):
        qgraph.apply(qgraph.compile(model, "dynamic", target="onnx"), nn.Linear(2, 2))
    with pytest.raises(QGraphError, match="not that of target 'cuda:f16': compile for cuda"):
        qgraph.apply(qgraph.compile(model, "dynamic", target="cuda:f16"), nn.Linear(2, 2))
    with pytest.raises(QGraphError, match="no linear layer for"):
        qgraph.apply(compilations[llama][1], nn.Sequential(nn.Linear(2, 2)))


def test_layers_name_themselves(compilations: Any) -> None:
    module, result = copy.deepcopy(compilations[llama][0]), compilations[llama][1]
    apply(result.model, result.source, module)
    with pytest.raises(QGraphError, match="'lm_head/MatMul' takes 32 columns and got 31"):
        module.lm_head(torch.zeros(1, 31))
