"""Grey and multi-channel pictures, for networks whose first convolution takes as many channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from svftool.errors import DataError, ModelError, UsageError
from svftool.models import Preprocessing
from svftool.models.preprocessing import _channels, _fitted, input_channels
from svftool.tasks.bands import load_picture
from svftool.tasks.classification import Classification
from svftool.tasks.images import image_size, list_images
from svftool.tasks.segmentation import Segmentation
from svftool.training import Settings, train

RANDOM = np.random.default_rng(0)
SIDE = 12


def bands(channels: int) -> Any:
    return RANDOM.integers(0, 256, (SIDE, SIDE + 2, channels), dtype=np.uint8)


def load(path: Path, channels: int) -> Tensor:
    return load_picture(path, channels, target=lambda _: None, interpolation="bilinear")


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("first", [True, False])
def test_an_array_gives_its_own_bands(tmp_path: Path, channels: int, first: bool) -> None:
    values = bands(channels)
    stored = np.moveaxis(values, 2, 0) if first else values
    np.save(tmp_path / "a.npy", stored)
    expected = torch.from_numpy(np.moveaxis(values, 2, 0).copy())
    assert torch.equal(load(tmp_path / "a.npy", channels), expected)
    assert image_size(tmp_path / "a.npy") == (SIDE, SIDE + 2)
    wide, unit = values.astype(np.uint16) * 257, values.astype(np.float32) / 255
    for deep in (wide, unit):
        np.save(tmp_path / "b.npy", deep)
        assert torch.equal(load(tmp_path / "b.npy", channels), expected)


def test_pictures_of_four_bands_keep_all_of_them(tmp_path: Path) -> None:
    values = bands(4)
    values[..., 3] //= 4
    for name, mode in (("a.png", "RGBA"), ("a.tif", "RGBA"), ("b.tif", "CMYK")):
        Image.fromarray(values, mode=mode).save(tmp_path / name)
        assert torch.equal(load(tmp_path / name, 4), torch.from_numpy(np.moveaxis(values, 2, 0)))
    small = load_picture(tmp_path / "a.png", 4, target=lambda _: [6, 7], interpolation="bilinear")
    assert small.shape == (4, 6, 7)
    # A band that is nearly black does not blacken the others, as transparency would.
    assert abs(float(small[0].float().mean()) - float(values[..., 0].mean())) < 3


def test_grey_becomes_colour_only_where_the_network_takes_three(tmp_path: Path) -> None:
    grey = bands(1)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([grey] * 3, 2)).save(tmp_path / "same.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.save(tmp_path / "grey.npy", grey)
    expected = torch.from_numpy(grey)[None]
    for name in ("grey.png", "same.png", "deep.png", "grey.npy"):
        assert torch.equal(load(tmp_path / name, 1), expected), name
        assert torch.equal(load(tmp_path / name, 3), expected.expand(3, -1, -1)), name


@pytest.mark.parametrize(
    ("name", "values", "channels", "message"),
    [
        ("a.png", bands(3), 1, r"a\.png: a picture of 3 channels \(RGB\), the model takes 1\."),
        ("a.png", bands(3), 4, r"3 channels \(RGB\), the model takes 4\. .*\.npy holds any number"),
        ("a.png", bands(1)[..., 0], 4, r"1 channels \(L\), the model takes 4"),
        ("a.npy", bands(4), 3, r"a\.npy: an array of \(12, 14, 4\), expected \(height, width, 3\)"),
        ("a.npy", bands(3), 5, "the model takes 5 channels"),
        ("a.npy", bands(4).astype(np.int64), 4, "values of int64, expected uint8, uint16"),
        ("a.npy", bands(4) * 1.0, 4, "values from 0 to 25., expected 0 to 1"),
        ("a.npy", np.array([object()]), 4, r"a\.npy: .*expected an array of numbers"),
        ("a.npy", np.zeros((0, 3, 4)), 4, "an array of"),
    ],
)
def test_other_channels_are_refused_in_one_line(
    tmp_path: Path, name: str, values: Any, channels: int, message: str
) -> None:
    path = tmp_path / name
    if name.endswith(".npy"):
        np.save(path, values, allow_pickle=True)
    else:
        Image.fromarray(values).save(path)
    with pytest.raises(DataError, match=message) as caught:
        load(path, channels)
    assert "\n" not in str(caught.value)


def test_arrays_are_pictures_where_there_are_no_others(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        np.save(tmp_path / label / "x.npy", bands(3))
    assert [one.path.name for one in list_images(tmp_path)] == ["x.npy", "x.npy"]
    Image.fromarray(bands(3)).save(tmp_path / "a" / "y.png")
    assert [one.path.name for one in list_images(tmp_path)] == ["y.png", "x.npy"]


class Declared(nn.Module):
    """Declares a layer of another place first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.conv = nn.Conv2d(5, 4, 3)


@pytest.mark.parametrize(
    ("model", "channels"),
    [
        (None, 3),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)), 1),
        (nn.Sequential(nn.Sequential(nn.Conv2d(4, 2, 3)), nn.Linear(2, 2)), 4),
        (nn.Sequential(nn.Conv2d(2048, 2, 1), nn.Conv2d(3, 2, 3)), 3),
        (Declared(), 3),
        (nn.Linear(3, 2), 3),
    ],
)
def test_the_first_convolution_says_how_many_channels_there_are(
    model: nn.Module | None, channels: int
) -> None:
    assert input_channels(model) == channels


def test_normalisation_has_a_number_a_channel() -> None:
    plain = Preprocessing(mean=(0.1, 0.2, 0.6), std=(1.0, 2.0, 3.0), flip_channels=True)
    assert _fitted(plain, 3) is plain
    assert _fitted(plain, 1).mean == pytest.approx((0.3,))
    five = _fitted(plain, 5)
    assert (five.mean, five.flip_channels) == (pytest.approx((0.1, 0.2, 0.6, 0.3, 0.3)), False)
    assert _channels(0.5, 4) == (0.5,) * 4
    assert _channels([1, 2, 3, 4], 4) == (1.0, 2.0, 3.0, 4.0)
    with pytest.raises(ValueError, match="2 channels, expected 3"):
        _channels([1, 2], 3)


def write_classes(folder: Path, channels: int) -> Path:
    for label in range(2):
        (folder / str(label)).mkdir(parents=True)
        for number in range(4):
            values = bands(channels) // 8
            values[..., -1] = 200 if label else 20
            np.save(folder / str(label) / f"{number}.npy", values)
    return folder


@pytest.mark.parametrize("channels", [1, 4])
def test_a_network_of_other_channels_is_trained(tmp_path: Path, channels: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(channels, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)
    )
    preprocessing = _fitted(Preprocessing(), input_channels(model))
    data = write_classes(tmp_path / "data", channels)
    task = Classification(data, preprocessing=preprocessing, shots=2, head="keep")
    draw = task.draw(0)
    assert draw.batch(torch.arange(3), torch.Generator())[0].shape == (3, channels, SIDE, SIDE + 2)
    groups = {"backbone": list(model.parameters())}
    settings = Settings(steps=40, lr=0.02, batch_size=4)
    train(model, groups, draw, settings, seed=0, metric=task.primary)
    assert draw.evaluate(model)["accuracy"] == 1.0
    with pytest.raises(UsageError, match=f"--mean has 2 numbers, expected {channels}"):
        Classification(data, preprocessing=preprocessing, shots=2, mean=(0.5, 0.5))
    if channels == 4:
        with pytest.raises(UsageError, match="--augment strong distorts colours"):
            Classification(data, preprocessing=preprocessing, shots=2, augment="strong")
        with pytest.raises((DataError, ModelError), match="the model takes 3 channels"):
            Classification(data, shots=2, head="keep").draw(0).prepare(model)


def test_maps_of_classes_go_with_pictures_of_any_channels(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for number in range(3):
        np.save(tmp_path / "images" / f"{number}.npy", bands(4))
        labels = RANDOM.integers(0, 2, (SIDE, SIDE + 2), dtype=np.uint8)
        Image.fromarray(labels).save(tmp_path / "masks" / f"{number}.png")
    task = Segmentation(
        tmp_path, preprocessing=_fitted(Preprocessing(), 4), shots=2, head="keep", augment="none"
    )
    images, labels = task.draw(0).batch(torch.arange(2), torch.Generator())
    assert (images.shape[1], labels.shape) == (4, (2, *images.shape[2:]))
