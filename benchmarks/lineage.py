"""How often `svftool lineage` is right of small networks trained on real pictures.

    python benchmarks/lineage.py [--data FOLDER] [--pairs 20] [--epochs 15] [--json FILE]

FOLDER holds `train/CLASS/*.jpg` and `test/CLASS/*.jpg` of 32 x 32 pixels. Each network is trained
by itself on `train`: all have one configuration, the same data, and a seed of their own. From each
are made a fine-tune (on `test`), a pruning, copies with its channels in another order, merges, and
a copy in int8. Two networks that were trained apart must not be called relatives, and what is made
of a network must be. Nothing is timed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from svftool.stages.lineage import Pair, lineage

State = dict[str, Tensor]
Sample = tuple[Tensor, Tensor]


class Plain(nn.Sequential):
    """Three convolutions with batch norm, then a linear layer."""

    def __init__(self, classes: int, width: int = 24) -> None:
        sides = [3, width, 2 * width, 2 * width]
        layers: list[nn.Module] = []
        for m, n in itertools.pairwise(sides):
            layers += [nn.Conv2d(m, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.append(nn.Linear(sides[-1], classes))


class Block(nn.Module):
    """Two convolutions whose result is added to what they were given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.middle = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.last = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Add to x."""
        y = self.middle(self.first(x)).relu()
        return (x + self.last(self.second(y))).relu()


class Residual(nn.Sequential):
    """A stem and two blocks over one stream of channels, then a linear layer."""

    def __init__(self, classes: int, width: int = 32) -> None:
        stem = [nn.Conv2d(3, width, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(width)]
        ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
        super().__init__(*stem, nn.ReLU(), Block(width), nn.MaxPool2d(2), Block(width), *ends)


KINDS: dict[str, Callable[[int], nn.Module]] = {"plain": Plain, "residual": Residual}


def pictures(folder: Path) -> Sample:
    """Read the pictures of a folder of classes, (N, 3, 32, 32), and their classes, (N,)."""
    import numpy as np
    from PIL import Image

    images, labels = [], []
    for label, place in enumerate(sorted(one for one in folder.iterdir() if one.is_dir())):
        for path in sorted(place.glob("*.jpg")):
            with Image.open(path) as image:
                images.append(torch.from_numpy(np.array(image.convert("RGB"))))
            labels.append(label)
    x = torch.stack(images).permute(0, 3, 1, 2).float() / 255.0
    return (x - 0.45) / 0.25, torch.tensor(labels)


def fit(model: nn.Module, data: Sample, *, epochs: int, rate: float, seed: int) -> float:
    """Train, and return the share of the training pictures that are then told rightly."""
    x, labels = data
    g = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-3)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=g).split(50):
            batch = x[rows]
            batch = batch.flip(3) if float(torch.rand((), generator=g)) < 0.5 else batch
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(batch), labels[rows]).backward()
            optimiser.step()
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(dim=1) == labels).float().mean())


def trained(kind: str, data: Sample, *, seed: int, epochs: int) -> tuple[nn.Module, float]:
    """Train a network of one kind from a seed of its own."""
    torch.manual_seed(seed)
    model = KINDS[kind](int(data[1].max()) + 1)
    return model, fit(model, data, epochs=epochs, rate=3e-3, seed=seed)


def state(model: nn.Module) -> State:
    """Copy what a network holds."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# What is made of a network.


def tuned(model: nn.Module, data: Sample, *, seed: int, epochs: int) -> State:
    """Go on training with other pictures."""
    other = copy.deepcopy(model)
    fit(other, data, epochs=max(1, epochs // 2), rate=1e-3, seed=seed)
    return state(other)


def pruned(one: State, share: float = 0.3) -> State:
    """Take the smallest entries of every weight to zero."""
    return {
        name: torch.where(v.abs() > v.abs().flatten().quantile(share), v, 0.0) if v.ndim > 1 else v
        for name, v in one.items()
    }


def int8(one: State) -> State:
    """Round every weight to 255 steps a row."""

    def rounded(v: Tensor) -> Tensor:
        step = v.abs().flatten(1).amax(dim=1).div(127).reshape(-1, *[1] * (v.ndim - 1))
        return (v / step).round() * step

    return {name: rounded(v) if v.ndim > 1 else v for name, v in one.items()}


def merged(one: State, other: State) -> State:
    """Average two networks."""
    return {
        name: ((v + other[name]) / 2 if v.is_floating_point() else v) for name, v in one.items()
    }


def permuted(model: nn.Module, seed: int) -> State:
    """Put the channels of every hidden layer into another order; the network computes the same."""
    g = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    order = torch.arange(3)
    for part in other:  # type: ignore[attr-defined]
        if isinstance(part, Block):
            inner = torch.randperm(len(order), generator=g)
            _reorder(part.first, order, inner)
            _reorder(part.middle, order, inner)
            _reorder(part.second, inner, order)
            _reorder(part.last, inner, order)
        elif isinstance(part, nn.Conv2d):
            rows = torch.randperm(part.out_channels, generator=g)
            _reorder(part, order, rows)
            order = rows
        elif isinstance(part, nn.BatchNorm2d):
            _reorder(part, order, order)
        elif isinstance(part, nn.Linear):
            _reorder(part, order, torch.arange(part.out_features))
    return state(other)


def _reorder(part: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
    for one in (*part.parameters(), *part.buffers()):
        if one.ndim:
            moved = one.data[outputs]
            one.data = moved[:, inputs] if one.ndim > 1 else moved


# The tests.


def relation(folder: Path, one: State, other: State) -> Pair:
    """Write two networks and ask."""
    paths = [folder / f"{name}.safetensors" for name in ("one", "other")]
    for path, held in zip(paths, (one, other), strict=True):
        save_file({name: value.contiguous() for name, value in held.items()}, path)
    return lineage(paths).pairs[0]


def uniform(chances: Sequence[float]) -> float:
    """Return the p-value of Kolmogorov and Smirnov's test that chances are uniform."""
    n, ordered = len(chances), sorted(chances)
    apart = max(max((i + 1) / n - p, p - i / n) for i, p in enumerate(ordered))
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * apart
    terms = ((-1) ** (k - 1) * math.exp(-2 * k * k * x * x) for k in range(1, 101))
    return min(1.0, max(0.0, 2.0 * sum(terms)))


def made_of(
    models: Sequence[nn.Module], data: Sample, epochs: int
) -> Iterable[tuple[str, int, State]]:
    """Yield what is made of each network, with its kind and the network's place."""
    states = [state(model) for model in models]
    for i, (model, own) in enumerate(zip(models, states, strict=True)):
        child = tuned(model, data, seed=1000 + i, epochs=epochs)
        yield "fine-tuned", i, child
        yield "pruned by 30 %", i, pruned(own)
        yield "channels permuted", i, permuted(model, i)
        yield "merged with its fine-tune", i, merged(own, child)
        yield "merged with a stranger", i, merged(own, states[(i + 1) % len(states)])
        yield "int8", i, int8(own)


def measure(kind: str, folder: Path, *, pairs: int, epochs: int) -> dict[str, Any]:
    """Train 2 `pairs` networks of one kind, and ask of all that is made of them."""
    first, second = pictures(folder / "train"), pictures(folder / "test")
    found = [trained(kind, first, seed=seed, epochs=epochs) for seed in range(2 * pairs)]
    models = [model for model, _ in found]
    states = [state(model) for model in models]
    relatives: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as place:
        strangers = [relation(Path(place), states[2 * i], states[2 * i + 1]) for i in range(pairs)]
        for name, i, made in made_of(models, second, epochs):
            said = relation(Path(place), states[i], made).relation
            relatives.setdefault(name, Counter())[said] += 1
    chances = [one.p_value for one in strangers if one.p_value is not None]
    return {
        "kind": kind,
        "accuracy": sum(right for _, right in found) / len(found),
        "strangers": dict(Counter(one.relation for one in strangers)),
        "uniform": uniform(chances) if chances else None,
        "least": min(chances, default=None),
        "relatives": {name: dict(said) for name, said in relatives.items()},
    }


def failed(row: dict[str, Any]) -> bool:
    """Tell whether a stranger counts as a relative, or over 5 % of a kind of relatives do not."""
    if row["strangers"].get("derived"):
        return True
    return any(
        said.get("derived", 0) < 0.95 * sum(said.values()) for said in row["relatives"].values()
    )


def report(row: dict[str, Any]) -> None:
    """Print a line a control."""
    print(f"{row['kind']}: right of {row['accuracy']:.0%} of the pictures that it was trained with")
    counts = ", ".join(f"{count} {said}" for said, count in row["strangers"].items())
    print(f"  {'trained apart':26} {counts} (least p {row['least']:.2g}, KS {row['uniform']:.2f})")
    for name, said in row["relatives"].items():
        whole = sum(said.values())
        others = ", ".join(f"{n} {one}" for one, n in said.items() if one != "derived")
        print(f"  {name:26} {said.get('derived', 0)} of {whole} derived  {others}")


def main() -> int:
    """Train, ask, print; 1 where a control fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = Path(os.environ.get("SVFTOOL_TEST_DATA", "../shared/data")) / "images" / "cifar10"
    parser.add_argument("--data", type=Path, default=usual)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if not (chosen.data / "train").is_dir():
        parser.error(f"{chosen.data}: no folder train/ of pictures, expected one class a folder")
    rows = []
    for kind in chosen.kinds:
        rows.append(measure(kind, chosen.data, pairs=chosen.pairs, epochs=chosen.epochs))
        report(rows[-1])
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return int(any(map(failed, rows)))


if __name__ == "__main__":
    raise SystemExit(main())
