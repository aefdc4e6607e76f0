"""The task as training meets it, on coloured shapes that a small network can learn to find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from shapes import SmallNet, write_shapes

from svftool.errors import DataError, ModelError, UsageError
from svftool.few_shot.base_learner import BaseMaps, BaseTraining
from svftool.few_shot.encoder import View
from svftool.few_shot.network import FewShotNet
from svftool.few_shot.overlays import (
    CAPTION,
    HEIGHT,
    LEGEND,
    PREDICTION_COLOUR,
    SUPPORT_COLOUR,
    TRUTH_COLOUR,
    captioned,
    score_text,
    write_overlay,
)
from svftool.few_shot.pictures import Ranges, distort
from svftool.few_shot.scoring import Prediction
from svftool.few_shot.task import FewShotSegmentation, few_shot_tasks
from svftool.progress import Silent
from svftool.tasks.base import to_device
from svftool.training.loop import training_mode


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"))


MakeTask = Callable[..., FewShotSegmentation]


@pytest.fixture
def make(shapes: Path) -> MakeTask:
    def build(**options: Any) -> FewShotSegmentation:
        chosen = {"image_size": 65, "width": 16, "test_episodes": 24, "select_episodes": 6}
        return few_shot_tasks(shapes, **(chosen | options))[0]

    return build


def train(task: FewShotSegmentation, steps: int, *, frozen: bool = True) -> tuple[Any, FewShotNet]:
    draw = task.draw(0)
    net = draw.prepare(SmallNet()).model
    assert isinstance(net, FewShotNet)
    net.backbone.requires_grad_(not frozen)
    training_mode(net)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(0)
    for _ in range(steps):
        order = draw.order(generator)
        loss = draw.loss(net, to_device(draw.batch(order[:6], generator), torch.device("cpu")))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return draw, net


def test_novel_classes_are_found_after_training_on_others(make: MakeTask):
    draw, net = train(make(folds=[1]), 80)
    before = net.host
    after = draw.evaluate(net)
    assert after["base_miou"] > 0.4
    assert after["miou"] > 0.3  # everything marked gives 0.19, nothing 0
    assert set(after) == {"miou", "fb_iou", "base_miou", "base_fb_iou"}
    assert net.host is before
    assert draw.evaluate(net) == after


def test_before_training_the_nearest_prototype_speaks(make: MakeTask):
    draw = make().draw(0)
    net = draw.prepare(SmallNet()).model
    first = draw.evaluate(net)
    assert first["miou"] > 0.2
    with torch.no_grad():
        next(net.host.parameters()).add_(1e-3)
    assert draw.evaluate(net) != first


def test_kept_features_train_the_same_as_features_computed_anew(make: MakeTask):
    states = []
    for whole in (False, True):
        task = make(augment="none")
        draw, net = task.draw(0), None
        net = draw.prepare(SmallNet()).model
        net.backbone.requires_grad_(False)
        net.backbone.layer3.requires_grad_(True)
        if whole:  # a trained stem keeps nothing
            net.backbone.conv1.requires_grad_(True)
        net.eval()
        generator = torch.Generator().manual_seed(3)
        losses = []
        for _ in range(3):
            batch = draw.batch(torch.tensor([0, 5, 9]), generator)
            loss = draw.loss(net, batch)
            gradient = torch.autograd.grad(loss, net.backbone.layer3[0].weight)[0]
            losses.append((loss.detach(), gradient))
        states.append(losses)
    for (a, g), (b, h) in zip(*states, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(g, h)


def test_a_batch_depends_on_its_generator_alone(make: MakeTask):
    def batch(seed: int) -> dict[str, Any]:
        return (
            make(shots=[2]).draw(0).batch(torch.tensor([0, 3]), torch.Generator().manual_seed(seed))
        )

    first, again, other = batch(1), batch(1), batch(2)
    assert first["views"] == again["views"]
    assert torch.equal(first["masks"], again["masks"])
    assert first["views"] != other["views"]
    assert first["masks"].shape == (2, 2, 65, 65)
    assert first["target"].shape == (2, 65, 65)
    assert len(first["views"]) == 6
    assert set(np.unique(first["target"])) <= {0, 1, 255}
    assert (first["own"] >= 0).all()


def test_light_augmentation_mirrors_half_of_the_pictures(make: MakeTask):
    generator = torch.Generator().manual_seed(0)
    draw = make().draw(0)
    flips = [v.flipped for _ in range(20) for v in draw.batch(torch.arange(6), generator)["views"]]
    assert 0.4 < np.mean(flips) < 0.6
    plain = make(augment="none").draw(0)
    assert not any(v.flipped for v in plain.batch(torch.arange(6), generator)["views"])


def test_strong_augmentation_distorts_images_and_trains(make: MakeTask):
    draw, net = train(make(augment="strong"), 2, frozen=False)
    batch = draw.batch(torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    assert batch["images"].shape == (4, 3, 65, 65)
    assert torch.isfinite(draw.loss(net, batch))


def test_distortion_moves_picture_and_mask_together_and_keeps_the_object():
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[5:20, 10:30] = 1
    picture = mask.expand(3, -1, -1) * 250
    for seed in range(40):
        random = np.random.default_rng(seed)
        image, labels = distort(picture, mask, 57, random, Ranges((0.9, 1.1)))
        assert image.shape == (3, 57, 57)
        assert labels.shape == (57, 57)
        assert set(labels.unique().tolist()) <= {0, 1, 255}
        inside = image[0][labels == 1].float().mean()
        outside = image[0][labels == 0].float().mean()
        assert inside > 200
        assert outside < 40
        assert (labels == 1).sum() > 0.8 * 15 * 20 * 0.81
        assert (
            image[:, labels == 255].float().mean(1) - torch.tensor([124, 116, 104])
        ).abs().max() < 30


def test_a_host_that_marks_nothing_is_told_of(make: MakeTask):
    class Told(Silent):
        """Keeps the warnings."""

        def __init__(self) -> None:
            self.warnings: list[str] = []

        def warn(self, message: str) -> None:
            self.warnings.append(message)

    draw, told = make().draw(0), Told()
    net = draw.prepare(SmallNet()).model
    assert draw.evaluate(net, progress=told)["miou"] > 0
    assert told.warnings == []
    with torch.no_grad():
        next(net.host.parameters()).mul_(2)
        net.host.classify.out.bias.copy_(torch.tensor([9.0, 0.0]))
    assert draw.evaluate(net, progress=told)["miou"] == 0
    assert "raise --steps" in told.warnings[0]


def test_further_shots_are_tested_with_the_same_weights(make: MakeTask):
    draw, net = train(make(test_shots=[3]), 3)
    metrics = draw.evaluate(net)
    assert {"miou", "miou_3shot", "base_fb_iou_3shot"} <= set(metrics)
    three = make(shots=[3]).draw(0)
    three._untrained = []
    assert three.evaluate(net)["miou"] == metrics["miou_3shot"]


def test_weights_are_chosen_by_base_classes_unless_told_otherwise(make: MakeTask):
    draw, net = train(make(), 2)
    assert draw.held_out == 6
    assert make(select_on="last").draw(0).held_out == 0
    seen: list[set[int]] = []
    for select_on in ("base", "novel"):
        task = make(select_on=select_on)
        chooser = task.draw(0)
        truth = task.pictures.truth
        asked: set[int] = set()
        task.pictures.truth = lambda pair, label, asked=asked, truth=truth: (  # type: ignore[method-assign]
            asked.add(label) or truth(pair, label)
        )
        chooser._untrained = []
        chooser.evaluate(net, "held_out")
        seen.append(asked)
    base, novel = seen
    assert base <= set(task.data.split.base)
    assert novel == set(task.data.split.novel)


def test_settings_are_chosen_by_base_classes_or_not_at_all(make: MakeTask):
    assert make(select_on="novel").draw(0).subdivide(2, seed=0) == []
    for select_on in ("base", "last"):
        task = make(select_on=select_on)
        (fold,) = task.draw(0).subdivide(2, seed=0)
        net = fold.prepare(SmallNet()).model
        truth, asked = task.pictures.truth, set()
        task.pictures.truth = lambda pair, label, asked=asked, truth=truth: (  # type: ignore[method-assign]
            asked.add(label) or truth(pair, label)
        )
        assert "miou" in fold.evaluate(net)
        assert asked
        assert asked <= set(task.data.split.base)


def test_what_was_done_is_described(make: MakeTask):
    task = make(folds=[1], remove_novel=True)
    task.draw(0).prepare(SmallNet())
    told = task.describe()
    assert told["novel_classes"] == ["green"]
    assert told["base_classes"] == ["blue", "red", "yellow"]
    assert told["removed_images_with_novel_classes"] is True
    assert told["select_on"] == "base"
    assert told["test_episodes"] == 24
    assert task.facts == {"fold": 1}
    assert not any("/" in str(value) for value in told.values())


def test_tasks_go_through_shots_and_folds(shapes: Path):
    tasks = few_shot_tasks(shapes, folds=[0, 3], shots=[1, 2], image_size=65)
    assert [(t.shots, t.facts["fold"]) for t in tasks] == [(1, 0), (1, 3), (2, 0), (2, 3)]
    assert len({id(task.pictures) for task in tasks}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": [4]}, "fold 4 does not exist, expected 0 to 3"),
        ({"shots": [8]}, r"classes of the training data of fold 0 with fewer than 9 images: 3"),
        ({"shots": [4]}, r"fold 0 holds out 9 images of 3 base classes, 3 of a class at most"),
        ({"test_shots": [8]}, r"classes of the test data .* images: 1, .*: blue \(8\)"),
    ],
)
def test_data_that_cannot_make_episodes_is_refused(
    make: MakeTask, options: dict[str, Any], message: str
):
    with pytest.raises(DataError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "options",
    [{"folds": []}, {"folds": [0, 0]}, {"shots": [0]}, {"test_episodes": 0}, {"test_shots": [0]}],
)
def test_options_that_make_no_sense_are_refused(make: MakeTask, options: dict[str, Any]):
    with pytest.raises(UsageError):
        make(**options)


# BAM


def test_base_maps_join_all_masks_of_a_picture(shapes: Path):
    task = few_shot_tasks(shapes, image_size=65)[0]
    pair = task.data.train.pairs[0]
    numbers = BaseMaps(task.data.train, task.pictures).map(pair)
    place = task.data.split.base.index(pair.query[0]) + 1
    assert set(np.unique(numbers)) == {0, place}
    assert np.array_equal(numbers == place, task.pictures.truth(pair, pair.query[0]) == 1)


def test_bam_trains_its_base_learner_once_and_takes_it_into_account(make: MakeTask):
    task = make(host="bam", base_learner=BaseTraining(steps=30, batch_size=4))
    draw, net = train(task, 2)
    assert list(task.learners) == [0]
    learner = task.learners[0]
    assert not any(p.requires_grad for p in learner.parameters())
    train(task, 0)
    assert task.learners[0] is learner
    assert not any("ppm" in name for name, _ in net.named_parameters())
    pool = task.data.train
    views = [View(pool.pairs[i], pool.pairs[i].query[0]) for i in (0, len(pool.pairs) - 1)]
    maps = draw._base(views)
    assert maps.shape[:2] == (2, 4)
    torch.testing.assert_close(maps.sum(1), torch.ones_like(maps[:, 0]))
    batch = draw.batch(torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    with torch.no_grad():
        net.host.ensemble.weight.copy_(torch.tensor([1.0, 0.5]).view(1, 2, 1, 1))
        with_base = draw.loss(net.eval(), batch)
        draw._base = None
        assert draw.loss(net, batch) != with_base


def test_a_base_network_of_other_classes_is_refused(make: MakeTask):
    pytest.importorskip("torchvision")
    from svftool.few_shot.paper_networks import _vgg_pspnet

    torch.manual_seed(0)
    with pytest.raises(ModelError, match="knows 16 classes with background, expected 4"):
        make(host="bam").draw(0).prepare(_vgg_pspnet(15))


# Pictures for looking at


def test_overlays_show_supports_truth_and_prediction(make: MakeTask, tmp_path: Path):
    task = make(shots=[2])
    draw = task.draw(0)
    from svftool.few_shot.pool import fixed_episodes

    episode = next(iter(fixed_episodes(task.data.test, 1, 2, 0)))
    truth = task.pictures.truth(task.data.test.pairs[episode.query], episode.label)
    prediction = Prediction(episode, np.zeros(truth.shape, bool), truth)
    path = write_overlay(tmp_path, 3, prediction, task.data.test, task.pictures, "../a b")
    assert path == tmp_path / "0003-a-b.png"
    picture = np.asarray(Image.open(path)).astype(int)
    assert picture.shape[0] == CAPTION + HEIGHT + LEGEND
    legend = picture[CAPTION + HEIGHT :]
    for colour, count in ((SUPPORT_COLOUR, 2), (TRUTH_COLOUR, 1), (PREDICTION_COLOUR, 1)):
        assert (legend == colour).all(2).sum() == 100 * count
    line = picture[:CAPTION].min(2) < 128
    assert line[:, :60].any()  # the class on the left
    assert line[:, -60:].any()  # the score on the right
    panels = np.array_split(picture[CAPTION : CAPTION + HEIGHT], 4, axis=1)
    query = np.asarray(
        Image.open(task.data.test.pairs[episode.query].image).resize((320, HEIGHT))
    ).astype(int)
    assert np.abs(panels[3][:, 20:300] - query[:, 20:300]).mean() < 12  # nothing was predicted
    assert np.abs(panels[2][:, 20:300] - query[:, 20:300]).mean() > 12  # the truth is tinted
    assert draw.size == 12


@pytest.mark.parametrize("width", [1, 60, 200, 900])
@pytest.mark.parametrize("name", ["", "a", "猫" * 40, "a name that is long " * 9, "a\nb"])
def test_the_score_over_an_overlay_is_never_cut(width: int, name: str) -> None:
    plain = "".join(filter(str.isprintable, name))
    made = captioned(np.full((4, width, 3), 9, np.uint8), plain, "IoU 12.3 %")
    alone = captioned(np.full((4, width, 3), 9, np.uint8), "", "IoU 12.3 %")
    assert made.shape == alone.shape
    assert (made[-4:, :width] == 9).all()
    right = made[:CAPTION, -70:] if width > 100 else made[:CAPTION, :0]
    assert (right == alone[:CAPTION, made.shape[1] - right.shape[1] :]).all()
    assert (alone[:CAPTION] < 128).any()
    assert (alone[:CAPTION, :2] == 255).all()


def test_the_score_of_an_overlay_is_that_of_its_episode() -> None:
    from svftool.few_shot.pool import Episode

    episode = Episode(3, 0, (1,))
    truth = np.array([[1, 1, 0, 255]], np.uint8)
    found = score_text(Prediction(episode, np.array([[True, False, False, True]]), truth))
    assert found == "IoU 50.0 %"
    nothing = np.zeros((1, 4), np.uint8)
    assert score_text(Prediction(episode, nothing.astype(bool), nothing)) == "IoU: nothing to find"


def test_every_run_gets_a_folder_of_pictures(make: MakeTask, tmp_path: Path):
    task = make(overlays=tmp_path / "seen", overlay_count=5)
    draw, net = train(task, 2)
    draw.illustrate(net, "fold0-svf")
    names = sorted(path.name for path in (tmp_path / "seen" / "fold0-svf").iterdir())
    assert names == [f"000{i}-blue.png" for i in range(5)]
    make().draw(0).illustrate(net, "nothing was asked for")
    assert len(list((tmp_path / "seen").iterdir())) == 1
    with pytest.raises(UsageError, match="--overlay-count is 0, expected at least 1"):
        make(overlays=tmp_path, overlay_count=0)
    with pytest.raises(UsageError, match="--overlay-count has no meaning without --overlays"):
        make(overlay_count=3)


def test_predictions_are_those_that_were_scored(make: MakeTask, tmp_path: Path):
    draw = make().draw(0)
    net = draw.prepare(SmallNet()).model
    rows = list(draw.predictions(net, "query", tmp_path))
    assert len(rows) == 24
    assert {row["class"] for row in rows} == {"blue"}
    pictures = [row["picture"] for row in rows]
    assert pictures[:12] == sorted(path.name for path in tmp_path.iterdir())
    assert pictures[12:] == [None] * 12
    assert all(row["query"] not in row["supports"] for row in rows)
    mean = np.mean([row["iou"] for row in rows])
    assert mean == pytest.approx(draw.evaluate(net)["miou"], abs=0.15)
    assert mean > 0.1


# Several processes


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_shares_of_a_batch_weigh_as_much_as_their_pixels(make: MakeTask, augment: str):
    draw = make(shots=[2], augment=augment).draw(0)
    net = draw.prepare(SmallNet()).model.eval()
    batch = draw.batch(torch.arange(5), torch.Generator().manual_seed(0))
    parts = [draw.share(batch, slice(0, 3)), draw.share(batch, slice(3, 5))]
    assert [len(part["views"]) for part in parts] == [9, 6]
    terms = [draw.terms(part) for part in parts]
    assert sum(terms) == draw.terms(batch)
    with torch.no_grad():
        whole = draw.loss(net, batch) * sum(terms)
        losses = [draw.loss(net, part) * count for part, count in zip(parts, terms, strict=True)]
    torch.testing.assert_close(sum(losses), whole, rtol=1e-4, atol=1e-4)
