"""Train singular values in a plain torch loop.

A small network learns handwritten digits, then meets them through a blurred lens. Ten images of
each class and its singular values are all it gets to adapt. Runs offline in seconds:

    python examples/train_loop.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import svftool


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)


def pretrain(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for batch in torch.randperm(len(images))[:1200].repeat(4).split(100):
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


def main(folder: Path) -> tuple[float, float]:
    """Return accuracy on the blurred digits before and after."""
    torch.manual_seed(0)
    images, labels = digits()
    model = network()
    pretrain(model, images, labels)
    save_file(model.state_dict(), folder / "base.safetensors")
    svftool.decompose(folder / "base.safetensors", folder / "factors", include=["*.weight"])

    blurred = nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    shots = torch.cat([torch.nonzero(labels == c).flatten()[:10] for c in range(10)])
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[shots] = False
    before = accuracy(model, blurred[rest], labels[rest])

    attached = svftool.attach(model, folder / "factors")
    optimiser = torch.optim.AdamW(attached.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        nn.functional.cross_entropy(model(blurred[shots]), labels[shots]).backward()
        optimiser.step()
        optimiser.zero_grad()
    svftool.save_tuned(model, folder / "blurred.svf.safetensors")

    after = accuracy(model, blurred[rest], labels[rest])
    size = (folder / "blurred.svf.safetensors").stat().st_size
    trained = sum(p.numel() for p in attached.parameters())
    print(f"accuracy {before:.3f} -> {after:.3f}, {trained} values trained, file of {size} bytes")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where to keep the files")
    chosen = parser.parse_args().folder
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        main(chosen)
    else:
        with TemporaryDirectory() as temporary:
            main(Path(temporary))
