"""Lists that say for each fold which images stand for which class: BAM's and HSNet's.

What they say is held against the masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from svftool.errors import DataError, shortlist
from svftool.progress import Progress
from svftool.tasks.few_shot_segmentation.folds import FOLDS, ClassSplit
from svftool.tasks.few_shot_segmentation.layouts.files import Listed, Relocator, locate
from svftool.tasks.few_shot_segmentation.layouts.labelled import Areas, LabelledSource
from svftool.tasks.few_shot_segmentation.layouts.lists import (
    Named,
    read_class_files,
    read_hsnet_lines,
    read_hsnet_pickle,
    read_pair_list,
)
from svftool.tasks.few_shot_segmentation.pool import Pair, allow


class BamSource(LabelledSource):
    """BAM's lists a fold: which images there are, and which support each class.

    Parameters
    ----------
    dataset, names, scheme
        As `LabelledSource`.
    folder : Path
        Holds ``train`` and ``val`` with ``data_list_F.txt`` and ``sub_class_file_list_F.txt``.
    relocator : Relocator
        Finds the files that the lists name.
    """

    def __init__(
        self,
        dataset: str,
        names: Sequence[str],
        scheme: Literal["blocks", "strides"],
        *,
        folder: Path,
        relocator: Relocator,
    ) -> None:
        super().__init__(dataset, names, scheme)
        self._folder = folder
        self._relocator = relocator

    def _train(self, split: ClassSplit, progress: Progress) -> list[Pair]:
        return self._read("train", split.tested, split.base, progress)

    def _held_out(self, split: ClassSplit, progress: Progress) -> list[Pair]:
        others = [fold for fold in range(FOLDS) if fold != split.tested]
        return _merge(
            pair for fold in others for pair in self._read("val", fold, split.base, progress)
        )

    def _test(self, split: ClassSplit, progress: Progress) -> list[Pair]:
        return self._read("val", split.tested, split.novel, progress)

    def _read(self, part: str, fold: int, classes: Sequence[int], progress: Progress) -> list[Pair]:
        images = self._folder / part / f"data_list_{fold}.txt"
        by_class = self._folder / part / f"sub_class_file_list_{fold}.txt"
        names = read_pair_list(images)
        supports = _supports(by_class, names, images.name)
        files = locate(names, self._relocator, images)
        areas = self._areas(files, progress)
        given = [supports.get(name, ()) for name in names]
        _require_classes(by_class, files, areas, given)
        pairs = [
            Pair(file.image, file.mask, tuple(found), labels, identity=str(file.image))
            for file, found, labels in zip(files, areas, given, strict=True)
        ]
        return allow(pairs, query=classes, support=classes)


def _supports(path: Path, names: Sequence[Named], images: str) -> dict[Named, tuple[int, ...]]:
    """Read which classes each image supports, all of them among the listed images."""
    supports: dict[Named, tuple[int, ...]] = {}
    for label, named in read_class_files(path).items():
        for name in named:
            supports[name] = (*supports.get(name, ()), label)
    known = set(names)
    unlisted = [image for image, mask in supports if (image, mask) not in known]
    if unlisted:
        raise DataError(
            f"{path}: {len(unlisted)} images are not in {images}, expected each of them there "
            f"with the same mask: {shortlist(unlisted, limit=3)}. Use the two lists that were "
            "made together"
        )
    return supports


def _require_classes(
    path: Path,
    files: Sequence[Listed],
    areas: Sequence[Areas],
    labels: Sequence[Sequence[int]],
) -> None:
    """Refuse a list that gives an image a class which its mask does not hold."""
    lacking = [
        f"{file.mask} (class {label})"
        for file, found, given in zip(files, areas, labels, strict=True)
        for label in given
        if label not in found
    ]
    if lacking:
        raise DataError(
            f"{path}: {len(lacking)} images are listed for a class that their masks do not hold, "
            f"expected some of its pixels: {shortlist(lacking, limit=3)}. Use the masks that the "
            "list was made for, or leave these images out of it"
        )


class HsnetSource(LabelledSource):
    """HSNet's splits: an entry is an image and the one class that it is asked for.

    Parameters
    ----------
    dataset, names, scheme
        As `LabelledSource`.
    folder : Path
        Holds ``trn`` and ``val`` with ``foldF.txt`` (Pascal) or ``foldF.pkl`` (COCO).
    relocator : Relocator
        Finds images and masks below the data set's folder.
    """

    def __init__(
        self,
        dataset: str,
        names: Sequence[str],
        scheme: Literal["blocks", "strides"],
        *,
        folder: Path,
        relocator: Relocator,
    ) -> None:
        super().__init__(dataset, names, scheme)
        self._folder = folder
        self._relocator = relocator

    @cached_property
    def _pickled(self) -> bool:
        return (self._folder / "val" / "fold0.pkl").is_file()

    @property
    def _order(self) -> Literal["images", "classes"]:  # type: ignore[override]
        return "classes" if self._pickled else "images"

    def _train(self, split: ClassSplit, progress: Progress) -> list[Pair]:
        if self._pickled:
            pairs = self._read("trn", split.tested, progress)
            return allow(pairs, query=split.base, support=split.base)
        return self._others("trn", split, progress)

    def _held_out(self, split: ClassSplit, progress: Progress) -> list[Pair]:
        return self._others("val", split, progress)

    def _test(self, split: ClassSplit, progress: Progress) -> list[Pair]:
        pairs = self._read("val", split.tested, progress)
        return allow(pairs, query=split.novel, support=split.novel)

    def _others(self, part: str, split: ClassSplit, progress: Progress) -> list[Pair]:
        others = [fold for fold in range(FOLDS) if fold != split.tested]
        pairs = [pair for fold in others for pair in self._read(part, fold, progress)]
        merged = _merge(pairs) if self._pickled else pairs
        return allow(merged, query=split.base, support=split.base)

    def _read(self, part: str, fold: int, progress: Progress) -> list[Pair]:
        suffix = "pkl" if self._pickled else "txt"
        path = self._folder / part / f"fold{fold}.{suffix}"
        if self._pickled:
            entries = sorted((n, c) for c, names in read_hsnet_pickle(path).items() for n in names)
            named = [(n, f"annotations/{Path(n).with_suffix('.png')}") for n, _ in entries]
        else:
            entries = read_hsnet_lines(path)
            named = [(f"JPEGImages/{n}.jpg", f"SegmentationClassAug/{n}.png") for n, _ in entries]
        files = locate(named, self._relocator, path)
        labels = [(label,) for _, label in entries]
        _require_classes(path, files, self._areas(files, progress), labels)
        pairs = [
            Pair(file.image, file.mask, (label,), (label,), identity=str(file.image))
            for file, (_, label) in zip(files, entries, strict=True)
        ]
        return _merge(pairs) if self._pickled else pairs


def _merge(pairs: Iterable[Pair]) -> list[Pair]:
    """Join the entries of one image, with the classes of all of them."""
    joined: dict[Path, Pair] = {}
    for pair in pairs:
        known = joined.get(pair.image)
        if known is None:
            joined[pair.image] = pair
            continue
        query = tuple(sorted({*known.query, *pair.query}))
        support = tuple(sorted({*known.support, *pair.support}))
        joined[pair.image] = Pair(pair.image, pair.mask, query, support, identity=pair.identity)
    return list(joined.values())
