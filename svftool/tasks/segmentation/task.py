"""The task ``segmentation``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from svftool.checkpoints import class_labels
from svftool.errors import UsageError
from svftool.models import DEFAULT_PREPROCESSING, Preprocessing
from svftool.tasks.base import TaskMetric
from svftool.tasks.images import LABELS, require_encodable
from svftool.tasks.options import SegmentationOptions, StrPath
from svftool.tasks.segmentation.draw import SegmentationDraw, Setting
from svftool.tasks.segmentation.pairs import (
    FILE,
    Chosen,
    ClassTable,
    ImagePair,
    Labels,
    Pairs,
    check_labels,
    list_pairs,
    read_classes,
    read_labels,
    survey,
)
from svftool.tasks.segmentation.views import choose_dense_view
from svftool.tasks.splits import draw_examples, nothing_left, require_held_out, require_query
from svftool.tasks.views import Decoded, with_normalisation


class Segmentation:
    """The task ``segmentation``: the class of every pixel.

    Parameters
    ----------
    data : path-like
        Folder with a folder of images and one of label maps; see
        `svftool.tasks.segmentation.pairs.list_pairs`.
    preprocessing : Preprocessing
        Normalisation and size that the checkpoint was trained with.
    config : mapping
        The checkpoint's ``config.json``.
    trained : mapping
        What `describe` said when the weights were trained; its sizes go before `preprocessing`.
    options
        Fields of `svftool.tasks.options.SegmentationOptions`.

    Raises
    ------
    DataError
        If images, maps, classes and shots do not fit together.
    """

    name = "segmentation"
    primary = TaskMetric("miou", higher_is_better=True)
    facts: Mapping[str, int] = MappingProxyType({})

    def __init__(
        self,
        data: StrPath,
        *,
        preprocessing: Preprocessing = DEFAULT_PREPROCESSING,
        config: Mapping[str, Any] = MappingProxyType({}),
        trained: Mapping[str, Any] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        self.options = chosen = SegmentationOptions(**options)
        if not 0 <= chosen.ignore_index < LABELS:
            raise UsageError(f"--ignore-index is {chosen.ignore_index}, expected 0 to {LABELS - 1}")
        require_query(chosen.shots, chosen.evaluation, "images")
        pairs = self._list(data)
        queries = [] if chosen.query_data is None else self._list(chosen.query_data)
        count, hold_out = len(pairs), chosen.hold_out
        split = draw_examples(count, unit="images", shots=chosen.shots, hold_out=hold_out)
        require_held_out(split, hold_out, "images")
        self.shots = chosen.shots
        self._table = _class_table(Path(data), chosen.classes)
        self.classes = self._check(pairs, queries, config)
        preprocessing = with_normalisation(
            preprocessing, chosen.mean, chosen.std, augment=chosen.augment
        )
        every = [pair.image for pair in (*pairs, *queries)]
        self.view = choose_dense_view(
            every,
            preprocessing,
            size=chosen.image_size,
            ignore=chosen.ignore_index,
            trained=trained,
        )
        self._pairs, self._queries = self._kept(pairs), self._kept(queries)

    def _list(self, data: StrPath) -> list[ImagePair]:
        chosen = self.options
        names = {"images": chosen.images, "masks": chosen.masks}
        return list_pairs(Path(data), **names, mask_suffix=chosen.mask_suffix)

    def _check(
        self, pairs: Sequence[ImagePair], queries: Sequence[ImagePair], config: Mapping[str, Any]
    ) -> tuple[str, ...]:
        """Hold the maps against the classes, and return the classes' names."""
        counts = [survey(some, self._labels) for some in (pairs, queries) if some]
        found = np.concatenate(counts).sum(0)
        found[self.options.ignore_index] = 0
        largest = int(np.flatnonzero(found).max(initial=1))
        names = self._table.names if self._table is not None else _known_names(config, largest)
        require_encodable(names, "the class names")
        for some, of_each in zip((pairs, queries), counts, strict=False):
            check_labels(some, of_each, classes=len(names), ignore=self.options.ignore_index)
        return names

    def _labels(self, path: Path) -> Labels:
        return read_labels(path, self._table, self.options.ignore_index)

    def _kept(self, pairs: Sequence[ImagePair]) -> Pairs:
        return Pairs(
            pairs,
            Decoded([pair.image for pair in pairs], self.view.load),
            Decoded(
                [pair.mask for pair in pairs], lambda path: torch.from_numpy(self._labels(path))
            ),
        )

    def describe(self) -> dict[str, Any]:
        """Shots, sizes, normalisation, augmentation and head."""
        augment = self.options.augment
        return {
            "shots": self.shots,
            "crop": list(self.view.crop),
            "short_side": self.view.short_side,
            "interpolation": self.view.interpolation,
            "mean": list(self.view.mean),
            "std": list(self.view.std),
            "augment": augment if isinstance(augment, str) else "custom",
            "ignore_index": self.options.ignore_index,
            "head_type": self.options.head_type,
            "head_name": self.options.head_name,
            "features": self.options.features,
            "hold_out": self.options.hold_out,
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
            hold_out=self.options.hold_out,
            seed=seed,
        )
        query = Chosen(self._queries, tuple(range(len(self._queries.pairs))))
        if not len(query) and self.options.measured:
            query = Chosen(self._pairs, split.rest)
            if not len(query):
                raise nothing_left(self.shots, "images")
        setting = Setting(self.options, self.classes, self.view)
        support, held_out = Chosen(self._pairs, split.support), Chosen(self._pairs, split.held_out)
        return SegmentationDraw(setting, support, held_out, query, seed=seed)


def _class_table(data: Path, given: StrPath | Sequence[str] | None) -> ClassTable | None:
    if isinstance(given, (str, os.PathLike)):
        return read_classes(Path(given))
    if (data / FILE).is_file():
        return read_classes(data / FILE)
    return None if given is None else ClassTable(tuple(given))


def _known_names(config: Mapping[str, Any], largest: int) -> tuple[str, ...]:
    """Names of a segmentation model's own classes, where there are enough; else numbers."""
    kinds = config.get("architectures")
    if isinstance(kinds, list) and any("Segmentation" in str(kind) for kind in kinds):
        known = class_labels(config)
        if known is not None and len(known) > largest:
            return known
    return tuple(str(label) for label in range(largest + 1))
