"""Listing, decoding and viewing of labelled images."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import write_pictures
from PIL import Image

from svftool.errors import DataError, UsageError, shortlist
from svftool.models import Preprocessing
from svftool.tasks.images import image_size, left_out, list_images, open_image, to_tensor
from svftool.tasks.two_classes import images_of_two_classes
from svftool.tasks.views import ImageSet, choose_view

PLAIN = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def test_a_folder_lists_its_class_folders_in_order(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data", count=2)
    (data / "red" / "notes.txt").write_text("no image")
    (data / ".cache").mkdir()
    images = list_images(data)
    assert [(i.label, i.path.name) for i in images] == [
        ("blue", "00.png"),
        ("blue", "01.png"),
        ("green", "00.png"),
        ("green", "01.png"),
        ("red", "00.png"),
        ("red", "01.png"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "red/00.png,red\nblue/01.png,blue\n",
        "path,label\nred/00.png,red\nblue/01.png,blue\n",
        "\ufefflabel,split,path\nred,train,red/00.png\nblue,train,blue/01.png\n\n",
    ],
)
def test_a_csv_file_lists_paths_beside_it(tmp_path: Path, text: str) -> None:
    data = write_pictures(tmp_path / "data", count=2)
    file = data / "list.csv"
    file.write_text(text, encoding="utf-8")
    images = list_images(file)
    assert [(i.label, i.path) for i in images] == [
        ("red", data / "red" / "00.png"),
        ("blue", data / "blue" / "01.png"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("red/00.png,red\nred/09.png,red\n", r"list.csv: line 2: 'red/09.png' is no file"),
        ("red/00.png,red\nred/00.png\n", r"list.csv: line 2: 'red/00.png', expected path,label"),
        ("red/00.png, \n", r"list.csv: line 1: .*expected path,label"),
        ("", r"list.csv: no images, expected rows of path,label"),
        ("path,label,label\nred/00.png,red,blue\n", r"two columns or more are named 'label'"),
        ("path,label\n", r"list.csv: no images, expected rows of path,label"),
    ],
)
def test_a_csv_row_that_names_nothing_is_said(tmp_path: Path, text: str, message: str) -> None:
    data = write_pictures(tmp_path / "data", count=1)
    (data / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        list_images(data / "list.csv")


def test_a_csv_file_in_another_encoding_is_said(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"path,label\ncaf\xe9.png,1\n")
    with pytest.raises(DataError, match=r"list.csv: line 2 is not UTF-8"):
        list_images(tmp_path / "list.csv")


def test_nothing_to_list_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: not found"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no images"):
        list_images(tmp_path)
    data = write_pictures(tmp_path / "data", count=2)
    with pytest.raises(DataError, match="red: 2 images outside of class folders, expected a"):
        list_images(data / "red")
    shutil.rmtree(data)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="cat: no images"):
        list_images(tmp_path)


def test_images_that_are_left_out_are_counted_and_named(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data", count=1)
    (data / "red" / "notes.txt").write_text("no image")
    (data / "red" / ".hidden.heic").write_text("a thumbnail")
    assert left_out(data) == left_out(data / "list.csv") == []
    for name in ("loose.png", "red/a.JFIF", "blue/deep/b.heic", "c.avif"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_bytes(b"")
    (said,) = left_out(data)
    assert f"{data}: images left out: 2 beside the class folders (c.avif, loose.png)" in said
    odd = shortlist([Path("blue/deep/b.heic"), Path("red/a.JFIF")])
    assert f"2 of kinds that are not read (.heic, .jfif: {odd})" in said


def test_an_image_of_two_classes_is_said(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data", count=2)
    assert images_of_two_classes(list_images(data)) == []
    shutil.copy(data / "red" / "00.png", data / "red" / "02.png")  # twice under one class
    assert images_of_two_classes(list_images(data)) == []
    shutil.copy(data / "red" / "00.png", data / "blue" / "copy.png")
    (said,) = images_of_two_classes(list_images(data))
    assert "two classes or more: 1, such as" in said
    assert f"{data / 'blue' / 'copy.png'} (blue) and {data / 'red' / '00.png'} (red)" in said
    (data / "list.csv").write_text("red/00.png,red\nred/01.png,red\nred/01.png,blue\n")
    (said,) = images_of_two_classes(list_images(data / "list.csv"))
    assert "more: 1, such as" in said


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_unreadable_image_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "x.png"
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(whole)
    file.write_bytes(whole.read_bytes()[:900] if content is None else content)
    with pytest.raises(DataError, match=r"x\.png: .*expected an image"):
        open_image(file)
    assert open_image(whole).size == (32, 32)


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    grey = np.arange(0, 64, dtype=np.uint8).reshape(8, 8)
    modes = {
        "L": Image.fromarray(grey),
        "I;16": Image.fromarray(grey.astype(np.uint16) * 256),
        "RGBA": Image.fromarray(np.stack([grey, grey, grey, grey], -1)),
        "P": Image.fromarray(grey).convert("P"),
        "1": Image.fromarray(grey > 9),
    }
    for name, image in modes.items():
        file = tmp_path / f"{name.replace(';', '')}.png"
        image.save(file)
        tensor = to_tensor(open_image(file))
        assert tensor.shape == (3, 8, 8)
        assert tensor.dtype == torch.uint8
        if name != "1":
            np.testing.assert_array_equal(tensor[0], grey, err_msg=name)


RAMP = np.array([[0, 1, 2, 3], [2, 1, 0, 3]])
"""Quarters of what is white, and black."""


def tiff_of(file: Path, bits: int, rows: np.ndarray, **tags: tuple[int, int, int]) -> Path:
    """Write a little-endian TIFF of one strip, with further tags of (number, type, value)."""
    height, width = rows.shape
    if bits == 12:
        text = ["".join(f"{value:012b}" for value in row) for row in rows.tolist()]
        data = b"".join(int(row, 2).to_bytes(len(row) // 8, "big") for row in text)
    else:
        data = rows.tobytes()
    entries = {256: (4, width), 257: (4, height), 258: (3, bits), 259: (3, 1), 262: (3, 1)}
    entries |= {273: (4, 8), 277: (3, 1), 278: (4, height), 279: (4, len(data))}
    entries |= {number: (kind, value) for number, kind, value in tags.values()}
    body = b"".join(
        struct.pack("<HHI", tag, kind, 1)
        + (struct.pack("<f", value) if kind == 11 else struct.pack("<I", value))
        for tag, (kind, value) in sorted(entries.items())
    )
    data += b"\0" * (len(data) % 2)
    directory = struct.pack("<H", len(entries)) + body + struct.pack("<I", 0)
    file.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory)
    return file


SIGNED, FLOAT = {"format": (339, 3, 2)}, {"format": (339, 3, 3)}
DEEP = {
    "12 bit": (12, (RAMP * 1365), {}),
    "16 bit": (16, (RAMP * 21845).astype("<u2"), {}),
    "16 bit to 4095": (16, (RAMP * 1365).astype("<u2"), {"most": (281, 3, 4095)}),
    "16 bit from 300 to 900": (
        16,
        (300 + RAMP * 200).astype("<u2"),
        {"least": (340, 3, 300), "most": (341, 3, 900)},
    ),
    "16 bit, white is 0": (16, (65535 - RAMP * 21845).astype("<u2"), {"white": (262, 3, 0)}),
    "16 bit signed": (16, np.rint(RAMP * 32767 / 3).astype("<i2"), SIGNED),
    "32 bit": (32, (RAMP * 1431655765).astype("<u4"), {}),
    "32 bit signed": (32, np.rint(RAMP * ((2**31 - 1) / 3)).astype("<i4"), SIGNED),
    "float": (32, (RAMP / 3).astype("<f4"), FLOAT),
    "float to 3": (32, RAMP.astype("<f4"), {**FLOAT, "most": (341, 11, 3.0)}),
    "float, white is 0": (32, (1 - RAMP / 3).astype("<f4"), {**FLOAT, "white": (262, 3, 0)}),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_images_are_scaled_by_what_their_file_says(kind: str, tmp_path: Path) -> None:
    bits, rows, tags = DEEP[kind]
    shown = to_tensor(open_image(tiff_of(tmp_path / "x.tif", bits, rows, **tags)))
    np.testing.assert_array_equal(shown, np.stack([RAMP * 85] * 3))


@pytest.mark.parametrize(
    ("bits", "rows", "tags", "message"),
    [
        (32, RAMP.astype("<f4"), FLOAT, "values from 0 to 3, expected 0 to 1"),
        (32, (RAMP - 1.5).astype("<f4"), FLOAT, "values from -1.5 to 1.5, expected 0 to 1"),
        (32, (RAMP * np.nan).astype("<f4"), FLOAT, "values from nan to nan, expected 0 to 1"),
        (16, (RAMP - 1).astype("<i2"), SIGNED, "values from -1 to 2, expected 0 to 32767"),
        (16, RAMP.astype("<u2"), {"most": (281, 3, 2)}, "values from 0 to 3, expected 0 to 2"),
    ],
)
def test_values_of_no_known_range_are_refused_with_theirs(
    bits: int, rows: np.ndarray, tags: dict[str, tuple[int, int, int]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=rf"x\.tif: {message}.*8 bits a channel"):
        open_image(tiff_of(tmp_path / "x.tif", bits, rows, **tags))


def test_16_bits_are_scaled_in_png_and_pgm_too(tmp_path: Path) -> None:
    deep = (RAMP * 21845).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "x.png")
    text = b"P5 4 2 65535\n" + deep.astype(">u2").tobytes()
    (tmp_path / "x.pgm").write_bytes(text)
    (tmp_path / "y.pgm").write_bytes(b"P5 4 2 4095\n" + (RAMP * 1365).astype(">u2").tobytes())
    for name in ("x.png", "x.pgm", "y.pgm"):
        found = to_tensor(open_image(tmp_path / name))
        np.testing.assert_array_equal(found[0], RAMP * 85, err_msg=name)


def ordinary() -> dict[str, Image.Image]:
    colours = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    picture = Image.fromarray(colours)
    palette = picture.quantize(8)
    seen = palette.copy()
    seen.info["transparency"] = 3
    return {
        "rgb.png": picture,
        "grey.png": picture.convert("L"),
        "grey alpha.png": picture.convert("LA"),
        "alpha.png": Image.fromarray(np.dstack([colours, colours[..., :1]])),
        "palette.png": palette,
        "transparent palette.png": seen,
        "transparent grey.png": picture.convert("L"),
        "bit.png": picture.convert("1"),
        "cmyk.tif": picture.convert("CMYK"),
        "cmyk.jpg": picture.convert("CMYK"),
        "animated.gif": palette,
        "plain.webp": picture,
        "plain.bmp": picture,
    }


@pytest.mark.parametrize("name", ordinary())
def test_ordinary_images_are_what_pillow_converts_them_to(name: str, tmp_path: Path) -> None:
    """transformers and timm do the same: ``convert("RGB")``."""
    image, options = ordinary()[name], {}
    if name == "animated.gif":
        options = {"save_all": True, "append_images": [image.rotate(90)]}
    if name == "transparent grey.png":
        options = {"transparency": 9}
    image.save(tmp_path / name, **options)
    with Image.open(tmp_path / name) as opened:
        expected = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / name)), expected)


def test_deep_colours_that_end_early_are_refused(tmp_path: Path) -> None:
    """Pillow keeps the upper 8 bits of each channel: of 12 bits in 16 they are black."""
    rows = np.full((2, 12), 4095, "<u2")
    colour = {"width": (256, 4, 4), "samples": (277, 3, 3), "colours": (262, 3, 2)}
    whole = tiff_of(tmp_path / "whole.tif", 16, rows, **colour)
    early = tiff_of(tmp_path / "early.tif", 16, rows, **colour, most=(281, 3, 4095))
    assert to_tensor(open_image(whole)).shape == (3, 2, 4)
    with pytest.raises(DataError, match=r"early\.tif: colours of 16 bits .* 4095"):
        open_image(early)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((10, 20, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (10, 20)
    assert image_size(tmp_path / "turned.jpg") == (20, 10)


def test_the_images_own_size_is_kept_where_all_agree(tmp_path: Path) -> None:
    data = write_pictures(tmp_path, count=2, size=(12, 20))
    paths = [image.path for image in list_images(data)]
    view = choose_view(paths, PLAIN)
    assert (view.size, view.short_side) == ((12, 20), None)
    images = ImageSet(paths, view).load([3, 0])
    expected = torch.stack([to_tensor(open_image(paths[i])) for i in (3, 0)]) / 255
    torch.testing.assert_close(view.centre(images), expected)


def test_images_of_several_sizes_are_resized_to_224(tmp_path: Path) -> None:
    write_pictures(tmp_path, classes=["red"], count=1, size=(30, 40))
    write_pictures(tmp_path, classes=["blue"], count=1, size=(40, 30))
    paths = [image.path for image in list_images(tmp_path)]
    view = choose_view(paths, PLAIN)
    assert (view.size, view.short_side) == ((224, 224), 256)
    assert view.centre(ImageSet(paths, view).load([0, 1])).shape == (2, 3, 224, 224)


def test_the_checkpoints_own_size_and_the_users_come_first(tmp_path: Path) -> None:
    paths = [i.path for i in list_images(write_pictures(tmp_path, count=1))]
    own = Preprocessing(
        mean=PLAIN.mean, std=PLAIN.std, size=(48, 48), interpolation="bicubic", crop_pct=0.75
    )
    assert choose_view(paths, own).size == (48, 48)
    assert choose_view(paths, own).short_side == 64
    assert choose_view(paths, own, size=24).short_side == 32
    assert choose_view(paths, PLAIN, size=24).short_side == 24
    with pytest.raises(UsageError, match="--image-size is 0"):
        choose_view(paths, own, size=0)


def test_normalisation_is_by_channel(tmp_path: Path) -> None:
    paths = [i.path for i in list_images(write_pictures(tmp_path, count=1))]
    view = choose_view(paths, Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0)))
    images = ImageSet(paths, view).load([0])
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 2.0])
    expected = (images[0] / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(view.centre(images)[0], expected)


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_augmentation_repeats_with_its_generator_alone(tmp_path: Path, augment: str) -> None:
    paths = [i.path for i in list_images(write_pictures(tmp_path, count=4))]
    view = choose_view(paths, PLAIN)
    images = ImageSet(paths, view).load(range(len(paths)))

    def augmented(seed: int) -> torch.Tensor:
        torch.manual_seed(torch.randint(1000, ()).item())
        return view.augmented(images, augment, torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    first = view.augmented(images, augment, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, augmented(0))
    assert not torch.equal(first, augmented(1))
    assert first.shape == (len(paths), 3, 16, 16)


def test_light_augmentation_shifts_by_an_eighth_at_most(tmp_path: Path) -> None:
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    image[:, 8, 8] = 255
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "dot.png")
    view = choose_view([tmp_path / "dot.png"], PLAIN)
    batch = view.augmented([image] * 300, "light", torch.Generator().manual_seed(0))
    found = batch[:, 0].flatten(1).argmax(1)
    assert set((found // 16).tolist()) == {6, 7, 8, 9, 10}
    assert set((found % 16).tolist()) == {5, 6, 7, 8, 9, 10}


def test_a_callable_augments_each_image(tmp_path: Path) -> None:
    paths = [i.path for i in list_images(write_pictures(tmp_path, count=1))]
    view = choose_view(paths, PLAIN)
    images = ImageSet(paths, view).load([0, 1])
    batch = view.augmented(images, lambda image: image * 0, torch.Generator())
    assert not batch.any()


def test_the_cache_keeps_what_fits_and_loads_the_rest_again(tmp_path: Path) -> None:
    paths = [i.path for i in list_images(write_pictures(tmp_path, classes=["red"], count=3))]
    view = choose_view(paths, PLAIN)
    images = ImageSet(paths, view, cache_bytes=2 * 3 * 16 * 16)
    first = images.load([0, 1, 2, 1])
    assert torch.equal(first[1], first[3])
    for path in paths[:2]:
        path.unlink()
    assert torch.equal(torch.stack(images.load([2, 1])), torch.stack([first[2], first[1]]))
    paths[2].unlink()
    with pytest.raises(DataError, match=paths[2].name):
        images.load([2])
