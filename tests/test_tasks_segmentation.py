"""Segmentation as a task: pairs and classes, heads, joint augmentation, metrics, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from svftool.cli import app
from svftool.errors import DataError, ModelError, UsageError
from svftool.tasks.base import Counts, Predicts
from svftool.tasks.segmentation import Segmentation
from svftool.tasks.segmentation.heads import (
    WithDenseHead,
    common_module,
    dense_heads,
    dense_logits,
    find_features,
    make_head,
)

pytest.importorskip("torchvision")

COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], dtype=np.uint8)


def scene(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Draw vertical bands of the three classes, as labels."""
    cuts = np.sort(generator.integers(1, size[1] - 1, 2))
    labels = np.zeros(size, dtype=np.uint8)
    labels[:, cuts[0] :], labels[:, cuts[1] :] = 1, 2
    return labels


def write_scenes(folder: Path, count: int = 6, size: tuple[int, int] = (12, 16)) -> Path:
    """Write pictures of three colours, a little noisy, and their label maps."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(count):
        labels = scene(generator, size)
        noise = generator.integers(-20, 20, (*size, 3))
        picture = (COLOURS[labels].astype(int) + noise).astype(np.uint8)
        Image.fromarray(picture).save(folder / "images" / f"{index:02}.png")
        Image.fromarray(labels).save(folder / "masks" / f"{index:02}.png")
    return folder


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Return a folder of six scenes."""
    return write_scenes(tmp_path / "data")


def read(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture)


def rewrite(folder: Path, change: Any, names: str = "*.png") -> None:
    for file in (folder / "masks").glob(names):
        Image.fromarray(change(read(file).copy())).save(file)


class Pixels(nn.Module):
    """A segmentation model: one layer of features, one of logits at half the size."""

    def __init__(self, classes: int = 3, kind: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.classifier = nn.Conv2d(8, classes, 1)

    def forward(self, images: Tensor) -> Any:
        logits = self.classifier(self.stem(images).relu())
        return {"out": logits, "aux": logits[:, :1]} if self.kind == "torchvision" else logits


class Backbone(nn.Module):
    """A classifier's backbone, whose pooled output is of no use for pixels."""

    def __init__(self, *, fc: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer1 = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(16, 5) if fc else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(images)).mean((2, 3)))


# ---- data


def test_labels_are_counted_where_nothing_names_them(scenes: Path) -> None:
    task = Segmentation(scenes, shots=2)
    assert task.classes == ("0", "1", "2")
    assert (task.view.crop, task.view.short_side) == ((12, 16), None)
    draw = task.draw(0)
    assert (draw.size, draw.held_out) == (2, 0)
    assert set(draw._support.indices) | set(draw._parts["query"].indices) == set(range(6))
    assert not set(draw._support.indices) & set(draw._parts["query"].indices)


def test_a_class_file_beside_the_folders_names_them(scenes: Path, tmp_path: Path) -> None:
    (scenes / "classes.txt").write_text("sky\nroad\n\ncar\ntree\n")
    assert Segmentation(scenes, shots=2).classes == ("sky", "road", "car", "tree")
    (tmp_path / "two.txt").write_text("sky\nroad\n")
    with pytest.raises(DataError, match=r"0\d\.png: label 2, expected 0 to 1, or 255"):
        Segmentation(scenes, shots=2, classes=tmp_path / "two.txt")
    assert Segmentation(scenes, shots=2, classes=tmp_path / "two.txt", ignore_index=2).classes == (
        "sky",
        "road",
    )


def test_a_models_own_names_are_taken(scenes: Path) -> None:
    config = {
        "architectures": ["SegformerForSemanticSegmentation"],
        "id2label": {"0": "a", "2": "c", "1": "b", "3": "d"},
    }
    assert Segmentation(scenes, shots=2, config=config).classes == ("a", "b", "c", "d")
    config["id2label"] = {"0": "a", "1": "b"}
    assert Segmentation(scenes, shots=2, config=config).classes == ("0", "1", "2")


def test_coloured_maps_are_read_by_the_class_file(scenes: Path) -> None:
    plain = Segmentation(scenes, shots=2)._pairs.maps.load(range(6))
    palette = np.array([[128, 0, 0], [0, 128, 0], [0, 0, 0]], dtype=np.uint8)
    rewrite(scenes, lambda labels: palette[labels])
    with pytest.raises(DataError, match=r"a colour picture, expected class numbers.*--classes"):
        Segmentation(scenes, shots=2)
    (scenes / "classes.txt").write_text("name,r,g,b\nred,128,0,0\ngreen,0,128,0\nnone,0,0,0\n")
    task = Segmentation(scenes, shots=2)
    assert task.classes == ("red", "green", "none")
    assert all(map(torch.equal, task._pairs.maps.load(range(6)), plain))
    (scenes / "classes.txt").write_text("red,128,0,0\ngreen,0,128,0\nignore,0,0,0\n")
    task = Segmentation(scenes, shots=2)
    assert task.classes == ("red", "green")
    found = task._pairs.maps.load([0])[0]
    assert torch.equal(found == 255, plain[0] == 2)
    (scenes / "classes.txt").write_text("red,128,0,0\ngreen,0,128,0\n")
    with pytest.raises(DataError, match=r"colour \(0, 0, 0\) is no class"):
        Segmentation(scenes, shots=2)


def test_palette_pictures_hold_class_numbers(scenes: Path) -> None:
    plain = Segmentation(scenes, shots=2)._pairs.maps.load(range(6))
    for file in (scenes / "masks").iterdir():
        labels = read(file)
        indexed = Image.new("P", labels.T.shape)
        indexed.putpalette([9, 9, 9, 80, 0, 0, 0, 80, 0])
        indexed.putdata(labels.ravel().tolist())
        indexed.save(file)
    assert all(map(torch.equal, Segmentation(scenes, shots=2)._pairs.maps.load(range(6)), plain))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\nb\na\n", "a twice"),
        ("a\n", "1 class, expected two or more"),
        ("a,1,2,3\nb,1,2\n", "line 2: '1,2', expected red,green,blue"),
        ("a,1,2,300\nb,1,2,3\n", "line 1: '1,2,300'"),
        ("a,1,2,3\nb\n", "colours missing or given twice"),
        ("a,1,2,3\nb,1,2,3\n", "colours missing or given twice"),
    ],
)
def test_class_files_that_say_nothing_clear(scenes: Path, text: str, message: str) -> None:
    (scenes / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=rf"classes\.txt: {message}"):
        Segmentation(scenes, shots=2)


def test_pairs_that_do_not_fit_are_said(scenes: Path, tmp_path: Path) -> None:
    (scenes / "masks" / "03.png").rename(scenes / "masks" / "03_L.png")
    with pytest.raises(DataError, match=r"masks: no label map for 1 of 6 images \(03\).*suffix"):
        Segmentation(scenes, shots=2)
    for file in list((scenes / "masks").glob("??.png")):
        file.rename(file.with_stem(f"{file.stem}_L"))
    assert Segmentation(scenes, shots=2, mask_suffix="_L").draw(0).size == 2
    with pytest.raises(DataError, match=r"pictures: no such folder.*--images"):
        Segmentation(scenes, shots=2, images="pictures")
    (scenes / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no files of"):
        Segmentation(scenes, shots=2, masks="empty")


def test_sizes_that_differ_are_said(scenes: Path) -> None:
    rewrite(scenes, lambda labels: labels[:, 1:], "02.png")
    with pytest.raises(
        DataError, match=r"1 image has another size than its map: 02 \(12 x 16, its map 12 x 15\)"
    ):
        Segmentation(scenes, shots=2)


def test_maps_without_a_class_are_said(scenes: Path) -> None:
    rewrite(scenes, lambda labels: np.full_like(labels, 255), "0[14].png")
    with pytest.raises(DataError, match=r"2 maps hold nothing but the ignored label 255: 01, 04"):
        Segmentation(scenes, shots=2)


def test_a_broken_map_is_named(scenes: Path) -> None:
    (scenes / "masks" / "01.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"01\.png: .*expected an image"):
        Segmentation(scenes, shots=2)


def test_wide_numbers_are_refused(scenes: Path) -> None:
    Image.fromarray(np.full((12, 16), 300, dtype=np.uint16)).save(scenes / "masks" / "01.png")
    with pytest.raises(DataError, match=r"01\.png: .*from 300 to 300, expected one class number"):
        Segmentation(scenes, shots=2)


def test_options_that_do_not_fit_are_said(scenes: Path) -> None:
    with pytest.raises(UsageError, match="--ignore-index is -1"):
        Segmentation(scenes, shots=2, ignore_index=-1)
    with pytest.raises(UsageError, match=r"--head-type 'cosine', expected linear, fcn, deeplab"):
        Segmentation(scenes, shots=2, head_type="cosine")
    with pytest.raises(UsageError, match="--image-size is 0"):
        Segmentation(scenes, shots=2, image_size=0)
    with pytest.raises(UsageError, match=r"--shots K.*--eval"):
        Segmentation(scenes)
    with pytest.raises(DataError, match="6 images, expected at least 7"):
        Segmentation(scenes, shots=7)
    with pytest.raises(DataError, match="leave none to measure with"):
        Segmentation(scenes, shots=6).draw(0)


# ---- augmentation


@pytest.mark.parametrize("augment", ["none", "light", "strong"])
@pytest.mark.parametrize("size", [None, 10, 24])
def test_images_and_maps_are_changed_together(scenes: Path, augment: Any, size: int | None) -> None:
    task = Segmentation(
        scenes, shots=4, augment=augment, image_size=size, mean=(0,) * 3, std=(1,) * 3
    )
    draw = task.draw(0)
    images, labels = draw.batch(torch.arange(4), torch.Generator().manual_seed(3))
    assert images.shape == (4, 3, *task.view.crop)
    assert labels.shape == (4, *task.view.crop)
    assert labels.dtype == torch.int64
    assert set(labels.unique().tolist()) <= {0, 1, 2, 255}
    # The strongest channel is the class, but where bands touch, or colours are distorted.
    if augment != "strong":
        inside = labels != 255
        agree = (images.argmax(1) == labels)[inside].float().mean()
        assert agree > 0.85
    again = draw.batch(torch.arange(4), torch.Generator().manual_seed(3))
    assert torch.equal(images, again[0])
    other = draw.batch(torch.arange(4), torch.Generator().manual_seed(4))
    assert torch.equal(images, other[0]) == (augment == "none")


def test_what_is_put_beside_an_image_is_ignored(scenes: Path) -> None:
    task = Segmentation(scenes, shots=2, augment="none", image_size=8)
    view = task.view
    small = [torch.zeros(3, 5, 6, dtype=torch.uint8)]
    _, labels = view.training(
        small, [torch.ones(5, 6, dtype=torch.uint8)], "none", torch.Generator()
    )
    assert sorted(labels.flatten().bincount(minlength=256).nonzero().flatten().tolist()) == [1, 255]
    assert int((labels == 1).sum()) == 30


# ---- models


def test_a_head_of_as_many_classes_is_kept(scenes: Path) -> None:
    model = Pixels(3)
    prepared = Segmentation(scenes, shots=2).draw(0).prepare(model)
    assert (prepared.model, prepared.head, prepared.new_head) == (model, "classifier", False)


@pytest.mark.parametrize("kind", ["tensor", "torchvision"])
def test_a_head_of_other_classes_is_replaced_and_starts_well(scenes: Path, kind: str) -> None:
    model = Pixels(7, kind)
    draw = Segmentation(scenes, shots=2).draw(0)
    prepared = draw.prepare(model)
    assert (prepared.model, prepared.head, prepared.new_head) == (model, "classifier", True)
    assert model.classifier.out_channels == 3
    assert draw.evaluate(model)["miou"] > 0.6
    with pytest.raises(ModelError, match=r"7 outputs for pixels, the data 3 classes.*--head new"):
        Segmentation(scenes, shots=2, head="keep").draw(0).prepare(Pixels(7))


@pytest.mark.parametrize("head_type", ["linear", "fcn", "deeplab"])
@pytest.mark.parametrize("fc", [False, True])
def test_a_backbone_gets_a_head(scenes: Path, head_type: Any, fc: bool) -> None:
    draw = Segmentation(scenes, shots=1, head_type=head_type).draw(0)
    prepared = draw.prepare(Backbone(fc=fc))
    model = prepared.model
    assert isinstance(model, WithDenseHead)
    assert (model.features, prepared.head, prepared.new_head) == ("layer2", "head", True)
    assert not [name for name, _ in model.named_buffers()]
    if head_type == "linear":
        assert draw.evaluate(model)["miou"] > 0.5
    before = draw.loss(model, draw.batch(torch.arange(1), torch.Generator()))
    before.backward()
    assert all(p.grad is not None for p in model.head.parameters())


def test_a_named_module_gives_the_features(scenes: Path) -> None:
    prepared = Segmentation(scenes, shots=2, features="layer1").draw(0).prepare(Backbone())
    assert prepared.model.features == "layer1"
    with pytest.raises(ModelError, match=r"--features 'layer9' is no module"):
        Segmentation(scenes, shots=2, features="layer9").draw(0).prepare(Backbone())
    with pytest.raises(ModelError, match="fc gives no feature map"):
        Segmentation(scenes, shots=2, features="fc").draw(0).prepare(Backbone(fc=True))


def test_a_model_without_a_map_is_refused(scenes: Path) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.fc(images.mean((2, 3)))

    with pytest.raises(ModelError, match="gives no feature map"):
        Segmentation(scenes, shots=2).draw(0).prepare(Flat())


def test_a_model_that_wants_another_size_is_said(scenes: Path) -> None:
    class Picky(Pixels):
        def forward(self, images: Tensor) -> Any:
            if images.shape[-1] != 20:
                raise RuntimeError("want 20 pixels")
            return super().forward(images)

    with pytest.raises(ModelError, match=r"12 x 16: want 20 pixels.*--image-size"):
        Segmentation(scenes, shots=2).draw(0).prepare(Picky())


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("fcn_resnet50", "classifier.4"),
        ("deeplabv3_mobilenet_v3_large", "classifier.4"),
        ("lraspp_mobilenet_v3_large", "classifier"),
    ],
)
def test_heads_of_torchvisions_models_are_found(name: str, head: str) -> None:
    from torchvision.models import get_model

    options = {} if name.startswith("lraspp") else {"aux_loss": True}
    with torch.device("meta"):
        model = get_model(name, weights=None, weights_backbone=None, num_classes=5, **options)
    assert common_module(dense_heads(model, 5)) == head


def test_transformers_models_are_trained(scenes: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=4,
    )
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    draw = Segmentation(scenes, shots=3, image_size=16).draw(0)
    prepared = draw.prepare(model)
    assert prepared.head == "decode_head.classifier"
    assert draw.evaluate(prepared.model)["miou"] > 0.2
    loss = draw.loss(prepared.model, draw.batch(torch.arange(2), torch.Generator()))
    assert bool(loss.isfinite())


def test_what_is_no_dense_output_is_refused() -> None:
    with pytest.raises(ModelError, match=r"returns \(2, 3\), expected logits of pixels"):
        dense_logits(torch.zeros(2, 3))
    with pytest.raises(ModelError, match="2 channels"):
        make_head("fcn", 2, 3, torch.zeros(1))
    assert find_features(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8)) == ("", 4)


# ---- loss and metrics


class Fixed(nn.Module):
    """Gives the same logits whatever it sees, at its own size."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), *self.logits.shape)


def scores(
    labels: list[np.ndarray], found: np.ndarray, classes: int, ignore: int
) -> tuple[float, float]:
    """Count mean IoU over classes that occur, and accuracy, pixel by pixel."""
    inter, union = np.zeros(classes), np.zeros(classes)
    right = total = 0
    for wanted in labels:
        valid = wanted != ignore
        right += int(((wanted == found) & valid).sum())
        total += int(valid.sum())
        for label in range(classes):
            inter[label] += ((wanted == label) & (found == label) & valid).sum()
            union[label] += (((wanted == label) | (found == label)) & valid).sum()
    return float((inter[union > 0] / union[union > 0]).mean()), right / total


def test_metrics_are_those_counted_by_hand(scenes: Path) -> None:
    def blank(labels: np.ndarray) -> np.ndarray:
        labels[:3] = 9
        return labels

    rewrite(scenes, blank)
    (scenes / "classes.txt").write_text("a\nb\nc\nd\n")
    task = Segmentation(scenes, evaluation=scenes, ignore_index=9, augment="none")
    draw = task.draw(0)
    logits = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(0))
    logits[3] = -9
    metrics = draw.evaluate(Fixed(logits))
    labels = [read(file) for file in sorted((scenes / "masks").iterdir())]
    miou, accuracy = scores(labels, logits.argmax(0).numpy(), 4, 9)
    assert metrics["miou"] == pytest.approx(miou, rel=1e-5)
    assert metrics["pixel_accuracy"] == pytest.approx(accuracy, rel=1e-5)
    target = torch.tensor(np.stack(labels), dtype=torch.int64)
    expected = cross_entropy(logits.expand(6, -1, -1, -1), target, ignore_index=9)
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    batch = draw.batch(torch.arange(6), torch.Generator())
    assert float(draw.loss(Fixed(logits), batch).detach()) == pytest.approx(
        float(expected), rel=1e-5
    )
    assert draw.terms(batch) == int((target != 9).sum())
    assert isinstance(draw, Counts)
    assert isinstance(draw, Predicts)


def test_a_crop_without_a_class_costs_nothing(scenes: Path) -> None:
    draw = Segmentation(scenes, shots=2).draw(0)
    loss = draw.loss(
        Fixed(torch.zeros(3, 4, 4)), (torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), 255))
    )
    loss.backward()
    assert float(loss.detach()) == 0


def test_images_are_measured_at_their_own_size(tmp_path: Path) -> None:
    data = write_scenes(tmp_path / "data", count=2)
    other = write_scenes(tmp_path / "other", count=1, size=(20, 30))
    (other / "images" / "00.png").rename(data / "images" / "z.png")
    (other / "masks" / "00.png").rename(data / "masks" / "z.png")
    draw = Segmentation(data, evaluation=data, image_size=24).draw(0)
    seen: list[tuple[int, ...]] = []
    model = Pixels(3)
    model.register_forward_hook(lambda _m, inputs, _o: seen.append(tuple(inputs[0].shape)))
    draw.evaluate(model)
    assert seen == [(2, 3, 24, 32), (1, 3, 24, 36)]
    rows = list(draw.predictions(model, "query", tmp_path / "maps"))
    assert [row["file"] for row in rows] == ["00.png", "01.png", "z.png"]
    sizes = [read(tmp_path / "maps" / row["map"]).T.shape for row in rows]
    assert sizes == [(16, 12), (16, 12), (30, 20)]
    wanted, found = read(data / "masks" / "z.png"), read(tmp_path / "maps" / rows[2]["map"])
    assert rows[2]["pixel_accuracy"] == pytest.approx(float((wanted == found).mean()), rel=1e-5)


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=4))
def test_the_common_module_holds_all(parts: list[str]) -> None:
    names = [".".join([*parts, "x", last]) for last in ("p", "q")]
    assert common_module(names) == ".".join([*parts, "x"])


# ---- the command


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_trains_a_backbone_and_merges(scenes: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    code = Path(__file__).read_text()
    start, end = code.index("class Backbone"), code.index("# ---- data")
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import Tensor, nn\n\n" + code[start:end]
    )
    save_file(Backbone().state_dict(), tmp_path / "base.safetensors", {"format": "pt"})
    assert (
        run("decompose", tmp_path / "base.safetensors", "-o", tmp_path / "f", "-q").exit_code == 0
    )
    common = [
        "--task",
        "segmentation",
        "--data",
        scenes,
        "--model",
        f"{tmp_path / 'net.py'}:Backbone",
    ]
    options = [
        "--shots",
        6,
        "--eval",
        scenes,
        "--steps",
        20,
        "--regime",
        "head,svf,full",
        "--lr",
        0.01,
    ]
    options += ["--head-lr", 0.01, "--augment", "none", "--json"]
    result = run("finetune", tmp_path / "f", "-o", tmp_path / "runs", *common, *options)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    for item in document["runs"]:
        assert item["metrics"]["after"].keys() == {"miou", "pixel_accuracy", "loss"}
        assert item["metrics"]["after"]["loss"] < item["metrics"]["before"]["loss"]
    svf = document["runs"][1]
    merged = tmp_path / "merged.safetensors"
    assert run("merge", tmp_path / "f", svf["output"], "-o", merged).exit_code == 0
    draw = Segmentation(scenes, shots=6, evaluation=scenes).draw(0)
    model = draw.prepare(Backbone()).model
    tensors = load_file(merged)
    state = {n if n.startswith("head.") else f"backbone.{n}": t for n, t in tensors.items()}
    model.load_state_dict(state)
    assert draw.evaluate(model)["miou"] == pytest.approx(svf["metrics"]["after"]["miou"], abs=2e-3)
    wrong = run("finetune", tmp_path / "f", "-o", tmp_path / "no", *common, "--tokenizer", scenes)
    assert "--tokenizer has no meaning for --task segmentation" in wrong.stderr
    wrong = run(
        "finetune",
        tmp_path / "f",
        "-o",
        tmp_path / "no",
        *common,
        "--shots",
        2,
        "--ignore-index",
        999,
    )
    assert wrong.exit_code == 2
    assert "Traceback" not in wrong.stderr


def test_folds_split_the_support_set_by_images(scenes: Path) -> None:
    draw = Segmentation(scenes, shots=5, hold_out=0.2, image_size=12).draw(0)
    folds = draw.subdivide(2, seed=0)
    support = set(draw._support.indices)
    left = [set(fold._parts["query"].indices) for fold in folds]
    assert left[0] | left[1] == support
    assert [len(one) for one in left] == [2, 2]
    for fold, images in zip(folds, left, strict=True):
        assert set(fold._support.indices) == support - images
        assert fold._parts["held_out"] is draw._parts["held_out"]
    assert Segmentation(scenes, shots=1).draw(0).subdivide(2, seed=0) == []
