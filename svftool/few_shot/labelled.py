"""Pascal-5i and COCO-20i: images with maps of class numbers, split into folds.

Every mask is read. Where lists are plain, or the folders themselves are the lists, the area rule
says here which images stand for which class; `fold_lists` has the lists that say so themselves.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from svftool.errors import DataError, shortlist
from svftool.few_shot.folds import FOLDS, ClassSplit, split_classes
from svftool.few_shot.list_files import (
    Listed,
    Named,
    Relocator,
    locate,
    read_class_files,
    read_hsnet_lines,
    read_hsnet_pickle,
    read_pair_list,
    scan,
)
from svftool.few_shot.pool import MINIMUM_AREA, FoldData, ImageMaskPair, ImagePool, allow
from svftool.progress import SILENT, Progress

Areas = dict[int, int]


def stand_for(file: Listed, areas: Areas, classes: Iterable[int]) -> ImageMaskPair | None:
    """Decide which classes an image stands for.

    Parameters
    ----------
    file : Listed
        The image and its map.
    areas : dict
        Pixels by class number in the map.
    classes : iterable of int
        Classes that may be asked for.

    Returns
    -------
    ImageMaskPair or None
        Supports the classes that fill `MINIMUM_AREA` pixels or more, and may be queried for all of
        the classes in it, as PFENet and BAM have it; None where no class fills the area.
    """
    present = [label for label in classes if label in areas]
    large = tuple(label for label in present if areas[label] >= MINIMUM_AREA)
    if not large:
        return None
    return ImageMaskPair(file.image, file.mask, tuple(present), large, identity=str(file.image))


class LabelledSource:
    """A data set of images with maps of class numbers.

    Parameters
    ----------
    dataset : str
        ``pascal-5i`` or ``coco-20i``.
    names : sequence of str
        Its classes.
    scheme : {"blocks", "strides"}
        How its folds are made.
    """

    def __init__(
        self, dataset: str, names: Sequence[str], scheme: Literal["blocks", "strides"]
    ) -> None:
        self.dataset = dataset
        self.names = tuple(names)
        self.scheme: Literal["blocks", "strides"] = scheme
        self._scanned: dict[Listed, Areas] = {}
        self._made: dict[tuple[int, int | None, bool], FoldData] = {}

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

        Parameters
        ----------
        index : int
            The fold, from 0.
        inner : int, optional
            A fold that stands in for it; see `split_classes`.
        shots : int
            Supports of an episode in training; the lists say what is held out, whatever they are.
        remove_novel : bool
            Leave out training images that hold a novel class anywhere.
        progress : Progress
            Told of the masks that are read.

        Raises
        ------
        DataError
            If the fold does not exist, or its lists or masks cannot be used.
        """
        key = (index, inner, remove_novel)
        if key not in self._made:
            split = split_classes(self.names, index, scheme=self.scheme, inner=inner)
            self._made[key] = self._make(split, remove_novel, progress)
        return self._made[key]

    def _make(self, split: ClassSplit, remove_novel: bool, progress: Progress) -> FoldData:
        train = self._train(split, progress)
        novel = self._holding(train, split.novel, progress)
        if remove_novel:
            train = [pair for pair in train if pair not in novel]
        order = self._order
        held_out, test = self._held_out(split, progress), self._test(split, progress)
        _refuse_overlap(train, [*held_out, *test])
        return FoldData(
            dataset=self.dataset,
            split=split,
            train=ImagePool(tuple(train), split.base, order),
            held_out=ImagePool(tuple(held_out), split.base, order),
            test=ImagePool(tuple(test), split.novel, order),
            novel_images=len({pair.image for pair in novel}),
            removed=remove_novel,
        )

    _order: Literal["images", "classes"] = "images"

    @abstractmethod
    def _train(self, split: ClassSplit, progress: Progress) -> list[ImageMaskPair]: ...

    @abstractmethod
    def _held_out(self, split: ClassSplit, progress: Progress) -> list[ImageMaskPair]: ...

    @abstractmethod
    def _test(self, split: ClassSplit, progress: Progress) -> list[ImageMaskPair]: ...

    def _areas(self, files: Sequence[Listed], progress: Progress) -> list[Areas]:
        new = [file for file in dict.fromkeys(files) if file not in self._scanned]
        if new:
            found = scan(new, classes=len(self.names), progress=progress)
            self._scanned.update(zip(new, found, strict=True))
        return [self._scanned[file] for file in files]

    def _holding(
        self, pairs: Sequence[ImageMaskPair], classes: Sequence[int], progress: Progress
    ) -> set[ImageMaskPair]:
        areas = self._areas([Listed(pair.image, pair.mask) for pair in pairs], progress)
        return {
            pair
            for pair, found in zip(pairs, areas, strict=True)
            if any(label in found for label in classes)
        }


def _refuse_overlap(train: Sequence[ImageMaskPair], test: Sequence[ImageMaskPair]) -> None:
    """Refuse lists by which a model is tested on pictures that it was trained on."""
    tested = {pair.image for pair in test}
    both = sorted(tested & {pair.image for pair in train})
    if both:
        raise DataError(
            f"{len(both)} of {len(tested)} images that are tested or held out are in the training "
            f"lists too, expected none: {shortlist(both, limit=3)}. Take them out of the training "
            "lists"
        )


class ScannedSource(LabelledSource):
    """Plain lists of training and test images; masks are read to see what is in them.

    Parameters
    ----------
    dataset, names, scheme
        As `LabelledSource`.
    train, test : sequence of Listed
        The two lists.
    """

    def __init__(
        self,
        dataset: str,
        names: Sequence[str],
        scheme: Literal["blocks", "strides"],
        *,
        train: Sequence[Listed],
        test: Sequence[Listed],
    ) -> None:
        super().__init__(dataset, names, scheme)
        self._train_files = tuple(train)
        self._test_files = tuple(test)

    def _train(self, split: ClassSplit, progress: Progress) -> list[ImageMaskPair]:
        return self._standing(self._train_files, split.base, progress)

    def _held_out(self, split: ClassSplit, progress: Progress) -> list[ImageMaskPair]:
        return self._standing(self._test_files, split.base, progress)

    def _test(self, split: ClassSplit, progress: Progress) -> list[ImageMaskPair]:
        return self._standing(self._test_files, split.novel, progress)

    def _standing(
        self, files: Sequence[Listed], classes: Sequence[int], progress: Progress
    ) -> list[ImageMaskPair]:
        areas = self._areas(files, progress)
        pairs = (stand_for(f, a, classes) for f, a in zip(files, areas, strict=True))
        return [pair for pair in pairs if pair is not None]


# Lists that say for each fold which images stand for which class: BAM's and HSNet's.


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

    def _train(self, split: ClassSplit, progress: Progress) -> list[ImageMaskPair]:
        return self._read("train", split.tested, split.base, progress)

    def _held_out(self, split: ClassSplit, progress: Progress) -> list[ImageMaskPair]:
        others = [fold for fold in range(FOLDS) if fold != split.tested]
        return _merge(
            pair for fold in others for pair in self._read("val", fold, split.base, progress)
        )

    def _test(self, split: ClassSplit, progress: Progress) -> list[ImageMaskPair]:
        return self._read("val", split.tested, split.novel, progress)

    def _read(
        self, part: str, fold: int, classes: Sequence[int], progress: Progress
    ) -> list[ImageMaskPair]:
        images = self._folder / part / f"data_list_{fold}.txt"
        by_class = self._folder / part / f"sub_class_file_list_{fold}.txt"
        names = read_pair_list(images)
        supports = _supports(by_class, names, images.name)
        files = locate(names, self._relocator, images)
        areas = self._areas(files, progress)
        given = [supports.get(name, ()) for name in names]
        _require_classes(by_class, files, areas, given)
        pairs = [
            ImageMaskPair(file.image, file.mask, tuple(found), labels, identity=str(file.image))
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
            f"{path}: images that are not in {images}: {len(unlisted)}, expected each of them "
            f"there with the same mask: {shortlist(unlisted, limit=3)}. Use the two lists that "
            "were made together"
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
            f"{path}: images listed for a class that their masks do not hold: {len(lacking)}, "
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

    def _train(self, split: ClassSplit, progress: Progress) -> list[ImageMaskPair]:
        if self._pickled:
            pairs = self._read("trn", split.tested, progress)
            return allow(pairs, query=split.base, support=split.base)
        return self._others("trn", split, progress)

    def _held_out(self, split: ClassSplit, progress: Progress) -> list[ImageMaskPair]:
        return self._others("val", split, progress)

    def _test(self, split: ClassSplit, progress: Progress) -> list[ImageMaskPair]:
        pairs = self._read("val", split.tested, progress)
        return allow(pairs, query=split.novel, support=split.novel)

    def _others(self, part: str, split: ClassSplit, progress: Progress) -> list[ImageMaskPair]:
        others = [fold for fold in range(FOLDS) if fold != split.tested]
        pairs = [pair for fold in others for pair in self._read(part, fold, progress)]
        merged = _merge(pairs) if self._pickled else pairs
        return allow(merged, query=split.base, support=split.base)

    def _read(self, part: str, fold: int, progress: Progress) -> list[ImageMaskPair]:
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
            ImageMaskPair(file.image, file.mask, (label,), (label,), identity=str(file.image))
            for file, (_, label) in zip(files, entries, strict=True)
        ]
        return _merge(pairs) if self._pickled else pairs


def _merge(pairs: Iterable[ImageMaskPair]) -> list[ImageMaskPair]:
    """Join the entries of one image, with the classes of all of them."""
    joined: dict[Path, ImageMaskPair] = {}
    for pair in pairs:
        known = joined.get(pair.image)
        if known is None:
            joined[pair.image] = pair
            continue
        query = tuple(sorted({*known.query, *pair.query}))
        support = tuple(sorted({*known.support, *pair.support}))
        joined[pair.image] = ImageMaskPair(
            pair.image, pair.mask, query, support, identity=pair.identity
        )
    return list(joined.values())
