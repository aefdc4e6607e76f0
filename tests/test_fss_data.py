"""Folds, layouts, lists and masks of few-shot segmentation, on small data in the real layouts."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svftool.errors import DataError
from svftool.tasks.few_shot_segmentation import few_shot_tasks
from svftool.tasks.few_shot_segmentation.folds import (
    COCO_CLASSES,
    VOC_CLASSES,
    in_voc_order,
    split_classes,
)
from svftool.tasks.few_shot_segmentation.layouts import open_source
from svftool.tasks.few_shot_segmentation.layouts.lists import (
    read_class_files,
    read_hsnet_lines,
    read_hsnet_pickle,
    read_pair_list,
)
from svftool.tasks.few_shot_segmentation.masks import (
    class_areas,
    mask_of,
    read_binary,
    read_label_map,
)
from svftool.tasks.few_shot_segmentation.pool import MINIMUM_AREA, require_shots

SIDE = 100
Areas = Mapping[int, int]


def label_map(areas: Areas, *, ignored: int = 0) -> np.ndarray:
    """Fill a SIDE x SIDE map with so many pixels of each class, in order."""
    flat = np.zeros(SIDE * SIDE, dtype=np.uint8)
    start = 0
    for label, area in areas.items():
        flat[start : start + area] = label
        start += area
    if ignored:
        flat[-ignored:] = 255
    return flat.reshape(SIDE, SIDE)


def write_image(path: Path, seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_indexed(path: Path, labels: np.ndarray) -> Path:
    """Write a map the way VOC does: a palette whose colours are not the numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels, mode="P")
    image.putpalette(np.random.default_rng(7).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(path)
    return path


VocFolder = Callable[..., Path]


@pytest.fixture
def voc(tmp_path: Path) -> VocFolder:
    """Return a factory of VOC folders from class areas: train and val by name."""

    def make(train: Mapping[str, Areas], val: Mapping[str, Areas]) -> Path:
        root = tmp_path / "VOC2012"
        for seed, (name, areas) in enumerate({**train, **val}.items()):
            write_image(root / "JPEGImages" / f"{name}.jpg", seed)
            write_indexed(root / "SegmentationClassAug" / f"{name}.png", label_map(areas))
        sets = root / "ImageSets" / "Segmentation"
        sets.mkdir(parents=True)
        (sets / "val.txt").write_text("\n".join(val) + "\n")
        return root

    return make


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
    with pytest.raises(DataError, match=r"m\.png: a colour image \(RGB\), expected a map"):
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
        DataError, match=r"^2 images and their masks differ in size.*a\.jpg.*b\.jpg"
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


# Lists of PFENet and BAM


def test_plain_lists_say_what_is_trained_and_tested_on(voc: VocFolder, tmp_path: Path):
    root = voc(
        train={"a": {8: 3000}, "b": {8: 3000}, "unlisted": {8: 3000}},
        val={"v": {1: 3000}, "w": {1: 3000}},
    )
    lists = tmp_path / "lists"
    lists.mkdir()

    def line(name: str) -> str:
        return f"JPEGImages/{name}.jpg SegmentationClassAug/{name}.png\n"

    (lists / "voc_sbd_merge_noduplicate.txt").write_text(line("b") + line("a"))
    (lists / "val.txt").write_text(line("w"))
    data = open_source(root, lists=lists).fold(0)
    assert [pair.image.stem for pair in data.train.pairs] == ["b", "a"]
    assert [pair.image.stem for pair in data.test.pairs] == ["w"]


def test_lists_that_name_missing_files_are_refused_with_the_count(voc: VocFolder, tmp_path: Path):
    root = voc(train={"a": {8: 3000}}, val={"v": {1: 3000}})
    lists = tmp_path / "lists"
    lists.mkdir()
    lost = "".join(f"JPEGImages/{i}.jpg SegmentationClassAug/{i}.png\n" for i in range(3))
    (lists / "train.txt").write_text(lost)
    (lists / "val.txt").write_text("JPEGImages/v.jpg SegmentationClassAug/v.png\n")
    with pytest.raises(DataError, match=r"train\.txt: names 6 files .*JPEGImages/0\.jpg.*3 more"):
        open_source(root, lists=lists)


def write_bam_lists(folder: Path, prefix: str) -> Path:
    """Write BAM's lists of two folds' worth, with the paths of another machine."""

    def pair(name: str) -> tuple[str, str]:
        return f"{prefix}/JPEGImages/{name}.jpg", f"{prefix}/SegmentationClassAug/{name}.png"

    contents = {
        ("train", 0): {8: ["a", "b"], 9: ["b"]},
        ("val", 0): {1: ["v"], 2: []},
        ("val", 1): {8: ["w"]},
        ("val", 2): {11: ["w"]},
        ("val", 3): {16: ["x"]},
    }
    for (part, fold), by_class in contents.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        names = dict.fromkeys(name for names in by_class.values() for name in names)
        lines = "".join(" ".join(pair(name)) + "\n" for name in names)
        (folder / part / f"data_list_{fold}.txt").write_text(lines)
        literal = {label: [pair(name) for name in names] for label, names in by_class.items()}
        (folder / part / f"sub_class_file_list_{fold}.txt").write_text(str(literal))
    return folder


def test_bams_lists_are_read_with_the_paths_of_another_machine(voc: VocFolder, tmp_path: Path):
    root = voc(
        train={"a": {8: 3000}, "b": {8: 3000, 9: 3000, 10: 20}},
        val={"v": {1: 3000}, "w": {8: 3000, 11: 3000}, "x": {16: 3000}},
    )
    write_bam_lists(tmp_path / "lists" / "fss_list", "/data/someone/VOCdevkit2012/VOC2012")
    data = open_source(root, lists=tmp_path / "lists").fold(0)
    assert [(p.image.stem, p.query, p.support) for p in data.train.pairs] == [
        ("a", (8,), (8,)),
        ("b", (8, 9, 10), (8, 9)),
    ]
    assert [(p.image.stem, p.query) for p in data.test.pairs] == [("v", (1,))]
    assert {p.image.stem: p.support for p in data.held_out.pairs} == {"w": (8, 11), "x": (16,)}


def test_bams_supports_hold_their_class_and_are_listed(voc: VocFolder, tmp_path: Path):
    root = voc(
        train={"a": {8: 3000}, "b": {8: 3000}},
        val={"v": {1: 3000}, "w": {8: 3000, 11: 3000}, "x": {16: 3000}},
    )
    lists = write_bam_lists(tmp_path / "fss_list", "VOC2012")
    with pytest.raises(
        DataError,
        match=r"sub_class_file_list_0\.txt: 1 images .* do not hold.*b\.png \(class 9\)",
    ):
        open_source(root, lists=lists).fold(0)
    write_indexed(root / "SegmentationClassAug" / "b.png", label_map({8: 3000, 9: 3000}))
    assert open_source(root, lists=lists).fold(0).train.pictures[9] == 1
    kept = (lists / "train" / "data_list_0.txt").read_text().splitlines()[:1]
    (lists / "train" / "data_list_0.txt").write_text(kept[0] + "\n")
    with pytest.raises(
        DataError,
        match=r"sub_class_file_list_0\.txt: 1 images are not in data_list_0\.txt, .*/b\.jpg",
    ):
        open_source(root, lists=lists).fold(0)


def test_a_literal_is_parsed_and_never_run(tmp_path: Path):
    path = tmp_path / "sub_class_file_list_0.txt"
    path.write_text(f"__import__('os').system('touch {tmp_path}/owned')")
    with pytest.raises(DataError, match="not a Python literal"):
        read_class_files(path)
    assert not (tmp_path / "owned").exists()
    path.write_text("{1: 'x'}")
    with pytest.raises(DataError, match="found another literal"):
        read_class_files(path)


def test_a_list_never_leaves_the_data_folder(voc: VocFolder, tmp_path: Path):
    root = voc(train={"a": {8: 3000}}, val={"v": {1: 3000}})
    (tmp_path / "secret.jpg").write_bytes((root / "JPEGImages" / "a.jpg").read_bytes())
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in ("train.txt", "val.txt"):
        (lists / name).write_text("../secret.jpg SegmentationClassAug/a.png\n")
    with pytest.raises(DataError, match=r"names 1 files .*\.\./secret\.jpg"):
        open_source(root, lists=lists)


def test_a_line_that_is_not_two_names_is_shown(tmp_path: Path):
    path = tmp_path / "train.txt"
    path.write_text("a.jpg a.png\nb.jpg\n\nc.jpg c.png d\n")
    with pytest.raises(DataError, match=r"2 lines are not 'image mask', the first is line 2: 'b"):
        read_pair_list(path)


# Splits of HSNet


def write_hsnet_splits(folder: Path, **parts: Sequence[Sequence[str]]) -> Path:
    """Write the lines of each fold of HSNet's ``trn`` and ``val``."""
    for part, folds in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        for fold, lines in enumerate(folds):
            (folder / part / f"fold{fold}.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_hsnets_pascal_splits_ask_each_image_for_one_class(voc: VocFolder, tmp_path: Path):
    root = voc(
        train={"a": {8: 3000, 12: 3000, 16: 3000}, "b": {1: 3000}},
        val={"v": {1: 3000, 2: 3000}, "w": {8: 3000, 11: 3000, 16: 3000}},
    )
    splits = write_hsnet_splits(
        tmp_path / "splits",
        trn=(["b__01"], ["a__08"], ["a__12"], ["a__16"]),
        val=(["v__02", "v__01"], ["w__08"], ["w__11"], ["w__16"]),
    )
    data = open_source(root, lists=splits).fold(0)
    assert [(p.image.stem, p.query) for p in data.train.pairs] == [
        ("a", (8,)), ("a", (12,)), ("a", (16,)),
    ]  # fmt: skip
    assert [(p.image.stem, p.query) for p in data.test.pairs] == [("v", (2,)), ("v", (1,))]
    assert data.novel_images == 0
    assert open_source(root, lists=splits).fold(2, remove_novel=True).novel_images == 1


def test_hsnets_splits_are_held_against_the_masks(voc: VocFolder, tmp_path: Path):
    root = voc(train={"a": {8: 3000}, "b": {8: 3000}}, val={"v": {1: 3000, 8: 5, 11: 5, 16: 5}})
    right = (["v__01"], ["v__08"], ["v__11"], ["v__16"])
    wrong = (["v__01"], ["a__08", "a__09", "b__08", "b__16"], ["a__08"], ["a__08"])
    splits = write_hsnet_splits(tmp_path / "splits", trn=right, val=right)
    assert open_source(root, lists=splits).fold(0).test.pictures[1] == 1
    picture = root / "JPEGImages" / "v.jpg"
    write_image(picture, 0, size=(SIDE, SIDE + 1))
    with pytest.raises(DataError, match=r"^1 images and their masks differ in size.*v\.jpg"):
        open_source(root, lists=splits).fold(0)
    write_image(picture, 0)
    write_hsnet_splits(splits, trn=wrong)
    with pytest.raises(
        DataError,
        match=r"trn/fold1\.txt: 2 images .* do not hold.*a\.png \(class 9\).*b\.png \(class 16\)",
    ):
        open_source(root, lists=splits).fold(0)


@pytest.mark.parametrize("text", ["2007_000032", "2007_000032__00", "x__21", ""])
def test_hsnet_lines_of_another_form_are_refused(tmp_path: Path, text: str):
    (tmp_path / "fold0.txt").write_text(text)
    with pytest.raises(DataError, match="expected 'name__class' with class 01 to 20"):
        read_hsnet_lines(tmp_path / "fold0.txt")


def test_hsnets_coco_pickles_draw_classes_uniformly(tmp_path: Path):
    root = tmp_path / "COCO2014"
    images = {
        "val2014/a": {1: 3000, 3: 9, 4: 9},
        "val2014/b": {2: 3000, 5: 3000},
        "train2014/c": {2: 3000},
    }
    for seed, (name, areas) in enumerate(images.items()):
        write_image(root / f"{name}.jpg", seed)
        mask = root / "annotations" / f"{name}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(label_map(areas)).save(mask)
    splits = tmp_path / "splits"
    contents = {
        "val": [{0: ["val2014/a.jpg"], 4: ["val2014/b.jpg"]}, {1: ["val2014/b.jpg"]}, {}, {}],
        "trn": [{1: ["train2014/c.jpg", "val2014/b.jpg"]}, {}, {}, {}],
    }
    for part, folds in contents.items():
        (splits / part).mkdir(parents=True)
        for fold, by_class in enumerate(folds):
            (splits / part / f"fold{fold}.pkl").write_bytes(pickle.dumps(by_class))
    for part, fold in (("val", 2), ("val", 3)):
        named = {fold: ["val2014/a.jpg"]}
        (splits / part / f"fold{fold}.pkl").write_bytes(pickle.dumps(named))
    data = open_source(root, lists=splits).fold(0)
    assert data.test.order == data.train.order == "classes"
    assert {p.image.stem: p.query for p in data.test.pairs} == {"a": (1,), "b": (5,)}
    assert {p.image.stem: p.query for p in data.train.pairs} == {"b": (2,), "c": (2,)}
    assert {p.image.stem: p.query for p in data.held_out.pairs} == {"a": (3, 4), "b": (2,)}


class Malicious:
    """Runs a command when an ordinary unpickler reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.folder}/owned",)


def test_a_pickle_that_imports_anything_is_refused(tmp_path: Path):
    path = tmp_path / "fold0.pkl"
    path.write_bytes(pickle.dumps({0: [Malicious(tmp_path)]}))
    with pytest.raises(DataError, match=r"fold0\.pkl: the pickle asks for posix\.system"):
        read_hsnet_pickle(path)
    assert not (tmp_path / "owned").exists()


def test_a_broken_pickle_and_another_object_are_refused(tmp_path: Path):
    path = tmp_path / "fold0.pkl"
    path.write_bytes(b"\x80\x04garbage")
    with pytest.raises(DataError, match="cannot be read as a pickle"):
        read_hsnet_pickle(path)
    path.write_bytes(pickle.dumps(["train2014/a.jpg"]))
    with pytest.raises(DataError, match="expected a dictionary of class number"):
        read_hsnet_pickle(path)


# Folders of pairs


def write_pairs(root: Path, counts: Mapping[str, int]) -> Path:
    seed = 0
    for name, count in counts.items():
        for index in range(count):
            write_image(root / name / f"{index}.jpg", seed)
            mask = label_map({1: 500}) * 255
            Image.fromarray(mask).save(root / name / f"{index}.png")
            seed += 1
    return root


def test_a_folder_of_pairs_is_split_by_class_and_picture(tmp_path: Path):
    root = write_pairs(tmp_path, {"a": 10, "b": 40, "c": 3, "d": 7})
    data = open_source(root).fold(1)
    assert data.dataset == "pairs"
    assert data.split.novel == (2,)
    assert {pair.query for pair in data.test.pairs} == {(2,)}
    held = {pair.image for pair in data.held_out.pairs}
    trained = {pair.image for pair in data.train.pairs}
    assert not held & trained
    assert len(held | trained) == 20
    counts = {n: sum(p.parent.name == n for p in held) for n in "acd"}
    assert counts == {"a": 5, "c": 1, "d": 3}
    assert data == open_source(root).fold(1)


def test_a_large_class_keeps_a_fifth_from_training(tmp_path: Path):
    root = write_pairs(tmp_path, {"a": 1, "b": 50, "c": 1, "d": 1})
    held = open_source(root).fold(0).held_out
    assert sum(pair.image.parent.name == "b" for pair in held.pairs) == 10


@pytest.mark.parametrize(("shots", "held"), [(1, 4), (3, 4), (4, 3), (6, 1), (7, 0)])
def test_a_small_class_keeps_the_pictures_that_its_shots_take(
    tmp_path: Path, shots: int, held: int
):
    root = write_pairs(tmp_path, dict.fromkeys("abcd", 8))
    data = open_source(root).fold(0, shots=shots)
    assert data.held_out.pictures == dict.fromkeys((2, 3, 4), held)
    assert data.train.pictures == dict.fromkeys((2, 3, 4), 8 - held)
    (task,) = few_shot_tasks(root, shots=[shots], select_on="last")
    assert task.data == data


def test_a_picture_is_not_held_out_where_another_of_its_classes_needs_it(tmp_path: Path):
    root = write_pairs(tmp_path, {"a": 1, "b": 12, "c": 2, "d": 4})
    for index in range(2):
        (root / "b" / f"{index}.jpg").write_bytes((root / "c" / f"{index}.jpg").read_bytes())
    data = open_source(root).fold(0)
    assert data.train.pictures == {2: 6, 3: 2, 4: 2}


def test_pictures_that_are_removed_do_not_count_as_left_for_training(tmp_path: Path):
    root = write_pairs(tmp_path, {"a": 4, "b": 8, "c": 4, "d": 4})
    for index in range(4):
        (root / "b" / f"{index}.jpg").write_bytes((root / "a" / f"{index}.jpg").read_bytes())
    data = open_source(root).fold(0, shots=3, remove_novel=True)
    assert data.train.pictures[2] == 4
    assert data.held_out.pictures[2] == 4


def test_shots_of_one_table_hold_out_what_they_would_alone(tmp_path: Path):
    root = write_pairs(tmp_path, dict.fromkeys("abcd", 8))
    one, four = few_shot_tasks(root, shots=[1, 4], select_on="last")
    assert (one.shots, len(one.data.held_out.pairs)) == (1, 12)
    assert (four.shots, len(four.data.held_out.pairs)) == (4, 9)


@pytest.mark.parametrize(
    ("counts", "shots", "found"),
    [
        ({"a": 3, "b": 3, "c": 3, "d": 3}, 1, "3 images of 3 base classes, 1 of a class at most"),
        ({"a": 11, "b": 11, "c": 11, "d": 11}, 5, "15 images of 3 base classes, 5 of a class"),
    ],
)
def test_too_few_held_out_pictures_to_choose_by_are_refused_before_training(
    tmp_path: Path, counts: Mapping[str, int], shots: int, found: str
):
    root = write_pairs(tmp_path, counts)
    with pytest.raises(
        DataError,
        match=rf"^fold 0 holds out {found}.*expected {shots + 1} .*--select-on last",
    ):
        few_shot_tasks(root, shots=[shots])
    for select_on in ("last", "novel"):
        assert few_shot_tasks(root, shots=[shots], select_on=select_on)


def test_an_empty_list_of_classes_to_choose_by_is_refused_before_training(tmp_path: Path):
    root = write_pairs(tmp_path / "FSS-1000", {"a": 4, "b": 4})
    lists = tmp_path / "lists"
    lists.mkdir()
    for part, text in (("trn", "a"), ("val", ""), ("test", "b")):
        (lists / f"{part}.txt").write_text(text)
    with pytest.raises(DataError, match=r"holds out 0 images of 0 base classes.*--select-on last"):
        few_shot_tasks(root, lists=lists)
    assert few_shot_tasks(root, lists=lists, select_on="last")


def test_training_images_that_are_kept_back_are_told_of(tmp_path: Path):
    root = write_pairs(tmp_path, {"a": 9, "b": 9, "c": 9, "d": 9})
    with pytest.raises(DataError, match=r"fewer than 6 images.*: b \(5, 4 more held out\), c .*"):
        require_shots(open_source(root).fold(0), "training", 5)
    for index in range(8):
        (root / "b" / f"{index}.jpg").write_bytes((root / "a" / f"{index}.jpg").read_bytes())
    with pytest.raises(DataError, match=r" b \(1, .*Use fewer --shots, --keep-novel or add images"):
        few_shot_tasks(root, remove_novel=True)


def test_one_picture_under_two_classes_is_one_picture(tmp_path: Path):
    root = write_pairs(tmp_path, {"a": 4, "b": 4, "c": 4, "d": 4})
    for source, copy in (("a/0.jpg", "b/0.jpg"), ("c/1.jpg", "b/1.jpg")):
        (root / copy).write_bytes((root / source).read_bytes())
    data = open_source(root).fold(0)
    assert data.novel_images == 1
    removed = open_source(root).fold(0, remove_novel=True)
    gone = {p.image for p in data.train.pairs} - {p.image for p in removed.train.pairs}
    assert gone <= {root / "b" / "0.jpg"}
    both = [data.train.pairs, data.held_out.pairs]
    sides = [{p.identity for p in pairs} for pairs in both]
    assert not sides[0] & sides[1]


def test_test_pairs_go_through_the_classes_in_turn(data: Path):
    fold = open_source(data / "images" / "voc20_pairs").fold(1)
    assert fold.dataset == "pascal-5i pairs"
    assert [fold.split.name(label) for label in fold.split.novel] == [
        "Bus", "Car", "Cat", "Chair", "Cow",
    ]  # fmt: skip
    assert [pair.query[0] for pair in fold.test.pairs[:10]] == [6, 7, 8, 9, 10] * 2
    assert len(fold.test.pairs) == 267
    assert fold.novel_images
    assert fold.novel_images > 10


def test_fss_1000_is_split_by_its_lists(tmp_path: Path):
    root = write_pairs(tmp_path / "FSS-1000", {"ab_wheel": 2, "abacus": 2, "apple": 2})
    lists = tmp_path / "lists"
    lists.mkdir()
    for part, name in (("trn", "abacus"), ("val", "apple"), ("test", "ab_wheel")):
        (lists / f"{part}.txt").write_text(name + "\n")
    source = open_source(root, lists=lists)
    data = source.fold(0)
    assert (source.folds, data.dataset) == (1, "fss-1000")
    parts = (data.train, data.held_out, data.test)
    assert [{pair.image.parent.name for pair in part.pairs} for part in parts] == [
        {"abacus"}, {"apple"}, {"ab_wheel"},
    ]  # fmt: skip
    with pytest.raises(DataError, match="fold 1 does not exist, expected 0"):
        source.fold(1)
    (lists / "val.txt").write_text("unicorn\n")
    with pytest.raises(DataError, match=r"val\.txt: names 1 classes without a folder: unicorn"):
        open_source(root, lists=lists)


@pytest.mark.parametrize(
    ("part", "text", "message"),
    [
        ("test", "b\na\n", r"lists: 1 classes are in more .*: a \(trn\.txt, test\.txt\)$"),
        (
            "val",
            "b\na\n",
            r"lists: 2 classes .*: a \(trn\.txt, val\.txt\), b \(val\.txt, test\.txt\)$",
        ),
        ("trn", "a\nc\na\n", r"trn\.txt: names 1 classes more than once, .*: a$"),
        ("trn", "\n", r"trn\.txt: names no classes, expected one a line$"),
        ("test", "", r"test\.txt: names no classes"),
    ],
)
def test_lists_that_share_classes_or_name_none_are_refused(
    tmp_path: Path, part: str, text: str, message: str
):
    root = write_pairs(tmp_path / "FSS-1000", {"a": 1, "b": 1, "c": 1, "d": 1})
    lists = tmp_path / "lists"
    lists.mkdir()
    for name, classes in {"trn": "a\n", "val": "d\n", "test": "b\n", part: text}.items():
        (lists / f"{name}.txt").write_text(classes)
    with pytest.raises(DataError, match=message):
        open_source(root, lists=lists)


def test_images_without_masks_are_counted(tmp_path: Path):
    root = write_pairs(tmp_path, {"a": 6, "b": 1, "c": 1, "d": 1})
    for index in range(5):
        (root / "a" / f"{index}.png").unlink()
    with pytest.raises(DataError, match=r"^5 of 9 images have no mask.*0\.jpg.* and 2 more$"):
        open_source(root)


def test_empty_masks_are_counted(tmp_path: Path):
    root = write_pairs(tmp_path, {"a": 2, "b": 1, "c": 1, "d": 1})
    Image.fromarray(label_map({})).save(root / "a" / "1.png")
    with pytest.raises(DataError, match=r"^1 masks are empty.*1\.png$"):
        open_source(root).fold(0)


def test_a_class_with_too_few_pairs_is_named(tmp_path: Path):
    root = write_pairs(tmp_path, {"a": 6, "b": 2, "c": 5, "d": 6})
    data = open_source(root).fold(1)
    require_shots(data, "test", 1)
    with pytest.raises(
        DataError, match=r"^1 classes of the test data of fold 1 .*6 images.* b \(2\)"
    ):
        require_shots(data, "test", 5)


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
