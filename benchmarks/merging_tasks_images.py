"""Pictures of five disjoint tasks as tensors, decoded once.

Every task has two parts that share no picture. CIFAR-10 and CamVid come in parts already. Of the
others a picture goes to a part by the digest of its file, so that a picture which stands in several
folders is in one part alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

TRAINED = 0.6
"""Share of the pictures that are for training, where the data has no parts."""
PATCH, STRIDE = 60, 30
"""Pixels of a patch of a street scene, and from one to the next."""
_FEWEST, _MOST = 20, 60
"""Patches of a class in each part: classes with fewer are left out, of more some are taken."""
_LABELS = 11
"""Labels of the street scenes; what is higher is no label."""

Picture = tuple[str, int, Image.Image]
"""Part (``train`` or ``test``), class, and the picture."""


@dataclass(frozen=True)
class Part:
    """Pictures of one part of a task.

    Attributes
    ----------
    images : (N, 3, size, size) uint8 Tensor
    labels : (N,) int64 Tensor
    """

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Part:
        """Move to a device."""
        return Part(self.images.to(device), self.labels.to(device))

    def at_most(self, count: int | None) -> Part:
        """Keep `count` pictures of every class, evenly spaced; None keeps all."""
        if count is None:
            return self
        rows = [_spaced(torch.nonzero(self.labels == one)[:, 0], count) for one in range(self.size)]
        kept = torch.cat(rows)
        return Part(self.images[kept], self.labels[kept])

    @property
    def size(self) -> int:
        """Number of classes."""
        return int(self.labels.max()) + 1


def _spaced(rows: Tensor, count: int) -> Tensor:
    if len(rows) <= count:
        return rows
    return rows[torch.arange(count) * len(rows) // count]


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as found:
        return found.convert("RGB")


def _part_of(path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return "train" if int(digest[:8], 16) < TRAINED * 16**8 else "test"


def _folders(folder: Path) -> list[Path]:
    return sorted(one for one in folder.iterdir() if one.is_dir())


def _cifar(images: Path, half: int) -> Iterator[Picture]:
    for part in ("train", "test"):
        for label, folder in enumerate(
            _folders(images / "cifar10" / part)[5 * half : 5 * half + 5]
        ):
            for path in sorted(folder.iterdir()):
                yield part, label, _opened(path)


def _textures(images: Path) -> Iterator[Picture]:
    for label, folder in enumerate(_folders(images / "dtd10")):
        for path in sorted(folder.iterdir()):
            yield _part_of(path), label, _opened(path)


def _objects(images: Path) -> Iterator[Picture]:
    """Cut out what the mask shows, with a tenth of it around."""
    for label, folder in enumerate(_folders(images / "voc20_pairs")):
        for path in sorted(folder.glob("*.jpg")):
            with Image.open(path.with_suffix(".png")) as found:
                mask = np.asarray(found.convert("L")) > 127
            picture = _opened(path)
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            side = round(1.2 * max(np.ptp(rows), np.ptp(columns), 16))
            top, left = (
                min(max(0, (int(one[0]) + int(one[-1]) - side) // 2), max(0, length - side))
                for one, length in ((rows, picture.height), (columns, picture.width))
            )
            yield (
                _part_of(path),
                label,
                picture.crop(
                    (left, top, min(left + side, picture.width), min(top + side, picture.height))
                ),
            )


def _scenes(images: Path) -> Iterator[Picture]:
    """Cut street scenes into patches; a patch has a class where a label covers half of it."""
    found: dict[str, dict[int, list[Image.Image]]] = {"train": {}, "test": {}}
    for folder, part in (("train", "train"), ("val", "train"), ("test", "test")):
        for path in sorted((images / "camvid" / folder / "images").iterdir()):
            picture = _opened(path)
            (mask,) = (images / "camvid" / folder / "masks").glob(f"{path.stem}.*")
            with Image.open(mask) as opened:
                labels = np.asarray(opened)
            for box, label in _patches(labels):
                found[part].setdefault(label, []).append(picture.crop(box))
    both = sorted(found["train"].keys() & found["test"].keys())
    kept = [one for one in both if min(len(part[one]) for part in found.values()) >= _FEWEST]
    for part, patches in found.items():
        for label, name in enumerate(kept):
            for at in _spaced(torch.arange(len(patches[name])), _MOST).tolist():
                yield part, label, patches[name][at]


def _patches(labels: np.ndarray) -> Iterator[tuple[tuple[int, int, int, int], int]]:
    height, width = labels.shape
    for top in range(0, height - PATCH + 1, STRIDE):
        for left in range(0, width - PATCH + 1, STRIDE):
            inside = labels[top : top + PATCH, left : left + PATCH].ravel()
            counts = np.bincount(inside, minlength=_LABELS)[:_LABELS]
            if 2 * counts.max() >= PATCH * PATCH:
                yield (left, top, left + PATCH, top + PATCH), int(counts.argmax())


TASKS: dict[str, Callable[[Path], Iterator[Picture]]] = {
    "cifar10 0-4": lambda images: _cifar(images, 0),
    "cifar10 5-9": lambda images: _cifar(images, 1),
    "dtd10": _textures,
    "voc20": _objects,
    "camvid": _scenes,
}
"""The tasks by name."""


def decode(task: str, data: Path, size: int, path: Path) -> None:
    """Read the pictures of a task, square and `size` pixels wide, and write them to a file.

    The short side is scaled, and the middle of the long one is taken.
    """
    rows: dict[str, list[tuple[Tensor, int]]] = {"train": [], "test": []}
    for part, label, picture in TASKS[task](data / "images"):
        rows[part].append((torch.from_numpy(_square(picture, size)), label))
    tensors = {}
    for part, found in rows.items():
        tensors[f"{part}.images"] = torch.stack([one for one, _ in found]).permute(0, 3, 1, 2)
        tensors[f"{part}.labels"] = torch.tensor([label for _, label in found])
    partial = path.with_suffix(".partial")
    save_file({name: one.contiguous() for name, one in tensors.items()}, partial)
    partial.replace(path)


def _square(picture: Image.Image, size: int) -> np.ndarray:
    short = min(picture.size)
    left, top = ((side - short) // 2 for side in picture.size)
    cut = picture.resize(
        (size, size), Image.Resampling.BILINEAR, (left, top, left + short, top + short)
    )
    return np.array(cut)


def parts(path: Path, most: int | None) -> dict[str, Part]:
    """Read what `decode` wrote: ``train`` and ``test``, at most so many pictures a class."""
    found = load_file(path)
    return {
        part: Part(found[f"{part}.images"], found[f"{part}.labels"]).at_most(most)
        for part in ("train", "test")
    }
