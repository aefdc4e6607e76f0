"""Folders of image and mask pairs: what is trained on, held out and refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from layouts import label_map, write_image
from PIL import Image

from svftool.errors import DataError
from svftool.few_shot.pool import require_shots
from svftool.few_shot.sources import open_source
from svftool.few_shot.task import few_shot_tasks


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
    assert data.dataset == "fss-1000"
    with pytest.raises(DataError, match="fold 1"):
        source.fold(1)
    parts = (data.train, data.held_out, data.test)
    assert [{pair.image.parent.name for pair in part.pairs} for part in parts] == [
        {"abacus"}, {"apple"}, {"ab_wheel"},
    ]  # fmt: skip
    with pytest.raises(DataError, match="fold 1 does not exist, expected 0"):
        source.fold(1)
    (lists / "val.txt").write_text("unicorn\n")
    with pytest.raises(DataError, match=r"val\.txt: names 1 class without a folder: unicorn"):
        open_source(root, lists=lists)


@pytest.mark.parametrize(
    ("part", "text", "message"),
    [
        (
            "test",
            "b\na\n",
            r"lists: classes in more .*: 1, .*: a \(trn\.txt, test\.txt\)$",
        ),
        (
            "val",
            "b\na\n",
            r"lists: classes .*: 2, .*: a \(trn\.txt, val\.txt\), b \(val\.txt, test\.txt\)$",
        ),
        ("trn", "a\nc\na\n", r"trn\.txt: names 1 class more than once, .*: a$"),
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
    with pytest.raises(DataError, match=r"^images without a mask: 5 of 9.*0\.jpg.* and 2 more$"):
        open_source(root)


def test_empty_masks_are_counted(tmp_path: Path):
    root = write_pairs(tmp_path, {"a": 2, "b": 1, "c": 1, "d": 1})
    Image.fromarray(label_map({})).save(root / "a" / "1.png")
    with pytest.raises(DataError, match=r"^1 mask is empty.*1\.png$"):
        open_source(root).fold(0)


def test_a_class_with_too_few_pairs_is_named(tmp_path: Path):
    root = write_pairs(tmp_path, {"a": 6, "b": 2, "c": 5, "d": 6})
    data = open_source(root).fold(1)
    require_shots(data, "test", 1)
    with pytest.raises(
        DataError, match=r"^classes of the test data of fold 1 .*6 images: 1, .* b \(2\)"
    ):
        require_shots(data, "test", 5)
