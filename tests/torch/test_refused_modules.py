"""Modules that cannot be traced as they are: one line that names the place and says what to fix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import torch_modules
from qgraph.errors import ModelError
from qgraph.torch.from_module import trace

transformers = pytest.importorskip("transformers")

_BERT = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32, "attention_window": [4],
}  # fmt: skip
_CODEC = {
    "num_filters": 4, "hidden_size": 8, "codebook_size": 8, "upsampling_ratios": [2],
    "num_lstm_layers": 1,
}  # fmt: skip
BY_VALUES: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str, str]] = {
    "Longformer": (
        _BERT,
        {"input_ids": torch.randint(3, 48, (2, 8))},
        "layer 'encoder.layer.0.attention.self'",
        r"modeling_longformer.py:\d+ \(if is_global_attn:\)",
    ),
    "Encodec": (
        _CODEC,
        {"input_values": torch.zeros(1, 1, 64)},
        "layer 'encoder.layers.0'",
        r"modeling_encodec.py:\d+ \(if length <= max_pad:\)",
    ),
}


@pytest.mark.parametrize("name", BY_VALUES)
def test_a_decision_by_values_names_the_layer_and_the_line(name: str) -> None:
    settings, example, layer, line = BY_VALUES[name]
    module = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**settings)
    )
    with pytest.raises(ModelError, match=f"cannot trace {layer}: .* values at {line}") as caught:
        trace(module, example)
    assert "torch.where or torch.cond" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["funnel", "mamba", "rwkv"])
def test_a_loop_over_tokens_names_the_axis(name: str) -> None:
    """With that axis fixed they are traced: tests/end_to_end/test_architectures.py."""
    example = torch_modules.example(name)
    free = {name: {0: "batch", 1: "length"} for name in example.inputs()}
    with pytest.raises(ModelError, match="axis 1 of 'input_ids' free") as caught:
        trace(example.module, example.feeds(1)[0], free)
    assert "leave that axis out of dynamic_shapes" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_strided_convolutions_take_any_length() -> None:
    module = torch.nn.Sequential(
        torch.nn.Conv1d(1, 4, 10, stride=5), torch.nn.ReLU(), torch.nn.Conv1d(4, 4, 3, stride=2)
    )
    model = trace(module, torch.zeros(2, 1, 100), {"input": {0: "batch", 2: "length"}})
    assert [str(d) for d in model.graph.inputs[0].shape or ()] == ["batch", "1", "length"]
