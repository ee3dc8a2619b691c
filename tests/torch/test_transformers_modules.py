"""What modules of transformers bring: caches as outputs, and mixtures of experts."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qgraph.backends import get_target
from qgraph.errors import ModelError
from qgraph.graph.sites import sites
from qgraph.io.kv_cache import Completer, complete_feed
from qgraph.io.session import open_session, run
from qgraph.passes.canonicalize import Canonicalize
from qgraph.pipeline.context import Context
from qgraph.torch.from_module import trace

transformers = pytest.importorskip("transformers")

FREE = {"input_ids": {0: "batch", 1: "length"}}
LEFT_OUT = "the DynamicCache that {} returns is left out"


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=48,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config).eval()


def llama(kind: str = "Llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **settings,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 48, (batch, length), generator=torch.Generator().manual_seed(batch))


def results(model: ir.Model, feed: dict[str, Any]) -> dict[str, np.ndarray]:
    given = {name: np.asarray(value) for name, value in feed.items()}
    found = run(open_session(model), given)
    return {str(v.name): y for v, y in zip(model.graph.outputs, found, strict=True)}


@pytest.mark.parametrize("build", [gpt2, llama])
def test_caches_are_left_out_with_a_warning(build: Any) -> None:
    module = build()
    assert module.config.use_cache
    with pytest.warns(UserWarning, match=LEFT_OUT.format(type(module).__name__)):
        model = trace(module, ids(2, 7), FREE)
    assert [v.name for v in model.graph.outputs] == ["logits"]
    assert "forward" not in vars(module)
    tokens = ids(3, 9)
    with torch.no_grad():
        wanted = module(tokens).logits
    found = results(model, {"input_ids": tokens})
    np.testing.assert_allclose(found["logits"], wanted, atol=1e-5)


@pytest.mark.parametrize("build", [gpt2, llama])
def test_caches_become_inputs_and_outputs(build: Any) -> None:
    module = build()
    module.config.use_cache = False
    example = {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    model = trace(module, example, {**FREE, "attention_mask": FREE["input_ids"]}, cache=True)
    inputs = {str(v.name): [str(d) for d in v.shape or ()] for v in model.graph.inputs}
    past = {name: shape for name, shape in inputs.items() if name.startswith("past")}
    assert [*past] == [f"past_key_values.{i}.{part}" for i in (0, 1) for part in ("key", "value")]
    assert all(shape[0] == "batch" and shape[2] == "past_length" for shape in past.values())
    assert inputs["attention_mask"] == ["batch", "total_length"]
    assert [*Completer(model).states] == [*past]  # what calibration recognises

    tokens = ids(3, 11)
    with torch.no_grad():
        wanted = module(tokens).logits.numpy()
    first = results(model, complete_feed(model, {"input_ids": tokens[:, :8].numpy()}))
    np.testing.assert_allclose(first.pop("logits"), wanted[:, :8], atol=1e-5)
    assert [*first] == [name.replace("past_key_values", "present") for name in past]
    feed = {name: first[name.replace("past_key_values", "present")] for name in past}
    feed |= {"input_ids": tokens[:, 8:].numpy(), "attention_mask": np.ones((3, 11), np.int64)}
    np.testing.assert_allclose(results(model, feed)["logits"], wanted[:, 8:], atol=1e-5)


def test_only_the_past_is_free_where_no_axes_are_named() -> None:
    model = trace(llama(), {"input_ids": ids(2, 3)}, cache=True)
    shapes = [[str(d) for d in v.shape or ()] for v in model.graph.inputs]
    assert shapes == [["2", "3"], *[["2", "1", "past_length", "8"]] * 4]


def test_a_window_hides_what_is_kept() -> None:
    module = llama("Mistral", sliding_window=4)
    model = trace(module, {"input_ids": ids(2, 7)}, FREE, cache=True)
    tokens = ids(1, 12)
    with torch.no_grad():
        wanted = module(tokens).logits.numpy()
    first = results(model, complete_feed(model, {"input_ids": tokens[:, :10].numpy()}))
    first.pop("logits")
    feed = {name.replace("present", "past_key_values"): state for name, state in first.items()}
    found = results(model, {**feed, "input_ids": tokens[:, 10:].numpy()})
    np.testing.assert_allclose(found["logits"], wanted[:, 10:], atol=1e-5)


def test_what_has_no_such_cache_is_refused_in_one_line() -> None:
    with pytest.raises(ModelError, match="whose forward takes past_key_values: Linear does not"):
        trace(torch.nn.Linear(2, 2), torch.zeros(1, 2), cache=True)
    config = transformers.T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    module = transformers.T5ForConditionalGeneration(config)
    example = {"input_ids": ids(2, 7), "decoder_input_ids": ids(2, 3)}
    with pytest.raises(ModelError, match="returns a EncoderDecoderCache with other states"):
        trace(module, example, cache=True)
    assert module.training


def test_a_cache_inside_what_a_module_of_ones_own_returns() -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def forward(self, tokens: Any) -> Any:
            result = self.model(tokens)
            return {"logits": result.logits, "rest": (tokens, result.past_key_values)}

    with pytest.warns(UserWarning, match=LEFT_OUT.format("Wrapped")):
        model = trace(Wrapped(), ids(2, 7))
    assert [v.name for v in model.graph.outputs] == ["logits", "rest_0"]


EXPERTS = {
    "Mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "GptOss": {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8},
}


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_are_products_of_their_own(kind: str) -> None:
    module = llama(kind, use_cache=False, **EXPERTS[kind])
    before = module.get_experts_implementation()
    model = trace(module, {"input_ids": ids(2, 7)}, FREE)
    assert module.get_experts_implementation() == before
    assert not any("forward" in vars(part) for part in module.modules())
    for batch, length in ((2, 9), (1, 1)):  # one token leaves an expert without any
        tokens = ids(batch, length)
        with torch.no_grad():
            wanted = module(tokens).logits
        found = results(model, {"input_ids": tokens})["logits"]
        np.testing.assert_allclose(found, wanted, atol=1e-5)

    Canonicalize().run(model, Context(get_target("onnx")))
    experts = [s for s in sites(model) if "mlp" in s.name and s.kind == "matmul"]
    assert len([s for s in experts if "experts" in s.name]) == 2 * 3 * 2
