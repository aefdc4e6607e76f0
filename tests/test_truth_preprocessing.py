"""Images reach the network as the checkpoint's own processor hands them over."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from svftool.checkpoints import open_checkpoint
from svftool.few_shot.encoder import Encoder
from svftool.models import Preprocessing, find_preprocessing
from svftool.tasks.segmentation.views import choose_dense_view
from svftool.tasks.views import choose_view

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
image_module = pytest.importorskip("PIL.Image")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A smooth picture that is wider than high, on which resizings differ little by themselves."""
    rows, columns = np.mgrid[0:90, 0:140]
    waves = [np.sin(rows / 9 + k) * np.cos(columns / (11 + k)) for k in range(3)]
    pixels = (127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)
    image_module.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def seen(folder: Path, picture: Path) -> torch.Tensor:
    save_file({"x": torch.ones(2)}, folder / "model.safetensors")
    with open_checkpoint(folder) as opened:
        view = choose_view([picture], find_preprocessing(opened))
    return view.centre([view.load(picture)])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ViTImageProcessor", {"size": {"height": 64, "width": 64}}),
        ("ViTImageProcessor", {"size": {"height": 48, "width": 64}}),
        ("DeiTImageProcessor", {"size": {"height": 64, "width": 64}, "crop_size": 56}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": 56}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}, "crop_pct": 0.875}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}, "crop_pct": 0.9}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
        ("LevitImageProcessor", {"size": {"shortest_edge": 56}, "crop_size": 56}),
        ("PoolFormerImageProcessor", {"size": {"shortest_edge": 56}, "crop_size": 56}),
        ("EfficientNetImageProcessor", {"size": {"height": 64, "width": 64}}),
        ("BitImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": 56}),
        ("SiglipImageProcessor", {"size": {"height": 64, "width": 64}}),
        ("BeitImageProcessor", {"size": {"height": 64, "width": 64}}),
        ("PvtImageProcessor", {"size": {"height": 64, "width": 64}}),
        ("BlipImageProcessor", {"size": {"height": 64, "width": 64}}),
        ("MobileNetV2ImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": 56}),
        ("MobileViTImageProcessor", {"size": {"shortest_edge": 56}, "crop_size": 64}),
        ("MobileViTImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": 64}),
        ("MobileViTImageProcessor", {"do_flip_channel_order": False}),
        ("BitImageProcessor", {"size": {"shortest_edge": 57}, "crop_size": 70}),
        ("DINOv3ViTImageProcessor", {"size": {"height": 64, "width": 64}}),
    ],
)
def test_pixels_are_those_of_transformers(
    kind: str, options: dict[str, Any], picture: Path, tmp_path: Path
) -> None:
    assert float(differences(kind, options, picture, tmp_path).max()) <= 0.02


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        # These crop before they resize, and round the long side up.
        ("PerceiverImageProcessor", {"size": {"height": 56, "width": 56}, "crop_size": 64}),
        ("PPLCNetImageProcessor", {"resize_short": 64, "crop_size": 56}),
    ],
)
def test_pixels_lie_within_one_of_those_of_transformers(
    kind: str, options: dict[str, Any], picture: Path, tmp_path: Path
) -> None:
    assert float(differences(kind, options, picture, tmp_path).mean()) <= 0.02


def differences(kind: str, options: dict[str, Any], picture: Path, folder: Path) -> torch.Tensor:
    """Hold our pixels against those of a processor; as shares of the range of its values."""
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    processor = getattr(transformers, kind)(**options)
    processor.save_pretrained(folder)
    with image_module.open(picture) as opened:
        expected = processor(opened.convert("RGB"), return_tensors="pt")["pixel_values"]
    found = seen(folder, picture)
    assert found.shape == expected.shape
    # Two libraries round a resized pixel to another of 256 values.
    return (found - expected).abs() / float(expected.max() - expected.min())


@pytest.mark.parametrize(
    "facts",
    [
        {"crop_pct": 0.9, "crop_mode": "center"},
        {"crop_pct": 0.9, "crop_mode": "squash"},
        {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"},
        {"crop_pct": 0.95, "interpolation": "bilinear"},
    ],
)
def test_pixels_are_those_of_timm(facts: dict[str, Any], picture: Path, tmp_path: Path) -> None:
    full = {"input_size": [3, 62, 62], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    full = {**full, "interpolation": "bicubic", **facts}
    config = {"architecture": "resnet10t", "pretrained_cfg": full}
    (tmp_path / "config.json").write_text(json.dumps(config))
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=full))
    with image_module.open(picture) as opened:
        expected = transform(opened.convert("RGB"))[None]
    torch.testing.assert_close(seen(tmp_path, picture), expected, atol=1e-5, rtol=0)


def test_channels_are_flipped_where_the_processor_does(picture: Path, tmp_path: Path) -> None:
    found = []
    for flip in (False, True):
        facts = {"size": {"shortest_edge": 64}, "do_flip_channel_order": flip}
        facts["image_processor_type"] = "MobileViTImageProcessor"
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
        found.append(seen(tmp_path, picture))
    assert not torch.equal(*found)
    assert torch.equal(found[0].flip(1), found[1])


def test_channels_are_flipped_in_every_task(picture: Path) -> None:
    flipped = Preprocessing(size=(64, 64), flip_channels=True)
    found, dense = [], []
    for source in (replace(flipped, flip_channels=False), flipped):
        view = choose_view([picture], source)
        found.append(view.centre([view.load(picture)]))
        wide = choose_dense_view([picture], source, size=None, ignore=255)
        images, maps = [wide.load(picture)], [torch.zeros(90, 140, dtype=torch.uint8)]
        dense.append(wide.normalised(images))
        dense.append(wide.training(images, maps, "none", torch.Generator())[0])
    for plain, other in ((found[0], found[1]), (dense[0], dense[2]), (dense[1], dense[3])):
        assert not torch.equal(plain, other)
        assert torch.equal(plain.flip(1), other)


def test_channels_are_flipped_in_few_shot_segmentation() -> None:
    """A network of pictures that are red is given pictures that are blue."""
    encoder = object.__new__(Encoder)
    encoder.device = torch.device("cpu")
    encoder._preprocessing = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3, flip_channels=True)
    red = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    red[:, 0] = 255
    assert encoder._normalised(red).sum((0, 2, 3)).tolist() == [0.0, 0.0, 4.0]
