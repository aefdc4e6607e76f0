"""A folder of classes, each a folder of images with binary masks: FSS-1000 and its like.

``CLASS/X.jpg`` goes with ``CLASS/X.png``. The 20 classes of PASCAL VOC make the folds of Pascal-5i;
lists ``trn.txt``, ``val.txt`` and ``test.txt`` of class names make the one fold of FSS-1000; other
classes are split into quarters of their sorted names.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import zip_longest
from pathlib import Path

import numpy as np

from svftool.errors import DataError, counted, shortlist
from svftool.few_shot.folds import (
    ClassSplit,
    in_voc_order,
    split_classes,
)
from svftool.few_shot.list_files import sizes_differ
from svftool.few_shot.masks import mapped, read_binary
from svftool.few_shot.pool import FoldData, ImageMaskPair, ImagePool, allow
from svftool.files.texts import read_text
from svftool.progress import SILENT, Progress
from svftool.tasks.images import image_size, refuse_splits

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".webp", ".bmp"})
HELD_OUT_SHARE = 0.2
HELD_OUT_LEAST = 6
"""Enough for one 5-shot episode."""


class PairsSource:
    """A folder of class folders with image and mask pairs.

    Parameters
    ----------
    root : Path
        The folder.
    lists : Path or None
        A folder with ``trn.txt``, ``val.txt`` and ``test.txt``, a class name a line.

    Raises
    ------
    DataError
        If masks are missing, or a list names no classes, unknown ones, or one that is named
        elsewhere too.
    """

    def __init__(self, root: Path, lists: Path | None = None) -> None:
        self._root = root
        folders = class_folders(root)
        _require_masks(folders)
        names = sorted(folders)
        self._lists = lists
        self._parts = None if lists is None else _read_parts(lists, names)
        ordered = in_voc_order(names)
        self.names = ordered or tuple(names)
        if self._parts is not None:
            self.dataset = "fss-1000"
        else:
            self.dataset = "pascal-5i pairs" if ordered else "pairs"
        self._folders = folders
        self._pairs: list[ImageMaskPair] | None = None

    def fold(
        self,
        index: int,
        *,
        inner: int | None = None,
        shots: int = 1,
        remove_novel: bool = False,
        progress: Progress = SILENT,
    ) -> FoldData:
        """Return the data of one fold.

        Pictures that stand in the folders of several classes are one picture: they are held out
        together, and a training pair whose picture also stands under a novel class holds that
        class.

        Where no list says what to hold out, a fifth of the pictures of each base class is, but 6
        at least, half of them at most, and none that leaves a class without the `shots` + 1
        pictures that an episode of training takes.

        Parameters
        ----------
        index : int
            The fold, from 0.
        inner : int, optional
            A fold that stands in for it; see `split_classes`.
        shots : int
            Supports of an episode in training.
        remove_novel : bool
            Leave out training pairs whose picture stands under a novel class.
        progress : Progress
            Told of the masks that are read.

        Raises
        ------
        DataError
            If the fold does not exist, sizes differ or masks are empty.
        """
        split, chosen_by = self._split(index, inner)
        pairs = self._read(progress)
        base = allow(pairs, query=split.base, support=split.base)
        test = allow(pairs, query=split.novel, support=split.novel)
        seen_novel = {pair.identity for pair in test}
        removed = seen_novel if remove_novel else set[str]()
        if chosen_by is None:
            held = _held_out(base, shots + 1, removed)
            chosen = [pair for pair in base if pair.identity in held]
        else:
            held = set[str]()
            chosen = allow(pairs, query=chosen_by, support=chosen_by)
        train = [pair for pair in base if pair.identity not in held]
        novel = {pair.identity for pair in train if pair.identity in seen_novel}
        train = [pair for pair in train if pair.identity not in removed]
        if novel and not remove_novel:
            progress.warn(
                f"{len(novel)} of {len(seen_novel)} pictures that are tested are trained on too, "
                "under another class. Leave them out of training with --remove-novel"
            )
        return FoldData(
            dataset=self.dataset,
            split=split,
            train=ImagePool(tuple(train), split.base),
            held_out=ImagePool(
                _interleaved(chosen), split.base if chosen_by is None else chosen_by
            ),
            test=ImagePool(_interleaved(test), split.novel),
            novel_images=len(novel),
            removed=remove_novel,
        )

    def _split(self, index: int, inner: int | None) -> tuple[ClassSplit, tuple[int, ...] | None]:
        if self._parts is None:
            return split_classes(self.names, index, inner=inner), None
        if index != 0 or inner is not None:
            number = index if inner is None else inner
            raise DataError(f"fold {number} does not exist, expected 0: {self._lists} makes one")
        numbers = {name: label for label, name in enumerate(self.names, start=1)}
        train, val, test = (
            tuple(sorted(numbers[name] for name in self._parts[part]))
            for part in ("trn", "val", "test")
        )
        return ClassSplit(self.names, train, test, 0), val

    def _read(self, progress: Progress) -> list[ImageMaskPair]:
        if self._pairs is None:
            self._pairs = _read_pairs(self._folders, self.names, progress)
        return self._pairs


def class_folders(root: Path) -> dict[str, list[Path]]:
    """List the images of every class folder below `root`, by the folder's name."""
    found = {}
    for folder in sorted(root.iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            images = [
                file
                for file in sorted(folder.iterdir())
                if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
            ]
            if images:
                found[folder.name] = images
    refuse_splits(root, found)
    return found


def _require_masks(folders: Mapping[str, Sequence[Path]]) -> None:
    images = [image for files in folders.values() for image in files]
    missing = [image for image in images if not image.with_suffix(".png").is_file()]
    if missing:
        raise DataError(
            f"images without a mask: {len(missing)} of {len(images)}, expected a .png of the same "
            f"name beside each: {shortlist(missing, limit=3)}"
        )


def _read_parts(lists: Path, names: Sequence[str]) -> dict[str, list[str]]:
    parts = {part: _read_classes(lists / f"{part}.txt", names) for part in ("trn", "val", "test")}
    empty = [part for part in ("trn", "test") if not parts[part]]
    if empty:
        raise DataError(f"{lists / empty[0]}.txt: names no classes, expected one a line")
    found: dict[str, list[str]] = defaultdict(list)
    for part, classes in parts.items():
        for name in classes:
            found[name].append(f"{part}.txt")
    shared = [f"{name} ({', '.join(files)})" for name, files in found.items() if len(files) > 1]
    if shared:
        raise DataError(
            f"{lists}: classes in more than one list: {len(shared)}, expected each in one, so that "
            f"none is trained and tested on: {shortlist(shared, limit=3)}"
        )
    return parts


def _read_classes(path: Path, names: Sequence[str]) -> list[str]:
    lines = read_text(path, "a list of classes").splitlines()
    classes = [line.strip() for line in lines if line.strip()]
    counts = Counter(classes)
    unknown = [name for name in counts if name not in set(names)]
    if unknown:
        raise DataError(
            f"{path}: names {counted(len(unknown), 'classes')} without a folder: "
            f"{shortlist(unknown, limit=3)}"
        )
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise DataError(
            f"{path}: names {counted(len(twice), 'classes')} more than once, expected each "
            f"on one line: {shortlist(twice, limit=3)}"
        )
    return classes


def _read_pairs(
    folders: Mapping[str, Sequence[Path]], names: Sequence[str], progress: Progress
) -> list[ImageMaskPair]:
    files = [(image, label) for label, name in enumerate(names, 1) for image in folders[name]]

    def look(file: tuple[Path, int]) -> tuple[bool, bool]:
        mask = read_binary(file[0].with_suffix(".png"))
        return mask.shape == image_size(file[0]), bool(mask.any())

    looked = mapped(look, files, description="reading masks", progress=progress)
    differing = [image for (image, _), (same, _) in zip(files, looked, strict=True) if not same]
    if differing:
        raise sizes_differ(differing)
    empty = [image for (image, _), (_, filled) in zip(files, looked, strict=True) if not filled]
    if empty:
        raise DataError(
            f"{counted(len(empty), 'masks', 'are')} empty, expected the class in each: "
            f"{shortlist((e.with_suffix('.png') for e in empty), limit=3)}"
        )
    identities = _identities([image for image, _ in files])
    return [
        ImageMaskPair(
            image, image.with_suffix(".png"), (label,), (label,), label, identities[image]
        )
        for image, label in files
    ]


def _identities(images: Iterable[Path]) -> dict[Path, str]:
    """Name each picture by its file, files of equal content by the first of them."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for image in images:
        by_size[image.stat().st_size].append(image)
    identities: dict[Path, str] = {}
    for same_size in by_size.values():
        first: dict[bytes, str] = {}
        for image in same_size:
            digest = hashlib.sha256(image.read_bytes()).digest() if len(same_size) > 1 else b""
            identities[image] = first.setdefault(digest, str(image))
    return identities


def _held_out(pairs: Sequence[ImageMaskPair], least: int, removed: Set[str]) -> set[str]:
    """Choose pictures of every class to keep from training: always the same ones.

    No class is left with fewer than `least` pictures to train on, `removed` ones left out.
    """
    by_class: dict[int, list[str]] = defaultdict(list)
    classes_of: dict[str, set[int]] = defaultdict(set)
    for pair in pairs:
        by_class[pair.query[0]].append(pair.identity)
        classes_of[pair.identity].add(pair.query[0])
    left = {label: len(set(names) - removed) for label, names in by_class.items()}
    held: set[str] = set()
    for label, identities in sorted(by_class.items()):
        wanted = max(round(HELD_OUT_SHARE * len(identities)), HELD_OUT_LEAST)
        wanted = min(wanted, len(identities) // 2) - sum(name in held for name in identities)
        shuffled = np.random.default_rng([label, len(identities)]).permutation(len(identities))
        for name in (identities[i] for i in shuffled if identities[i] not in held):
            trained = set[int]() if name in removed else classes_of[name]
            if wanted > 0 and all(left[other] > least for other in trained):
                held.add(name)
                wanted -= 1
                for other in trained:
                    left[other] -= 1
    return held


def _interleaved(pairs: Sequence[ImageMaskPair]) -> tuple[ImageMaskPair, ...]:
    """Deal the pairs out class by class, so that any stretch of the order holds all classes."""
    by_class: dict[int, list[ImageMaskPair]] = defaultdict(list)
    for pair in pairs:
        by_class[pair.query[0]].append(pair)
    rounds = zip_longest(*by_class.values())
    return tuple(pair for dealt in rounds for pair in dealt if pair is not None)
