"""Classifier heads: logits found, heads replaced or added, class means."""

from __future__ import annotations

import copy
from math import comb
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from svftool.errors import ModelError
from svftool.tasks.base import forward_errors
from svftool.tasks.heads import (
    class_means,
    head_inputs,
    head_rows,
    logits_of,
    new_head,
    pool,
    set_head,
    try_head,
)


def clusters(count: int, spread: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 24, generator=torch.Generator().manual_seed(9)).abs()
    labels = torch.arange(4).repeat_interleave(count)
    return centres[labels] + spread * torch.randn(4 * count, 24, generator=generator), labels


def test_logits_are_found_in_what_models_return() -> None:
    logits = torch.ones(2, 3)
    for output in (logits, SimpleNamespace(logits=logits), (logits, None), [logits]):
        assert logits_of(output) is logits
    with pytest.raises(ModelError, match="returns dict, expected logits"):
        logits_of({"out": logits})


def test_maps_and_sequences_are_pooled() -> None:
    maps = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(pool(maps), maps.mean((2, 3)))
    torch.testing.assert_close(pool(maps[..., 0]), maps[..., 0].mean(1))
    assert pool(maps[..., 0, 0]).shape == (2, 5)


def test_class_means_separate_new_examples() -> None:
    features, labels = clusters(5, 0.3)
    weights = class_means(features, labels, 4)
    queries, answers = clusters(50, 0.3, seed=1)
    assert ((queries @ weights.T).argmax(1) == answers).float().mean() > 0.95


def test_class_means_are_surer_of_tighter_classes() -> None:
    scales = [class_means(*clusters(8, spread), 4).norm() for spread in (1.5, 0.5, 0.05)]
    assert scales[0] < scales[1] < scales[2]


def test_one_example_a_class_is_enough() -> None:
    features, labels = clusters(1, 0.1)
    weights = class_means(features, labels, 4)
    assert torch.equal((features @ weights.T).argmax(1), labels)
    torch.testing.assert_close(weights.norm(dim=1), (15 / features.norm(dim=1).mean()).expand(4))


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_head_is_replaced(bias: bool) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(12, 7, bias=bias)))
    assert new_head(model, "1.0", 4, 7) == (model, "1.0")
    weights = torch.randn(4, 12)
    set_head(model.get_submodule("1.0"), weights)
    images = torch.randn(2, 3, 2, 2)
    torch.testing.assert_close(model(images), images.flatten(1) @ weights.T)
    assert set(model.state_dict()) == ({"1.0.weight", "1.0.bias"} if bias else {"1.0.weight"})


def test_a_convolutional_head_is_replaced() -> None:
    model = nn.Sequential(nn.Conv2d(3, 9, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    new_head(model, "0", 4, 9)
    weights = torch.randn(4, 3)
    set_head(model[0], weights)
    images = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(model(images), images.mean((2, 3)) @ weights.T)


@pytest.mark.parametrize("flat", [False, True])
def test_a_headless_network_is_wrapped(flat: bool) -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU())
    if flat:
        backbone.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    model, head = new_head(backbone, None, 4, 6)
    images = torch.randn(2, 3, 5, 5)
    features = backbone[0](images).relu().mean((2, 3))
    torch.testing.assert_close(model(images), model.get_submodule(head)(features))
    assert list(copy.deepcopy(model).state_dict()) == [
        "backbone.0.weight",
        "backbone.0.bias",
        "head.weight",
        "head.bias",
    ]


def test_other_heads_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    with pytest.raises(ModelError, match="head '1' is a LayerNorm"):
        new_head(model, "1", 2, 4)


def test_the_inputs_of_a_head_are_caught_and_let_go() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    batches = [torch.randn(4, 5), torch.randn(1, 5)]
    caught = head_inputs(model, "1", batches)
    torch.testing.assert_close(caught, model[0](torch.cat(batches)))
    assert not model[1]._forward_pre_hooks


@pytest.mark.parametrize("right", range(13))
def test_chance_is_judged_by_the_binomial_tail(right: int) -> None:
    """Held against a sum over the tail; predictions are as frequent as the classes."""
    labels = torch.arange(3).repeat(4)
    predicted = labels.clone()
    predicted[right:] = (predicted[right:] + 1) % 3
    trial = try_head(predicted, labels, 3)
    guessed = torch.bincount(predicted, minlength=3) / 12
    chance = float(guessed.mean())
    tail = sum(comb(12, k) * chance**k * (1 - chance) ** (12 - k) for k in range(right, 13))
    assert trial.right == right
    assert trial.p_value == pytest.approx(tail, rel=1e-6)
    assert trial.at_chance is (tail > 0.05)


def test_the_most_frequent_class_alone_is_chance() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    assert try_head(torch.zeros_like(labels), labels, 2).at_chance
    assert not try_head(labels, labels, 2).at_chance


@pytest.mark.parametrize(("count", "decidable"), [(2, False), (4, False), (6, True)])
def test_few_images_decide_nothing(count: int, decidable: bool) -> None:
    labels = torch.arange(count) % 2
    assert try_head(1 - labels, labels, 2).decidable is decidable
    assert try_head(1 - labels, labels, 2).at_chance is decidable


def test_two_outputs_of_one_name_and_classes_of_one_form_are_no_match() -> None:
    assert head_rows(["crane"], ["crane, bird", "crane, machine"]) is None
    assert head_rows(["a b", "a_b"], ["A B", "c"]) is None
    assert head_rows(["A-b", "Stra\u00dfe"], ["strasse", "a B"]) == [1, 0]


@pytest.mark.parametrize("error", [TypeError, KeyError, IndexError, OverflowError, RuntimeError])
def test_what_a_model_raises_is_said_in_one_line(error: type[Exception]) -> None:
    with (
        pytest.raises(ModelError, match=r"images of 3 x 3: .*first") as caught,
        forward_errors("images of 3 x 3"),
    ):
        raise error("first\nsecond")
    assert "second" not in str(caught.value).replace("\\nsecond", "")
    with pytest.raises(torch.OutOfMemoryError), forward_errors("x"):
        raise torch.OutOfMemoryError
