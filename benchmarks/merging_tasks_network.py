"""The network of `merging_tasks`: its trunk, a head a task, fine-tuning, merging and measuring.

All that runs in processes of their own is here. Functions take plain values and leave files.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from merging_tasks_images import Part, decode, parts
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils import parametrize

from svftool import CombineOptions, combine, open_checkpoint
from svftool.tasks.heads import CosineHead, start_head
from svftool.training.loop import training_mode
from svftool.training.optimise import rate_factor

BATCH = 32
_MEASURED = 128
"""Pictures that are measured at once."""
_SHIFT = 8
"""Pixels by which pictures are shifted at most in training."""
_WARMUP, _CLIP = 0.1, 1.0
RATES = {"full": (3e-5, 1e-4, 3e-4), "lora:8": (3e-4, 1e-3, 3e-3)}
"""Peak learning rates of AdamW that are tried."""
_HELD = 5
"""One of how many pictures of the training part is held out to choose a rate."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Place:
    """Where a run is, and all that its results depend on.

    Attributes
    ----------
    data, work : Path
        What is read; what is kept for later calls.
    device : str
    steps : int
        Of each fine-tuning.
    size : int
        Pixels of a picture.
    images : int or None
        Pictures a class at most, of each part.
    rates : tuple of (str, float)
        Rates that are given; of other kinds they are chosen.
    threads : int
        Of a process.
    """

    data: Path
    work: Path
    device: str
    steps: int
    size: int
    images: int | None
    rates: tuple[tuple[str, float], ...]
    threads: int

    @property
    def setting(self) -> str:
        """What tells results that must not be mixed apart."""
        images = "all" if self.images is None else self.images
        rates = "".join(f" {kind}={rate:g}" for kind, rate in self.rates)
        return f"steps={self.steps} size={self.size} images={images}{rates}"

    @property
    def base(self) -> Path:
        """The trunk without its head."""
        return self.work / "base.safetensors"

    def pictures(self, task: str) -> Path:
        """Return the file of a task's decoded pictures."""
        return self.work / f"{task.replace(' ', '-')}-{self.size}.safetensors"

    def head(self, task: str) -> Path:
        """Return the file of a task's fixed head."""
        return self._folder / f"head-{task.replace(' ', '-')}.safetensors"

    def tuned(self, kind: str, seed: int, task: str) -> Path:
        """Return where a fine-tune is: a file, or an adapter's folder."""
        folder = self._folder / kind.replace(":", "-") / str(seed)
        name = task.replace(" ", "-")
        return folder / (f"{name}.safetensors" if kind == "full" else name)

    @property
    def _folder(self) -> Path:
        return self.work / self.setting.replace(" ", "-").replace(":", "-")


def write_base(checkpoint: Path, path: Path) -> None:
    """Write the trunk of torchvision's checkpoint: everything but the classifier."""
    with open_checkpoint(checkpoint) as opened:
        names = [name for name in opened.infos if name.startswith("features.")]
        tensors = {name: opened.read(name).contiguous() for name in names}
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


def network(weights: Path, device: str) -> nn.Module:
    """Build the trunk; its output are 1280 pooled features."""
    from torchvision.models import mobilenet_v2

    model: nn.Module = mobilenet_v2()
    model.classifier = nn.Identity()
    model.load_state_dict(load_file(weights))
    # On processors alone: kernels of depthwise convolutions on GPUs are made for the other order.
    form = torch.channels_last if device == "cpu" else torch.contiguous_format
    return model.to(device, memory_format=form).eval()


@cache
def _pictures(place: Place, task: str) -> dict[str, Part]:
    found = parts(place.pictures(task), place.images)
    return {name: one.to(torch.device(place.device)) for name, one in found.items()}


@cache
def _head(place: Place, task: str) -> CosineHead:
    weights = load_file(place.head(task))
    head = CosineHead(*reversed(weights["weight"].shape))
    head.load_state_dict(weights)
    return head.to(place.device).requires_grad_(False)


def _made_head(place: Place, part: Part) -> CosineHead:
    """Make a head of the mean directions of the base's features of each class."""
    found = torch.cat([*_features(network(place.base, place.device), part.images)]).cpu()
    head = CosineHead(found.shape[1], part.size).requires_grad_(False)
    start_head(head, found, part.labels.cpu(), part.size)
    return head.to(place.device)


def _write_head(place: Place, task: str) -> None:
    head, path = _made_head(place, _pictures(place, task)["train"]), place.head(task)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: one.cpu() for name, one in head.state_dict().items()}, path)


def _input(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(one, device=images.device).view(1, 3, 1, 1) for one in (_MEAN, _STD))
    return (images.float() / 255 - mean) / std


@torch.no_grad()
def _features(model: nn.Module, images: Tensor) -> Iterator[Tensor]:
    model.eval()
    for some in images.split(_MEASURED):
        yield model(_input(some))


def _accuracy(model: nn.Module, head: nn.Module, part: Part) -> float:
    with torch.no_grad():
        logits = torch.cat([head(one) for one in _features(model, part.images)])
    return int((logits.argmax(1) == part.labels).sum()) / len(part.labels)


def measure(place: Place, model: nn.Module, tasks: Sequence[str]) -> dict[str, float]:
    """Return the accuracy of a trunk with the head of each task, on the test part."""
    return {
        task: _accuracy(model, _head(place, task), _pictures(place, task)["test"]) for task in tasks
    }


def prepare(place: Place, task: str) -> dict[str, Any]:
    """Decode the pictures of a task and make its head, where not done; measure the base on it."""
    if not place.pictures(task).exists():
        decode(task, place.data, place.size, place.pictures(task))
    if not place.head(task).exists():
        _write_head(place, task)
    accuracy = measure(place, network(place.base, place.device), [task])
    counts = {name: len(one.labels) for name, one in _pictures(place, task).items()}
    return {"accuracy": accuracy, "pictures": counts, "classes": _head(place, task).weight.shape[0]}


class _LowRank(nn.Module):
    """A change of low rank of a convolution, begun as PEFT begins it: at zero."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, *inner = weight.shape
        self.down = nn.Parameter(torch.empty(rank, *inner, device=weight.device))
        self.up = nn.Parameter(torch.zeros(out, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down.flatten(1)).view_as(weight)


def _adapt(model: nn.Module, rank: int) -> dict[str, _LowRank]:
    """Give every convolution that is not depthwise a change of low rank; freeze all else."""
    model.requires_grad_(False)
    plain = {
        name: one
        for name, one in model.named_modules()
        if isinstance(one, nn.Conv2d) and one.groups == 1
    }
    found = {name: _LowRank(one.weight, rank) for name, one in plain.items()}
    for name, one in plain.items():
        parametrize.register_parametrization(one, "weight", found[name])
    return found


def try_rate(place: Place, kind: str, rate: float, task: str) -> dict[str, Any]:
    """Train at a rate with a part of the training pictures, and measure on those held out."""
    part = _pictures(place, task)["train"]
    held = torch.arange(len(part.labels), device=part.labels.device) % _HELD == 0
    kept = Part(part.images[~held], part.labels[~held])
    head = _made_head(place, kept)
    model, _ = _begun(place, kind)
    losses = _train(place, model, head, kept, rate, 0)
    found = _accuracy(model, head, Part(part.images[held], part.labels[held]))
    return {"accuracy": {task: found}, "loss": losses}


def _begun(place: Place, kind: str) -> tuple[nn.Module, dict[str, _LowRank]]:
    """Build the trunk, with what is trained set free, and the adapters where there are any."""
    model = network(place.base, place.device)
    return model, {} if kind == "full" else _adapt(model, int(kind.partition(":")[2]))


def fine_tune(
    place: Place, kind: str, seed: int, task: str, rate: float, tasks: Sequence[str]
) -> dict[str, Any]:
    """Train the trunk below the task's fixed head, write it, and measure it on all tasks.

    Batch norms run with the base's statistics, as in ``svftool finetune``.
    """
    begun = time.perf_counter()
    torch.manual_seed(seed)
    model, adapters = _begun(place, kind)
    losses = _train(place, model, _head(place, task), _pictures(place, task)["train"], rate, seed)
    accuracy = measure(place, model, tasks)
    target = place.tuned(kind, seed, task)
    target.parent.mkdir(parents=True, exist_ok=True)
    if adapters:
        _write_adapter(adapters, target)
    else:
        tensors = {name: one.cpu().contiguous() for name, one in model.state_dict().items()}
        save_file(tensors, target)
    return {
        "accuracy": accuracy,
        "loss": losses,
        "trained": sum(one.numel() for one in model.parameters() if one.requires_grad),
        "seconds": time.perf_counter() - begun,
    }


def _train(
    place: Place, model: nn.Module, head: nn.Module, part: Part, rate: float, seed: int
) -> tuple[float, float]:
    """Run all steps; return the mean loss of the first and of the last tenth."""
    chance = torch.Generator().manual_seed(seed)
    trained = [one for one in model.parameters() if one.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    training_mode(model)
    losses = []
    order = torch.empty(0, dtype=torch.int64)
    for step in range(place.steps):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(part.labels), generator=chance)])
        rows, order = order[:BATCH].to(place.device), order[BATCH:]
        logits = head(model(_input(_shifted(part.images[rows], chance))))
        loss = cross_entropy(logits, part.labels[rows])
        optimiser.param_groups[0]["lr"] = rate * rate_factor(step, place.steps, _WARMUP)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(trained, _CLIP)
        optimiser.step()
        losses.append(loss.detach())
    values = torch.stack(losses).cpu()
    tenth = max(1, len(values) // 10)
    return float(values[:tenth].mean()), float(values[-tenth:].mean())


def _shifted(images: Tensor, chance: torch.Generator) -> Tensor:
    """Shift each picture at random, and mirror half of them."""
    count, _, height, width = images.shape
    room = pad(images.float(), (_SHIFT,) * 4, mode="reflect")
    offsets = torch.randint(0, 2 * _SHIFT + 1, (2, count, 1), generator=chance)
    rows, columns = (
        (offset + torch.arange(length)).to(images.device)
        for offset, length in zip(offsets, (height, width), strict=True)
    )
    mirrored = (torch.rand(count, 1, generator=chance) < 0.5).to(images.device)
    columns = torch.where(mirrored, columns.flip(1), columns)
    at = torch.arange(count, device=images.device)
    return room[at[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def _write_adapter(adapters: dict[str, _LowRank], folder: Path) -> None:
    """Write PEFT's folder; `lora_alpha` is the rank, so that the scale is 1."""
    rank = next(iter(adapters.values())).down.shape[0]
    tensors = {}
    for name, one in adapters.items():
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"] = one.down.detach().cpu().contiguous()
        tensors[f"{stem}.lora_B.weight"] = one.up.detach().cpu()[:, :, None, None].contiguous()
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(adapters),
        "bias": "none",
    }
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")


def merge(
    place: Place, kind: str, seed: int, method: str, groups: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Merge fine-tunes as ``svftool merge`` does, and measure the result on their tasks.

    Parameters
    ----------
    place : Place
    kind : {"full", "lora:8"}
    seed : int
    method : str
        As ``--method`` takes it.
    groups : sequence of sequence of str
        The tasks whose fine-tunes are merged; of several groups, a task's accuracy is the mean.
    """
    accuracy: dict[str, list[float]] = {}
    seconds, clashes = 0.0, []
    for tasks in groups:
        with TemporaryDirectory(dir=place.work) as folder:
            output = Path(folder) / "merged.safetensors"
            begun = time.perf_counter()
            done = combine(
                place.base,
                [place.tuned(kind, seed, task) for task in tasks],
                output=output,
                options=CombineOptions(method=method),
            )
            seconds += time.perf_counter() - begun
            found = measure(place, network(output, place.device), tasks)
        for task, value in found.items():
            accuracy.setdefault(task, []).append(value)
        clash = done.interference
        clashes.append({"before": clash.before, "after": clash.after})
    return {
        "accuracy": {task: statistics.fmean(values) for task, values in accuracy.items()},
        "interference": [
            {name: None if one is None else asdict(one) for name, one in both.items()}
            for both in clashes
        ],
        "seconds": seconds,
    }


def processors() -> int:
    """Count the processors that this process may use."""
    return len(os.sched_getaffinity(0))
