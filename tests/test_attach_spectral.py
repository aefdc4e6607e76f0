"""Entries, cores, scales and remainders: gradients, files, merges, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

import svftool
from svftool.attaching import AttachedLayer
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
