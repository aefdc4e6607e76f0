"""Small labelled pictures on disk, in which a network can tell the classes apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 40, 220), "green": (40, 220, 40), "red": (220, 40, 40)}


def write_pictures(
    folder: Path,
    *,
    classes: Sequence[str] = tuple(COLOURS),
    count: int = 6,
    size: tuple[int, int] = (16, 16),
    seed: int = 0,
) -> Path:
    """Write `count` noisy single-colour PNG files a class, and return the folder."""
    random = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            noise = random.normal(0, 40, (*size, 3))
            pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index:02d}.png")
    return folder
