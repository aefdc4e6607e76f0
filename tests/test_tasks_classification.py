"""Image classification as a task: classes, draws, heads, loss and metrics."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import write_pictures
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from svftool.errors import DataError, MissingDependencyError, ModelError, UsageError
from svftool.tasks.base import Predicts
from svftool.tasks.classification import Classification
from svftool.tasks.heads import CosineHead
from svftool.tasks.options import recorded


class ColourNet(nn.Module):
    """Mean colour, mixed at random, then a linear head of its own."""

    def __init__(self, classes: int = 3, *, size: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size = size
        self.conv = nn.Conv2d(3, 12, 1)
        self.fc = nn.Linear(12, classes)

    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None and images.shape[-1] != self.size:
            raise RuntimeError(f"want {self.size} pixels")
        return self.fc(self.conv(images).relu().mean((2, 3)))


def test_the_rest_is_what_the_shots_left_over(tmp_path: Path) -> None:
    task = Classification(write_pictures(tmp_path, count=6), shots=2)
    assert task.classes == ("blue", "green", "red")
    draw = task.draw(0)
    assert (draw.size, draw.held_out) == (6, 0)
    _, labels = draw.batch(torch.arange(6), torch.Generator())
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    trained = set(draw._support.indices)
    assert trained | set(draw._parts["query"].indices) == set(range(18))
    assert not trained & set(draw._parts["query"].indices)


def test_evaluation_images_are_their_own(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "a", count=3)
    other = write_pictures(tmp_path / "b", classes=["red"], count=5)
    task = Classification(data, evaluation=other)
    draw = task.draw(0)
    assert draw.size == 9

    class Red(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images: Tensor) -> Tensor:
            logits = self.weight * torch.tensor([0.0, 0.0, 2.0])
            return logits.expand(len(images), 3)

    metrics = draw.evaluate(Red())
    assert metrics["accuracy"] == 1.0
    expected = cross_entropy(torch.tensor([[0.0, 0.0, 2.0]]), torch.tensor([2]))
    assert metrics["loss"] == pytest.approx(float(expected))


def test_a_held_out_share_is_measured_apart(tmp_path: Path) -> None:
    draw = Classification(write_pictures(tmp_path), shots=4, hold_out=0.25).draw(0)
    assert (draw.size, draw.held_out) == (9, 3)
    assert set(draw.evaluate(ColourNet(), "held_out")) == {"accuracy", "class_accuracy", "loss"}


def test_a_head_of_as_many_classes_is_kept(tmp_path: Path) -> None:
    model = ColourNet(3)
    before = model.fc.weight.clone()
    draw = Classification(write_pictures(tmp_path), shots=2, head="keep").draw(0)
    prepared = draw.prepare(model)
    assert (prepared.model, prepared.head, prepared.new_head) == (model, "fc", False)
    assert torch.equal(model.fc.weight, before)


class KnowingNet(nn.Module):
    """Gives the channel that is brightest, with outputs for the channels in `order`."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.fc = nn.Linear(3, len(order))
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
            self.fc.weight.copy_(10 * torch.eye(3)[list(order)])
            self.fc.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).mean((2, 3)))


RED, GREEN, BLUE = range(3)


def prepared_for(folder: Path, model: nn.Module, **options: Any) -> tuple[Any, Any, float]:
    """Return the task, its prepared model, and the accuracy before any training."""
    task = Classification(folder, **{"shots": 5, **options})
    draw = task.draw(0)
    prepared = draw.prepare(model)
    return task, prepared, draw.evaluate(prepared.model)["accuracy"]


@pytest.mark.parametrize(
    ("order", "kept"),
    [((BLUE, GREEN, RED), True), ((GREEN, RED, BLUE), False), ((RED, RED, RED), False)],
)
def test_without_names_a_head_at_chance_is_replaced_and_said(
    order: tuple[int, ...], kept: bool, tmp_path: Path
) -> None:
    data = write_pictures(tmp_path, count=8)
    _, prepared, accuracy = prepared_for(data, KnowingNet(*order))
    assert prepared.new_head is not kept
    assert accuracy > 0.9
    trial = prepared.facts["head_trial"]
    assert trial["images"] == 15
    assert (trial["p_value"] <= 0.05) is kept
    assert prepared.facts["head"] == ("keep" if kept else "new")
    if kept:
        assert prepared.said == ()
    else:
        share = f"{trial['right']} of 15 support images \\({trial['right'] / 15:.1%}\\)"
        assert re.search(share + ".*as chance does.*--head keep", prepared.said[0])


def test_a_head_that_may_not_be_judged_is_kept(tmp_path: Path) -> None:
    data = write_pictures(tmp_path, count=8)
    wrong = (GREEN, RED, BLUE)
    for options in ({"head": "keep"}, {"classes": ("blue", "green", "red")}):
        _, prepared, _ = prepared_for(data, KnowingNet(*wrong), **options)
        assert not prepared.new_head
        assert "head_trial" not in prepared.facts
    draw = Classification(data, shots=5).draw(0)
    assert not draw.prepare(KnowingNet(*wrong), start=False).new_head


def test_a_handful_of_images_decides_nothing_and_it_is_said(tmp_path: Path) -> None:
    data = write_pictures(tmp_path, classes=["red", "blue"], count=4)
    for order in ((BLUE, RED), (RED, BLUE)):
        _, prepared, _ = prepared_for(data, KnowingNet(*order), shots=2)
        assert not prepared.new_head
        assert "too few to tell" in prepared.said[0]
    _, prepared, accuracy = prepared_for(data, KnowingNet(RED, BLUE), shots=3)
    assert (prepared.new_head, accuracy) == (True, 1.0)


@pytest.mark.parametrize(
    "names", [("Red", "BLUE", "green"), ("red, crimson", "blue, azure", "green, lime")]
)
def test_names_in_another_order_are_mapped(names: tuple[str, ...], tmp_path: Path) -> None:
    data = write_pictures(tmp_path, count=8)
    model = KnowingNet(RED, BLUE, GREEN)
    task, prepared, accuracy = prepared_for(data, model, head_classes=names)
    assert task.classes == ("red", "blue", "green")
    assert (prepared.new_head, prepared.said, accuracy) == (False, (), 1.0)


def test_a_part_of_the_heads_classes_keeps_their_outputs(tmp_path: Path) -> None:
    data = write_pictures(tmp_path, classes=["red", "blue"], count=8)
    names = ("blue", "green", "red")
    model = KnowingNet(BLUE, GREEN, RED)
    task, prepared, accuracy = prepared_for(data, model, head_classes=names)
    assert (task.classes, prepared.new_head, accuracy) == (("blue", "red"), True, 1.0)
    assert model.fc.weight.argmax(1).tolist() == [BLUE, RED]
    assert "2 of its 3 outputs are kept" in prepared.said[0]
    whole = {"head_classes": names, "whole_head": True}
    task, prepared, accuracy = prepared_for(data, KnowingNet(BLUE, GREEN, RED), **whole)
    assert (task.classes, prepared.new_head, accuracy) == (names, False, 1.0)


@pytest.mark.parametrize("names", [("cat", "dog", "eel"), ("blue", "green", "rot")])
def test_a_head_of_other_names_is_replaced_and_said(names: tuple[str, ...], tmp_path: Path) -> None:
    data = write_pictures(tmp_path, count=8)
    model = KnowingNet(BLUE, GREEN, RED)
    _, prepared, accuracy = prepared_for(data, model, head_classes=names)
    assert prepared.new_head
    assert accuracy > 0.9
    assert "is for other classes" in prepared.said[0]
    with pytest.raises(DataError, match="unknown class"):
        Classification(data, shots=5, head_classes=names, whole_head=True)


@pytest.mark.parametrize("names", [("0", "1", "2"), ("class 1", "class 2", "class 3")])
def test_names_that_say_nothing_are_no_names(names: tuple[str, ...], tmp_path: Path) -> None:
    data = write_pictures(tmp_path, count=8)
    _, prepared, _ = prepared_for(data, KnowingNet(BLUE, GREEN, RED), head_classes=names)
    assert not prepared.new_head
    _, prepared, _ = prepared_for(data, KnowingNet(GREEN, RED, BLUE), head_classes=names)
    assert prepared.new_head


def numbered(folder: Path) -> Path:
    """Name the classes so that their order as text is another than that of their numbers."""
    for name, number in {"blue": 1, "green": 2, "red": 10}.items():
        (folder / name).rename(folder / str(number))
    return folder


def test_the_order_of_numbered_folders_is_said_where_a_head_is_kept_by_it(tmp_path: Path) -> None:
    data = numbered(write_pictures(tmp_path, count=8))
    _, prepared, _ = prepared_for(data, KnowingNet(BLUE, RED, GREEN))
    assert not prepared.new_head
    assert "the order 1, 10, 2, sorted as text" in prepared.said[0]
    assert "--classes" in prepared.said[0]
    _, prepared, _ = prepared_for(data, KnowingNet(BLUE, GREEN, RED))
    assert prepared.new_head
    assert len(prepared.said) == 2
    assert "by number they are 1, 2, 10" in prepared.said[1]
    _, prepared, _ = prepared_for(data, KnowingNet(*[RED] * 3), head="new")
    assert prepared.said == ()
    draw = Classification(data, shots=5).draw(0)
    assert "sorted as text" in draw.prepare(KnowingNet(BLUE, RED, GREEN), start=False).said[0]


def test_folds_judge_the_head_as_the_whole_support_set_does(tmp_path: Path) -> None:
    data = write_pictures(tmp_path, count=8)
    for order, new in (((BLUE, GREEN, RED), False), ((GREEN, RED, BLUE), True)):
        for fold in Classification(data, shots=4).draw(0).subdivide(4, seed=0):
            prepared = fold.prepare(KnowingNet(*order))
            assert prepared.new_head is new
            assert prepared.facts["head_trial"]["images"] == 12


def test_a_cosine_head_in_place_of_one_at_chance_is_found_again(tmp_path: Path) -> None:
    """What the tuned file says of the head, not the number of classes, makes it for `evaluate`."""
    data = write_pictures(tmp_path, count=8)
    task, prepared, _ = prepared_for(data, KnowingNet(RED, RED, RED), head_type="cosine")
    assert isinstance(prepared.model.fc, CosineHead)
    told = recorded("classification", {**task.describe(), **prepared.facts})
    again = Classification(data, shots=5, **told).draw(0)
    assert isinstance(again.prepare(KnowingNet(RED, RED, RED), start=False).model.fc, CosineHead)


@pytest.mark.parametrize(("outputs", "head"), [(7, "auto"), (3, "new")])
def test_a_new_head_starts_from_class_means(tmp_path: Path, outputs: int, head: str) -> None:
    model = ColourNet(outputs)
    draw = Classification(write_pictures(tmp_path, count=12), shots=4, head=head).draw(0)
    prepared = draw.prepare(model)
    assert (prepared.model, prepared.head, prepared.new_head) == (model, "fc", True)
    assert model.fc.out_features == 3
    assert draw.evaluate(model)["accuracy"] > 0.9


@pytest.mark.parametrize(("shots", "rate"), [(1, 0.1), (2, 1.0)])
def test_a_head_that_single_examples_made_moves_little(
    tmp_path: Path, shots: int, rate: float
) -> None:
    folder = write_pictures(tmp_path / "data")
    prepared = Classification(folder, shots=shots, head="new").draw(0).prepare(ColourNet(3))
    assert prepared.head_rate == rate
    kept = Classification(folder, shots=shots, head="keep").draw(0).prepare(ColourNet(3))
    assert kept.head_rate == 1.0


def test_a_network_without_a_head_gets_one(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU())
    draw = Classification(write_pictures(tmp_path, count=12), shots=4).draw(0)
    prepared = draw.prepare(model)
    assert (prepared.head, prepared.new_head) == ("head", True)
    assert prepared.model.backbone is model
    assert draw.evaluate(prepared.model)["accuracy"] > 0.9


def test_a_head_of_another_size_cannot_be_kept(tmp_path: Path) -> None:
    draw = Classification(write_pictures(tmp_path), shots=2, head="keep").draw(0)
    with pytest.raises(ModelError, match=r"7 outputs, the data 3 classes.*--head new"):
        draw.prepare(ColourNet(7))


def test_a_file_of_classes_gives_their_order(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data")
    names = tmp_path / "names.txt"
    names.write_text("red\nyellow\n\nblue\ngreen\n")
    task = Classification(data, shots=2, classes=names)
    assert task.classes == ("red", "yellow", "blue", "green")
    _, labels = task.draw(0).batch(torch.arange(6), torch.Generator())
    assert labels.tolist() == [2, 2, 3, 3, 0, 0]
    with pytest.raises(DataError, match="no images of class yellow"):
        task.draw(0).prepare(ColourNet(9))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("red\nblue\n", r"unknown class green, expected one of red, blue"),
        ("red\nblue\nred\ngreen", r"names.txt: red twice"),
        ("red", r"names.txt: 1 class, expected two or more"),
    ],
)
def test_classes_that_do_not_fit_are_said(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "names.txt").write_text(lines)
    data = write_pictures(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        Classification(data, shots=2, classes=tmp_path / "names.txt")
    with pytest.raises(DataError, match=r"absent.txt: .*expected a text file"):
        Classification(data, shots=2, classes=tmp_path / "absent.txt")


def test_evaluation_images_of_an_unknown_class_are_said(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "a", classes=["red", "blue"])
    other = write_pictures(tmp_path / "b")
    with pytest.raises(DataError, match=r"b: unknown class green, expected one of blue, red"):
        Classification(data, evaluation=other, shots=2)


def test_shots_that_do_not_fit_are_said(tmp_path: Path) -> None:
    data = write_pictures(tmp_path, count=4)
    with pytest.raises(DataError, match=r"class 'blue' has 4 images, expected at least 5"):
        Classification(data, shots=5)
    with pytest.raises(UsageError, match=r"--shots K.*--eval"):
        Classification(data)
    with pytest.raises(DataError, match="leave none to measure with"):
        Classification(data, shots=4).draw(0)


def test_a_model_that_wants_another_size_is_said(tmp_path: Path) -> None:
    data = write_pictures(tmp_path)
    with pytest.raises(ModelError, match=r"16 x 16: want 20 pixels.*--image-size"):
        Classification(data, shots=2).draw(0).prepare(ColourNet(3, size=20))
    Classification(data, shots=2, image_size=20).draw(0).prepare(ColourNet(3, size=20))


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    data = write_pictures(tmp_path)
    (data / "red" / "00.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"red/00\.png: .*expected an image"):
        Classification(data, shots=2)
    whole = (data / "red" / "01.png").read_bytes()
    (data / "red" / "00.png").write_bytes(whole[: len(whole) - 200])
    with pytest.raises(DataError, match=r"red/00\.png: .*expected an image"):
        Classification(data, evaluation=data).draw(0).evaluate(ColourNet())


def test_large_sets_are_measured_in_batches(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(150):
            Image.new("RGB", (4, 4), (index, 0, 0)).save(tmp_path / name / f"{index}.png")
    draw = Classification(tmp_path, evaluation=tmp_path, image_size=4).draw(0)
    seen: list[int] = []
    model = ColourNet(2)
    model.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    assert 0 <= draw.evaluate(model)["accuracy"] <= 1
    assert seen == [256, 44]


@pytest.mark.parametrize(("kind", "expected"), [("cpu", [4] * 5), ("meta", [20])])
def test_a_cpu_sees_fewer_pixels_at_once(tmp_path: Path, kind: str, expected: list[int]) -> None:
    data = write_pictures(tmp_path, classes=["red", "blue"], count=10)
    draw = Classification(data, evaluation=data, image_size=256).draw(0)
    batches = draw._parts["query"].batches(torch.device(kind))
    assert [len(images) for images, _ in batches] == expected


def test_the_description_holds_no_paths(tmp_path: Path) -> None:
    described = Classification(write_pictures(tmp_path), shots=2).describe()
    assert described["shots"] == 2
    assert described["image_size"] == [16, 16]
    assert str(tmp_path) not in str(described)


def test_balanced_sampling_shows_every_class_equally_often(tmp_path: Path) -> None:
    write_pictures(tmp_path, classes=["red"], count=17)
    write_pictures(tmp_path, classes=["blue", "green"], count=2)
    for sampling, spread in (("uniform", [2, 2, 17]), ("balanced", [7, 7, 7])):
        draw = Classification(tmp_path, evaluation=tmp_path, sampling=sampling).draw(0)
        order = draw.order(torch.Generator().manual_seed(1))
        assert draw._support.labels[order].bincount().tolist() == spread
    batches = draw._support.labels[order].split(3)
    assert all(sorted(batch.tolist()) == [0, 1, 2] for batch in batches)
    # Every image of a small class comes before any comes again, and large ones change by epoch.
    small = order[draw._support.labels[order] == 0]
    assert small[:2].sort().values.tolist() == [0, 1]
    other = draw.order(torch.Generator().manual_seed(2))
    assert not torch.equal(order.sort().values, other.sort().values)


def test_a_cosine_head_starts_from_class_means_and_learns(tmp_path: Path) -> None:
    data = write_pictures(tmp_path, count=12)
    for model in (ColourNet(7), nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU())):
        draw = Classification(data, shots=4, head_type="cosine").draw(0)
        prepared = draw.prepare(model)
        head = prepared.model.get_submodule(prepared.head or "")
        assert isinstance(head, CosineHead)
        assert draw.evaluate(prepared.model)["accuracy"] > 0.9
        loss = draw.loss(prepared.model, draw.batch(torch.arange(4), torch.Generator()))
        loss.backward()
        assert head.weight.grad is not None
        assert head.scale.grad is not None


def test_kinds_of_heads_and_sampling_are_checked(tmp_path: Path) -> None:
    data = write_pictures(tmp_path)
    with pytest.raises(UsageError, match=r"--head-type 'fcn', expected linear, cosine"):
        Classification(data, shots=2, head_type="fcn")
    with pytest.raises(UsageError, match=r"--sampling 'odd', expected uniform, balanced"):
        Classification(data, shots=2, sampling="odd")


def test_a_cosine_head_goes_by_direction_alone() -> None:
    head = CosineHead(4, 3)
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    before = head(features)
    expected = head.scale * cosine_similarity(features[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(before, expected)
    with torch.no_grad():
        head.weight.mul_(3)
    torch.testing.assert_close(head(7 * features), before)


def test_a_head_of_convolutions_gets_no_cosine(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("features", nn.Conv2d(3, 8, 1))
    model.add_module("classifier", nn.Conv2d(8, 7, 1))
    draw = Classification(write_pictures(tmp_path), shots=2, head_type="cosine").draw(0)
    with pytest.raises(ModelError, match=r"is a Conv2d.*--head-type linear"):
        draw.prepare(model)


def test_predictions_name_classes(tmp_path: Path) -> None:
    draw = Classification(write_pictures(tmp_path, count=12), shots=4).draw(0)
    model = draw.prepare(ColourNet(7)).model
    rows = list(draw.predictions(model))
    assert len(rows) == 24
    right = sum(row["label"] == row["prediction"] for row in rows) / len(rows)
    assert right == draw.evaluate(model)["accuracy"]
    assert rows[0]["file"].startswith("blue/")
    assert all(1 / 3 <= row["probability"] <= 1 for row in rows)
    assert isinstance(draw, Predicts)


def test_several_measures_are_given_besides_accuracy(tmp_path: Path) -> None:
    write_pictures(tmp_path, classes=["red"], count=9)
    write_pictures(tmp_path, classes=["blue"], count=3)

    class Red(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images: Tensor) -> Tensor:
            return self.weight * torch.tensor([0.0, 2.0]).expand(len(images), 2)

    metrics = Classification(tmp_path, evaluation=tmp_path).draw(0).evaluate(Red())
    assert metrics["accuracy"] == 0.75
    assert metrics["class_accuracy"] == 0.5


@pytest.mark.filterwarnings("ignore:Cannot")  # of dill, which datasets hashes by
def test_a_saved_data_set_is_a_source_of_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = write_pictures(tmp_path / "pictures", count=4)
    files = sorted(folder.rglob("*.png"))
    names = sorted({file.parent.name for file in files})
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    content = {"image": [], "label": [file.parent.name for file in files]}
    content["image"] = [{"bytes": file.read_bytes(), "path": None} for file in files]
    datasets.Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "saved")
    stored, plain = (Classification(data, shots=2) for data in (tmp_path / "saved", folder))
    assert stored.classes == plain.classes
    batches = [task.draw(0).batch(torch.arange(6), torch.Generator()) for task in (stored, plain)]
    assert torch.equal(batches[0][0], batches[1][0])
    assert torch.equal(batches[0][1], batches[1][1])
    datasets.DatasetDict(train=datasets.load_from_disk(tmp_path / "saved")).save_to_disk(
        tmp_path / "split"
    )
    with pytest.raises(DataError, match=r"several splits \(train\), expected one.*split/train"):
        Classification(tmp_path / "split", shots=2)
    assert Classification(tmp_path / "split" / "train", shots=2).classes == plain.classes
    datasets.Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "other")
    with pytest.raises(DataError, match="columns a, expected one of images and one of labels"):
        Classification(tmp_path / "other", shots=2)


def test_a_saved_data_set_needs_the_library(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(MissingDependencyError, match=r"'datasets'.*pip install .*\[datasets\]"):
        Classification(tmp_path, shots=2)
