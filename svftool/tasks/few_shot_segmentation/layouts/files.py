"""Files that lists name, found below a data set's folder wherever the list was written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from svftool.errors import DataError, shortlist
from svftool.progress import SILENT, Progress
from svftool.tasks.few_shot_segmentation.masks import class_areas, mapped, read_label_map
from svftool.tasks.images import image_size


@dataclass(frozen=True)
class Listed:
    """An image and its map of class numbers, as a list names them."""

    image: Path
    mask: Path


class Relocator:
    """Find listed paths below a folder, whatever folder stood before them on the list's machine.

    BAM's lists hold absolute paths. The number of leading parts to drop is found once, for the
    first path that exists, and tried first for all that follow.

    Parameters
    ----------
    roots : sequence of Path
        Folders to look below, in order.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = tuple(roots)
        self._known: list[tuple[Path, int]] = []

    def find(self, listed: str) -> Path | None:
        """Give the file that `listed` means, or None where there is none."""
        parts = tuple(part for part in PurePosixPath(listed).parts if part not in {"/", "."})
        if ".." in parts or not parts:
            return None
        for root, dropped in self._known:
            path = root.joinpath(*parts[dropped:])
            if len(parts) > dropped and path.is_file():
                return path
        for root in self._roots:
            for dropped in range(len(parts)):
                path = root.joinpath(*parts[dropped:])
                if path.is_file():
                    self._known.append((root, dropped))
                    return path
        return None


def locate(names: Iterable[tuple[str, str]], relocator: Relocator, source: Path) -> list[Listed]:
    """Find every image and mask that a list names.

    Parameters
    ----------
    names : iterable of (str, str)
        Image and mask, as they are listed.
    relocator : Relocator
        Where to look.
    source : Path
        The list, for the message.

    Returns
    -------
    list of Listed
        In the order of the list.

    Raises
    ------
    DataError
        If files are missing: how many, and the first few.
    """
    found, missing = [], []
    for image_name, mask_name in names:
        image, mask = relocator.find(image_name), relocator.find(mask_name)
        missing += [n for n, p in ((image_name, image), (mask_name, mask)) if p is None]
        if image is not None and mask is not None:
            found.append(Listed(image, mask))
    if missing:
        raise DataError(
            f"{source}: names {len(missing)} files that are not in the data folder: "
            f"{shortlist(missing, limit=3)}"
        )
    if not found:
        raise DataError(f"{source}: names no images, expected one image and mask a line")
    return found


def scan(
    files: Sequence[Listed], *, classes: int, progress: Progress = SILENT
) -> list[dict[int, int]]:
    """Count the pixels of each class in every mask, and hold sizes and numbers against the rest.

    Parameters
    ----------
    files : sequence of Listed
        Images with their masks.
    classes : int
        How many classes there are, numbered from 1.
    progress : Progress
        Told of the masks that are read.

    Returns
    -------
    list of dict
        Pixels by class number, one dictionary a file.

    Raises
    ------
    DataError
        If sizes differ or numbers are no classes: how many masks, and the first few.
    """

    def look(file: Listed) -> tuple[dict[int, int], bool]:
        mask = read_label_map(file.mask)
        return class_areas(mask), mask.shape == image_size(file.image)

    looked = mapped(look, files, description="reading masks", progress=progress)
    differing = [file.image for file, (_, same) in zip(files, looked, strict=True) if not same]
    if differing:
        raise sizes_differ(differing)
    highest = [max(areas, default=0) for areas, _ in looked]
    beyond = [f"{f.mask} ({n})" for f, n in zip(files, highest, strict=True) if n > classes]
    if beyond:
        raise DataError(
            f"{len(beyond)} masks hold numbers above {classes}, expected classes numbered 1 to "
            f"{classes} without gaps, 0 for background and 255 for ignored pixels: "
            f"{shortlist(beyond, limit=3)}. Renumber the masks"
        )
    return [areas for areas, _ in looked]


def sizes_differ(images: Sequence[Path]) -> DataError:
    """Make the error of images whose masks have another size."""
    return DataError(
        f"{len(images)} images and their masks differ in size, expected the same: "
        f"{shortlist(images, limit=3)}"
    )
