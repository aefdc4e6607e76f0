"""Entries, cores, scales and remainders: gradients, files, merges, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import svftool
from svftool.attaching import (
    AttachedLayer,
    Attachment,
    Mode,
    parse_regime,
    spectral_step,
    weight_gradients,
)
from svftool.attaching.extras import band_places, largest_places
from svftool.attaching.weight import count_operations
from svftool.errors import UsageError
from svftool.factors import LayerFactors
from tests.attaching import MemoryStore, randomise
from tests.test_attach_gradients import CASES

WAYS = [
    ("svf+scale", "factored", None),
    ("entries:2x:random+scale", "composed", None),
    ("salt:1", "auto", None),
    ("core:2+scale", "residual", 2),
    ("rows", "auto", 2),
    ("entries:3x:band", "factored", None),
]


def leaves_of(layer: AttachedLayer) -> dict[str, Tensor]:
    return {part: p.detach().clone().requires_grad_() for part, p in layer.trainable().items()}


def weight_by_definition(
    base: Tensor, factors: LayerFactors, layer: AttachedLayer, leaves: Mapping[str, Tensor]
) -> Tensor:
    """Form ``W + diag(row) U M Vh diag(col) - U diag(S_base) Vh + BA``, matrix by matrix."""
    U, S, Vh = factors.U, factors.S, factors.Vh
    k = S.shape[-1]
    M = torch.diag_embed(S * (1.0 + leaves.get("S", torch.zeros(()))))
    if "entry" in leaves:
        i, j = layer.extras._index // k, layer.extras._index % k
        added = torch.zeros_like(M)
        added[..., i, j] = leaves["entry"] * (S[..., i] * S[..., j]).sqrt()
        M = M + added
    after = U @ M @ Vh
    if "row" in leaves:
        after = (1.0 + leaves["row"]).unsqueeze(-1) * after
    if "col" in leaves:
        after = after * (1.0 + leaves["col"]).unsqueeze(-2)
    change = after - (U * S.unsqueeze(-2)) @ Vh
    if "B" in leaves:
        change = change + leaves["B"] @ leaves["A"]
    return base + change.reshape(base.shape)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("regime", "mode", "rank"), WAYS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_autograd(
    case: str, regime: str, mode: str, rank: int | None
) -> None:
    check_gradients(case, regime, mode, rank)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("mode", ["factored", "residual"])
@pytest.mark.parametrize("regime", ["entries:3:random+scale", "entries:3x:band", "core:2"])
@pytest.mark.parametrize("case", CASES)
def test_entries_may_go_with_activations_or_with_left_vectors(
    case: str, regime: str, mode: str, folds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = (1, 0) if folds else (0, 1)
    monkeypatch.setattr(spectral_step, "_entry_operations", lambda *_: counted)
    check_gradients(case, regime, mode, None)


@pytest.mark.parametrize("mode", ["factored", "residual", "composed"])
@pytest.mark.parametrize(
    "regime",
    ["svf", "rows", "svf+scale", "core:6", "core:6+scale", "salt:3", "entries:5x:random",
     "entries:300:band"],
)  # fmt: skip
@pytest.mark.parametrize("count", [4, 40, 400])
@pytest.mark.parametrize(
    "build",
    [partial(torch.nn.Linear, 48, 64), partial(torch.nn.Conv2d, 8, 64, (2, 3)),
     partial(torch.nn.ConvTranspose2d, 64, 8, (3, 2))],
)  # fmt: skip
def test_a_step_takes_the_operations_that_are_counted(
    build: Callable[[], torch.nn.Module], count: int, regime: str, mode: Mode
) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(build())
    attached = svftool.attach(
        model, MemoryStore(model, dtype=torch.float32), mode=mode, regime=regime
    )
    linear = isinstance(model[0], torch.nn.Linear)
    x = torch.randn((count, 48) if linear else (1, model[0].in_channels, count + 1, 4))
    y = model(x.requires_grad_())
    positions = (x if isinstance(model[0], torch.nn.ConvTranspose2d) else y).numel() // 64
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    expected = count_operations(attached.layers["0.weight"], positions)[mode]
    assert counter.get_total_flops() == pytest.approx(2 * expected, rel=0.03)


def check_gradients(case: str, regime: str, mode: str, rank: int | None) -> None:
    torch.manual_seed(0)
    build, sample = CASES[case]
    model = build().double()
    plain = copy.deepcopy(model)
    x = sample()
    small = min(min(p.flatten(1).shape) for p in model.parameters() if p.ndim > 1)
    store = MemoryStore(
        model,
        rank=None if rank is None else min(rank, small),
        batch=("stack",) if case == "experts" else (),
    )
    if case == "linear of one input" and regime.partition(":")[0] in ("entries", "core", "salt"):
        with pytest.raises(UsageError, match="more numbers than any layer has; the largest, 5 x 1"):
            svftool.attach(model, store, regime=regime)
        return
    attached = svftool.attach(model, store, mode=mode, regime=regime)  # type: ignore[arg-type]
    randomise(attached)
    ours, theirs = (x.clone().requires_grad_(x.is_floating_point()) for _ in range(2))
    model(ours).pow(2).sum().backward()

    leaves = {name: leaves_of(layer) for name, layer in attached.layers.items()}
    bases = dict(plain.named_parameters())
    weights = {
        name: weight_by_definition(bases[name].detach(), store.read(name), layer, leaves[name])
        for name, layer in attached.layers.items()
    }
    expected = functional_call(plain, weights, (theirs,), tie_weights=True)
    expected.pow(2).sum().backward()

    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(model(x), expected.detach(), **close)
    torch.testing.assert_close(model.eval()(x), expected.detach(), **close)
    for name, layer in attached.layers.items():
        for part, parameter in layer.trainable().items():
            torch.testing.assert_close(parameter.grad, leaves[name][part].grad, **close)
    if x.is_floating_point():
        torch.testing.assert_close(ours.grad, theirs.grad, **close)
    trained = {id(one) for one in attached.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)


def layer_of(m: int = 6, n: int = 5) -> tuple[torch.nn.Module, MemoryStore]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(n, m, bias=False)).double()
    return model, MemoryStore(model)


def test_entries_by_gradient_are_the_steepest_of_their_numbers() -> None:
    model, store = layer_of()
    x = torch.randn(7, 5, dtype=torch.float64)
    found = weight_gradients(model, store, [lambda: model(x).pow(2).sum()])
    weight = next(model.parameters())
    assert weight.requires_grad
    assert weight.grad is None
    expected = torch.autograd.grad(model(x).pow(2).sum(), weight)[0]
    torch.testing.assert_close(found["0.weight"], expected)
    attached = svftool.attach(model, store, regime="entries:4", gradients=found)
    factors = store.read("0.weight")
    steep = factors.U.T @ expected @ factors.Vh.T
    steep = (steep * factors.S.sqrt().outer(factors.S.sqrt())).abs().flatten()
    layer = attached.layers["0.weight"]
    assert layer.extras._index.tolist() == sorted(steep.topk(4).indices.tolist())
    model(x).pow(2).sum().backward()
    # The first gradient of a trained number is the one that it was chosen by.
    torch.testing.assert_close(
        layer.extras.entry.grad.abs().sort().values, steep.topk(4).values.sort().values
    )


@pytest.mark.parametrize("k", [1, 2, 7])
def test_a_band_grows_from_the_diagonal(k: int) -> None:
    # By offset, then by the larger of the two values, then row by row.
    order = sorted(range(k * k), key=lambda at: (abs(at // k - at % k), min(at // k, at % k), at))
    assert band_places(k).tolist() == order
    for count in range(k * k + 1):
        assert band_places(k, count).tolist() == order[:count]


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, torch.inf]), min_size=16, max_size=16))
def test_the_largest_places_are_those_of_a_sort(numbers: list[float]) -> None:
    sizes, band = torch.tensor(numbers).reshape(4, 4), band_places(4).tolist()
    order = sorted(band, key=lambda at: -numbers[at])
    for count in range(1, 17):
        assert sorted(largest_places(sizes, count).tolist()) == sorted(order[:count])


@pytest.mark.parametrize(
    ("gradients", "found"),
    [
        (None, "no gradient of the support set"),
        ({"0.weight": torch.zeros(6, 5)}, "a gradient that is zero"),
        ({"0.weight": torch.full((6, 5), torch.nan)}, "a gradient that is not finite"),
    ],
)
def test_entries_without_a_support_gradient_are_refused(
    gradients: dict[str, Tensor] | None, found: str
) -> None:
    model, store = layer_of()
    with pytest.raises(
        UsageError, match=f"{found}, expected .* entries:4:random or entries:4:band"
    ):
        svftool.attach(model, store, regime="entries:4", gradients=gradients)
    assert svftool.attaching.find_attachment(model) is None


def test_the_seed_chooses_random_entries_and_the_start_of_a_remainder() -> None:
    found = {}
    for seed in (0, 0, 1):
        model, store = layer_of()
        attached = svftool.attach(model, store, regime="entries:9:random", seed=seed)
        found.setdefault(seed, []).append(attached.layers["0.weight"].extras._index.tolist())
    assert found[0][0] == found[0][1] != found[1][0]
    starts = []
    for seed in (0, 0, 1):
        model, store = layer_of(9, 9)
        attached = svftool.attach(model, store, regime="salt:2", seed=seed)
        starts.append(attached.layers["0.weight"].extras.A.detach())
        assert not attached.layers["0.weight"].extras.B.any()
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize(
    ("regime", "count"),
    [
        ("svf", 8), ("svf+scale", 8 + 12 + 8), ("entries:20:band", 20), ("entries:4x:random", 32),
        ("core:3", 9), ("core:4x", 36), ("salt:2", 8 + 2 * 20), ("salt:1x", 8 + 20), ("rows", 12),
        ("entries:1000:band", 64),
    ],
)  # fmt: skip
def test_a_regime_trains_the_numbers_that_it_says(regime: str, count: int) -> None:
    spectral = parse_regime(regime).spectral
    assert spectral is not None
    assert spectral.of(12, 8, 8).count == count
    if count < 64:
        model, store = layer_of(12, 8)
        attached = svftool.attach(model, store, regime=regime)
        assert sum(p.numel() for p in attached.parameters()) == count
        kinds = {p for group in attached.groups().values() for p in group}
        assert kinds == set(attached.parameters())


@pytest.mark.parametrize("regime", ["entries:65:band", "core:9", "salt:5"])
def test_more_numbers_than_any_layer_has_are_refused(regime: str) -> None:
    model, store = layer_of(12, 8)
    with pytest.raises(UsageError, match="more numbers than any layer has; the largest, 12 x 8"):
        svftool.attach(model, store, regime=regime)


def test_where_nothing_of_a_remainder_fits_no_smaller_one_is_asked_for() -> None:
    model, store = layer_of(5, 1)
    with pytest.raises(UsageError, match=r"remainder of rank 0.*Choose another regime"):
        svftool.attach(model, store, regime="salt:1+scale")
    model, store = layer_of(12, 8)
    with pytest.raises(UsageError, match="Give a smaller size"):
        svftool.attach(model, store, regime="salt:5+scale")


@pytest.mark.parametrize("regime", ["head", "lora:8", "svf+bias", "full"])
def test_attaching_takes_regimes_of_the_singular_basis_alone(regime: str) -> None:
    model, store = layer_of()
    with pytest.raises(UsageError, match="not of the singular basis alone"):
        svftool.attach(model, store, regime=regime)


@pytest.mark.parametrize(
    "text",
    ["entries", "entries:4:best", "core", "core:0", "salt:0x", "svf:2", "scale", "rows+scale",
     "svf+core:2", "svf+svf", "norm:3", "entries:4x+scale+scale"],
)  # fmt: skip
def test_regimes_that_do_not_exist(text: str) -> None:
    with pytest.raises(UsageError, match="expected one of"):
        parse_regime(text)


def test_a_merged_state_loads_back_where_it_tells_what_was_trained() -> None:
    def attached_to(regime: str) -> tuple[torch.nn.Module, Attachment]:
        model, store = layer_of()
        return model, svftool.attach(model, store, regime=regime)

    for regime in ("entries:9:random", "core:3"):
        model, attached = attached_to(regime)
        randomise(attached)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        other, again = attached_to(regime)
        other.load_state_dict(state)
        x = torch.randn(4, 5, dtype=torch.float64)
        torch.testing.assert_close(other(x), model(x), rtol=1e-6, atol=1e-6)
        assert any(bool(p.any()) for p in again.layers["0.weight"].extras.trainable().values())
    model, attached = attached_to("svf+scale")
    randomise(attached)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="differs from the base by more"):
        attached_to("svf+scale")[0].load_state_dict(state)


@pytest.mark.parametrize("regime", ["svf", "svf+scale", "entries:9:random", "core:3", "salt:1"])
def test_the_best_weights_that_a_trainer_wrote_load_back(regime: str, tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Conv2d(3, 4, 3))
    model = net.to(memory_format=torch.channels_last)
    attached = svftool.attach(model, MemoryStore(model, dtype=torch.float32), regime=regime)

    def numbers() -> list[Tensor]:
        return [one.detach().clone() for one in attached.parameters()]

    seen = []
    for step in range(4):
        if step:  # the first is the start, where a remainder is zero
            randomise(attached, seed=step)
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(state, tmp_path / f"{step}.safetensors")
        seen.append((numbers(), model[0](torch.ones(12)).detach()))
    for step in (1, 0, 3, 2):
        model.load_state_dict(load_file(tmp_path / f"{step}.safetensors"), strict=False)
        torch.testing.assert_close(model[0](torch.ones(12)), seen[step][1])
        if regime in ("svf+scale", "salt:1"):  # of which a weight does not tell the numbers
            assert all(map(torch.equal, numbers(), seen[step][0]))


def test_what_a_weight_keeps_of_itself_is_bounded(monkeypatch) -> None:
    model, store = layer_of()
    attached = svftool.attach(model, store, regime="salt:1")
    weight = attached.weights["0.weight"]
    monkeypatch.setattr("svftool.attaching.weight._KEPT_BYTES", 0)
    for step in range(9):
        randomise(attached, seed=step)
        model.state_dict()
    held = [sum(one.nbytes for one in values) for values in weight._given.values()]
    assert 1 <= len(held) < 9
    assert len(held) == 1 or sum(held) <= model[0].weight.nbytes
    # A weight that was made of something else is not taken for one of them.
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["0.weight"].view(-1)[1] += 1.0
    with pytest.raises(RuntimeError, match="scales or remainder are not among"):
        model.load_state_dict(state)


@pytest.mark.parametrize("regime", ["svf+scale", "entries:2x:random", "salt:1"])
def test_checkpointing_and_autocast_see_the_same_weights(regime: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Tanh(), torch.nn.Linear(10, 9))
    attached = svftool.attach(model, MemoryStore(model, dtype=torch.float32), regime=regime)
    randomise(attached)
    x = torch.randn(3, 12)
    model(x).square().sum().backward()
    expected = [one.grad.clone() for one in attached.parameters()]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    for parameter, gradient in zip(attached.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    torch.testing.assert_close(low.float(), model(x), rtol=0.1, atol=0.1)
    half = copy.deepcopy(model).bfloat16()
    trained = list(svftool.attaching.find_attachment(half).parameters())
    assert {one.dtype for one in trained} == {torch.float32}
