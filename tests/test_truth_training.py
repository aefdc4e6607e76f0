"""Attached models in other people's loops: right, or refused in one line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import svftool
from svftool.attaching import Attachment
from svftool.attaching.layer import belongs, rounding_of
from svftool.errors import FactorsError, ModelError
from tests.attaching import MemoryStore, randomise


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.r = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.b, self.n2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.holder = nn.ModuleDict({"inner": Inner()})

    def forward(self, x: Tensor) -> Tensor:
        y = self.n2(self.b(self.r(self.n(self.a(x)))))
        # A weight of a module that is not called, two levels below.
        return x + F.conv2d(y, self.holder["inner"].conv.weight)


Checkpoint = Callable[..., Any]


def whole(run: Checkpoint, block: Block, x: Tensor) -> Tensor:
    return run(block, x)


def single(run: Checkpoint, block: Block, x: Tensor) -> Tensor:
    y = x
    for layer in (block.a, block.n, block.r, block.b, block.n2):
        y = run(layer, y)
    return x + y


def from_norm(run: Checkpoint, block: Block, x: Tensor) -> Tensor:
    return x + run(lambda y: block.n2(block.b(block.r(block.n(y)))), block.a(x))


def from_relu(run: Checkpoint, block: Block, x: Tensor) -> Tensor:
    return x + run(lambda y: block.b(block.r(y)), block.n(block.a(x)))


def up_to_norm(run: Checkpoint, block: Block, x: Tensor) -> Tensor:
    return x + block.b(block.r(block.n(run(block.a, x))))


def twice(run: Checkpoint, block: Block, x: Tensor) -> Tensor:
    return block.a(x) + run(block.a, run(block.a, x))


class Net(nn.Module):
    def __init__(self, way: Any = whole, reentrant: bool | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Conv2d(4, 2, 1)
        self.way, self.reentrant = way, reentrant

    def run(self, function: Any, *args: Any) -> Any:
        if self.reentrant is None:
            return function(*args)
        return checkpoint(function, *args, use_reentrant=self.reentrant)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self.way(self.run, block, x)
        return self.head(x)


def gradients(way: Any, reentrant: bool | None, mode: str, passes: int = 1) -> list[Tensor]:
    torch.manual_seed(0)
    model = Net(way, reentrant).double()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    attached = svftool.attach(model.eval(), MemoryStore(model), mode=mode)
    randomise(attached)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for _ in range(passes):
        model(x).square().sum().backward()
    return [torch.zeros(1) if p.grad is None else p.grad for p in attached.parameters()]


@pytest.mark.parametrize("mode", ["auto", "factored", "residual", "composed"])
@pytest.mark.parametrize("way", [whole, single, from_norm, from_relu, up_to_norm, twice])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_those_without(way: Any, reentrant: bool, mode: str) -> None:
    expected = gradients(way, None, mode, passes=2)
    found = gradients(way, reentrant, mode, passes=2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_function_that_reads_a_weight_is_refused(reentrant: bool) -> None:
    def reads(run: Checkpoint, block: Block, x: Tensor) -> Tensor:
        return run(lambda y: F.conv2d(y, block.b.weight), x)

    with pytest.raises(ModelError, match=r"blocks\.0\.b\.weight: .* does not call"):
        gradients(reads, reentrant, "auto")


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("part", [False, True])
def test_a_reentrant_checkpoint_without_gradients_is_refused(part: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    svftool.attach(model, MemoryStore(model))
    with pytest.raises(ModelError, match="use_reentrant=False"):
        checkpoint(model[0] if part else model, torch.randn(2, 4), use_reentrant=True)


def test_a_part_without_gradients_keeps_those_of_the_rest() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = self.fc.weight.sum() * self.fc(x)
            return (self.fc.weight * (self.fc(x) - target).sum()).sum()

    found = []
    for mode in ("composed", "factored"):
        torch.manual_seed(0)
        model = Shared().double()
        attached = svftool.attach(model, MemoryStore(model), mode=mode)
        randomise(attached)
        model(torch.ones(2, 4, dtype=torch.float64)).backward()
        (theta,) = attached.parameters()
        assert theta.grad is not None
        found.append(theta.grad)
    torch.testing.assert_close(*found)


def small() -> tuple[nn.Sequential, Attachment, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    attached = svftool.attach(model, MemoryStore(model, dtype=torch.float32))
    randomise(attached)
    return model, attached, torch.randn(4, 6)


@torch.no_grad()
def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def reference(attached: Attachment, x: Tensor) -> Tensor:
    """Compute the pass from the singular values that there are now."""
    values = []
    for name, layer in attached.layers.items():
        base = attached.model.get_parameter(name).double()
        U, Vh = layer.U.detach(), layer.Vh.detach()
        delta = (layer.values() - layer.S_base).detach().double()
        values.append(base + (U.double() * delta) @ Vh.double())
    first, last = attached.model[0], attached.model[2]  # type: ignore[index]
    y = F.linear(x.double(), values[0], first.bias.double()).relu()
    return F.linear(y, values[1], last.bias.double()).detach()


def fused_step(attached: Attachment, new: list[Tensor]) -> None:
    for theta, value in zip(attached.parameters(), new, strict=True):
        theta.grad = theta.detach() - value
    torch.optim.SGD(attached.parameters(), lr=1.0, fused=True).step()


WRITES: dict[str, Callable[[nn.Parameter, Tensor], Any]] = {
    "data.copy_": lambda theta, new: theta.data.copy_(new),
    "data =": lambda theta, new: setattr(theta, "data", new),
    "set_": lambda theta, new: torch.no_grad()(theta.set_)(new),
    "foreach": lambda theta, new: torch._foreach_copy_([theta.data], [new]),
    "swap": lambda theta, new: torch.utils.swap_tensors(theta, nn.Parameter(new)),
    "numpy": lambda theta, new: theta.data.numpy().__setitem__(..., new.numpy()),
}


@pytest.mark.parametrize("write", [*WRITES, "fused"])
def test_evaluation_follows_values_however_they_were_written(write: str) -> None:
    model, attached, x = small()
    # Memory of its own, however the values get there.
    for theta in attached.parameters():
        theta.data = theta.data.clone()
    before, state = evaluated(model, x).clone(), copy.deepcopy(model.state_dict())
    new = [p.detach() + 0.5 for p in attached.parameters()]
    if write == "fused":
        fused_step(attached, new)
    else:
        for theta, value in zip(list(attached.parameters()), new, strict=True):
            WRITES[write](theta, value.clone())
    expected = reference(attached, x)
    assert not torch.allclose(before.double(), expected, rtol=1e-2)
    torch.testing.assert_close(evaluated(model, x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(evaluated(model, x).double(), expected, rtol=1e-5, atol=1e-5)
    plain = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(model.state_dict()["0.weight"], state["0.weight"])


def state_average(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Average as timm's and many other loops do: through the state dictionaries."""
    for mine, theirs in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(mine * decay + theirs * (1.0 - decay))


@pytest.mark.parametrize("trained", [False, True])
def test_averages_through_state_dictionaries_are_averages(trained: bool, tmp_path: Path) -> None:
    model, attached, x = small()
    if not trained:
        attached.set_deltas({n: torch.zeros_like(v.S_base) for n, v in attached.layers.items()})
    ema = copy.deepcopy(model)
    means = {name: value.clone() for name, value in attached.singular_values().items()}
    for seed in range(3):
        randomise(attached, seed=seed)
        state_average(ema, model, 0.5)
        for name, value in attached.singular_values().items():
            means[name] = (means[name] + value) / 2
    found = svftool.attaching.find_attachment(ema)
    assert found is not None
    for name, value in found.singular_values().items():
        torch.testing.assert_close(value, means[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        evaluated(ema, x).double(), reference(found, x), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(model.get_parameter("0.weight"), ema.get_parameter("0.weight"))


def test_averages_of_parameters_are_averages() -> None:
    model, attached, x = small()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    ema.update_parameters(model)
    before = evaluated(ema, x)
    randomise(attached, scale=0.5, seed=3)
    ema.update_parameters(model)
    found = svftool.attaching.find_attachment(ema)
    assert found is not None
    assert not torch.allclose(evaluated(ema, x), before)
    torch.testing.assert_close(
        evaluated(ema, x).double(), reference(found, x), rtol=1e-5, atol=1e-5
    )


def test_writing_something_else_to_a_state_dictionary_is_refused() -> None:
    model, _, x = small()
    model.state_dict()["0.weight"].normal_()
    with pytest.raises(ModelError, match=r"0\.weight: what was written"):
        model(x)
    model(x)


@pytest.mark.parametrize("change", ["in place", "replaced", "functional"])
def test_other_weights_under_an_attached_layer_are_refused(change: str) -> None:
    model, _, x = small()
    model(x)
    call: Callable[[Tensor], Tensor] = model
    with torch.no_grad():
        if change == "in place":
            model[0].weight.mul_(1.001)
        elif change == "replaced":
            model[0].weight = nn.Parameter(torch.randn(6, 6))
        else:
            state = dict(model.state_dict())
            call = partial(torch.func.functional_call, model, state)
    with pytest.raises(ModelError, match=r"0\.weight: the weight in the model"):
        call(x)


def test_what_is_frozen_stays_frozen(caplog: pytest.LogCaptureFixture) -> None:
    model, attached, x = small()
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if "theta" not in n}
    model.requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()
    assert "set free" in caplog.text
    for name, value in model.named_parameters():
        if "theta" not in name:
            assert torch.equal(value, kept[name]) == (not name.endswith("bias")), name
    free = {n for n, p in model.named_parameters() if p.requires_grad}
    assert free == {n for n in kept if n.endswith("bias")} | {
        n for n, _ in model.named_parameters() if "theta" in n
    }
    assert set(attached.whole_tensors()) == {"0.bias", "2.bias"}


def replica(model: nn.Module) -> nn.Module:
    """Copy a model as torch.nn.parallel.replicate does, but on the same device."""
    made = model._replicate_for_data_parallel()
    for name, value in model._parameters.items():
        setattr(made, name, None if value is None else value.clone())
    for name, child in model._modules.items():
        made._modules[name] = None if child is None else replica(child)
    return made


def test_replicas_are_refused() -> None:
    model, _, x = small()
    evaluated(model, x)
    for part in (replica(model), replica(model[0])):
        with pytest.raises(ModelError, match="DistributedDataParallel"):
            part(x)
    model(x)


@pytest.mark.parametrize("change", ["prune", "weight_norm"])
def test_parameters_that_others_take_away_are_refused(change: str) -> None:
    model, _, x = small()
    if change == "prune":
        prune.l1_unstructured(model[0], "weight", 0.5)
    else:
        parametrizations.weight_norm(model[0])
    with pytest.raises(ModelError, match="no parameter any more"):
        model(x)


def test_no_part_is_attached_twice() -> None:
    model, _, _ = small()
    cases: dict[str, tuple[nn.Module, str]] = {
        "the model": (model, "the model has"),
        "inside": (nn.Sequential(nn.Identity(), model), "its part 1 has"),
        "a part": (nn.Sequential(model[0], nn.ReLU()), "its part 0 has"),
        "a layer": (model[2], "the model has"),
    }
    tied = nn.Sequential(nn.Linear(6, 6))
    tied[0].weight = model[0].weight
    cases["a parameter"] = tied, r"0\.weight is the same tensor as 0\.weight"
    same = nn.Sequential(nn.Linear(6, 6))
    same[0].weight = nn.Parameter(model[0].weight.data)
    cases["memory"] = same, r"0\.weight is the same tensor as 0\.weight"
    for module, message in cases.values():
        with pytest.raises(ModelError, match=message):
            svftool.attach(
                module,
                MemoryStore(
                    module, [n for n, _ in module.named_parameters() if n.endswith("weight")][:1]
                ),
            )
    svftool.detach(model)
    svftool.detach(svftool.attach(tied, MemoryStore(tied)).model)


def test_two_attachments_in_one_model_are_told_apart(tmp_path: Path) -> None:
    both = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for part in both:
        svftool.attach(part, MemoryStore(part))
    with pytest.raises(ModelError, match="2 parts"):
        svftool.save_tuned(both, tmp_path / "t.svf.safetensors")


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_rounding_may_lie_between_a_weight_and_its_factors(
    dtype: torch.dtype, rank: int | None
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    store = MemoryStore(model, rank=rank, dtype=torch.float32)
    store.layers["0.weight"] = type(store.layers["0.weight"])(
        **{**vars(store.layers["0.weight"]), "dtype": "float32"}
    )
    base = copy.deepcopy(model).to(dtype)
    svftool.attach(base, store)
    for noise in (0.03, 0.02, 1e-3 if dtype == torch.float32 else 0.05):
        other = copy.deepcopy(model)
        with torch.no_grad():
            change = torch.randn_like(other[0].weight)
            other[0].weight += noise * change / change.norm() * other[0].weight.norm()
        with pytest.raises(FactorsError, match="other weights"):
            svftool.attach(other.to(dtype), store)


def test_a_weight_of_the_files_own_dtype_is_not_rounded() -> None:
    assert rounding_of(torch.bfloat16, torch.bfloat16) == 0.0
    assert rounding_of(torch.float32, torch.float16) == 0.0
    assert rounding_of(torch.bfloat16, torch.float16) > 0.0
    assert rounding_of(torch.float16, torch.bfloat16) > 0.0  # its small numbers vanish
    W = torch.randn(20, 30).bfloat16()
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    factors = svftool.factors.LayerFactors(U.float(), S, Vh.float())
    assert belongs(W, factors, 0.0)
    off = W.clone()
    off[0, 0] *= 1.02
    assert not belongs(off, factors, 0.0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_transforms_and_traces_are_right_or_refused() -> None:
    model, attached, x = small()
    expected = evaluated(model, x)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(model)(x), expected)
        torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    with pytest.raises(ModelError, match=r"torch\.func"):
        torch.vmap(model)(x)
    with pytest.raises(ModelError, match=r"torch\.jit\.trace"):
        torch.jit.trace(model, x)
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    with pytest.raises(ModelError, match=r"torch\.func"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)
    traced = torch.fx.symbolic_trace(model)
    traced(x).sum().backward()
    assert all(p.grad is not None for p in attached.parameters())
    torch.testing.assert_close(evaluated(traced, x), expected)
    with pytest.raises(AttributeError):
        torch.jit.script(model)


def test_second_derivatives_are_refused_where_a_layer_is_split() -> None:
    model, _, x = small()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hugging_face_models_checkpoint_their_blocks() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    ids = torch.arange(12).reshape(2, 6)
    found = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).double()
        attached = svftool.attach(model, MemoryStore(model))
        randomise(attached)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for p in attached.parameters()])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-8, atol=1e-10)
