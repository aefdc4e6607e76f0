"""Data sets of few-shot segmentation in the folders that they come in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from svftool.errors import DataError, counted
from svftool.few_shot.folds import COCO_CLASSES, VOC_CLASSES
from svftool.few_shot.labelled import BamSource, HsnetSource, LabelledSource, ScannedSource
from svftool.few_shot.list_files import Listed, Relocator, locate, read_pair_list
from svftool.few_shot.pairs import PairsSource, class_folders
from svftool.few_shot.pool import FoldData
from svftool.files.texts import read_text
from svftool.progress import SILENT, Progress

__all__ = ["DataSource", "open_source"]

_TRAIN_LISTS = ("voc_sbd_merge_noduplicate.txt", "train.txt", "train_data.txt")
_TEST_LISTS = ("val.txt", "val_fixed.txt", "val_data.txt")


class DataSource(Protocol):
    """A data set that gives its folds."""

    dataset: str
    names: tuple[str, ...]

    def fold(
        self,
        index: int,
        *,
        inner: int | None = None,
        shots: int = 1,
        remove_novel: bool = False,
        progress: Progress = SILENT,
    ) -> FoldData:
        """Return the data of one fold."""


def open_source(root: Path, *, lists: Path | None = None) -> DataSource:
    """Recognise the data set in a folder.

    Parameters
    ----------
    root : Path
        The folder of PASCAL VOC 2012 (``JPEGImages`` and ``SegmentationClassAug``), of COCO 2014
        (``train2014``, ``val2014`` and ``annotations``), one that holds either, or a folder of
        classes with image and mask pairs.
    lists : Path, optional
        A folder of list files: PFENet's (``voc_sbd_merge_noduplicate.txt`` or ``train.txt``, and
        ``val.txt``), BAM's (``fss_list/train``, ``fss_list/val``), HSNet's (``trn``, ``val``), or
        FSS-1000's class lists (``trn.txt``, ``val.txt``, ``test.txt``). By default the folder's
        own.

    Raises
    ------
    DataError
        If the folder has none of these layouts, or the lists cannot be used.
    """
    for folder, what in ((root, "a data set of images and masks"), (lists, "list files")):
        if folder is not None and not folder.is_dir():
            raise DataError(f"{folder}: not a folder, expected one with {what}")
    return _open_labelled(root, lists) or _open_pairs(root, lists)


def _open_labelled(root: Path, lists: Path | None) -> LabelledSource | None:
    for folder in _candidates(root, ("VOC2012", "VOCdevkit/VOC2012")):
        if (folder / "JPEGImages").is_dir():
            return _open_voc(folder, lists)
    for folder in _candidates(root, ("COCO2014", "MSCOCO2014", "coco")):
        if (folder / "val2014").is_dir() and (folder / "annotations").is_dir():
            return _open_coco(folder, lists)
    return None


def _open_pairs(root: Path, lists: Path | None) -> PairsSource:
    for folder in _candidates(root, ("fewshot_data", "FSS-1000")):
        if class_folders(folder):
            return PairsSource(folder, lists)
    raise DataError(
        f"{root}: no data set found, expected PASCAL VOC 2012 (JPEGImages), COCO 2014 (val2014), "
        "or class folders with images (.jpg) and masks (.png of the same name)"
    )


def _candidates(root: Path, below: Sequence[str]) -> Iterable[Path]:
    yield root
    for name in below:
        if (root / name).is_dir():
            yield root / name


def _open_voc(folder: Path, lists: Path | None) -> LabelledSource:
    relocator = Relocator([folder, folder.parent])
    if lists is not None:
        return _from_lists("pascal-5i", VOC_CLASSES, "blocks", lists, relocator)
    train, test = _voc_lists(folder)
    return ScannedSource("pascal-5i", VOC_CLASSES, "blocks", train=train, test=test)


def _voc_lists(folder: Path) -> tuple[list[Listed], list[Listed]]:
    """Make the lists of a VOC folder: val.txt to test, all other masks, SBD's too, to train."""
    sets = folder / "ImageSets" / "Segmentation"
    test_names = _names(sets / "val.txt")
    extended = folder / "SegmentationClassAug"
    masks = extended if extended.is_dir() else folder / "SegmentationClass"
    by_name = {path.stem: path for path in sorted(masks.glob("[!.]*.png"))}
    if not extended.is_dir():
        for sbd in (folder / "SBD", folder.parent / "SBD", folder.parent / "benchmark_RELEASE"):
            for path in sorted((sbd / "dataset" / "cls").glob("[!.]*.mat")):
                by_name.setdefault(path.stem, path)
    test = [Listed(_jpeg(folder, n), masks / f"{n}.png") for n in test_names]
    missing = [str(f.mask) for f in test if not f.mask.is_file()]
    if missing:
        raise DataError(
            f"{sets / 'val.txt'}: names {counted(len(missing), 'masks')} without a file, such as "
            f"{missing[0]}"
        )
    held = set(test_names)
    train = [Listed(_jpeg(folder, n), path) for n, path in by_name.items() if n not in held]
    lost = [str(f.image) for f in (*train, *test) if not f.image.is_file()]
    if lost:
        raise DataError(
            f"{folder}: {counted(len(lost), 'masks', 'have')} no image, such as {lost[0]}"
        )
    return train, test


def _jpeg(folder: Path, name: str) -> Path:
    return folder / "JPEGImages" / f"{name}.jpg"


def _open_coco(folder: Path, lists: Path | None) -> LabelledSource:
    relocator = Relocator([folder, folder.parent])
    if lists is not None:
        return _from_lists("coco-20i", COCO_CLASSES, "strides", lists, relocator)
    parts = []
    for part in ("train2014", "val2014"):
        masks = folder / "annotations" / part
        files = [
            Listed(folder / part / f"{path.stem}.jpg", path)
            for path in sorted(masks.glob("[!.]*.png"))
        ]
        lost = [str(file.image) for file in files if not file.image.is_file()]
        if lost or not files:
            found = (
                f"{counted(len(lost), 'masks', 'have')} no image, such as {lost[0]}"
                if lost
                else "no masks"
            )
            raise DataError(
                f"{masks}: {found}, expected a grey .png of class numbers (1 to 80) an image"
            )
        parts.append(files)
    return ScannedSource("coco-20i", COCO_CLASSES, "strides", train=parts[0], test=parts[1])


def _from_lists(
    dataset: str,
    names: Sequence[str],
    scheme: Literal["blocks", "strides"],
    lists: Path,
    relocator: Relocator,
) -> LabelledSource:
    for folder in (lists, lists / "fss_list"):
        if (folder / "val" / "data_list_0.txt").is_file():
            return BamSource(dataset, names, scheme, folder=folder, relocator=relocator)
    if any((lists / "val" / f"fold0.{suffix}").is_file() for suffix in ("txt", "pkl")):
        return HsnetSource(dataset, names, scheme, folder=lists, relocator=relocator)
    train, test = (_first(lists, group) for group in (_TRAIN_LISTS, _TEST_LISTS))
    return ScannedSource(
        dataset,
        names,
        scheme,
        train=locate(read_pair_list(train), relocator, train),
        test=locate(read_pair_list(test), relocator, test),
    )


def _first(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(
        f"{folder}: no list files, expected {names[0]} or {names[1]}, or BAM's fss_list, or "
        "HSNet's trn and val"
    )


def _names(path: Path) -> list[str]:
    return read_text(path, "image names (or another list with --lists)").split()
