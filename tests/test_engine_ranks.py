from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svftool.engine import FULL, RankRule, parse_rank
from svftool.errors import UsageError


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("full", FULL),
        (" Full ", FULL),
        ("16", RankRule("count", 16)),
        ("1", RankRule("count", 1)),
        ("0.25", RankRule("fraction", 0.25)),
        ("1.0", RankRule("fraction", 1.0)),
        (".5", RankRule("fraction", 0.5)),
        ("energy:0.99", RankRule("energy", 0.99)),
        ("energy:1", RankRule("energy", 1.0)),
    ],
)
def test_rules(text: str, rule: RankRule) -> None:
    assert parse_rank(text) == rule
    assert parse_rank(str(rule)) == rule


REFUSED = """0 -3 1.5 0.0 nan inf 1e3 energy: energy:0 energy:2 energy:x energy:nan rank:3 :0.5"""


@pytest.mark.parametrize("text", ["", "full:0.5", *REFUSED.split()])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected 'full', a count such as 16"):
        parse_rank(text)


def test_fixed_ranks_are_within_the_matrix() -> None:
    assert parse_rank("full").fixed(8, 100) == 8
    assert parse_rank("16").fixed(8, 100) == 8
    assert parse_rank("3").fixed(8, 100) == 3
    assert parse_rank("0.3").fixed(8, 100) == 3
    assert parse_rank("0.01").fixed(8, 100) == 1
    assert parse_rank("energy:0.5").fixed(8, 100) is None


def test_energy_takes_what_the_spectrum_needs() -> None:
    S = torch.tensor([3.0, 1.0, 1.0, 0.0])
    assert parse_rank("energy:0.8").rank_of(S, 4, 9) == 1
    assert parse_rank("energy:0.9").rank_of(S, 4, 9) == 2
    flat = torch.ones(4)
    assert parse_rank("energy:0.9").rank_of(torch.stack([S, flat]), 4, 9) == 4
    assert parse_rank("2").rank_of(S, 4, 9) == 2


@given(st.integers(1, 10**9), st.floats(1e-9, 1.0))
def test_the_text_of_a_rule_gives_the_rule(count: int, share: float) -> None:
    rules = RankRule("count", count), RankRule("fraction", share), RankRule("energy", share)
    for rule in rules:
        assert parse_rank(str(rule)) == rule
