"""Features of backbones: the chain that is found, dilation, and what is computed once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from svftool.errors import ModelError, UsageError
from svftool.few_shot.backbones import (
    FeatureNames,
    adapt_backbone,
    default_names,
    dilate,
    features_of,
    frozen_stages,
    high_of,
    is_vgg16,
    parse_names,
    plan_features,
    run_stages,
)
from svftool.few_shot.dilation import DilatedAvgPool2d, strided_modules
from svftool.few_shot.encoder import Encoder, View
from svftool.few_shot.network import FewShotNet
from svftool.few_shot.pictures import ByteCache, Pictures
from svftool.few_shot.pool import ImageMaskPair
from svftool.few_shot.trace import watch
from svftool.models import Preprocessing
from svftool.tasks.options import FewShotOptions

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


def deepest(net: nn.Module, names: FeatureNames, images: Tensor) -> Tensor:
    plan = plan_features(net, names)
    with torch.no_grad():
        state = run_stages(net, plan, images, last=len(plan.stages))
    return features_of(state, plan).high


def require_same_where_it_was(net: nn.Module, names: FeatureNames) -> None:
    """Hold the features at stride 8 against those at 32, at the positions that both have."""
    images = torch.rand(1, 3, 97, 97)
    before = deepest(net, names, images)
    plan = dilate(net, names, 8)
    after = deepest(net, names, images)
    assert set(plan.strides.values()) == {8}
    assert after.shape[-1] >= 12
    assert after[..., ::4, ::4].shape == before.shape
    assert (after[..., ::4, ::4] - before).abs().max() < 1e-4 * before.std()


def lively(net: nn.Module) -> nn.Module:
    """Set what batch norms are left with, so that features are no constants."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            module.running_var.fill_(0.5)
    return net.eval()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "densenet121"])
def test_dilation_changes_nothing_at_the_positions_that_were_there(name: str):
    torch.manual_seed(0)
    net = lively(torchvision.models.get_model(name))
    require_same_where_it_was(net, default_names(net))


@pytest.mark.parametrize("name", ["resnet18d", "res2net50_26w_4s"])
def test_pooled_shortcuts_are_dilated_like_what_they_are_added_to(name: str):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = lively(timm.create_model(name))
    require_same_where_it_was(net, default_names(net))


class Residual(nn.Module):
    """A block that halves the resolution in ways that ImageNet's usual networks do not."""

    def __init__(self, pool: nn.Module, *body: nn.Module) -> None:
        super().__init__()
        self.body, self.pool = nn.Sequential(*body), pool

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.pool(x)


def staged(*stages: nn.Module) -> tuple[nn.Module, FeatureNames]:
    """Put stages from stride 8 on a stem, under the names 1, 2 and 3."""
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), nn.Conv2d(4, 4, 3, 2, 1))
    names = [str(i + 1) for i in range(len(stages))]
    return nn.Sequential(stem, *stages).eval(), FeatureNames(tuple(names[:2]), names[-1])


def test_every_kind_of_layer_sees_what_it_saw():
    torch.manual_seed(0)
    first = Residual(
        nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
        nn.Conv2d(4, 4, 1, 2),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect"),
    )
    second = Residual(nn.AvgPool2d(3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1))
    net, names = staged(nn.ReLU(), first, second)
    require_same_where_it_was(net, names)
    assert [layer.dilation for layer in first.body] == [(1, 1), (2, 2)]
    assert (first.pool.dilation, second.pool.dilation) == ((1, 1), (2, 2))
    assert [layer.dilation for layer in second.body] == [(2, 2), (4, 4)]


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2, 2, ceil_mode=True),
        nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d((3, 1), 2, (1, 0), divisor_override=2),
        nn.AvgPool2d(3, 2, ceil_mode=True),
    ],
    ids=lambda pool: pool.extra_repr(),
)
def test_an_average_pool_without_its_stride_counts_what_it_counted(pool: nn.AvgPool2d):
    maps = torch.randn(2, 3, 9, 9)
    dilated = DilatedAvgPool2d(pool)
    wanted = pool(maps)
    size = wanted.shape[-1]
    assert dilated(maps).shape == maps.shape
    torch.testing.assert_close(dilated(maps)[..., ::2, ::2][..., :size, :size], wanted)
    dilated.dilation = (2, 2)
    dilated.padding = (2 * dilated.padding[0], 2 * dilated.padding[1])
    fine = torch.randn(2, 3, 17, 17)
    torch.testing.assert_close(
        dilated(fine)[..., ::4, ::4][..., :size, :size], pool(fine[..., ::2, ::2])
    )


class Merging(nn.Module):
    """Takes every other position by a function, as Swin's patch merging does."""

    def __init__(self) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(x[..., ::2, ::2])


class PooledByFunction(nn.Module):
    """A strided convolution beside a pool that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + F.avg_pool2d(x, 2, ceil_mode=True)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            [nn.Conv2d(4, 4, 3, 2, 1), nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1))],
            r"^3\.1: MaxPool2d goes from stride 16 to 32, .* output stride of 8\. "
            r"Use --output-stride 32\.$",
        ),
        ([nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, 2, 1)], r"^2: MaxPool2d .* --output-stride 16\.$"),
        ([nn.Conv2d(4, 4, 3, 2, 1), Merging()], r"^3: Merging .* --output-stride 32\.$"),
        (
            [nn.ReLU(), PooledByFunction()],
            r"^Sequential: does not take .*, expected it to once .* --output-stride 16\.$",
        ),
    ],
    ids=["max pool", "the deepest", "function", "function beside"],
)
def test_what_loses_resolution_otherwise_is_refused(stages: list[nn.Module], message: str):
    net, names = staged(nn.ReLU(), *stages)
    with pytest.raises(ModelError, match=message):
        adapt_backbone(net, names)


class Attention(nn.Module):
    """A channel attention, a pool that is upsampled again, and a list of strided layers."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.coarse = nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(4, 4)
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)])

    def forward(self, x: Tensor) -> Tensor:
        around = F.interpolate(self.coarse(x), size=x.shape[-2:])
        x = self.squeeze(x).sigmoid() * (x + around)
        for layer in self.layers:
            x = layer(x)
        return x


def test_pools_that_are_not_the_way_through_a_stage_stay():
    net, names = staged(nn.ReLU(), Attention())
    assert strided_modules(net, "2", watch(net, names.all)) == ["2.layers.0"]
    assert set(adapt_backbone(net, names).strides.values()) == {8}
    assert net[2].coarse.stride == 4


def test_a_stride_that_dilation_does_not_reach_is_refused(net: SmallNet):
    with pytest.raises(
        ModelError, match=r"layer2 has stride 2 after dilation, expected 1\. Use --output-stride 2"
    ):
        adapt_backbone(net, NAMES, 1)


def test_a_stride_beyond_the_backbones_is_refused(net: SmallNet):
    with pytest.raises(ModelError, match=r"layer4 end at stride 16, expected .* stride of 32"):
        adapt_backbone(net, NAMES, 32)
    shallow = FeatureNames(("conv1", "layer1"), "layer1")
    assert dict(adapt_backbone(net, shallow).strides) == {"conv1": 2, "layer1": 4}


@pytest.mark.parametrize("stride", [0, -1, -8, 6, 12])
def test_an_output_stride_is_a_power_of_two(stride: int):
    with pytest.raises(UsageError, match=rf"--output-stride is {stride}, expected a power of two"):
        FewShotOptions(output_stride=stride)
    assert [FewShotOptions(output_stride=s).output_stride for s in (None, 1, 16)] == [None, 1, 16]


def unset(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a network without the seconds that drawing its weights takes."""
    with torch.device("meta"):
        net = make()
    return net.to_empty(device="cpu")


def test_vgg_is_cut_and_pooled_as_in_pfenet():
    net = unset(torchvision.models.vgg16_bn)
    names = default_names(net)
    assert names == FeatureNames(("features.23", "features.33"), "features.42", "features.13")
    plan = adapt_backbone(net, names)
    assert plan.middle_channels == 768
    assert plan.trained[0] == "features.14"
    assert plan.strides["features.33"] == 16
    assert all(m.ceil_mode for m in net.modules() if isinstance(m, nn.MaxPool2d))
    assert {m.dilation for m in net.modules() if isinstance(m, nn.Conv2d)} == {(1, 1)}
    with pytest.raises(ModelError, match=r"^features\.33: MaxPool2d .* --output-stride 16\.$"):
        adapt_backbone(net, names, 8)


def test_timms_vgg_is_cut_like_torchvisions():
    timm = pytest.importorskip("timm")
    net = unset(lambda: timm.create_model("vgg16_bn", features_only=True))
    names = default_names(net)
    assert names == FeatureNames(("features_23", "features_33"), "features_42", "features_13")
    plan = adapt_backbone(net, names)
    assert list(plan.strides.values()) == [8, 16, 16]
    assert not is_vgg16(unset(torchvision.models.vgg19_bn))


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
    with pytest.raises(UsageError, match="1 name, expected two or three"):
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
def pairs(tmp_path: Path) -> list[ImageMaskPair]:
    made = []
    for index in range(3):
        random = np.random.default_rng(index)
        image, mask = tmp_path / f"{index}.jpg", tmp_path / f"{index}.png"
        Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(image)
        half = np.zeros((40, 60), np.uint8)
        half[:, index * 10 : index * 10 + 25] = 255
        Image.fromarray(half).save(mask)
        made.append(ImageMaskPair(image, mask, (1,), (1,), 1, str(image)))
    return made


def encoder_of(net: nn.Module, *, training: bool, capacity: int = 1 << 30) -> Encoder:
    plan = plan_features(net, NAMES)
    whole = FewShotNet(net, plan, nn.Identity())
    return Encoder(whole, Pictures(65), Preprocessing(), training=training, capacity=capacity)


@pytest.mark.parametrize("trained", ["none", "layer1", "layer3", "conv1"])
def test_kept_features_are_those_of_a_whole_pass(
    net: SmallNet, pairs: list[ImageMaskPair], trained: str
):
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


def test_frozen_stages_run_once_a_picture(net: SmallNet, pairs: list[ImageMaskPair]):
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
    net: SmallNet, pairs: list[ImageMaskPair]
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


def test_a_full_cache_drops_the_oldest_and_stays_right(net: SmallNet, pairs: list[ImageMaskPair]):
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
