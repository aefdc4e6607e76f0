"""Weights of a merge by data against those given, on pictures that neither has seen.

    python benchmarks/merge_weights.py [--seeds 5] [--shots 1 5] [--methods linear ties]

A small network reads digits. Fine-tunes of it have learnt noisy ones, faint ones, and labels at
random, which harms. What the merge is to read are noisy and faint digits. For each seed a few
examples a class are drawn, `merge --weights-from` chooses the weights on them, and the accuracy on
other pictures is measured, beside that with the weights given.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from svftool import CombineOptions, WeightsFrom, combine, evaluate
from svftool.stages.demo_net import DigitsNet

NETWORK = "from svftool.stages.demo_net import DigitsNet\ndef net(): return DigitsNet(10)\n"
INPUTS = ("noisy", "faint", "random")


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    bright = (interpolate(grey, size=16, mode="bilinear").clamp(0, 1) * 255).to(torch.uint8)
    return bright, torch.tensor(found.target)


def noisy(images: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(int(images.sum()))
    noise = 90 * torch.randn(images.shape, generator=g)
    return (images + noise).clamp(0, 255).to(torch.uint8)


def faint(images: Tensor) -> Tensor:
    return (120 + images * 0.12).to(torch.uint8)


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, rate: float) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,), generator=g)
        batch = (images[chosen].float() / 255 - 0.5) / 0.5
        optimiser.zero_grad()
        cross_entropy(model(batch.expand(-1, 3, -1, -1)), labels[chosen]).backward()
        optimiser.step()
    return model


def make(folder: Path, images: Tensor, labels: Tensor) -> None:
    torch.manual_seed(0)
    base = train(DigitsNet(10), images, labels, 500, 3e-3)
    (folder / "net.py").write_text(NETWORK)
    chance = torch.randint(10, labels.shape, generator=torch.Generator().manual_seed(1))
    tasks: dict[str, tuple[Tensor, Tensor]] = {
        "noisy": (noisy(images), labels),
        "faint": (faint(images), labels),
        "random": (images, chance),
    }
    save(base, folder / "base.safetensors")
    for name, (seen, wanted) in tasks.items():
        model = DigitsNet(10)
        model.load_state_dict(base.state_dict())
        save(train(model, seen, wanted, 300, 1e-3), folder / f"{name}.safetensors")


def save(model: nn.Module, path: Path) -> None:
    save_file({n: v.contiguous() for n, v in model.state_dict().items()}, path, {"format": "pt"})


def write(folder: Path, images: Tensor, labels: Tensor) -> Path:
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        for name, change in (("n", noisy), ("f", faint)):
            place = folder / str(label) / f"{name}{index}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(change(image[None])[0, 0].numpy()).convert("RGB").save(place)
    return folder


def drawn(labels: Tensor, shots: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=g)
    return torch.cat([order[labels[order] == one][:shots] for one in range(10)])


def run(folder: Path, measure: Callable[[Path], float], data: Path | None, how: str, w: float):
    weights = None
    if data is not None:
        weights = WeightsFrom(
            data=data, task="classification", model=f"{folder}/net.py:net", device="cpu",
            options={"mean": (0.5,) * 3, "std": (0.5,) * 3},
        )  # fmt: skip
    result = combine(
        folder / "base.safetensors",
        [(folder / f"{name}.safetensors", w) for name in INPUTS],
        output=folder / "out.safetensors",
        options=CombineOptions(method=how, weights=weights, other_base=True),
        force=True,
    )
    return measure(result.output), result.weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--methods", nargs="+", default=["linear", "ties"])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = digits()
    learn, rest = slice(0, 900), slice(900, 1797)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        make(folder, images[learn], labels[learn])
        images, labels = images[rest], labels[rest]
        test = write(folder / "test", images[400:], labels[400:])

        def measure(path: Path) -> float:
            found = evaluate(
                path, data=test, model=f"{folder}/net.py:net", device="cpu",
                mean=(0.5,) * 3, std=(0.5,) * 3,
            )  # fmt: skip
            return 100 * found.runs[0].metrics["accuracy"]

        for name in ("base", *INPUTS):
            print(f"{name}: {measure(folder / f'{name}.safetensors'):.1f}", flush=True)
        for how in chosen.methods:
            for start in (1.0, 1 / 3):
                plain, _ = run(folder, measure, None, how, start)
                for shots in chosen.shots:
                    scores, kept, last = [], 0, ()
                    for seed in range(chosen.seeds):
                        own = drawn(labels[:400], shots, seed)
                        data = write(folder / f"d{shots}-{seed}", images[own], labels[own])
                        score, choice = run(folder, measure, data, how, start)
                        scores.append(score)
                        kept += choice.kept
                        last = choice.chosen.weights
                    spread = stdev(scores) if len(scores) > 1 else 0.0
                    print(
                        f"{how} from {start:.2f}: {plain:.1f} given; by {20 * shots} examples "
                        f"{mean(scores):.1f} ± {spread:.1f}, worst {min(scores):.1f}, start kept "
                        f"{kept} of {len(scores)}; {', '.join(f'{one:.2f}' for one in last)}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
