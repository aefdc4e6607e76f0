"""The papers' networks, their published rows, and the table that stands beside them."""

from __future__ import annotations

import io
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from shapes import SmallNet, write_shapes
from torch import nn

from svftool.errors import ModelError, UsageError
from svftool.few_shot.backbones import (
    FeatureNames,
    adapt_backbone,
    default_names,
)
from svftool.few_shot.task import few_shot_tasks
from svftool.report import few_shot
from svftool.report.finetune import document, view
from svftool.report.published import _PERCENT, published_rows
from svftool.stages.finetune import FinetuneResult
from svftool.tasks.base import TaskMetric
from svftool.training import Run, summarise
from svftool.training.loop import Outcome

torchvision = pytest.importorskip("torchvision")
from svftool.few_shot.paper_networks import (  # noqa: E402
    DeepStemResNet,
    PspNet,
    backbone_name,
    own_base_learner,
    pspnet_resnet50_pascal,
    pspnet_vgg16_coco,
    resnet50_deep,
)


def test_the_deep_stem_has_the_names_of_the_papers_weight_files():
    net = resnet50_deep()
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert shapes["conv1.weight"] == (64, 3, 3, 3)
    assert shapes["conv2.weight"] == (64, 64, 3, 3)
    assert shapes["conv3.weight"] == (128, 64, 3, 3)
    assert shapes["bn3.running_var"] == (128,)
    assert shapes["layer1.0.conv1.weight"] == (64, 128, 1, 1)
    assert shapes["layer1.0.downsample.0.weight"] == (256, 128, 1, 1)
    plain = torchvision.models.resnet50().state_dict()
    others = {
        n for n in shapes if not n.startswith(("conv", "bn", "layer1.0.conv1", "layer1.0.down"))
    }
    assert all(shapes[name] == tuple(plain[name].shape) for name in others)
    assert len(others) > 250


def test_the_deep_stem_is_dilated_and_named_like_any_resnet():
    net = resnet50_deep().eval()
    plan = adapt_backbone(net, default_names(net))
    assert plan.trained == ("layer2", "layer3", "layer4")
    assert set(plan.strides.values()) == {8}
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 65, 65)).shape == (1, 1000)
    assert backbone_name(net) == "ResNet-50"


def test_bams_base_networks_have_the_names_of_their_files():
    for net, classes, last in (
        (pspnet_resnet50_pascal(), 16, 2048),
        (pspnet_vgg16_coco(), 61, 512),
    ):
        names = set(net.state_dict())
        assert {"layer0.0.weight", "encoder.0.0.weight", "encoder.4.0.conv1.weight"} <= names or (
            "encoder.4.0.weight" in names
        )
        assert net.state_dict()["cls.4.weight"].shape == (classes, 512, 1, 1)
        assert net.state_dict()["ppm.features.0.1.weight"].shape == (last // 4, last, 1, 1)
        learner = own_base_learner(net)
        assert learner is not None
        assert learner.cls[4] is net.cls[4]
        assert net.encoder[2] is net.layer2
    assert own_base_learner(torchvision.models.resnet18()) is None


def test_bams_resnet_is_dilated_as_it_was_trained():
    net = pspnet_resnet50_pascal()
    plan = adapt_backbone(net, default_names(net))
    assert dict(plan.strides) == {"layer2": 8, "layer3": 8, "layer4": 8}
    # BAM sets every conv2 of a stage, the first block's too; dilate() would give it half.
    for stage, dilation in ((net.layer1, 1), (net.layer2, 1), (net.layer3, 2), (net.layer4, 4)):
        seconds = [conv for name, conv in stage.named_modules() if name.endswith("conv2")]
        assert {conv.dilation for conv in seconds} == {(dilation, dilation)}
        assert {conv.padding for conv in seconds} == {(dilation, dilation)}
    strided = [
        name
        for name, conv in net.named_modules()
        if isinstance(conv, nn.Conv2d) and conv.stride != (1, 1)
    ]
    assert strided == ["layer0.0", "layer2.0.conv2", "layer2.0.downsample.0"]
    with pytest.raises(ModelError, match=r"PspNet: .* end at stride 8, expected .* stride of 16"):
        adapt_backbone(net, default_names(net), 16)


def test_bams_vgg_keeps_its_stride_and_is_not_dilated():
    net = pspnet_vgg16_coco()
    plan = adapt_backbone(net, default_names(net))
    assert plan.names == FeatureNames(("layer2", "layer3"), "layer4", "layer1")
    assert dict(plan.strides) == {"layer2": 8, "layer3": 16, "layer4": 16}
    assert plan.middle_channels == 768
    body = net.encoder.modules()
    convs = [layer for layer in body if isinstance(layer, nn.Conv2d)]
    assert len(convs) == 13
    assert {(conv.stride, conv.dilation, conv.padding) for conv in convs} == {
        ((1, 1), (1, 1), (1, 1))
    }
    pools = [layer for layer in net.encoder.modules() if isinstance(layer, nn.MaxPool2d)]
    assert [(pool.kernel_size, pool.stride, pool.ceil_mode) for pool in pools] == [(2, 2, True)] * 4


# One checkpoint a fold


def small_base_network(classes: int) -> PspNet:
    stages: list[nn.Module] = [nn.Conv2d(3, 8, 3, 2, 1)]
    stages += [nn.Conv2d(8, 8, 3, stride, 1) for stride in (2, 2, 1, 1)]
    return PspNet(stages, 8, classes)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.mark.parametrize("host", ["baseline", "bam"])
def test_a_base_network_is_not_tested_on_classes_that_it_was_trained_on(shapes: Path, host: str):
    several = few_shot_tasks(shapes, folds=[0, 2], image_size=65, host=host)
    for task in several:
        with pytest.raises(UsageError, match=r"^--fold 0,2: .* Run --fold N with the weights of"):
            task.draw(0).prepare(small_base_network(3))
        task.meet(resnet50_deep())  # one of ImageNet serves every fold
    inner = few_shot_tasks(shapes, folds=[0], inner=2, image_size=65, host=host)[0]
    with pytest.raises(UsageError, match=r"^--inner-fold 2: .* Leave --inner-fold out"):
        inner.draw(0).prepare(small_base_network(2))


def test_one_fold_of_a_base_network_is_told_with_the_result(shapes: Path):
    task = few_shot_tasks(shapes, folds=[2], image_size=65)[0]
    assert task.describe()["base_network_fold"] is None
    task.draw(0).prepare(small_base_network(3))
    assert task.describe()["base_network_fold"] == 2
    told = few_shot.rules(result_of([run_of("svf", 0, 2, 0.5)], **task.describe()))
    assert "; weights taken to be those of fold 2's base network" in told
    task.draw(0).prepare(SmallNet())
    assert task.describe()["base_network_fold"] is None
    assert "base network" not in few_shot.rules(result_of([], **task.describe()))


# Names


def test_backbones_are_named_as_in_the_tables():
    names = {
        "resnet50": "ResNet-50",
        "resnet101": "ResNet-101",
        "vgg16_bn": "VGG-16",
        "resnet34": None,  # the same depths, without bottlenecks
        "resnet18": None,
        "wide_resnet50_2": None,  # wider bottlenecks
        "resnext50_32x4d": None,  # in groups
        "vgg19_bn": None,
    }
    with torch.device("meta"):  # the names go by the modules alone
        assert {n: backbone_name(torchvision.models.get_model(n)) for n in names} == names
        assert backbone_name(pspnet_vgg16_coco()) == "VGG-16"
        assert backbone_name(pspnet_resnet50_pascal()) == "ResNet-50"
    assert backbone_name(nn.Linear(2, 2)) is None
    assert isinstance(resnet50_deep(), DeepStemResNet)


def test_variants_of_resnet_are_not_named_like_it():
    timm = pytest.importorskip("timm")
    names = {
        "resnet50": "ResNet-50",
        "resnet50d": None,  # pooled shortcuts
        "seresnet50": None,  # attention by convolutions
        "ecaresnet50t": None,  # attention without
        "resnetaa50": None,  # pools before strides
        "res2net50_26w_4s": None,  # split bottlenecks
    }
    with torch.device("meta"):
        assert {name: backbone_name(timm.create_model(name)) for name in names} == names


# Published rows


def test_published_means_are_those_of_their_folds():
    assert len(_PERCENT) == 24
    for rows in _PERCENT.values():
        for *folds, mean in rows:
            assert sum(folds) / 4 == pytest.approx(mean, abs=0.0101)


def test_rows_are_found_by_data_set_backbone_shots_and_host():
    frozen, tuned = published_rows("pascal-5i", "ResNet-50", 1, "pfenet")
    assert (frozen.method, tuned.method) == ("PFENet", "PFENet + SVF")
    assert tuned.folds == pytest.approx((0.6927, 0.7355, 0.6749, 0.6230))
    assert tuned.mean == pytest.approx(0.6815)
    assert published_rows("pascal-5i pairs", "ResNet-50", 1, "pfenet") == ()
    assert published_rows("pascal-5i", None, 1, "pfenet") == ()
    assert published_rows("coco-20i", "ResNet-50", 3, "bam") == ()


# The table


def run_of(regime: str, seed: int, fold: int, miou: float, *, shots: int = 1) -> Run:
    outcome = Outcome("finished", 10, 10, 1.0, 0.5, 3.0, 0.3)
    metrics = {"miou": miou, "fb_iou": 0.7, "base_miou": 0.6, "base_fb_iou": 0.8}
    before = dict.fromkeys(metrics, 0.25)
    return Run(
        regime, seed, shots, {"fold": fold}, before, metrics, 1234, outcome, 5.0, None, miou < 0.25
    )


def result_of(runs: list[Run], **setting: object) -> FinetuneResult:
    return FinetuneResult(
        output=Path("out"),
        task="few-shot-segmentation",
        metric="miou",
        runs=tuple(runs),
        summary=tuple(summarise(runs, TaskMetric("miou", higher_is_better=True))),
        interrupted=None,
        setting={
            "dataset": "pascal-5i",
            "host": "baseline",
            "start": "blank",
            "inner_fold": None,
            "backbone": "ResNet-50",
            "image_size": 473,
            "test_episodes": 1000,
            "select_on": "base",
            "images_with_novel_classes": 20,
            "removed_images_with_novel_classes": True,
        }
        | setting,
    )


def text_of(result: FinetuneResult) -> str:
    stream = io.StringIO()
    Console(width=200, file=stream).print(view(result))
    return stream.getvalue()


def runs_of_two_seeds() -> list[Run]:
    values = {"head": (0.60, 0.62), "svf": (0.64, 0.68)}
    return [
        run_of(regime, seed, fold, values[regime][seed] + fold / 100)
        for seed in (0, 1)
        for fold in range(4)
        for regime in ("head", "svf")
    ]


def test_summaries_give_each_fold_and_their_mean_with_the_seeds_interval():
    summaries = summarise(runs_of_two_seeds(), TaskMetric("miou", higher_is_better=True))
    assert [(s.regime, s.facts["fold"]) for s in summaries] == [
        *((regime, fold) for fold in range(4) for regime in ("head", "svf")),
        ("head", None),
        ("svf", None),
    ]
    svf = summaries[-1]
    assert svf.mean == pytest.approx(0.675)
    assert svf.seeds == 2
    assert svf.ci95 is not None
    low, high = svf.ci95
    assert (low + high) / 2 == pytest.approx(0.675)
    # Two seeds' means of 0.655 and 0.695: t(0.975, 1) = 12.706 times 0.02.
    assert high - low == pytest.approx(2 * 12.7062 * 0.02, rel=1e-3)


def test_a_seed_that_missed_a_fold_is_left_out_of_the_mean():
    runs = [run for run in runs_of_two_seeds() if not (run.seed == 1 and run.facts["fold"] == 3)]
    means = [s for s in summarise(runs, TaskMetric("miou", True)) if s.facts["fold"] is None]
    assert [(s.regime, s.seeds) for s in means] == [("head", 1), ("svf", 1)]
    assert means[1].mean == pytest.approx(0.655)


def test_the_table_stands_beside_the_published_rows_of_the_setting():
    text = text_of(result_of(runs_of_two_seeds()))
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line}
    assert lines["svf"][1:6] == ["66.00", "67.00", "68.00", "69.00", "67.50"]
    assert lines["nearest prototype"][2:7] == ["25.00"] * 5
    assert lines["published: baseline + SVF"][4:9] == ["67.42", "71.57", "67.99", "61.57", "67.14"]
    assert "1-shot mIoU, % (2 seeds)" in text
    assert "chosen on held-out images of base classes" in text
    assert "novel classes removed" in text
    other = text_of(result_of(runs_of_two_seeds(), backbone=None, select_on="novel"))
    assert "published" not in other
    assert "chosen on NOVEL classes" in other


def test_other_test_classes_and_another_host_have_no_published_row():
    inner = text_of(result_of(runs_of_two_seeds(), inner_fold=2))
    assert "published" not in inner
    assert "1000 test episodes a fold and seed, on the classes of inner fold 2 in place of" in inner
    nearest = text_of(result_of(runs_of_two_seeds(), start="nearest"))
    assert "published" not in nearest
    assert "baseline host from the nearest prototype" in nearest
    assert "published: PFENet" in text_of(result_of(runs_of_two_seeds(), host="pfenet", start=None))


@pytest.mark.parametrize(
    ("found", "removed", "said"),
    [
        (0, False, "; none of the training images holds novel classes"),
        (0, True, "; none of the training images holds novel classes"),
        (20, False, "; training images that hold novel classes kept"),
        (20, True, "; training images that hold novel classes removed"),
    ],
)
def test_the_rules_say_what_became_of_images_with_novel_classes(
    found: int, removed: bool, said: str
):
    setting = {"images_with_novel_classes": found, "removed_images_with_novel_classes": removed}
    assert few_shot.rules(result_of(runs_of_two_seeds(), **setting)).endswith(said)


def test_one_fold_and_several_shots_have_tables_too():
    runs = [run_of("svf", 0, 2, 0.5), run_of("svf", 0, 2, 0.6, shots=5)]
    text = text_of(result_of(runs))
    assert "1-shot mIoU" in text
    assert "5-shot mIoU" in text
    assert few_shot.rules(result_of(runs)).startswith("pascal-5i, baseline host, 473 px")


def test_the_document_names_folds_and_the_setting():
    result = result_of(runs_of_two_seeds())
    told = document(result)
    assert told["setting"]["select_on"] == "base"
    assert {run["fold"] for run in told["runs"]} == {0, 1, 2, 3}
    assert told["runs"][0]["metrics"]["after"]["base_miou"] == 0.6
    assert told["summary"][-1]["fold"] is None
    assert told["summary"][-1]["ci95"][0] < told["summary"][-1]["mean"]
    assert told["interrupted"] is None
    assert signal.Signals.SIGINT.name not in str(told)
