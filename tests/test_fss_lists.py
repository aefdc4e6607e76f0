"""Lists of PFENet and BAM and splits of HSNet, on small data in the real layouts."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from layouts import SIDE, label_map, write_image, write_indexed, write_voc
from PIL import Image

from svftool.errors import DataError
from svftool.few_shot.list_files import (
    read_class_files,
    read_hsnet_lines,
    read_hsnet_pickle,
    read_pair_list,
)
from svftool.few_shot.sources import open_source

VocFolder = Callable[..., Path]


@pytest.fixture
def voc(tmp_path: Path) -> VocFolder:
    """Return a factory of VOC folders: train and val by name."""
    return partial(write_voc, tmp_path / "VOC2012")


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
        match=r"sub_class_file_list_0\.txt: images .* do not hold: 1, .*b\.png \(class 9\)",
    ):
        open_source(root, lists=lists).fold(0)
    write_indexed(root / "SegmentationClassAug" / "b.png", label_map({8: 3000, 9: 3000}))
    assert open_source(root, lists=lists).fold(0).train.pictures[9] == 1
    kept = (lists / "train" / "data_list_0.txt").read_text().splitlines()[:1]
    (lists / "train" / "data_list_0.txt").write_text(kept[0] + "\n")
    with pytest.raises(
        DataError,
        match=r"sub_class_file_list_0\.txt: images .* not in .*data_list_0\.txt: 1, .*/b\.jpg",
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
    with pytest.raises(DataError, match=r"names 1 file .*\.\./secret\.jpg"):
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
    root = voc(
        train={"a": {8: 3000}, "b": {8: 3000}, "c": {11: 3000, 16: 3000}},
        val={"v": {1: 3000, 8: 5, 11: 5, 16: 5}},
    )
    right = (["v__01"], ["v__08"], ["v__11"], ["v__16"])
    trained = (["a__08"], ["b__08"], ["c__11"], ["c__16"])
    wrong = (["v__01"], ["a__08", "a__09", "b__08", "b__16"], ["a__08"], ["a__08"])
    splits = write_hsnet_splits(tmp_path / "splits", trn=trained, val=right)
    assert open_source(root, lists=splits).fold(0).test.pictures[1] == 1
    picture = root / "JPEGImages" / "v.jpg"
    write_image(picture, 0, size=(SIDE, SIDE + 1))
    with pytest.raises(DataError, match=r"^images whose masks have another size: 1.*v\.jpg"):
        open_source(root, lists=splits).fold(0)
    write_image(picture, 0)
    write_hsnet_splits(splits, trn=wrong)
    with pytest.raises(
        DataError,
        match=r"fold1\.txt: images .* do not hold: 2, .*a\.png \(class 9\).*b\.png \(class 16\)",
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
        "train2014/d": {2: 3000},
    }
    for seed, (name, areas) in enumerate(images.items()):
        write_image(root / f"{name}.jpg", seed)
        mask = root / "annotations" / f"{name}.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(label_map(areas)).save(mask)
    splits = tmp_path / "splits"
    contents = {
        "val": [{0: ["val2014/a.jpg"], 4: ["val2014/b.jpg"]}, {1: ["val2014/b.jpg"]}, {}, {}],
        "trn": [{1: ["train2014/c.jpg", "train2014/d.jpg"]}, {}, {}, {}],
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
    assert {p.image.stem: p.query for p in data.train.pairs} == {"c": (2,), "d": (2,)}
    assert {p.image.stem: p.query for p in data.held_out.pairs} == {"a": (3, 4), "b": (2,)}


def test_hsnets_splits_that_overlap_are_refused(voc: VocFolder, tmp_path: Path):
    root = voc(
        train={"a": {8: 3000}, "b": {11: 3000, 16: 3000}},
        val={"v": {1: 3000, 8: 3000}, "w": {11: 3000, 16: 3000}},
    )
    splits = write_hsnet_splits(
        tmp_path / "splits",
        trn=(["v__01"], ["a__08", "v__08"], ["b__11"], ["b__16"]),
        val=(["v__01"], ["v__08"], ["w__11"], ["w__16"]),
    )
    with pytest.raises(DataError, match=r"1 of 2 images .* in the training lists too.*v\.jpg"):
        open_source(root, lists=splits).fold(0)


def test_bams_lists_that_overlap_are_refused(voc: VocFolder, tmp_path: Path):
    root = voc(
        train={"a": {8: 3000}, "b": {8: 3000, 9: 3000}},
        val={"v": {1: 3000}, "w": {8: 3000, 11: 3000}, "x": {16: 3000}},
    )
    lists = write_bam_lists(tmp_path / "fss_list", "VOC2012")
    for part in ("data_list_0.txt", "sub_class_file_list_0.txt"):
        text = (lists / "train" / part).read_text()
        (lists / "train" / part).write_text(text.replace("/a.", "/w."))
    with pytest.raises(DataError, match=r"1 of 3 images .* in the training lists too.*w\.jpg"):
        open_source(root, lists=lists).fold(0)


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
