"""A language model of torch at 8 bits, and what happened to one of its layers.

It is a small Llama with random weights, so that nothing must be downloaded.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qgraph


def main() -> None:
    """Trace, compile with the recipe `w8a8`, print remarks and the error on unseen tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    module = LlamaForCausalLM(config)
    *calibration, unseen = torch.randint(0, 512, (9, 1, 64))
    axes = {"input_ids": {0: "batch", 1: "sequence"}}
    model = qgraph.trace(module, {"input_ids": unseen}, axes)

    compiled = qgraph.compile(model, "w8a8", [{"input_ids": ids} for ids in calibration])
    for remark in compiled.remarks:
        if remark.site == "model.layers.1.mlp.down_proj/MatMul":
            print(remark)

    with torch.no_grad():
        expected = module(unseen).logits
    error = (compiled(unseen) - expected).norm() / expected.norm()
    print(f"error of the logits: {error:.1%}")


if __name__ == "__main__":
    main()
