"""The three hosts by hand-made cases: prototypes, priors, shots, scales, base classes, losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svftool.few_shot.backbones import Features, resized
from svftool.few_shot.hosts import (
    BAM,
    BaseLearner,
    Baseline,
    EpisodeFeatures,
    HostName,
    HostOutput,
    Nearest,
    PFENet,
    make_host,
)
from svftool.few_shot.hosts.bam import other_classes, scene_distances
from svftool.few_shot.hosts.parts import (
    gram,
    mask_loss,
    masked_mean,
    prior_masks,
    prior_of,
)

CHANNELS, SIDE = 6, 8


def episodes_of(shots: int, batch: int = 2, *, seed: int = 0, base: int = 0) -> EpisodeFeatures:
    generator = torch.Generator().manual_seed(seed)

    def maps(*shape: int) -> Tensor:
        return torch.rand(*shape, SIDE, SIDE, generator=generator)

    query = Features(maps(batch, CHANNELS), maps(batch, 5), maps(batch, 4), maps(batch, 4))
    return EpisodeFeatures(
        query,
        maps(batch, shots, CHANNELS),
        maps(batch, shots, 4),
        maps(batch, shots, 5),
        (maps(batch, shots) > 0.5).float(),
        maps(batch, base + 1).softmax(1) if base else None,
        torch.tensor([-1] * batch) if base else None,
    )


def take_shots(episodes: EpisodeFeatures, *places: int) -> EpisodeFeatures:
    chosen = list(places)
    return EpisodeFeatures(
        episodes.query,
        episodes.middle[:, chosen],
        episodes.low[:, chosen],
        episodes.high[:, chosen],
        episodes.masks[:, chosen],
        episodes.base,
        episodes.own,
    )


@pytest.fixture(params=["baseline", "pfenet", "bam"])
def host(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return make_host(request.param, CHANNELS, width=8, shots=2).eval()


# Parts


def test_a_prototype_is_the_mean_under_the_mask():
    features = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]])
    masks = torch.tensor([[1.0, 0.0], [0.5, 0.0]])
    wanted = torch.tensor([2.5, 25.0]) / (1.5 + 5e-4)
    torch.testing.assert_close(masked_mean(features, masks), wanted)
    empty = masked_mean(features, torch.zeros(2, 2))
    torch.testing.assert_close(empty, torch.zeros(2))


def test_the_prior_is_the_largest_cosine_stretched_over_the_query():
    # Query positions: along x, along y, between them, opposite to x.
    query = torch.tensor([[[[2.0, 0.0], [3.0, -1.0]], [[0.0, 5.0], [3.0, 0.0]]]])
    support = torch.tensor([[[[7.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]]])[:, None]
    only_x = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    cosines = torch.tensor([1.0, 0.0, 0.5**0.5, 0.0])  # an empty position is nearer than -1
    prior = prior_masks(query, support, only_x)
    torch.testing.assert_close(prior.flatten(), cosines, atol=1e-6, rtol=0)
    both = prior_masks(query, support, torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]]))
    torch.testing.assert_close(
        both.flatten(), torch.tensor([1.0, 1.0, 0.5**0.5, 0.0]), atol=1e-6, rtol=0
    )


def test_priors_are_between_0_and_1_for_each_support_alone():
    episodes = episodes_of(3)
    prior = prior_masks(episodes.query.high, episodes.high, episodes.masks)
    assert prior.shape == (2, 3, SIDE, SIDE)
    assert (prior.amin((2, 3)) == 0).all()
    torch.testing.assert_close(prior.amax((2, 3)), torch.ones(2, 3))


def test_the_loss_leaves_out_ignored_pixels_and_weighs_the_rest_alike():
    logits = torch.randn(2, 2, 4, 4)
    target = torch.randint(0, 2, (2, 4, 4), dtype=torch.uint8)
    target[0, :, 2:] = 255
    wanted = F.cross_entropy(logits, target.long(), ignore_index=255)
    torch.testing.assert_close(mask_loss(logits, target), wanted)
    assert mask_loss(logits, torch.full_like(target, 255)) == 0
    whole = HostOutput(logits, [(0.25, logits * 2), (0.5, logits * 3)]).loss(target)
    parts = [F.cross_entropy(logits * k, target.long(), ignore_index=255) for k in (1, 2, 3)]
    torch.testing.assert_close(whole, parts[0] + 0.25 * parts[1] + 0.5 * parts[2])


# Every host


def test_the_same_support_twice_says_no_more_than_once(host: nn.Module):
    episodes = episodes_of(1, base=3)
    once = host(episodes).logits
    torch.testing.assert_close(host(take_shots(episodes, 0, 0)).logits, once)


def test_the_order_of_supports_does_not_matter(host: nn.Module):
    episodes = episodes_of(2, base=3)
    torch.testing.assert_close(
        host(take_shots(episodes, 1, 0)).logits, host(episodes).logits, atol=1e-5, rtol=1e-4
    )


def test_every_parameter_of_a_host_is_trained(host: nn.Module):
    host.train()
    target = torch.randint(0, 2, (2, SIDE, SIDE), dtype=torch.uint8)
    host(episodes_of(2, base=3)).loss(target).backward()
    without = [name for name, p in host.named_parameters() if p.grad is None]
    assert without == []


def test_hosts_learn_to_follow_the_prior(host: nn.Module):
    """A support that looks like one half of the query: the host must learn to mark that half."""
    host.train()
    torch.manual_seed(1)
    optimiser = torch.optim.Adam(host.parameters(), lr=1e-2)
    target = torch.zeros(2, SIDE, SIDE, dtype=torch.uint8)
    target[0, :, :4] = 1
    target[1, 4:] = 1
    episodes = episodes_of(1)
    marked = target.float()[:, None]
    likeness = torch.cat([marked, 1 - marked], 1)
    query = Features(episodes.query.middle, likeness, episodes.query.low, episodes.query.deep)
    high = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1, 1).expand(2, 1, 2, SIDE, SIDE)
    for _ in range(60):
        loss = host(
            EpisodeFeatures(query, episodes.middle, episodes.low, high, episodes.masks)
        ).loss(target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    host.eval()
    found = host(
        EpisodeFeatures(query, episodes.middle, episodes.low, high, episodes.masks)
    ).logits.argmax(1)
    assert (found == target).float().mean() > 0.9


# Baseline and PFENet


@pytest.mark.parametrize("kind", [Baseline, PFENet])
def test_prototypes_and_priors_of_several_supports_are_averaged(kind: type[nn.Module]):
    torch.manual_seed(0)
    host = kind(CHANNELS, 8).eval()
    seen: list[tuple[Tensor, ...]] = []
    merge = host.merge if isinstance(host, Baseline) else host.scales[0].merge
    merge.register_forward_pre_hook(lambda module, given: seen.append(given))
    episodes = episodes_of(3)
    host(episodes)
    for place in range(3):
        host(take_shots(episodes, place))
    (_, together, prior), *apart = seen
    mean = torch.stack([prototype for _, prototype, _ in apart]).mean(0)
    torch.testing.assert_close(together, mean)
    torch.testing.assert_close(prior, torch.stack([p for _, _, p in apart]).mean(0))


def test_pfenet_enriches_at_the_papers_four_scales():
    host = PFENet(CHANNELS, 4).eval()
    sizes: list[tuple[int, ...]] = []
    for scale in host.scales:
        scale.register_forward_hook(lambda module, given, output: sizes.append(output.shape[-2:]))
    features = torch.rand(1, CHANNELS, 60, 60)
    query = Features(features, features, features, features)
    masks = torch.ones(1, 1, 60, 60)
    host(EpisodeFeatures(query, features[:, None], features[:, None], features[:, None], masks))
    assert sizes == [(60, 60), (30, 30), (15, 15), (8, 8)]


def test_pfenet_adds_what_the_scale_above_saw():
    torch.manual_seed(0)
    host = PFENet(CHANNELS, 4).eval()
    outputs: list[Tensor] = []
    merged: list[tuple[Tensor, Tensor]] = []
    for scale in host.scales:
        scale.register_forward_hook(lambda module, given, output: outputs.append(output))
        if scale.above is not None:
            scale.above.register_forward_hook(lambda module, given, output: merged.append(given))
    with torch.no_grad():
        host(episodes_of(1))
    assert len(outputs) == 4
    assert len(merged) == 3
    for finer, (own, above), coarser in zip(outputs[:-1], merged, outputs[1:], strict=True):
        # Each scale's output goes to the query's size before it is brought to the next scale's.
        whole = resized(finer, (SIDE, SIDE))
        torch.testing.assert_close(above, resized(whole, coarser.shape[-2:]))
        assert own.shape == coarser.shape


def test_pfenets_side_outputs_weigh_as_much_as_the_main_one_together():
    output = PFENet(CHANNELS, 4).eval()(episodes_of(1))
    assert [weight for weight, _ in output.auxiliary] == [0.25] * 4
    assert sum(weight for weight, _ in output.auxiliary) == 1
    assert output.auxiliary[3][1].shape == (2, 2, 1, 1)


# BAM


def test_gram_matrices_hold_the_cosines_of_channels():
    features = torch.tensor([[[3.0, 0.0]], [[1.0, 1.0]]])  # 2 channels of 1 x 2 positions
    wanted = torch.tensor([[1.0, 0.5**0.5], [0.5**0.5, 1.0]])
    torch.testing.assert_close(gram(features), wanted)


def test_scenes_are_compared_by_gram_matrices_relative_to_ones():
    query = torch.tensor([[[[3.0, 0.0]], [[1.0, 1.0]]]])
    supports = torch.stack([query[0], torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])])[None]
    difference = torch.tensor([[0.0, 0.5**0.5], [0.5**0.5, 0.0]]).norm() / 2
    torch.testing.assert_close(scene_distances(query, supports), torch.tensor([[0.0, difference]]))


def test_other_base_classes_are_summed_without_the_one_asked_for():
    base = torch.tensor([0.4, 0.3, 0.2, 0.1]).view(1, 4, 1, 1).expand(3, 4, 1, 1)
    own = torch.tensor([-1, 0, 2])
    torch.testing.assert_close(other_classes(base, own).flatten(), torch.tensor([0.6, 0.3, 0.5]))
    torch.testing.assert_close(other_classes(base, None).flatten(), torch.full((3,), 0.6))


def test_bam_starts_as_its_meta_learner():
    torch.manual_seed(0)
    host = BAM(CHANNELS, 8).eval()
    output = host(episodes_of(1, base=3))
    meta = output.auxiliary[0][1]
    torch.testing.assert_close(output.logits, meta.softmax(1))
    with torch.no_grad():
        host.ensemble.weight.copy_(torch.tensor([1.0, 2.0]).view(1, 2, 1, 1))
    episodes = episodes_of(1, base=3)
    assert episodes.base is not None
    moved = host(episodes).logits
    torch.testing.assert_close(moved[:, 1], meta.softmax(1)[:, 1])
    others = episodes.base[:, 1:].sum(1)
    torch.testing.assert_close(moved[:, 0], meta.softmax(1)[:, 0] + 2 * others)


def test_bam_weighs_supports_by_distance_whatever_their_order():
    torch.manual_seed(0)
    host = BAM(CHANNELS, 8, shots=3)
    distances = torch.tensor([[0.3, 0.1, 0.2]])
    weights = host.weigh(distances)
    torch.testing.assert_close(weights.sum(1), torch.ones(1))
    order = [2, 0, 1]
    torch.testing.assert_close(host.weigh(distances[:, order]), weights[:, order])
    assert len(set(weights[0].tolist())) == 3


def test_bams_weights_reach_prototypes_priors_and_distance():
    torch.manual_seed(0)
    host = BAM(CHANNELS, 8, shots=3).eval()
    compared: list[tuple[Tensor, Tensor]] = []
    compare = host.meta.compare
    host.meta.compare = lambda e, *given: compared.append(given) or compare(e, *given)
    weights = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.5, 0.5]])
    host.weigh = lambda distances: weights
    # The distance alone decides what is added to both probabilities.
    with torch.no_grad():
        host.adjust.weight.copy_(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1))
    episodes = episodes_of(3)
    logits = host(episodes).logits
    prototypes = host.meta.prototypes(episodes)
    wanted = (weights[..., None] * prototypes).sum(1)
    torch.testing.assert_close(compared[0][0], wanted)
    priors = torch.stack([prior_of(take_shots(episodes, k))[:, 0] for k in range(3)], dim=1)
    torch.testing.assert_close(compared[0][1], (weights[..., None, None] * priors).sum(1)[:, None])
    distance = (weights * scene_distances(episodes.query.low, episodes.low)).sum(1)
    torch.testing.assert_close(logits, distance.view(2, 1, 1, 1).expand_as(logits))


def test_bam_weighs_another_number_of_supports_alike():
    host = BAM(CHANNELS, 8, shots=3).eval()
    torch.testing.assert_close(host.weigh(torch.rand(2, 5)), torch.full((2, 5), 0.2))
    assert host(episodes_of(2)).logits.shape == (2, 2, SIDE, SIDE)


def test_the_base_learner_says_background_and_every_base_class():
    learner = BaseLearner(8, 15).eval()
    assert learner(torch.rand(2, 8, 7, 7)).shape == (2, 16, 7, 7)
    names = set(learner.state_dict())
    # The names of BAM's published PSPNet weights.
    assert {"ppm.features.3.1.weight", "ppm.features.0.2.running_mean", "cls.0.weight"} <= names
    assert {"cls.1.bias", "cls.4.weight", "cls.4.bias"} <= names


@pytest.mark.parametrize("name", ["baseline", "pfenet", "bam"])
def test_a_new_host_is_undecided_and_passes_on_what_comes_in(name: HostName):
    torch.manual_seed(0)
    host = make_host(name, CHANNELS, width=32, start="blank").eval()
    meta = host.meta if isinstance(host, BAM) else host
    hidden: list[Tensor] = []
    meta.classify.out.register_forward_hook(lambda module, given, output: hidden.append(given[0]))
    logits = host(episodes_of(1)).logits
    assert (logits.softmax(1) - 0.5).abs().max() < 0.3
    assert 0.1 < hidden[0].std() < 10


def test_the_baseline_starts_as_the_nearest_prototype():
    torch.manual_seed(0)
    host = make_host("baseline", CHANNELS, width=32).eval()
    assert isinstance(host, Baseline)
    episodes = episodes_of(2)
    cosines = Nearest()(episodes).logits
    nn.init.zeros_(host.classify.out.weight)
    nn.init.zeros_(host.classify.out.bias)
    logits = host(episodes).logits
    assert torch.equal(logits.argmax(1), cosines.argmax(1))
    assert 0 < logits.argmax(1).float().mean() < 1
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], 6 * (cosines[:, 1] - cosines[:, 0]))
    host.share = None
    host.merge = Baseline(CHANNELS, 32).merge
    assert not host(episodes).logits.any()


def test_the_likeness_to_the_prototypes_is_seen_beside_the_prior():
    torch.manual_seed(0)
    host = make_host("baseline", CHANNELS, width=32).eval()
    assert isinstance(host, Baseline)
    seen: list[Tensor] = []
    host.merge.register_forward_hook(lambda module, given, output: seen.extend(given))
    episodes = episodes_of(1)
    host(episodes)
    cosines = Nearest()(episodes).logits
    assert [maps.shape[1] for maps in seen] == [32, 32, 1, 1]
    torch.testing.assert_close(seen[3], 10 * (cosines[:, 1:] - cosines[:, :1]))


def test_published_hosts_have_no_such_start():
    assert make_host("baseline", CHANNELS, start="blank").share is None
    bam = make_host("bam", CHANNELS)
    assert isinstance(bam, BAM)
    assert bam.meta.share is None
