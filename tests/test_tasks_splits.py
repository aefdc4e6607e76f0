"""Draws of support sets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svftool.errors import DataError, UsageError
from svftool.tasks.splits import draw_examples, draw_shots, nothing_left, require_held_out

LABELS = ["cat"] * 12 + ["dog"] * 9 + ["owl"] * 7


@given(
    shots=st.one_of(st.none(), st.integers(1, 7)),
    hold_out=st.floats(0, 0.99),
    seed=st.integers(0, 2**32),
)
def test_every_example_is_in_one_part(shots: int | None, hold_out: float, seed: int) -> None:
    split = draw_shots(LABELS, shots=shots, hold_out=hold_out, seed=seed)
    parts = [*split.support, *split.held_out, *split.rest]
    assert sorted(parts) == list(range(len(LABELS)))
    for name in ("cat", "dog", "owl"):
        members = LABELS.count(name)
        drawn = [i for i in (*split.support, *split.held_out) if LABELS[i] == name]
        assert len(drawn) == (members if shots is None else shots)
        assert any(LABELS[i] == name for i in split.support)


def test_the_seed_decides_and_other_classes_do_not() -> None:
    first = draw_shots(LABELS, shots=5, seed=3)
    assert draw_shots(LABELS, shots=5, seed=3) == first
    assert draw_shots(LABELS, shots=5, seed=4) != first
    alone = draw_shots(LABELS[:12], shots=5, seed=3)
    assert alone.support == tuple(i for i in first.support if i < 12)
    more = draw_shots(LABELS, shots=6, seed=3)
    assert set(first.support) < set(more.support)


def test_classes_of_one_size_are_drawn_apart() -> None:
    split = draw_shots(["a"] * 50 + ["b"] * 50, shots=10, seed=0)
    assert {i for i in split.support if i < 50} != {i - 50 for i in split.support if i >= 50}


def test_a_held_out_share_is_taken_from_every_class() -> None:
    split = draw_shots(LABELS, shots=5, hold_out=0.4, seed=0)
    assert [LABELS[i] for i in split.held_out] == ["cat"] * 2 + ["dog"] * 2 + ["owl"] * 2


def test_one_of_a_thing_is_in_the_singular() -> None:
    with pytest.raises(DataError, match=r"class 'a' has 1 image, expected at least 2 for 2 shots"):
        draw_shots(["a", "b", "b"], shots=2)
    with pytest.raises(DataError, match=r"^0 texts, expected at least 1 for 1 shot\. Lower"):
        draw_examples(0, unit="texts", shots=1)
    assert "1 shot takes every one of the images" in str(nothing_left(1, "images"))


def test_a_share_that_holds_nothing_out_is_refused() -> None:
    split = draw_shots(LABELS, shots=1, hold_out=0.3)
    with pytest.raises(UsageError, match=r"--hold-out 0.3 holds out none of the texts .*3 in all"):
        require_held_out(split, 0.3, "texts")
    require_held_out(split, 0.0, "texts")
    uneven = draw_shots(["cat", "dog", "dog"], shots=None, hold_out=0.3)
    require_held_out(uneven, 0.3, "texts")


def test_a_class_that_is_too_small_is_named() -> None:
    with pytest.raises(DataError, match=r"class 'owl' has 7 images, expected at least 8"):
        draw_shots(LABELS, shots=8)
