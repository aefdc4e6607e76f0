"""Features of backbones: the chain that is found, dilation, and what is computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from svftool.errors import ModelError, UsageError
from svftool.models import Preprocessing
from svftool.tasks.few_shot_segmentation.backbones import (
    FeatureNames,
    adapt_backbone,
    default_names,
    dilate,
    features_of,
    frozen_stages,
    high_of,
    parse_names,
    plan_features,
    run_stages,
)
from svftool.tasks.few_shot_segmentation.encoding import Encoder
from svftool.tasks.few_shot_segmentation.kept import View
from svftool.tasks.few_shot_segmentation.network import FewShotNet
from svftool.tasks.few_shot_segmentation.pictures import ByteCache, Pictures
from svftool.tasks.few_shot_segmentation.pool import Pair

torchvision = pytest.importorskip("torchvision")


class SmallNet(nn.Module):
    """A stem with functional parts, three stages and a classifier, as ResNets are written."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.layer1 = nn.Conv2d(8, 8, 3, 2, 1)
        self.layer2 = nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Conv2d(12, 16, 3, 2, 1), nn.ReLU())
        self.layer4 = nn.Sequential(nn.Conv2d(16, 20, 3, 1, 1), nn.ReLU())
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.conv1(x))))
        return self.fc(self.layer4(self.layer3(x)).mean((2, 3)))


class Branched(SmallNet):
    """The same, but a function between the stages breaks their chain."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.conv1(x))))
        return self.fc(self.layer4(self.layer3(x * 2)).mean((2, 3)))


@pytest.fixture
def net() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet().eval()


NAMES = FeatureNames(("layer2", "layer3"), "layer4", "layer1")


def test_the_chain_of_stages_is_found_by_watching(net: SmallNet):
    plan = plan_features(net, default_names(net))
    assert plan.names == NAMES
    assert plan.stages == ("", "layer1", "layer2", "layer3", "layer4")
    assert plan.stem == ("conv1",)
    assert dict(plan.channels) == {"layer2": 12, "layer3": 16, "layer4": 20}
    assert dict(plan.strides) == {"layer2": 8, "layer3": 16, "layer4": 16}
    assert plan.trained == ("layer2", "layer3", "layer4")
    assert plan_features(net, parse_names("layer3,layer4")).trained == ("layer3", "layer4")
    assert net.training is False
    assert not net._forward_hooks


def test_stages_give_what_the_whole_network_gives_from_wherever_they_start(net: SmallNet):
    plan = plan_features(net, NAMES)
    images = torch.randn(2, 3, 65, 65)
    two = net.layer2(net.layer1(F.relu(net.conv1(images))))
    three = net.layer3(two)
    four = net.layer4(three)
    for first in range(1, 6):
        state = run_stages(net, plan, images, last=first)
        features = features_of(run_stages(net, plan, state, first=first, last=5), plan)
        assert torch.equal(features.high, four)
        assert torch.equal(features.deep, three)
        assert torch.equal(features.low, two)
        small = F.interpolate(two, size=three.shape[-2:], mode="bilinear", align_corners=True)
        assert torch.equal(features.middle, torch.cat([three, small], 1))


def test_the_last_stages_run_again_on_a_masked_map(net: SmallNet):
    plan = plan_features(net, NAMES)
    deep = torch.randn(2, 16, 5, 5)
    assert torch.equal(high_of(net, plan, deep), net.layer4(deep))
    shallow = plan_features(net, FeatureNames(("layer2", "layer3"), "layer3"))
    assert torch.equal(high_of(net, shallow, deep), deep)


def test_modules_that_are_no_chain_still_give_their_features():
    torch.manual_seed(0)
    net = Branched().eval()
    plan = plan_features(net, NAMES)
    assert plan.stages == ("", "layer3", "layer4") or plan.stages == ("",)
    assert not plan.repeats_high or plan.stages != ("",)
    images = torch.randn(1, 3, 65, 65)
    features = features_of(run_stages(net, plan, images, last=len(plan.stages)), plan)
    two = net.layer2(net.layer1(F.relu(net.conv1(images))))
    assert torch.equal(features.low, two)
    assert torch.equal(features.high, net.layer4(net.layer3(two * 2)))


def test_frozen_stages_end_at_the_first_trained_parameter(net: SmallNet):
    plan = plan_features(net, NAMES)
    counts = {}
    for name in ("conv1", "layer1", "layer2", "layer3", "layer4", "fc"):
        net.requires_grad_(False)
        net.get_submodule(name).requires_grad_(True)
        counts[name] = frozen_stages(net, plan)
    assert counts == {"conv1": 0, "layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4, "fc": 5}


def test_the_papers_resnet_is_dilated_to_stride_8():
    net = torchvision.models.resnet50()
    plan = adapt_backbone(net, default_names(net))
    assert dict(plan.strides) == {"layer2": 8, "layer3": 8, "layer4": 8}
    for stage, first, dilation in ((net.layer3, 1, 2), (net.layer4, 2, 4)):
        for name, layer in stage.named_modules():
            if isinstance(layer, nn.Conv2d):
                wanted = (first if name == "0.conv2" else dilation) if "conv2" in name else 1
                assert layer.stride == (1, 1)
                assert layer.dilation == (wanted, wanted)
                assert layer.padding == ((wanted, wanted) if "conv2" in name else (0, 0))
    assert net.layer2[0].conv2.stride == (2, 2)
    assert plan.middle_channels == 1536


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_dilation_changes_nothing_at_the_positions_that_were_there(name: str):
    torch.manual_seed(0)
    net = torchvision.models.get_model(name).eval()
    for module in net.modules():  # so that the features are no constants
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.5)
    names = default_names(net)
    images = torch.rand(1, 3, 97, 97)

    def deepest() -> Tensor:
        plan = plan_features(net, names)
        with torch.no_grad():
            state = run_stages(net, plan, images, last=len(plan.stages))
        return features_of(state, plan).high

    before = deepest()
    dilate(net, names, 8)
    after = deepest()
    assert before.shape[-1] == 4
    assert after.shape[-1] == 13
    assert (after[..., ::4, ::4] - before).abs().max() < 1e-4 * before.abs().max()


def test_vgg_is_cut_and_pooled_as_in_pfenet():
    net = torchvision.models.vgg16_bn()
    names = default_names(net)
    assert names == FeatureNames(("features.23", "features.33"), "features.42", "features.13")
    plan = adapt_backbone(net, names)
    assert plan.middle_channels == 768
    assert plan.trained[0] == "features.14"
    assert plan.strides["features.33"] == 16
    assert all(m.ceil_mode for m in net.modules() if isinstance(m, nn.MaxPool2d))


def test_the_small_real_backbones_have_features(data: Path):
    from svftool.models.build import _call_factory

    names = {}
    for factory in ("resnet18_to_layer3", "mobilenet_v2_035"):
        net = _call_factory(str(data / "models.py"), factory)
        names[factory] = default_names(net)
        plan = adapt_backbone(net, names[factory])
        assert set(plan.strides.values()) == {8}
    assert names["resnet18_to_layer3"] == FeatureNames(("layer2", "layer3"), "layer3", "layer1")
    assert names["mobilenet_v2_035"] == FeatureNames(
        ("features.6", "features.13"), "features.18", "features.3"
    )


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "regnety_002"])
def test_timm_networks_say_themselves_where_their_features_are(name: str):
    timm = pytest.importorskip("timm")
    for features_only in (False, True):
        net = timm.create_model(name, features_only=features_only)
        plan = plan_features(net, default_names(net))
        assert [plan.strides[n] for n in plan.names.all] == [8, 16, 32]
        assert len(plan.stages) > 3


def test_maps_with_channels_last_are_turned():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("mambaout_femto").eval()
    plan = plan_features(net, default_names(net))
    assert plan.channels_last
    with torch.no_grad():
        state = run_stages(net, plan, torch.randn(1, 3, 129, 129), last=len(plan.stages))
        features = features_of(state, plan)
        again = high_of(net, plan, features.deep)
    assert features.middle.shape == (1, 192 + 96, 9, 9)
    torch.testing.assert_close(again, features.high)


def test_names_that_do_not_exist_are_shown_beside_those_that_do(net: SmallNet):
    with pytest.raises(ModelError, match=r"no module layer7, expected some of: .*layer2"):
        plan_features(net, FeatureNames(("layer2", "layer7"), "layer7"))
    with pytest.raises(ModelError, match=r"fc gives \(1, 5\), expected a feature map"):
        plan_features(net, FeatureNames(("layer2", "layer3"), "fc"))
    with pytest.raises(UsageError, match="1 names, expected two or three"):
        parse_names("layer2")
    assert parse_names("a, b") == FeatureNames(("a", "b"), "b")
    assert parse_names("a,b,c") == FeatureNames(("a", "b"), "c")


def test_a_stride_that_no_stage_ends_at_is_refused():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, 4, 1), nn.Conv2d(4, 4, 3, 4, 1), nn.Conv2d(4, 4, 3, 1, 1)
    )
    with pytest.raises(ModelError, match=r"1: goes from stride 4 to 16, expected .* ends at 8"):
        dilate(net, FeatureNames(("0", "1"), "2"), 8)


def test_a_network_without_known_features_asks_for_names():
    with pytest.raises(ModelError, match="Name modules with --features"):
        default_names(nn.Sequential(nn.Conv2d(3, 4, 3)))


# What is computed once


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    made = []
    for index in range(3):
        random = np.random.default_rng(index)
        image, mask = tmp_path / f"{index}.jpg", tmp_path / f"{index}.png"
        Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(image)
        half = np.zeros((40, 60), np.uint8)
        half[:, index * 10 : index * 10 + 25] = 255
        Image.fromarray(half).save(mask)
        made.append(Pair(image, mask, (1,), (1,), 1, str(image)))
    return made


def encoder_of(net: nn.Module, *, training: bool, capacity: int = 1 << 30) -> Encoder:
    plan = plan_features(net, NAMES)
    whole = FewShotNet(net, plan, nn.Identity())
    return Encoder(whole, Pictures(65), Preprocessing(), training=training, capacity=capacity)


@pytest.mark.parametrize("trained", ["none", "layer1", "layer3", "conv1"])
def test_kept_features_are_those_of_a_whole_pass(net: SmallNet, pairs: list[Pair], trained: str):
    net.requires_grad_(False)
    if trained != "none":
        net.get_submodule(trained).requires_grad_(True)
    encoder = encoder_of(net, training=True)
    views = [View(pairs[0], 1), View(pairs[1], 1, True), View(pairs[0], 1, True), View(pairs[0], 1)]
    for _ in range(2):  # the second time from what was kept
        features = encoder.features(views)
        plan = encoder.net.plan
        whole = features_of(run_stages(net, plan, encoder.images(views), last=5), plan)
        torch.testing.assert_close(features.middle, whole.middle)
        torch.testing.assert_close(features.high, whole.high)
    assert features.high.requires_grad == (trained != "none")
    mirrored = encoder.images(views[2:3])[0, :, :40, :64]
    torch.testing.assert_close(mirrored, encoder.images(views[:1])[0, :, :40, :64].flip(2))


def test_frozen_stages_run_once_a_picture(net: SmallNet, pairs: list[Pair]):
    net.requires_grad_(False)
    net.layer3.requires_grad_(True)
    calls = {"layer1": 0, "layer3": 0}
    for name in calls:
        net.get_submodule(name).register_forward_hook(
            lambda module, given, output, name=name: calls.__setitem__(
                name, calls[name] + len(output)
            )
        )
    encoder = encoder_of(net, training=True)
    calls.update(layer1=0, layer3=0)
    for _ in range(3):
        encoder.features([View(pair, 1) for pair in pairs])
    assert calls == {"layer1": 3, "layer3": 9}


def test_high_features_through_a_mask_are_kept_where_nothing_is_trained(
    net: SmallNet, pairs: list[Pair]
):
    net.requires_grad_(False)
    encoder = encoder_of(net, training=False)
    views = [View(pair, 1) for pair in pairs]
    masks = torch.stack([encoder._pictures.mask(pair, 1) for pair in pairs])
    features = encoder.features(views)
    small = encoder.net.small_masks(masks, features)
    wanted = net.layer4(features.deep * small[:, None])
    first = encoder.shown(views[:2], features, masks[:2])
    again = encoder.shown(views, features, masks)
    assert first is not None
    assert again is not None
    torch.testing.assert_close(first, wanted[:2])
    torch.testing.assert_close(again, wanted)
    net.layer4.requires_grad_(True)
    assert encoder_of(net, training=True).shown(views, features, masks) is None


def test_a_full_cache_drops_the_oldest_and_stays_right(net: SmallNet, pairs: list[Pair]):
    net.requires_grad_(False)
    views = [View(pair, 1) for pair in pairs]
    wanted = encoder_of(net, training=False).features(views).middle
    tight = encoder_of(net, training=False, capacity=1)
    torch.testing.assert_close(tight.features(views).middle, wanted)
    cache: ByteCache[Tensor] = ByteCache(20, lambda value: value.nbytes)
    for key in range(3):
        cache.put(key, torch.zeros(2))
    assert (0 in cache, 1 in cache, 2 in cache, len(cache)) == (False, True, True, 2)
    cache.find(1)
    cache.put(3, torch.zeros(2))
    assert (1 in cache, 2 in cache) == (True, False)
