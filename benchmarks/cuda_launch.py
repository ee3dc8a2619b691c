"""What a call of our operators costs the host beside `nn.Linear(64, 64)` of one row, without a GPU.

    python -m benchmarks.cuda_launch

The driver is the stub of the tests and does nothing; the operators go the way that they go on a
GPU: dispatch, launch code, driver. The bar is 1.5 times the layer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

os.environ["QGRAPH_STUB_IDLE"] = "1"

from qgraph.backends.cuda import launches
from qgraph.backends.cuda.ops import SCHEMAS
from tests.cuda.stub import stub_driver

CALLS, ROUNDS = 4000, 9


def microseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Processor time a call, in turns, the best of some."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.process_time()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], (time.process_time() - start) / CALLS * 1e6)
    return best


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    library: Any = torch.library.Library("qgraph_launch", "DEF")  # type: ignore[no-untyped-call]
    for name, schema in SCHEMAS.items():
        library.define(f"{name}{schema}")
        library.impl(name, getattr(launches, name), "CPU")  # in ops.py so for CUDA
    quantize = torch.ops.qgraph_launch.quantize_per_token
    product = torch.ops.qgraph_launch.int8_linear
    layer, x = torch.nn.Linear(64, 64), torch.randn(1, 64)
    w, scale = torch.ones(64, 64, dtype=torch.int8), torch.ones(64)
    for mode in (torch.no_grad, torch.inference_mode):
        with stub_driver(), mode():
            q, largest = quantize(x, 1 / 127, 128, 2.0**-60)
            rest = (w, scale, None, None, 128, torch.float32)
            spent = microseconds(
                {
                    "nn.Linear": lambda: layer(x),
                    "quantize_per_token": lambda: quantize(x, 1 / 127, 128, 2.0**-60),
                    "int8_linear": partial(product, q, largest, *rest),
                }
            )
        for name, us in spent.items():
            print(f"{mode.__name__}: {name:20s}{us:6.2f} us  {us / spent['nn.Linear']:.2f} x")


if __name__ == "__main__":
    main()
