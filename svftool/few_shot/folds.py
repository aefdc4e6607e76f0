"""Which classes are novel in which fold: Pascal-5i, COCO-20i, and any other list of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from svftool.errors import DataError, counted

FOLDS = 4

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle",
    "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person",
    "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip

_VOC_ALIASES = {
    "aero": "aeroplane",
    "airplane": "aeroplane",
    "bike": "bicycle",
    "couch": "sofa",
    "mbike": "motorbike",
    "motorcycle": "motorbike",
    "monitor": "tvmonitor",
    "plant": "pottedplant",
    "table": "diningtable",
    "tv": "tvmonitor",
}


@dataclass(frozen=True)
class ClassSplit:
    """The classes of one fold.

    Attributes
    ----------
    names : tuple of str
        All classes; class ``c`` (counted from 1, as in the label maps) is ``names[c - 1]``.
    base, novel : tuple of int
        Classes to train on and classes to test on, increasing and disjoint.
    fold : int
        Which fold, from 0.
    inner : int or None
        The fold that stands in for it; see `split_classes`.
    """

    names: tuple[str, ...]
    base: tuple[int, ...]
    novel: tuple[int, ...]
    fold: int
    inner: int | None = None

    @property
    def tested(self) -> int:
        """The fold whose classes are novel here."""
        return self.fold if self.inner is None else self.inner

    def name(self, label: int) -> str:
        """Return the name of a class."""
        return self.names[label - 1]


def split_classes(
    names: Sequence[str],
    fold: int,
    *,
    scheme: Literal["blocks", "strides"] = "blocks",
    inner: int | None = None,
) -> ClassSplit:
    """Split a list of classes into the base and novel ones of a fold.

    Parameters
    ----------
    names : sequence of str
        The classes in their order.
    fold : int
        0 to 3.
    scheme : {"blocks", "strides"}
        ``blocks`` takes the fold-th quarter of the list as novel (Pascal-5i: classes ``5i + 1`` to
        ``5i + 5``); ``strides`` takes every fourth class from ``fold + 1`` (COCO-20i as PFENet, BAM
        and HSNet have it).
    inner : int, optional
        Another fold, whose classes are novel instead, while those of `fold` take no part at all:
        choices that are made this way have seen nothing of `fold`.

    Raises
    ------
    DataError
        If there is no such fold, there are fewer classes than folds, or `inner` is `fold`.

    Examples
    --------
    >>> split_classes(VOC_CLASSES, 1).novel
    (6, 7, 8, 9, 10)
    >>> split_classes(COCO_CLASSES, 1, scheme="strides").novel[:3]
    (2, 6, 10)
    """
    count = len(names)
    for number in (fold, fold if inner is None else inner):
        if not 0 <= number < FOLDS:
            raise DataError(f"fold {number} does not exist, expected 0 to {FOLDS - 1}")
    if inner == fold:
        raise DataError(f"inner fold {inner} is the fold that it stands in for, expected another")
    if count < FOLDS:
        raise DataError(
            f"{counted(count, 'classes')} cannot make {FOLDS} folds, expected at least {FOLDS}"
        )
    labels = range(1, count + 1)
    outer = _classes_of(labels, fold, scheme)
    novel = outer if inner is None else _classes_of(labels, inner, scheme)
    base = tuple(label for label in labels if label not in {*outer, *novel})
    return ClassSplit(tuple(names), base, novel, fold, inner)


def _classes_of(labels: range, fold: int, scheme: str) -> tuple[int, ...]:
    if scheme == "strides":
        return tuple(labels[fold::FOLDS])
    return tuple(labels[len(labels) * fold // FOLDS : len(labels) * (fold + 1) // FOLDS])


def in_voc_order(names: Sequence[str]) -> tuple[str, ...] | None:
    """Sort names that are the 20 PASCAL VOC classes into VOC's order.

    Parameters
    ----------
    names : sequence of str
        Names in any order, case and common short form (``Aero``, ``Mbike``, ``Monitor``).

    Returns
    -------
    tuple of str or None
        The names as they were given, in VOC's order; None where they are not the 20 classes.
    """
    found = {}
    for name in names:
        plain = name.lower().replace(" ", "").replace("_", "").replace("-", "")
        found[_VOC_ALIASES.get(plain, plain)] = name
    if len(names) != len(VOC_CLASSES) or set(found) != set(VOC_CLASSES):
        return None
    return tuple(found[name] for name in VOC_CLASSES)
