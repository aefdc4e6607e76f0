"""Small data sets for few-shot segmentation, written in the layouts of the real ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 100
Areas = Mapping[int, int]


def label_map(areas: Areas, *, ignored: int = 0) -> np.ndarray:
    """Fill a SIDE x SIDE map with so many pixels of each class, in order."""
    flat = np.zeros(SIDE * SIDE, dtype=np.uint8)
    start = 0
    for label, area in areas.items():
        flat[start : start + area] = label
        start += area
    if ignored:
        flat[-ignored:] = 255
    return flat.reshape(SIDE, SIDE)


def write_image(path: Path, seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_indexed(path: Path, labels: np.ndarray) -> Path:
    """Write a map the way VOC does: a palette whose colours are not the numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels, mode="P")
    image.putpalette(np.random.default_rng(7).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(path)
    return path


def write_voc(root: Path, train: Mapping[str, Areas], val: Mapping[str, Areas]) -> Path:
    """Write a VOC folder from the areas of the classes in each picture."""
    for seed, (name, areas) in enumerate({**train, **val}.items()):
        write_image(root / "JPEGImages" / f"{name}.jpg", seed)
        write_indexed(root / "SegmentationClassAug" / f"{name}.png", label_map(areas))
    sets = root / "ImageSets" / "Segmentation"
    sets.mkdir(parents=True)
    (sets / "val.txt").write_text("\n".join(val) + "\n")
    return root
