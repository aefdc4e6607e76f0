"""Every kind of layer: output and gradients equal autograd through U diag(S) Vh in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import svftool
from tests.attaching import MemoryStore, randomise


class TiedHead(nn.Module):
    """Language-model like: one weight as embedding and as output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embed(x))))


class FunctionalTie(TiedHead):
    """The same, without calling the output layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.mix(self.embed(x))), self.embed.weight)


class Experts(nn.Module):
    """A stack of matrices as one 3-D parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return sum(torch.tanh(F.linear(x, self.stack[e])) for e in range(3))  # type: ignore[return-value]


class TransformersConv1D(nn.Module):
    """GPT-2's layer: a linear layer whose weight is (inputs, outputs)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.shape[:-1], self.weight.shape[1])
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(size)


class StandardisedConv(nn.Conv2d):
    """Normalises its weight before it is used, as in big-transfer networks."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class PadsItself(nn.Conv2d):
    """Calls the functional convolution on a padded input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, 2)


class SelfAttention(nn.Module):
    """torch's attention with its packed projection."""

    def __init__(self, **options: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        other = x[..., : self.attention.kdim] if self.attention.kdim != 8 else x
        result: Tensor = self.attention(x, other, other, need_weights=False)[0]
        return result


class FirstOutput(nn.Module):
    """A recurrent network without its state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x)[0]
        return result


def _real(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, dtype=torch.float64)


def _tokens(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 11, shape)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 4), _real(3, 6)),
    "linear tall": (lambda: nn.Linear(4, 7, bias=False), _real(2, 3, 4)),
    "linear vector": (lambda: nn.Linear(4, 7), _real(4)),
    "linear of one input": (lambda: nn.Linear(1, 5), _real(3, 1)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 4, stride=2, padding=1, dilation=2), _real(2, 3, 17)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, padding=1), _real(2, 3, 7, 6)),
    "conv2d pointwise": (lambda: nn.Conv2d(6, 4, 1, bias=False), _real(2, 6, 5, 5)),
    "conv2d strided": (lambda: nn.Conv2d(3, 5, (3, 2), (2, 3), (1, 0)), _real(2, 3, 8, 9)),
    "conv2d dilated": (lambda: nn.Conv2d(3, 5, 3, dilation=2, padding=2), _real(2, 3, 7, 7)),
    "conv2d same": (lambda: nn.Conv2d(3, 5, 3, padding="same"), _real(2, 3, 7, 6)),
    "conv2d same, even": (lambda: nn.Conv2d(3, 5, (4, 3), padding="same"), _real(2, 3, 7, 6)),
    "conv2d valid": (lambda: nn.Conv2d(3, 5, 3, padding="valid"), _real(2, 3, 7, 6)),
    "conv2d circular": (
        lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"),
        _real(2, 3, 7, 6),
    ),
    "conv2d reflect": (
        lambda: nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode="reflect"),
        _real(2, 3, 7, 6),
    ),
    "conv2d replicate": (
        lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="replicate", stride=2),
        _real(2, 3, 7, 6),
    ),
    "conv2d unbatched": (lambda: nn.Conv2d(3, 5, 3), _real(3, 7, 6)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), _real(2, 4, 5, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), _real(2, 4, 5, 5)),
    "conv2d standardised": (lambda: StandardisedConv(3, 5, 3), _real(2, 3, 5, 5)),
    "conv2d pads itself": (lambda: PadsItself(3, 5, 3), _real(2, 3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), _real(1, 2, 4, 5, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2), _real(2, 4, 6)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 3, 3, 2, padding=1, output_padding=1, dilation=2),
        _real(2, 4, 5, 4),
    ),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), _real(2, 4, 5, 4)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(3, 2, 2, stride=2), _real(1, 3, 3, 3, 3)),
    "embedding": (lambda: nn.Embedding(11, 5), _tokens(3, 4)),
    "embedding padded": (lambda: nn.Embedding(11, 5, padding_idx=2), _tokens(5, 8)),
    "embedding negative padding": (lambda: nn.Embedding(11, 5, padding_idx=-9), _tokens(5, 8)),
    "embedding by frequency": (lambda: nn.Embedding(11, 5, scale_grad_by_freq=True), _tokens(9)),
    "attention": (SelfAttention, _real(2, 5, 8)),
    "attention, other keys": (lambda: SelfAttention(kdim=6, vdim=6), _real(2, 5, 8)),
    "recurrent": (lambda: FirstOutput(nn.LSTM(4, 3, 2, batch_first=True)), _real(2, 5, 4)),
    "recurrent cell": (lambda: nn.GRUCell(4, 3), _real(2, 4)),
    "Conv1D": (lambda: TransformersConv1D(6, 9), _real(2, 3, 6)),
    "tied": (TiedHead, _tokens(2, 5)),
    "tied in code": (FunctionalTie, _tokens(2, 5)),
    "experts": (Experts, _real(2, 4)),
    "two layers": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)),
        _real(2, 3, 5, 5),
    ),
}  # fmt: skip


def _reference(
    model: nn.Module, store: MemoryStore, thetas: dict[str, Tensor], x: Tensor
) -> Tensor:
    """Run the plain model on W + U diag(S theta) Vh, built by plain autograd."""
    weights = {}
    for name, factors in store.factors.items():
        base = dict(model.named_parameters())[name].detach()
        change = (factors.U * (factors.S * thetas[name]).unsqueeze(-2)) @ factors.Vh
        weights[name] = base + change.reshape(base.shape)
    return functional_call(model, weights, (x,), tie_weights=True)  # type: ignore[no-any-return]


def _leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_(x.is_floating_point())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("mode", "rank"),
    [("factored", None), ("composed", None), ("residual", None), ("auto", None), ("auto", 2)],
)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_autograd(case: str, mode: str, rank: int | None) -> None:
    torch.manual_seed(0)
    build, sample = CASES[case]
    model = build().double()
    plain = copy.deepcopy(model)
    x = sample()
    batch = ("stack",) if case == "experts" else ()
    small = min(min(p.flatten(1).shape) for p in model.parameters() if p.ndim > 1)
    store = MemoryStore(model, rank=None if rank is None else min(rank, small), batch=batch)
    attached = svftool.attach(model, store, mode=mode)  # type: ignore[arg-type]
    randomise(attached)

    ours = _leaf(x)
    model(ours).pow(2).sum().backward()
    theirs = _leaf(x)
    thetas = {
        name: theta.detach().clone().requires_grad_() for name, theta in attached.named_parameters()
    }
    expected = _reference(plain, store, thetas, theirs)
    expected.pow(2).sum().backward()

    torch.testing.assert_close(model(x), expected.detach(), rtol=1e-10, atol=1e-10)
    for name, theta in attached.named_parameters():
        torch.testing.assert_close(theta.grad, thetas[name].grad, rtol=1e-9, atol=1e-9)
    if ours.requires_grad:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.endswith("theta"))
