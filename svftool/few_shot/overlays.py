"""Pictures of episodes for looking at: supports, truth and prediction side by side, with words.

A line on top names the class and says how well it was found; each panel says under itself, in the
colour of its mask, what it shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
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
from svftool.few_shot.scoring import Pooled, Prediction
from svftool.tasks.images import open_image

HEIGHT = 240
GAP = 4
CAPTION = 26
LEGEND = 22
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

    The line on top has the class, and the intersection over union of this episode alone.

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
        Of the class.

    Returns
    -------
    Path
        The file.
    """
    episode = prediction.episode
    panels = []
    for place, index in enumerate(episode.support, 1):
        pair = pool.pairs[index]
        mask = pictures.truth(pair, episode.label)
        count = f" {place}" if len(episode.support) > 1 else ""
        drawn = panel(_pixels(pair.image), mask, SUPPORT_COLOUR)
        panels.append(labelled(drawn, f"support{count}", SUPPORT_COLOUR))
    query = _pixels(pool.pairs[episode.query].image)
    truth, predicted = prediction.truth, prediction.predicted.astype(np.uint8)
    panels.append(labelled(panel(query, truth, TRUTH_COLOUR), "truth", TRUTH_COLOUR))
    drawn = panel(query, predicted, PREDICTION_COLOUR)
    panels.append(labelled(drawn, "prediction", PREDICTION_COLOUR))
    plain = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "class"
    path = folder / f"{number:04d}-{plain}.png"
    picture = captioned(
        side_by_side(panels), "".join(filter(str.isprintable, name)), score_text(prediction)
    )
    _image().fromarray(picture).save(path)
    return path


def score_text(prediction: Prediction) -> str:
    """Write the intersection over union of one prediction."""
    pooled = Pooled()
    pooled.add(prediction.predicted, prediction.truth, prediction.episode.label)
    ratio = pooled.scores().miou
    return "IoU: nothing to find" if np.isnan(ratio) else f"IoU {100 * ratio:.1f} %"


def labelled(picture: Pixels, words: str, colour: tuple[int, int, int]) -> Pixels:
    """Put words under a picture, beside a square of the colour that they are about."""
    strip = np.full((LEGEND, picture.shape[1], 3), 255, dtype=np.uint8)
    strip[6:16, 2:12] = colour
    return np.concatenate([picture, _written(strip, words, 18, 13)])


def captioned(picture: Pixels, left: str, right: str) -> Pixels:
    """Put a line over a picture: words at its left end and a score, which is never cut, after.

    The picture is widened with white where the score alone needs more room.
    """
    score = _length(right, 15)
    width = max(picture.shape[1], score + 8)
    wider = np.full((picture.shape[0], width, 3), 255, dtype=np.uint8)
    wider[:, : picture.shape[1]] = picture
    while len(left) > 1 and _length(left, 15) > width - score - 24:
        left = left.removesuffix("…")[:-1] + "…"
    strip = np.full((CAPTION, width, 3), 255, dtype=np.uint8)
    strip = _written(strip, left if width > score + 40 else "", 4, 15)
    return np.concatenate([_written(strip, right, width - score - 4, 15), wider])


def _written(strip: Pixels, words: str, x: int, size: int) -> Pixels:
    """Write words into a white strip, in its vertical middle."""
    from PIL import ImageDraw

    image = _image().fromarray(strip)
    place = (x, strip.shape[0] / 2)
    ImageDraw.Draw(image).text(place, words, fill=(30, 30, 30), font=_font(size), anchor="lm")
    return np.asarray(image)


def _length(words: str, size: int) -> int:
    return int(np.ceil(_font(size).getlength(words)))


@cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


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
    gap = np.full((panels[0].shape[0], GAP, 3), 255, dtype=np.uint8)
    parts = [part for each in panels for part in (each, gap)]
    return np.concatenate(parts[:-1], axis=1)


def _pixels(path: Path) -> Pixels:
    return np.asarray(open_image(path))


def _image() -> Any:
    from PIL import Image

    return Image
