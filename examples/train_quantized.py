"""A classifier of digits at 2-bit weights: what rounding loses, and what training wins back.

The digits are drawn here, so that nothing must be downloaded. Takes half a minute on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import qgraph

SEGMENTS = (119, 36, 93, 109, 46, 107, 123, 37, 127, 111)
"""Which of the seven segments of a display each digit lights, a bit for each."""


def digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy seven-segment digits at random places: images (count, 1, 16, 16), and their labels."""
    generator = torch.Generator().manual_seed(seed)
    across, down = [(0, 1), (0, 0), (0, 5), (5, 1), (5, 0), (5, 5), (10, 1)], {1, 2, 4, 5}
    shapes = torch.zeros(10, 16, 16)
    for digit, lit in enumerate(SEGMENTS):
        for segment, (top, left) in enumerate(across):
            if lit >> segment & 1:
                height, width = (6, 1) if segment in down else (1, 4)
                shapes[digit, top : top + height, left : left + width] = 1
    labels = torch.randint(10, (count,), generator=generator)
    shifts = torch.randint(0, 5, (count, 2), generator=generator).tolist()
    images = torch.stack([
        shapes[label].roll((down, right), (0, 1))
        for label, (down, right) in zip(labels.tolist(), shifts, strict=True)
    ])  # fmt: skip
    noise = torch.randn(images.shape, generator=generator)
    return (images + 0.3 * noise).unsqueeze(1), labels


def train(model: nn.Module, epochs: int, rate: float) -> None:
    """Plain training, of the float model and of the one with quantization alike."""
    loader = DataLoader(TensorDataset(*digits(3000, seed=0)), batch_size=64, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    model.eval()


def main() -> dict[str, float]:
    """Train in float, quantize with and without training, and compare on unseen digits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 16, 10),
    )  # fmt: skip
    train(model, epochs=4, rate=3e-3)
    images, labels = digits(1000, seed=1)
    seen, _ = digits(256, seed=2)

    source = qgraph.trace(model, images, [{0: "batch"}])
    rounded = qgraph.compile(source, "static", DataLoader(TensorDataset(seen), 32), "onnx", bits=2)
    qmodel = qgraph.prepare_qat(model, images[:1], bits=2)
    train(qmodel, epochs=6, rate=2e-3)
    compiled = qgraph.compile(qmodel, target="onnx")

    right = {
        "float": model(images),
        "2 bits, rounded": rounded(images),
        "2 bits, in training": qmodel(images),
        "2 bits, trained and compiled": compiled(images),
    }
    shares = {name: float((y.argmax(1) == labels).float().mean()) for name, y in right.items()}
    for name, share in shares.items():
        print(f"{name:30} {share:.1%}")
    return shares


if __name__ == "__main__":
    main()
