"""Pictures of episodes for looking at: supports, query, truth and prediction side by side."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from svftool.checkpoints import write_errors
from svftool.errors import UsageError
from svftool.few_shot.folds import ClassSplit
from svftool.few_shot.masks import IGNORE, Mask
from svftool.few_shot.pictures import Pictures
from svftool.few_shot.pool import ImagePool
from svftool.few_shot.scoring import Prediction
from svftool.tasks.images import open_image

HEIGHT = 240
GAP = 4
SUPPORT_COLOUR = (0, 110, 255)
TRUTH_COLOUR = (0, 170, 60)
PREDICTION_COLOUR = (230, 30, 60)
STRENGTH = 0.5

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Overlays:
    """Pictures of predictions that a user asked for.

    Attributes
    ----------
    folder : Path
        Gets a folder for each run; pictures of an earlier run of the same name are replaced.
    count : int
        Test episodes of each run, the first ones.
    """

    folder: Path
    count: int = 12

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"--overlay-count is {self.count}, expected at least 1")

    def write(
        self,
        name: str,
        predictions: Iterable[Prediction],
        pool: ImagePool,
        pictures: Pictures,
        split: ClassSplit,
    ) -> None:
        """Write the predictions of a run of this name.

        Raises
        ------
        ResourceError
            If the files cannot be written.
        """
        folder = self.folder / name
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for number, prediction in enumerate(predictions):
                label = split.name(prediction.episode.label)
                write_overlay(folder, number, prediction, pool, pictures, label)


def write_overlay(
    folder: Path,
    number: int,
    prediction: Prediction,
    pool: ImagePool,
    pictures: Pictures,
    name: str,
) -> Path:
    """Write one episode as a PNG: each support with its mask, the truth, the prediction.

    Parameters
    ----------
    folder : Path
        An existing folder.
    number : int
        Place of the episode, for the file's name.
    prediction : Prediction
        What was predicted.
    pool : ImagePool
        What the episode indexes.
    pictures : Pictures
        Reads the supports' masks.
    name : str
        Of the class, for the file's name.

    Returns
    -------
    Path
        The file.
    """
    episode = prediction.episode
    panels = []
    for index in episode.support:
        pair = pool.pairs[index]
        mask = pictures.truth(pair, episode.label)
        panels.append(panel(_pixels(pair.image), mask, SUPPORT_COLOUR))
    query = _pixels(pool.pairs[episode.query].image)
    panels.append(panel(query, prediction.truth, TRUTH_COLOUR))
    panels.append(panel(query, prediction.predicted.astype(np.uint8), PREDICTION_COLOUR))
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "class"
    path = folder / f"{number:04d}-{plain}.png"
    _image().fromarray(side_by_side(panels)).save(path)
    return path


def panel(picture: Pixels, mask: Mask, colour: tuple[int, int, int]) -> Pixels:
    """Tint a picture where a mask is 1, grey it where the mask is ignored, and scale it.

    Parameters
    ----------
    picture : (height, width, 3) uint8 array
    mask : (height, width) uint8 array
    colour : tuple of int

    Returns
    -------
    (HEIGHT, ., 3) uint8 array
    """
    tinted = picture.astype(np.float32)
    for value, tint in ((1, colour), (IGNORE, (128, 128, 128))):
        where = mask == value
        tinted[where] = (1 - STRENGTH) * tinted[where] + STRENGTH * np.array(tint)
    width = max(1, round(picture.shape[1] * HEIGHT / picture.shape[0]))
    scaled = _image().fromarray(tinted.round().astype(np.uint8)).resize((width, HEIGHT))
    return np.asarray(scaled)


def side_by_side(panels: Sequence[Pixels]) -> Pixels:
    """Put panels of one height beside each other on white, with gaps."""
    gap = np.full((HEIGHT, GAP, 3), 255, dtype=np.uint8)
    parts = [part for each in panels for part in (each, gap)]
    return np.concatenate(parts[:-1], axis=1)


def _pixels(path: Path) -> Pixels:
    return np.asarray(open_image(path))


def _image() -> Any:
    from PIL import Image

    return Image
