"""The task ``segmentation``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
import torch

from svftool.errors import UsageError
from svftool.models import DEFAULT_PREPROCESSING, Preprocessing
from svftool.tasks.base import Metric, require_one_of
from svftool.tasks.segmentation.draw import Chosen, Pairs, SegmentationDraw
from svftool.tasks.segmentation.heads import HeadType
from svftool.tasks.segmentation.pairs import (
    FILE,
    LABELS,
    ClassTable,
    Labels,
    Pair,
    check_labels,
    list_pairs,
    read_classes,
    read_labels,
    survey,
)
from svftool.tasks.segmentation.views import choose_dense_view
from svftool.tasks.splits import draw_examples, nothing_left, require_query
from svftool.tasks.views import Augment, Decoded, Transform

StrPath = str | os.PathLike[str]
HeadChoice = Literal["auto", "keep", "new"]

DEFAULT_IGNORE = 255


class Segmentation:
    """The task ``segmentation``: the class of every pixel.

    Parameters
    ----------
    data : path-like
        Folder with a folder of images and one of label maps; see
        `svftool.tasks.segmentation.pairs.list_pairs`.
    evaluation : path-like or None
        Such a folder to measure with; None takes what the shots left over.
    shots : int or None
        Images in the support set; None takes all, which needs `evaluation`.
    images, masks, mask_suffix : str
        Names of the folders, and what the maps' names end with.
    classes : path-like or sequence of str or None
        Class file, see `svftool.tasks.segmentation.pairs.read_classes`; None looks for
        ``classes.txt`` in `data`, then at the names in `config`, and else counts the labels. Names
        stand in where `data` has no such file.
    ignore_index : int
        Label of pixels without a class.
    head : {"auto", "keep", "new"}
        ``auto`` keeps the checkpoint's head when it has as many outputs as there are classes.
    head_name : str or None
        Module that gives the logits, where it is not found by itself.
    head_type : {"linear", "fcn", "deeplab"}
        Head of a backbone that has none; see `svftool.tasks.segmentation.heads.make_head`.
    features : str or None
        Module of a backbone that gives the feature map, where the last one is not meant.
    image_size : int or None
        Side of the training crop, to which short sides are resized; see
        `svftool.tasks.segmentation.views.choose_dense_view`.
    augment : {"none", "light", "strong"} or callable
        See `svftool.tasks.segmentation.views.DenseView.training`.
    hold_out : float
        Share of the support set that chooses the best weights instead of being trained on.
    preprocessing : Preprocessing
        Normalisation and size that the checkpoint was trained with.
    mean, std : tuple of float or None
        Override those of `preprocessing`.
    config : mapping
        The checkpoint's ``config.json``.

    Raises
    ------
    DataError
        If images, maps, classes and shots do not fit together.
    """

    name = "segmentation"
    primary = Metric("miou", higher_is_better=True)
    facts: Mapping[str, int] = MappingProxyType({})

    def __init__(
        self,
        data: StrPath,
        *,
        evaluation: StrPath | None = None,
        shots: int | None = None,
        images: str = "images",
        masks: str = "masks",
        mask_suffix: str = "",
        classes: StrPath | Sequence[str] | None = None,
        ignore_index: int = DEFAULT_IGNORE,
        head: HeadChoice = "auto",
        head_name: str | None = None,
        head_type: HeadType = "linear",
        features: str | None = None,
        image_size: int | None = None,
        augment: Augment | Transform = "light",
        hold_out: float = 0.0,
        preprocessing: Preprocessing = DEFAULT_PREPROCESSING,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        config: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        if not 0 <= ignore_index < LABELS:
            raise UsageError(f"--ignore-index is {ignore_index}, expected 0 to {LABELS - 1}")
        require_one_of("--head-type", head_type, get_args(HeadType), self.name)
        require_query(shots, evaluation, "images")
        names = {"images": images, "masks": masks, "mask_suffix": mask_suffix}
        pairs = list_pairs(Path(data), **names)
        queries = [] if evaluation is None else list_pairs(Path(evaluation), **names)
        draw_examples(len(pairs), unit="images", shots=shots)
        self.shots = shots
        self.ignore = ignore_index
        self.head, self.head_name, self.head_type = head, head_name, head_type
        self.features = features
        self.augment = augment
        self.hold_out = hold_out
        self._table = _class_table(Path(data), classes)
        self.classes = self._check(pairs, queries, config)
        preprocessing = replace(
            preprocessing, mean=mean or preprocessing.mean, std=std or preprocessing.std
        )
        every = [pair.image for pair in (*pairs, *queries)]
        self.view = choose_dense_view(every, preprocessing, size=image_size, ignore=ignore_index)
        self._pairs, self._queries = self._kept(pairs), self._kept(queries)

    def _check(
        self, pairs: Sequence[Pair], queries: Sequence[Pair], config: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """Hold the maps against the classes, and return the classes' names."""
        counts = [survey(some, self._labels) for some in (pairs, queries) if some]
        found = np.concatenate(counts).sum(0)
        found[self.ignore] = 0
        largest = int(np.flatnonzero(found).max(initial=1))
        names = self._table.names if self._table is not None else _known_names(config, largest)
        for some, of_each in zip((pairs, queries), counts, strict=False):
            check_labels(some, of_each, classes=len(names), ignore=self.ignore)
        return names

    def _labels(self, path: Path) -> Labels:
        return read_labels(path, self._table, self.ignore)

    def _kept(self, pairs: Sequence[Pair]) -> Pairs:
        return Pairs(
            pairs,
            Decoded([pair.image for pair in pairs], self.view.load),
            Decoded(
                [pair.mask for pair in pairs], lambda path: torch.from_numpy(self._labels(path))
            ),
        )

    def describe(self) -> dict[str, Any]:
        """Shots, sizes, normalisation, augmentation and head."""
        return {
            "shots": self.shots,
            "crop": list(self.view.crop),
            "short_side": self.view.short_side,
            "mean": list(self.view.mean),
            "std": list(self.view.std),
            "augment": self.augment if isinstance(self.augment, str) else "custom",
            "ignore_index": self.ignore,
            "head_type": self.head_type,
            "features": self.features,
            "hold_out": self.hold_out,
        }

    def draw(self, seed: int) -> SegmentationDraw:
        """Draw the support set of a seed.

        Raises
        ------
        DataError
            If nothing is left to evaluate on.
        """
        split = draw_examples(
            len(self._pairs.pairs),
            unit="images",
            shots=self.shots,
            hold_out=self.hold_out,
            seed=seed,
        )
        query = Chosen(self._queries, tuple(range(len(self._queries.pairs))))
        if not len(query):
            query = Chosen(self._pairs, split.rest)
        if not len(query):
            raise nothing_left(self.shots, "images")
        support, held_out = Chosen(self._pairs, split.support), Chosen(self._pairs, split.held_out)
        return SegmentationDraw(self, support, held_out, query, seed=seed)


def _class_table(data: Path, given: StrPath | Sequence[str] | None) -> ClassTable | None:
    if isinstance(given, (str, os.PathLike)):
        return read_classes(Path(given))
    if (data / FILE).is_file():
        return read_classes(data / FILE)
    return None if given is None else ClassTable(tuple(given))


def _known_names(config: Mapping[str, Any], largest: int) -> tuple[str, ...]:
    """Names of a segmentation model's own classes, where there are enough; else numbers."""
    known = config.get("id2label")
    kind = " ".join(config.get("architectures") or [])
    if isinstance(known, Mapping) and "Segmentation" in kind and len(known) > largest:
        return tuple(str(known[key]) for key in sorted(known, key=int))
    return tuple(str(label) for label in range(largest + 1))
