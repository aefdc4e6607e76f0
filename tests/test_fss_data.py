"""Folds, masks and the folders of Pascal and COCO, on small data in the real layouts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from layouts import SIDE, label_map, write_image, write_indexed, write_voc
from PIL import Image

from svftool.errors import DataError
from svftool.few_shot.folds import (
    COCO_CLASSES,
    VOC_CLASSES,
    in_voc_order,
    split_classes,
)
from svftool.few_shot.masks import (
    class_areas,
    mask_of,
    read_binary,
    read_label_map,
)
from svftool.few_shot.pool import MINIMUM_AREA
from svftool.few_shot.sources import open_source

VocFolder = Callable[..., Path]


@pytest.fixture
def voc(tmp_path: Path) -> VocFolder:
    """Return a factory of VOC folders: train and val by name."""
    return partial(write_voc, tmp_path / "VOC2012")


# Folds


def test_the_folds_of_pascal_are_quarters_of_the_classes():
    novel = [split_classes(VOC_CLASSES, fold).novel for fold in range(4)]
    assert novel == [
        (1, 2, 3, 4, 5),
        (6, 7, 8, 9, 10),
        (11, 12, 13, 14, 15),
        (16, 17, 18, 19, 20),
    ]
    first = split_classes(VOC_CLASSES, 0)
    assert [first.name(label) for label in first.novel] == [
        "aeroplane", "bicycle", "bird", "boat", "bottle",
    ]  # fmt: skip
    assert first.base == tuple(range(6, 21))


def test_the_folds_of_coco_take_every_fourth_class():
    for fold in range(4):
        split = split_classes(COCO_CLASSES, fold, scheme="strides")
        assert split.novel == tuple(range(fold + 1, 81, 4))
        assert len(split.base) == 60
        assert not set(split.base) & set(split.novel)
    assert COCO_CLASSES[0] == "person"
    assert COCO_CLASSES[79] == "toothbrush"
    assert len(set(COCO_CLASSES)) == 80


def test_classes_that_four_does_not_divide_are_all_novel_once():
    novel = [label for fold in range(4) for label in split_classes("abcdef", fold).novel]
    assert novel == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("fold", [-1, 4])
def test_a_fold_that_does_not_exist_is_refused(fold: int):
    with pytest.raises(DataError, match=rf"fold {fold} does not exist, expected 0 to 3"):
        split_classes(VOC_CLASSES, fold)


def test_short_names_of_voc_classes_are_put_in_order():
    names = ["Train", "Aero", "Bicycle", "Bird", "Boat", "Bottle", "Bus", "Car", "Cat", "Chair"]
    names += [
        "Cow",
        "Table",
        "Dog",
        "Horse",
        "Mbike",
        "Person",
        "Plant",
        "Sheep",
        "Sofa",
        "Monitor",
    ]
    ordered = in_voc_order(names)
    assert ordered is not None
    assert ordered[:2] == ("Aero", "Bicycle")
    assert ordered[10:14] == ("Table", "Dog", "Horse", "Mbike")
    assert ordered[18:] == ("Train", "Monitor")
    assert in_voc_order([*names[:-1], "Unicorn"]) is None
    assert in_voc_order(names[:-1]) is None


# Masks


def test_an_indexed_mask_is_read_as_numbers_and_not_as_colours(tmp_path: Path):
    labels = label_map({5: 40, 20: 3}, ignored=7)
    assert np.array_equal(read_label_map(write_indexed(tmp_path / "m.png", labels)), labels)
    assert class_areas(labels) == {5: 40, 20: 3}


def test_a_colour_mask_is_no_map_of_classes(tmp_path: Path):
    path = write_image(tmp_path / "m.png", 0)
    with pytest.raises(
        DataError, match=r"m\.png: a colour picture \(RGB\), expected class numbers"
    ):
        read_label_map(path)


def test_an_sbd_mask_is_read(tmp_path: Path):
    from scipy.io import savemat

    labels = label_map({3: 500})
    savemat(tmp_path / "x.mat", {"GTcls": {"Segmentation": labels}})
    assert np.array_equal(read_label_map(tmp_path / "x.mat"), labels)
    (tmp_path / "y.mat").write_bytes(b"no matlab file")
    with pytest.raises(DataError, match=r"y\.mat: no GTcls\.Segmentation"):
        read_label_map(tmp_path / "y.mat")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "P", "0/1"])
def test_binary_masks_of_every_kind_mean_the_same(tmp_path: Path, mode: str):
    wanted = label_map({1: 300})
    if mode == "0/1":
        image = Image.fromarray(wanted)
    else:
        image = Image.fromarray(wanted * 255).convert(mode)
        if mode == "P":
            image = Image.fromarray(wanted, mode="P")
            image.putpalette([0, 0, 0, 9, 9, 9])
    image.save(tmp_path / "m.png")
    assert np.array_equal(read_binary(tmp_path / "m.png"), wanted)


def test_a_mask_of_one_class_keeps_ignored_pixels():
    assert mask_of(np.array([[0, 3, 7, 255]], np.uint8), 3).tolist() == [[0, 1, 0, 255]]


# Pascal and COCO folders


def test_a_voc_folder_is_split_by_what_its_masks_hold(voc: VocFolder):
    root = voc(
        train={
            "base": {8: 3000},
            "novel": {1: 3000},
            "both": {8: 3000, 1: 10},
            "small": {8: MINIMUM_AREA - 1},
            "edge": {9: MINIMUM_AREA},
        },
        val={"v1": {1: 3000, 8: 3000}, "v2": {2: 2500, 3: 50}, "v3": {8: 4000}},
    )
    data = open_source(root).fold(0)
    assert data.dataset == "pascal-5i"
    assert [pair.image.stem for pair in data.train.pairs] == ["base", "both", "edge"]
    assert (data.novel_images, data.removed) == (1, False)
    assert [(pair.image.stem, pair.query, pair.support) for pair in data.test.pairs] == [
        ("v1", (1,), (1,)),
        ("v2", (2, 3), (2,)),
    ]
    assert [pair.image.stem for pair in data.held_out.pairs] == ["v1", "v3"]
    assert not {p.image for p in data.train.pairs} & {p.image for p in data.held_out.pairs}


def test_training_images_with_novel_classes_are_removed_on_request(voc: VocFolder):
    root = voc(
        train={"base": {8: 3000}, "both": {8: 3000, 1: 10}, "more": {8: 3000, 20: 3000}},
        val={"v": {1: 3000}},
    )
    data = open_source(root).fold(0, remove_novel=True)
    assert [pair.image.stem for pair in data.train.pairs] == ["base", "more"]
    assert (data.novel_images, data.removed) == (1, True)


def test_voc_and_sbd_are_merged_where_there_is_no_merged_folder(tmp_path: Path):
    from scipy.io import savemat

    root = tmp_path / "VOCdevkit" / "VOC2012"
    for seed, name in enumerate(["voc", "sbd", "both", "val"]):
        write_image(root / "JPEGImages" / f"{name}.jpg", seed)
    for name, label in (("voc", 8), ("both", 9), ("val", 1)):
        write_indexed(root / "SegmentationClass" / f"{name}.png", label_map({label: 3000}))
    sbd = tmp_path / "VOCdevkit" / "benchmark_RELEASE" / "dataset" / "cls"
    sbd.mkdir(parents=True)
    for name in ("sbd", "both", "val"):
        savemat(sbd / f"{name}.mat", {"GTcls": {"Segmentation": label_map({10: 3000})}})
    sets = root / "ImageSets" / "Segmentation"
    sets.mkdir(parents=True)
    (sets / "val.txt").write_text("val\n")
    data = open_source(tmp_path).fold(0)
    found = {pair.image.stem: pair.query for pair in data.train.pairs}
    assert found == {"voc": (8,), "both": (9,), "sbd": (10,)}


def test_a_coco_folder_is_split_by_strides(tmp_path: Path):
    root = tmp_path / "COCO2014"
    for part, classes in (("train2014", (1, 2, 80)), ("val2014", (5, 6))):
        for label in classes:
            name = f"COCO_{part}_{label:012d}"
            write_image(root / part / f"{name}.jpg", label)
            mask = root / "annotations" / part / f"{name}.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(label_map({label: 3000})).save(mask)
    data = open_source(tmp_path).fold(0)
    assert data.dataset == "coco-20i"
    assert [pair.query for pair in data.train.pairs] == [(2,), (80,)]
    assert [pair.query for pair in data.test.pairs] == [(5,)]
    assert [pair.query for pair in data.held_out.pairs] == [(6,)]


def test_images_of_another_size_than_their_masks_are_counted(voc: VocFolder):
    root = voc(train={"a": {8: 3000}, "b": {8: 3000}}, val={"v": {1: 3000}})
    write_image(root / "JPEGImages" / "a.jpg", 0, size=(SIDE, SIDE + 1))
    write_image(root / "JPEGImages" / "b.jpg", 0, size=(SIDE, SIDE + 1))
    with pytest.raises(
        DataError, match=r"^images whose masks have another size: 2.*a\.jpg.*b\.jpg"
    ):
        open_source(root).fold(0)


def test_numbers_that_are_no_class_are_counted(voc: VocFolder):
    """COCO's own numbers go to 90, with gaps: cut off at 80 they would be other classes."""
    train = {"a": {8: 3000}, "b": {8: 3000, 21: 1}, "c": {9: 3000, 254: 1}}
    root = voc(train=train, val={"v": {1: 3000}})
    with pytest.raises(
        DataError, match=r"^2 masks hold numbers above 20, .*b\.png \(21\), .*c\.png \(254\)"
    ):
        open_source(root).fold(0)


def test_a_folder_of_no_known_layout_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no data set found, expected PASCAL VOC 2012"):
        open_source(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        open_source(tmp_path / "missing")


def test_an_inner_fold_stands_in_for_one_that_takes_no_part(voc: VocFolder):
    split = split_classes(VOC_CLASSES, 0, inner=2)
    assert (split.novel, split.tested) == ((11, 12, 13, 14, 15), 2)
    assert split.base == (6, 7, 8, 9, 10, 16, 17, 18, 19, 20)
    with pytest.raises(DataError, match="expected another"):
        split_classes(VOC_CLASSES, 1, inner=1)
    root = voc(
        train={"a": {1: 3000}, "b": {6: 3000}, "c": {11: 3000}, "d": {1: 3000, 16: 3000}},
        val={"v": {1: 3000}, "w": {11: 3000}, "x": {1: 3000, 6: 3000}},
    )
    data = open_source(root).fold(0, inner=2)
    assert [(p.image.stem, p.query) for p in data.train.pairs] == [("b", (6,)), ("d", (16,))]
    assert [(p.image.stem, p.query) for p in data.test.pairs] == [("w", (11,))]
    assert [(p.image.stem, p.query) for p in data.held_out.pairs] == [("x", (6,))]
