"""Data folders: what is no data is not read, and what a picture shows is what counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svftool.errors import DataError
from svftool.few_shot.labelled import ScannedSource
from svftool.few_shot.list_files import Listed
from svftool.few_shot.masks import read_binary, read_label_map
from svftool.few_shot.pairs import PairsSource, class_folders
from svftool.progress import Silent
from svftool.tasks.class_names import class_names, natural_order, order_warning
from svftool.tasks.images import list_images
from svftool.tasks.segmentation import Segmentation
from svftool.tasks.segmentation.pairs import ClassTable, read_labels
from svftool.tasks.texts import list_texts

image_module = pytest.importorskip("PIL.Image")

TRUTH = np.zeros((12, 14), np.uint8)
TRUTH[3:8, 2:9] = 1


def picture(place: Path, value: int = 90) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    image_module.new("RGB", (8, 8), (value, value, value)).save(place)


@pytest.mark.parametrize(
    "hidden", [".x.png", "._0.png", ".ipynb_checkpoints/0-checkpoint.png", "in/.deep/0.png"]
)
def test_hidden_files_and_folders_are_no_images(hidden: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        for place in (f"{name}/0.png", f"{name}/in/1.png", f"{name}/{hidden}"):
            picture(tmp_path / "data" / place)
    found = [image.path.relative_to(tmp_path / "data") for image in list_images(tmp_path / "data")]
    assert [str(path) for path in found] == ["a/0.png", "a/in/1.png", "b/0.png", "b/in/1.png"]


def test_a_hidden_folder_above_the_data_hides_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / ".cache" / name / "0.png")
    assert len(list_images(tmp_path / ".cache")) == 2


def test_hidden_files_are_no_texts_and_no_pairs(tmp_path: Path) -> None:
    for name in ("one.jsonl", "._one.jsonl", ".ipynb_checkpoints/one.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "a b"}\n')
    assert len(list_texts(tmp_path)) == 1
    for name in ("0.jpg", "._0.jpg"):
        picture(tmp_path / "fss" / "cat" / name)
    assert [file.name for file in class_folders(tmp_path / "fss")["cat"]] == ["0.jpg"]


@pytest.mark.parametrize(
    "parts",
    [
        ("train", "test"),
        ("Train", "val", "test"),
        ("trn", "tst"),
        ("val", "test"),
        ("annotations", "test", "train"),
        ("training", "validation"),
    ],
)
@pytest.mark.parametrize("inside", ["cat/0.png", "0.png"])
def test_the_parts_of_a_data_set_are_no_classes(
    parts: tuple[str, ...], inside: str, tmp_path: Path
) -> None:
    for part in parts:
        picture(tmp_path / part / inside)
    with pytest.raises(DataError, match="the parts of a data set"):
        list_images(tmp_path)


def test_the_parts_of_a_data_set_are_no_classes_of_pairs(tmp_path: Path) -> None:
    for part in ("train", "test"):
        picture(tmp_path / part / "0.jpg")
    with pytest.raises(DataError, match=r"the parts of a data set.*train, and .*test with --eval"):
        class_folders(tmp_path)


@pytest.mark.parametrize("names", [("bus", "train"), ("bus", "test"), ("train", "training")])
def test_a_class_may_be_called_train(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        picture(tmp_path / name / "0.png")
        picture(tmp_path / name / "0.jpg")
    assert {image.label for image in list_images(tmp_path)} == set(names)
    assert set(class_folders(tmp_path)) == set(names)


@pytest.mark.parametrize("text", ["a \\ud83d b", "\\udc4d"])
@pytest.mark.parametrize(
    "row",
    [
        '{"text": "%s"}',
        '{"prompt": "%s", "completion": "x"}',
        '{"prompt": "x", "completion": "%s"}',
    ],
)
def test_half_a_surrogate_pair_is_named_with_its_line(row: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n' + row % text + "\n")
    with pytest.raises(DataError, match=r"line 2: .*half a surrogate pair"):
        list_texts(tmp_path / "rows.jsonl")


def test_whole_surrogate_pairs_are_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    assert list_texts(tmp_path / "rows.jsonl")[0].body == "\U0001f600"


def test_class_names_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    for name in (b"a", b"caf\xe9"):
        place = Path(str(tmp_path)) / name.decode("utf-8", "surrogateescape")
        try:
            picture(place / "0.png")
        except OSError:
            pytest.skip("the file system takes UTF-8 alone")
    with pytest.raises(DataError, match="half a surrogate pair"):
        list_images(tmp_path)
    with pytest.raises(DataError, match="half a surrogate pair"):
        class_names([], ["a", "\ud83d"])


def test_the_order_of_numbered_classes_is_said() -> None:
    names = tuple(sorted(str(number) for number in range(1, 11)))
    assert natural_order(names) == tuple(str(number) for number in range(1, 11))
    assert "1, 10, 2" in str(order_warning(names))
    assert "c1, c10" in str(order_warning(("c1", "c10", "c9")))
    assert order_warning(("1", "2", "3")) is None
    assert order_warning(("01", "02", "10")) is None
    assert order_warning(("cat", "dog")) is None


def indexed(background: int, thing: int, colour: tuple[int, int, int] = (255,) * 3) -> Any:
    image = image_module.fromarray(np.where(TRUTH, thing, background).astype(np.uint8))
    image = image.convert("L")
    image.putpalette([0] * 768)
    palette = [0] * 768
    palette[3 * thing : 3 * thing + 3] = colour
    image.putpalette(palette)
    return image


GREY = TRUTH * np.uint8(255)
MASKS = {
    "white first": indexed(1, 0),
    "anywhere": indexed(3, 7),
    "black first": indexed(0, 1),
    "VOC's red": indexed(0, 1, (128, 0, 0)),
    "VOC's dark red": indexed(0, 8, (64, 0, 0)),
    "ramp": indexed(0, 1, (1, 1, 1)),
    "quantised": image_module.fromarray(np.dstack([GREY] * 3)).quantize(2),
    "grey": image_module.fromarray(GREY),
    "numbers": image_module.fromarray(TRUTH),
    "dark grey": image_module.fromarray(TRUTH * np.uint8(100)),
    "one bit": image_module.fromarray(GREY).convert("1"),
    "colour": image_module.fromarray(np.dstack([GREY, GREY * 0, GREY * 0])),
    "alpha": image_module.fromarray(np.dstack([GREY] * 3 + [GREY * 0 + 255])),
    "grey alpha": image_module.fromarray(GREY).convert("LA"),
    "16 bit": image_module.fromarray(TRUTH * np.uint16(65535)),
    "12 bit": image_module.fromarray(TRUTH * np.uint16(4095)),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_is_what_it_shows_not_black(kind: str, tmp_path: Path) -> None:
    MASKS[kind].save(tmp_path / "mask.png")
    assert np.array_equal(read_binary(tmp_path / "mask.png"), TRUTH)


@pytest.mark.parametrize(
    "image",
    [
        image_module.fromarray(TRUTH.astype(np.float32)),
        image_module.fromarray(TRUTH.astype(np.float32) * 255),
        image_module.fromarray(TRUTH.astype(np.int32) * (2**31 - 1)),
        image_module.fromarray(np.dstack([GREY] * 3)).convert("CMYK"),
    ],
)
def test_a_tiff_mask_is_what_it_shows_not_black(image: Any, tmp_path: Path) -> None:
    image.save(tmp_path / "mask.tif")
    assert np.array_equal(read_binary(tmp_path / "mask.tif"), TRUTH)


WHITE = np.full_like(GREY, 255)
SEE_THROUGH = {
    "white, object in the alpha": np.dstack([WHITE] * 3 + [GREY]),
    "black, object in the alpha": np.dstack([GREY * 0] * 3 + [GREY]),
    "dark red, object in the alpha": np.dstack([GREY * 0 + 90, GREY * 0, GREY * 0, GREY]),
    "black object on nothing white": np.dstack([WHITE - GREY] * 3 + [GREY]),
    "white object, corner hidden": np.dstack([GREY] * 3 + [np.where(TRUTH, 255, 0)]),
    "cut out of a picture": np.dstack([np.arange(168).reshape(12, 14) % 99 + 40] * 3 + [GREY]),
    "all hidden": np.dstack([GREY] * 3 + [GREY * 0]),
}


@pytest.mark.parametrize("kind", SEE_THROUGH)
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_not_shown(kind: str, mode: str, tmp_path: Path) -> None:
    image = image_module.fromarray(SEE_THROUGH[kind].astype(np.uint8))
    image.convert(mode).save(tmp_path / "mask.png")
    assert np.array_equal(read_binary(tmp_path / "mask.png"), TRUTH)


def test_a_transparent_colour_is_not_shown(tmp_path: Path) -> None:
    """Palettes and grey pictures name the transparent colour apart from the pixels."""
    white = indexed(1, 0)
    white.putpalette([255] * 6)
    white.save(tmp_path / "palette.png", transparency=1)
    image_module.fromarray(GREY + 1).save(tmp_path / "grey.png", transparency=1)
    for name in ("palette.png", "grey.png"):
        assert np.array_equal(read_binary(tmp_path / name), TRUTH), name


NUMBERS = TRUTH * np.uint8(7)
NUMBERED = {
    "grey": image_module.fromarray(NUMBERS),
    "grey alpha": image_module.fromarray(np.dstack([NUMBERS, WHITE])),
    "palette": indexed(0, 7),
    "16 bit": image_module.fromarray(NUMBERS.astype(np.uint16)),
    "32 bit": image_module.fromarray(NUMBERS.astype(np.int32)),
    "float": image_module.fromarray(NUMBERS.astype(np.float32)),
    "one bit": image_module.fromarray(GREY).convert("1"),
}


@pytest.mark.parametrize("kind", NUMBERED)
def test_a_label_map_is_its_numbers_in_both_tasks(kind: str, tmp_path: Path) -> None:
    NUMBERED[kind].save(tmp_path / "map.tif")
    right = NUMBERS // 7 if kind == "one bit" else NUMBERS
    assert np.array_equal(read_label_map(tmp_path / "map.tif"), right)
    assert np.array_equal(read_labels(tmp_path / "map.tif", None, 255), right)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.dstack([NUMBERS] * 3), "a colour picture"),
        (np.dstack([NUMBERS, GREY]), "133 transparent pixels"),
        (NUMBERS.astype(np.uint16) * 50, "values from 0 to 350"),
        (NUMBERS.astype(np.int32) * -1, "values from -7 to 0"),
        (NUMBERS.astype(np.float32) / 2, "values from 0.0 to 3.5"),
        (NUMBERS.astype(np.float32) * np.nan, "values from nan to nan"),
    ],
)
def test_a_label_map_of_anything_else_is_refused(pixels: Any, message: str, tmp_path: Path) -> None:
    image_module.fromarray(pixels).save(tmp_path / "map.tif")
    with pytest.raises(DataError, match=message):
        read_label_map(tmp_path / "map.tif")
    with pytest.raises(DataError, match=message):
        read_labels(tmp_path / "map.tif", None, 255)


def test_a_coloured_label_map_hides_no_pixels(tmp_path: Path) -> None:
    table = ClassTable(("a", "b"), {(0, 0, 0): 0, (255, 255, 255): 1})
    for alpha, name in ((WHITE, "whole.png"), (GREY, "hidden.png")):
        image_module.fromarray(np.dstack([GREY] * 3 + [alpha])).save(tmp_path / name)
    assert np.array_equal(read_labels(tmp_path / "whole.png", table, 255), TRUTH)
    with pytest.raises(DataError, match="133 transparent pixels"):
        read_labels(tmp_path / "hidden.png", table, 255)


def test_segmentation_classes_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        picture(tmp_path / name / "0.png", 0)
    image_module.new("L", (8, 8)).save(tmp_path / "masks" / "0.png")
    config = {"architectures": ["XForSemanticSegmentation"], "id2label": {"0": "a", "1": "\ud83d"}}
    for told in ({"classes": ("a", "\ud83d")}, {"config": config}):
        with pytest.raises(DataError, match="half a surrogate pair"):
            Segmentation(tmp_path, evaluation=tmp_path, **told)


def test_pairs_that_are_trained_and_tested_on_are_counted(tmp_path: Path) -> None:
    for number, name in enumerate("abcdefgh"):
        for file in range(3):
            place = tmp_path / name / f"{file}.jpg"
            picture(place, 10 * number + file)
            image_module.fromarray(GREY[:8, :8]).save(place.with_suffix(".png"))
    (tmp_path / "c" / "0.jpg").write_bytes((tmp_path / "a" / "0.jpg").read_bytes())
    said: list[str] = []

    class Heard(Silent):
        def warn(self, message: str) -> None:
            said.append(message)

    PairsSource(tmp_path).fold(0, progress=Heard())
    assert [message[:40] for message in said] == ["1 of 6 pictures that are tested are trai"]
    PairsSource(tmp_path).fold(0, remove_novel=True, progress=Heard())
    assert len(said) == 1


def test_lists_that_overlap_are_refused(tmp_path: Path) -> None:
    files = []
    for number in range(8):
        image, mask = tmp_path / f"{number}.png", tmp_path / f"{number}-mask.png"
        picture_of = image_module.new("RGB", (64, 64), (9, 9, 9))
        picture_of.save(image)
        numbers = np.full((64, 64), number % 4 + 1, np.uint8)
        image_module.fromarray(numbers).save(mask)
        files.append(Listed(image, mask))
    names = ("a", "b", "c", "d")

    def fold(train: list[Listed], test: list[Listed]) -> Any:
        return ScannedSource("pascal-5i", names, "blocks", train=train, test=test).fold(0)

    assert len(fold(files[:4], files[4:]).test.pairs) == 1
    with pytest.raises(DataError, match="1 of 4 images that are tested or held out"):
        fold(files[:6], files[4:])
