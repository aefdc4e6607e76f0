"""Protocol of few-shot segmentation: episodes, canvases and pooled scores, by hand-made cases."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from svftool.few_shot.masks import (
    canvas_side,
    paste_image,
    paste_mask,
    place,
    predict_at,
)
from svftool.few_shot.pool import ImageMaskPair, ImagePool, draw_episode, fixed_episodes
from svftool.few_shot.scoring import Pooled
from svftool.models import normalise


def pool_of(*asked: tuple[int, ...], order: str = "images", shown: str | None = None) -> ImagePool:
    """Make a pool whose n-th pair may be asked for, and support, the n-th classes."""
    names = shown or "abcdefghijklmnopqrstuvwxyz"
    pairs = tuple(
        ImageMaskPair(Path(f"{i}.jpg"), Path(f"{i}.png"), labels, labels, identity=names[i])
        for i, labels in enumerate(asked)
    )
    classes = tuple(sorted({label for labels in asked for label in labels}))
    return ImagePool(pairs, classes, order)  # type: ignore[arg-type]


# Episodes


def test_supports_show_the_class_and_never_repeat_or_hold_the_query():
    pool = pool_of((1,), (1, 2), (2,), (1,), (2,), (1,))
    for index in range(200):
        random = np.random.default_rng(index)
        episode = draw_episode(pool, index % 6, 2, random)
        assert episode.label in pool.pairs[episode.query].query
        assert len(set(episode.support)) == 2
        assert episode.query not in episode.support
        assert all(episode.label in pool.pairs[i].support for i in episode.support)


def test_a_picture_that_stands_twice_in_the_pool_is_no_support_of_itself():
    pool = pool_of((1,), (1,), (1,), shown="aab")
    for index in range(30):
        assert draw_episode(pool, 0, 1, np.random.default_rng(index)).support == (2,)
        supports = draw_episode(pool, 2, 1, np.random.default_rng(index)).support
        assert supports in {(0,), (1,)}


def test_the_class_of_an_image_is_uniform_over_those_in_it():
    pool = pool_of((1, 2), (1,), (2,))
    drawn = Counter(draw_episode(pool, 0, 1, np.random.default_rng(i)).label for i in range(1000))
    assert 440 < drawn[1] < 560
    assert drawn[1] + drawn[2] == 1000


def test_drawing_by_classes_is_uniform_over_classes_of_any_size():
    pool = pool_of((1,), (1,), (1,), (1,), (1,), (1,), (2,), (2,), order="classes")
    drawn = Counter(e.label for e in fixed_episodes(pool, 1000, 1, seed=3))
    assert 440 < drawn[2] < 560


def test_a_class_below_the_area_limit_is_asked_for_but_supports_nothing():
    pairs = tuple(
        ImageMaskPair(Path(f"{i}.jpg"), Path(f"{i}.png"), asked, given, identity=str(i))
        for i, (asked, given) in enumerate([((1, 2), (1,)), ((1, 2), (2,)), ((2,), (2,))])
    )
    pool = ImagePool(pairs, (1, 2))
    assert pool.support_of == {1: (0,), 2: (1, 2)}
    asked = {
        e.label: e.support
        for e in (draw_episode(pool, 0, 2, np.random.default_rng(i)) for i in range(20))
    }
    assert set(asked[2]) == {1, 2}


def test_test_episodes_go_through_the_images_again_and_again():
    pool = pool_of((1,), (1,), (2,), (2,))
    episodes = list(fixed_episodes(pool, 10, 1, seed=0))
    assert [e.query for e in episodes] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_swapped_episodes_ask_the_same_but_show_another_class():
    pool = pool_of((1,), (1, 2), (2,), (1,), (2, 3), (1,), (3,), (3,))
    asked = list(fixed_episodes(pool, 40, 1, 5))
    swapped = list(fixed_episodes(pool, 40, 1, 5, swapped=True))
    assert [(e.query, e.label) for e in swapped] == [(e.query, e.label) for e in asked]
    assert {e.shown for e in swapped} == {1, 2, 3}
    for episode in swapped:
        assert episode.shown != episode.label
        assert all(episode.shown in pool.pairs[i].support for i in episode.support)
        assert episode.query not in episode.support
    assert all(e.shown == e.label for e in asked)


def test_test_episodes_depend_on_the_seed_alone():
    pool = pool_of(*[(1,)] * 10)
    first = list(fixed_episodes(pool, 50, 3, seed=5))
    torch.manual_seed(1)
    np.random.default_rng(2)
    assert first == list(fixed_episodes(pool, 50, 3, seed=5))
    assert first != list(fixed_episodes(pool, 50, 3, seed=6))
    assert first[:20] == list(fixed_episodes(pool, 20, 3, seed=5))


# Canvases


@pytest.mark.parametrize(
    ("size", "canvas", "wanted"),
    [
        ((333, 500), 473, (312, 472)),
        ((500, 333), 473, (472, 312)),
        ((500, 500), 473, (472, 472)),
        ((480, 640), 641, (480, 640)),
        ((100, 50), 473, (472, 232)),
        ((1000, 2), 97, (96, 8)),
    ],
)
def test_the_longer_side_is_fitted_and_both_rounded_down_to_eights(size, canvas, wanted):
    spot = place(*size, canvas)
    assert (spot.height, spot.width) == wanted


def test_canvases_are_odd_so_that_features_fall_on_pixels():
    assert [canvas_side(n) for n in (1, 96, 97, 100, 473, 641)] == [9, 97, 97, 97, 473, 641]


def test_a_picture_is_pasted_on_black_and_a_mask_on_ignored_pixels():
    picture = torch.full((3, 20, 40), 200, dtype=torch.uint8)
    pasted = paste_image(picture, 33)
    assert pasted.shape == (3, 33, 33)
    assert (pasted[:, :16, :32] == 200).all()
    assert (pasted[:, 16:] == 0).all()
    assert (pasted[:, :, 32:] == 0).all()
    mask = paste_mask(np.ones((20, 40), np.uint8), 33)
    assert (mask[:16, :32] == 1).all()
    assert (mask[16:] == 255).all()
    assert (mask[:, 32:] == 255).all()


def test_masks_are_resized_by_nearest_pixels_and_keep_their_labels():
    mask = np.zeros((40, 40), np.uint8)
    mask[10:30, 10:30] = 7
    mask[:, 38:] = 255
    pasted = paste_mask(mask, 17)
    assert set(np.unique(pasted)) == {0, 7, 255}
    assert pasted[8, 8] == 7


def test_black_borders_are_normalised_like_pixels():
    given = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)
    result = normalise(given, mean, std)[0, :, 0]
    torch.testing.assert_close(result, torch.tensor([[-1.0, 1.0], [-1.0, 3.0], [0.0, 1.0]]))


def logits_of(foreground: torch.Tensor) -> torch.Tensor:
    return torch.stack([-foreground, foreground])


@pytest.mark.parametrize("size", [(300, 500), (500, 300), (64, 97), (30, 20)])
def test_a_prediction_is_scored_where_the_picture_was(size: tuple[int, int]):
    """Paste a mask, hand its own canvas back as logits: the original mask must come out."""
    height, width = size
    mask = np.zeros(size, np.uint8)
    mask[height // 3 : 2 * height // 3, width // 4 : width // 2] = 1
    canvas = 473
    pasted = torch.from_numpy(paste_mask(mask, canvas)).float()
    pasted[pasted == 255] = 0
    found = predict_at(logits_of(pasted - 0.5), size, canvas)
    assert found.shape == size
    pooled = Pooled()
    pooled.add(found, mask, 1)
    assert pooled.scores().miou > 0.95


def test_the_papers_alignment_stretches_the_canvas_over_the_longer_side():
    canvas, size = 97, (48, 96)
    line = torch.linspace(-1, 1, canvas)
    logits = logits_of(line.expand(canvas, canvas))
    found = predict_at(logits, size, canvas, alignment="canvas")
    assert found.shape == size
    assert not found[:, :48].any()
    assert found[:, 48:].all()
    short = predict_at(logits_of(line.expand(canvas, canvas).T), size, canvas, alignment="canvas")
    assert (
        not short.any()
    )  # 48 rows are the upper half of the square that the canvas is stretched to
    assert predict_at(logits_of(line.expand(canvas, canvas).T), size, canvas)[-1].sum() == 0


def test_coarse_logits_are_interpolated_between_the_corner_pixels():
    logits = logits_of(torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]))
    found = predict_at(logits, (96, 96), 97)
    assert not found[:, :48].any()
    assert found[:, 49:].all()


# Scores


def test_intersections_and_unions_are_pooled_before_the_ratio():
    pooled = Pooled()
    truth = np.zeros((10, 10), np.uint8)
    truth[:5] = 1
    exact = truth.astype(bool)
    pooled.add(exact, truth, 1)  # 50 of 50
    small = np.zeros((10, 10), np.uint8)
    small[0, 0] = 1
    pooled.add(np.zeros((10, 10), bool), small, 1)  # 0 of 1
    other = np.zeros((10, 10), np.uint8)
    other[0, :4] = 1
    wrong = np.zeros((10, 10), bool)
    wrong[0, 2:6] = True
    pooled.add(wrong, other, 2)  # 2 of 6
    scores = pooled.scores()
    assert scores.classes == {1: pytest.approx(50 / 51), 2: pytest.approx(2 / 6)}
    assert scores.miou == pytest.approx((50 / 51 + 2 / 6) / 2)
    background = (50 + 99 + 94) / (50 + 100 + 98)
    assert scores.fb_iou == pytest.approx((52 / 57 + background) / 2)
    assert scores.episodes == 3


def test_shares_of_several_processes_are_one_pool():
    random = np.random.default_rng(0)
    whole, parts = Pooled(), [Pooled(), Pooled(), Pooled()]
    for number in range(7):
        predicted = random.random((9, 11)) < 0.5
        truth = random.choice(np.array([0, 1, 255], np.uint8), (9, 11))
        whole.add(predicted, truth, number % 2)
        parts[number % 3].add(predicted, truth, number % 2)
    joined = Pooled()
    for part in parts:
        joined.include(pickle.loads(pickle.dumps(part)))
    assert joined.scores() == whole.scores()


def test_ignored_pixels_count_neither_way():
    truth = np.array([[1, 0, 255, 255]], np.uint8)
    pooled = Pooled()
    pooled.add(np.array([[1, 0, 1, 0]], bool), truth, 1)
    scores = pooled.scores()
    assert scores.classes == {1: 1.0}
    assert scores.fb_iou == 1.0


def test_a_class_that_was_never_asked_for_does_not_pull_the_mean():
    pooled = Pooled()
    assert np.isnan(pooled.scores().miou)
    pooled.add(np.ones((2, 2), bool), np.full((2, 2), 255, np.uint8), 3)
    pooled.add(np.ones((2, 2), bool), np.ones((2, 2), np.uint8), 4)
    assert pooled.scores().miou == 1.0
