"""What onnxruntime-genai generates from a folder: always the likeliest token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tasks
from benchmarks.metrics import common_beginning
from benchmarks.zoo import Array

PROMPTS, PROMPT, FIRST = 4, 64, 32
"""Prompts of the handbook, their tokens, and the tokens compared after each."""


def load(path: Path, threads: int) -> Any:
    """The model of a folder, an `onnxruntime_genai.Model`."""
    import onnxruntime_genai as genai

    config = genai.Config(str(path))
    sessions = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": sessions}}))
    return genai.Model(config)


def begin(model: Any, prompt: Array, n: int) -> Any:
    """A generator that has read the prompt and can generate `n` tokens; none ends it early."""
    import onnxruntime_genai as genai

    params = genai.GeneratorParams(model)
    length = len(prompt) + n
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(prompt.astype(np.int32))
    return generator


def greedy(model: Any, prompt: Array, n: int) -> Array:
    """The `n` tokens `(n,)` that follow the prompt `(tokens,)`."""
    generator = begin(model, prompt, n)
    for _ in range(n):
        generator.generate_next_token()
    return np.array(generator.get_sequence(0)[len(prompt) :])


def same_tokens(reference: Path, other: Path, threads: int) -> float:
    """How many of the first 32 tokens are the same until the texts part, mean of four prompts."""
    prompts = tasks.smollm2_chunks(n=PROMPTS, length=PROMPT)
    models = [load(path, threads) for path in (reference, other)]
    texts = [[greedy(model, prompt, FIRST) for model in models] for prompt in prompts]
    return float(np.mean([common_beginning(*pair) for pair in texts]))
