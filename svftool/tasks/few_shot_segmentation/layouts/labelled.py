"""Pascal-5i and COCO-20i: images with maps of class numbers, split into folds.

Every mask is read. Where lists are plain, or the folders themselves are the lists, the area rule
says here which images stand for which class; `fold_lists` has the lists that say so themselves.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Literal

from svftool.progress import SILENT, Progress
from svftool.tasks.few_shot_segmentation.folds import FOLDS, ClassSplit, split_classes
from svftool.tasks.few_shot_segmentation.layouts.files import Listed, scan
from svftool.tasks.few_shot_segmentation.pool import MINIMUM_AREA, FoldData, Pair, Pool

Areas = dict[int, int]


def stand_for(file: Listed, areas: Areas, classes: Iterable[int]) -> Pair | None:
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
    Pair or None
        Supports the classes that fill `MINIMUM_AREA` pixels or more, and may be queried for all of
        the classes in it, as PFENet and BAM have it; None where no class fills the area.
    """
    present = [label for label in classes if label in areas]
    large = tuple(label for label in present if areas[label] >= MINIMUM_AREA)
    if not large:
        return None
    return Pair(file.image, file.mask, tuple(present), large, identity=str(file.image))


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

    @property
    def folds(self) -> int:
        """How many folds there are."""
        return FOLDS

    def fold(
        self,
        index: int,
        *,
        inner: int | None = None,
        shots: int = 1,
        remove_novel: bool = False,
        progress: Progress = SILENT,
    ) -> FoldData:
        """Give the data of one fold.

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
        return FoldData(
            dataset=self.dataset,
            split=split,
            train=Pool(tuple(train), split.base, order),
            held_out=Pool(tuple(self._held_out(split, progress)), split.base, order),
            test=Pool(tuple(self._test(split, progress)), split.novel, order),
            novel_images=len({pair.image for pair in novel}),
            removed=remove_novel,
        )

    _order: Literal["images", "classes"] = "images"

    @abstractmethod
    def _train(self, split: ClassSplit, progress: Progress) -> list[Pair]: ...

    @abstractmethod
    def _held_out(self, split: ClassSplit, progress: Progress) -> list[Pair]: ...

    @abstractmethod
    def _test(self, split: ClassSplit, progress: Progress) -> list[Pair]: ...

    def _areas(self, files: Sequence[Listed], progress: Progress) -> list[Areas]:
        new = [file for file in dict.fromkeys(files) if file not in self._scanned]
        if new:
            found = scan(new, classes=len(self.names), progress=progress)
            self._scanned.update(zip(new, found, strict=True))
        return [self._scanned[file] for file in files]

    def _holding(
        self, pairs: Sequence[Pair], classes: Sequence[int], progress: Progress
    ) -> set[Pair]:
        areas = self._areas([Listed(pair.image, pair.mask) for pair in pairs], progress)
        return {
            pair
            for pair, found in zip(pairs, areas, strict=True)
            if any(label in found for label in classes)
        }


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

    def _train(self, split: ClassSplit, progress: Progress) -> list[Pair]:
        return self._standing(self._train_files, split.base, progress)

    def _held_out(self, split: ClassSplit, progress: Progress) -> list[Pair]:
        return self._standing(self._test_files, split.base, progress)

    def _test(self, split: ClassSplit, progress: Progress) -> list[Pair]:
        return self._standing(self._test_files, split.novel, progress)

    def _standing(
        self, files: Sequence[Listed], classes: Sequence[int], progress: Progress
    ) -> list[Pair]:
        areas = self._areas(files, progress)
        pairs = (stand_for(f, a, classes) for f, a in zip(files, areas, strict=True))
        return [pair for pair in pairs if pair is not None]
