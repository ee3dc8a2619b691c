"""A real model through launch code, stub driver and emulator: the same bits as on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import qgraph
from tests.cuda.stub import stub_driver

PROMPT = (504, 260, 3575, 282, 4649, 314, 253, 1218)


@pytest.mark.slow
def test_a_prompt_and_a_step_of_smollm2() -> None:
    pytest.importorskip("transformers")
    from benchmarks import zoo

    feeds = [{"input_ids": np.array([PROMPT * 4])}]
    compiled = qgraph.compile(zoo.smollm2_traced(), "w8a8", feeds, "cuda")
    module, *_ = zoo.smollm2_module()
    qgraph.apply(compiled, module)
    model = module.model
    assert isinstance(model, torch.nn.Module)

    def logits() -> list[Tensor]:
        with torch.inference_mode():
            prompt = model(input_ids=torch.tensor([PROMPT]), use_cache=True)
            word = prompt.logits[:, -1:].argmax(-1)
            step = model(input_ids=word, past_key_values=prompt.past_key_values)
        return [prompt.logits, step.logits]

    on_cpu = logits()
    with stub_driver() as device:
        emulated = logits()
    assert {"quantize_f32", "w8a8_small_1_f32"} <= set(device.functions)
    assert all(map(torch.equal, emulated, on_cpu))
