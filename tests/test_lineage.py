"""Which network comes from which: strangers are a matter of chance, relatives are found."""

from __future__ import annotations

import importlib
import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from svftool.auditing.kinship import Marks, agreement, earlier, score, unit_axes, upper_tail
from svftool.errors import CheckpointError, UsageError
from svftool.stages.lineage import Lineage, lineage

State = dict[str, torch.Tensor]
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "lineage.py"
INPUTS, HIDDEN, CLASSES = 20, 32, 5


@cache
def trained(count: int) -> list[State]:
    """Train networks of one configuration on the same data, all at once, each on its own."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(CLASSES, INPUTS, generator=g)
    labels = torch.randint(CLASSES, (80,), generator=g)
    x = (centres[labels] + torch.randn(80, INPUTS, generator=g)).tanh()
    sides = [INPUTS, HIDDEN, HIDDEN, HIDDEN, CLASSES]
    weights = [
        (torch.randn(count, n, m, generator=g) / m**0.5).requires_grad_()
        for m, n in itertools.pairwise(sides)
    ]
    optimiser = torch.optim.Adam(weights, lr=1e-2)
    for _ in range(30):
        h = x.expand(count, -1, -1)
        for index, W in enumerate(weights):
            h = h @ W.mT
            h = h.relu() if index < len(weights) - 1 else h
        loss = torch.nn.functional.cross_entropy(
            h.reshape(-1, CLASSES), labels.repeat(count), reduction="none"
        )
        optimiser.zero_grad()
        loss.view(count, -1).mean(dim=1).sum().backward()
        optimiser.step()
    assert float((h.argmax(dim=2) == labels).float().mean()) > 0.9
    return [
        {f"layers.{i}.weight": W[k].detach().clone() for i, W in enumerate(weights)}
        for k in range(count)
    ]


def noisy(state: State, size: float, seed: int = 0) -> State:
    g = torch.Generator().manual_seed(seed)
    return {k: v + size * v.std() * torch.randn(v.shape, generator=g) for k, v in state.items()}


def permuted(state: State, seed: int) -> State:
    g = torch.Generator().manual_seed(seed)
    out, order = {}, torch.arange(INPUTS)
    for index, (name, W) in enumerate(state.items()):
        rows = torch.arange(len(W)) if index == 3 else torch.randperm(len(W), generator=g)
        out[name] = W[rows][:, order]
        order = rows
    return out


def pruned(state: State, share: float = 0.3) -> State:
    return {
        k: torch.where(v.abs() >= v.abs().flatten().quantile(share), v, 0.0)
        for k, v in state.items()
    }


def int8(state: State) -> State:
    steps = {k: v.abs().amax(dim=1, keepdim=True) / 127 for k, v in state.items()}
    return {k: (v / steps[k]).round() * steps[k] for k, v in state.items()}


def merged(a: State, b: State) -> State:
    return {k: (a[k] + b[k]) / 2 for k in a}


def found(tmp_path: Path, *states: State) -> Lineage:
    paths = []
    for index, state in enumerate(states):
        path = tmp_path / f"m{index}.safetensors"
        save_file({k: v.contiguous() for k, v in state.items()}, path)
        paths.append(path)
    return lineage(paths)


def relation(tmp_path: Path, *states: State) -> str:
    return found(tmp_path, *states).pairs[0].relation


def p_value(a: State, b: State) -> float:
    axes = unit_axes({name: tuple(W.shape) for name, W in a.items()})
    known = (agreement(a[name], b[name], axis) for name, axis in axes.items())
    return upper_tail(score([one for one in known if one is not None]))


def test_p_values_of_strangers_are_uniform() -> None:
    """Kolmogorov and Smirnov's test over 200 pairs of networks that learned the same task."""
    states = trained(400)
    p = sorted(p_value(states[2 * i], states[2 * i + 1]) for i in range(200))
    apart = max(max((i + 1) / 200 - one, one - i / 200) for i, one in enumerate(p))
    assert apart < 1.63 / math.sqrt(200)  # 1 %


def test_independent_trainings_are_never_relatives(tmp_path: Path) -> None:
    states = trained(400)
    for i in range(20):
        pair = found(tmp_path, states[2 * i], states[2 * i + 1]).pairs[0]
        assert pair.relation == ("independent" if (pair.p_value or 0.0) >= 0.01 else "undecided")


@pytest.mark.parametrize(
    "change",
    [
        lambda one, other, i: noisy(one, 0.3, i),
        lambda one, other, i: pruned(one),
        lambda one, other, i: permuted(one, i),
        lambda one, other, i: merged(one, noisy(one, 0.5, i)),
        lambda one, other, i: merged(one, other),
        lambda one, other, i: int8(one),
        lambda one, other, i: {f"net.{k}": v for k, v in one.items()},
        lambda one, other, i: {k.replace("layers", "blocks.x"): v for k, v in one.items()},
        lambda one, other, i: {k: v.half() for k, v in one.items()},
        lambda one, other, i: dict(one),
    ],
    ids=[
        "tuned", "pruned", "permuted", "merged with its tune", "merged with a stranger", "int8",
        "prefixed", "renamed", "half", "copy",
    ],
)  # fmt: skip
def test_what_is_made_of_a_network_is_its_relative(change: object, tmp_path: Path) -> None:
    assert callable(change)
    states = trained(400)
    for i in range(10):
        made = change(states[i], states[i + 50], i)
        assert relation(tmp_path, states[i], made) == "derived"


def test_layers_that_were_dropped_do_not_hide_a_relative(tmp_path: Path) -> None:
    state = noisy(trained(400)[0], 0.05)
    short = {"layers.0.weight": state["layers.0.weight"]}
    short |= {f"layers.{i - 1}.weight": state[f"layers.{i}.weight"] for i in (2, 3)}
    pair = found(tmp_path, trained(400)[0], short).pairs[0]
    assert pair.relation == "derived"


def test_a_chain_of_epochs_is_put_in_order(tmp_path: Path) -> None:
    chain = [dict(trained(400)[0])]
    for i in range(3):
        chain.append(noisy(chain[-1], 0.1, i))
    for steps, one in enumerate(chain):
        one["bn.num_batches_tracked"] = torch.tensor(100 * steps)
    mixed = [chain[i] for i in (2, 0, 3, 1)]
    tree = found(tmp_path, *mixed).tree
    assert [(one.child, one.parent) for one in tree] == [(1, None), (3, 1), (0, 3), (2, 0)]
    assert all(one.directed for one in tree[1:])


def test_what_cannot_be_told_has_no_direction(tmp_path: Path) -> None:
    state = trained(400)[0]
    pair = found(tmp_path, state, noisy(state, 0.1)).pairs[0]
    assert (pair.relation, pair.direction) == ("derived", 0)
    for made, why in ((pruned(state), "zeros"), (int8(state), "fewer digits")):
        pair = found(tmp_path, made, state).pairs[0]
        assert pair.direction == 1
        assert why in pair.reason


def test_age_is_read_off_counters_before_all_else() -> None:
    assert earlier(Marks({"n": 5, "new": 9}, 0.5, 8), Marks({"n": 9}, 0.0, 24))[0] == -1
    assert earlier(Marks({"n": 5}, 0.5, 8), Marks({"n": 5}, 0.5, 8)) == (0, "")


def test_a_network_of_other_shapes_is_not_comparable(tmp_path: Path) -> None:
    other = {k: torch.randn(7, 9) for k in ("a.weight", "b.weight")}
    pair = found(tmp_path, trained(400)[0], other).pairs[0]
    assert (pair.relation, pair.p_value) == ("not comparable", None)


def test_claims_are_held_against_the_others(tmp_path: Path) -> None:
    states = trained(400)
    for name, state in (("root", states[0]), ("child", noisy(states[0], 0.1)), ("liar", states[1])):
        folder = tmp_path / name
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
        if name != "root":
            (folder / "README.md").write_text("---\nbase_model: someone/root\n---\n")
    result = lineage([tmp_path / name for name in ("root", "child", "liar")])
    assert [(one.checkpoint, one.found, one.holds) for one in result.claims] == [
        (1, 0, True),
        (2, 0, False),
    ]


def test_one_checkpoint_and_a_change_alone_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(trained(400)[0], path)
    with pytest.raises(UsageError, match="two or more"):
        lineage([path])
    with pytest.raises(CheckpointError, match="no such file"):
        lineage([path, tmp_path / "b.safetensors"])


# Real networks.


@pytest.mark.skipif(not SCRIPT.is_file(), reason="benchmarks/ is not in this checkout")
def test_networks_trained_on_real_pictures(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short run of what docs/metrics.md shows 40 networks a kind of."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    script: Any = importlib.import_module("lineage")
    row = script.measure("residual", data / "images" / "cifar10", pairs=1, epochs=1)
    assert not script.failed(row)
    assert row["strangers"] == {"independent": 1}
    assert row["relatives"] == {key: {"derived": 2} for key in row["relatives"]}
    assert len(row["relatives"]) == 6
    assert script.failed({**row, "strangers": {"derived": 1}})
    assert script.failed({**row, "relatives": {"int8": {"derived": 1, "undecided": 1}}})


def test_real_relatives_and_strangers(data: Path) -> None:
    pairs, checkpoints = data / "pairs", data / "checkpoints"
    retina = pairs / "retinaface"
    tuned = lineage([retina / f"mobilenet0.25_{name}.pth" for name in ("Final", "size_320")])
    assert tuned.pairs[0].relation == "derived"
    assert tuned.pairs[0].direction == -1
    names = ("resnet20-12fca82f.th", "resnet56-4bfd9763.th")
    assert lineage([checkpoints / one for one in names]).pairs[0].relation == "not comparable"


def test_epochs_of_a_real_training_are_in_their_order(data: Path) -> None:
    folder = data / "pairs" / "trajectory"
    base = "base_mobilenetV1X0.25_pretrain"
    names = ["epoch_100", "epoch_10", "Final", base, "epoch_50", "epoch_200"]
    result = lineage([folder / f"{name}.safetensors" for name in names])
    order = [names[one.child] for one in result.tree]
    assert order == [base, "epoch_10", "epoch_50", "epoch_100", "epoch_200", "Final"]
    assert [one.parent for one in result.tree] == [None, *(one.child for one in result.tree[:-1])]
