"""An attached model: what it keeps of the plain one, and how the two turn into each other."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import svftool
from svftool.attaching import Attachment, find_attachment
from svftool.attaching.lifecycle import offload
from svftool.errors import FactorsError, ModelError, UsageError
from tests.attaching import MemoryStore, randomise


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    ).eval()


def attached_net(**options: object) -> tuple[nn.Sequential, Attachment, Tensor]:
    model = small_net()
    store = MemoryStore(model, dtype=torch.float32)
    x = torch.randn(4, 3, 6, 6)
    return model, svftool.attach(model, store, **options), x  # type: ignore[arg-type]


def test_before_training_the_model_is_the_original() -> None:
    x = torch.randn(4, 3, 6, 6)
    expected = small_net()(x)
    model, _, _ = attached_net()
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_only_singular_values_train_and_every_one_does() -> None:
    model, attached, x = attached_net()
    assert [p for p in model.parameters() if p.requires_grad] == list(attached.parameters())
    model(x).square().sum().backward()
    for name, theta in attached.named_parameters():
        assert theta.grad is not None
        assert theta.grad.abs().max() > 0, name


@pytest.mark.parametrize("make", ["adamw", "fused", "foreach", "sgd"])
def test_evaluation_follows_every_optimiser_step(make: str) -> None:
    model, attached, x = attached_net()
    optimiser = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
        "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    }[make](list(attached.parameters()))
    for _ in range(3):
        with torch.inference_mode():
            frozen = model(x)
        recorded = model(x)
        torch.testing.assert_close(frozen, recorded.detach(), rtol=1e-4, atol=1e-4)
        recorded.square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        assert not torch.allclose(model(x), frozen, rtol=1e-3)


def test_detaching_merges_or_restores() -> None:
    model, attached, x = attached_net()
    before = copy.deepcopy(model)
    randomise(attached)
    tuned = model(x).detach()
    restored = copy.deepcopy(model)
    svftool.detach(model)
    torch.testing.assert_close(model(x), tuned, rtol=1e-5, atol=1e-5)
    svftool.detach(restored, merge=False)
    assert torch.equal(restored(x), small_net()(x))
    for plain in (model, restored):
        assert repr(plain) == repr(small_net())
        assert find_attachment(plain) is None
        assert all(parameter.requires_grad for parameter in plain.parameters())
        assert all(not vars(module).keys() & {"weight"} for module in plain.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    assert find_attachment(before) is not None


def test_detaching_an_untouched_model_keeps_every_bit() -> None:
    model, _, _ = attached_net()
    svftool.detach(model)
    for found, expected in zip(model.parameters(), small_net().parameters(), strict=True):
        assert torch.equal(found, expected)


def test_modules_keep_class_and_names() -> None:
    model, _, _ = attached_net()
    plain = small_net()
    assert [type(m) for m in model] == [type(m) for m in plain]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert isinstance(model[0].weight, nn.Parameter)
    assert not model[0].weight.requires_grad
    assert not [name for name, _ in model.named_buffers() if "svf" in name]


def test_state_dict_holds_merged_weights_and_loads_into_a_plain_model() -> None:
    model, attached, x = attached_net()
    randomise(attached)
    plain = small_net()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), model(x).detach(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain(x), small_net()(x), rtol=1e-2)


def test_a_merged_state_dict_loads_back_into_an_attached_model() -> None:
    model, attached, x = attached_net()
    randomise(attached)
    expected = attached.singular_values()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other, again, _ = attached_net()
    other.load_state_dict(state)
    for name, values in again.singular_values().items():
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(other[0].weight, small_net()[0].weight)


def test_other_weights_are_refused_by_an_attached_model() -> None:
    model, attached, _ = attached_net()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["0.weight"] += 0.1 * torch.randn_like(state["0.weight"])
    with pytest.raises(RuntimeError, match=r"0\.weight: differs from the base by more than"):
        model.load_state_dict(state)
    assert torch.equal(attached.layers["0.weight"].delta(), torch.zeros(6))


def test_copies_and_pickles_are_independent() -> None:
    model, attached, x = attached_net()
    randomise(attached)
    expected = model(x).detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        found = find_attachment(twin)
        assert found is not None
        assert found.model is twin
        randomise(found, seed=3)
        assert not torch.allclose(twin(x), expected)
        svftool.detach(twin)
        assert "svf" not in repr(twin)
    assert torch.equal(model(x), expected)


def test_parts_of_a_model_can_be_called() -> None:
    model, attached, x = attached_net()
    randomise(attached)
    assert torch.equal(model[1](model[0](x)), nn.Sequential.forward(model[:2], x))
    assert not torch.allclose(model[0](x), small_net()[0](x))


def test_an_exception_leaves_the_parameters_uncovered() -> None:
    model, _, _ = attached_net()
    with pytest.raises(RuntimeError):
        model(torch.randn(4, 7, 6, 6))
    assert isinstance(model[0].weight, nn.Parameter)
    assert isinstance(model[6].weight, nn.Parameter)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, attached, x = attached_net()
    randomise(attached)
    model(x).square().sum().backward()
    expected = [theta.grad for theta in attached.parameters()]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    for theta, gradient in zip(attached.parameters(), expected, strict=True):
        torch.testing.assert_close(theta.grad, gradient)


@pytest.mark.parametrize("mode", ["factored", "residual", "composed"])
def test_autocast_computes_in_low_precision_and_trains_in_float32(mode: str) -> None:
    model, attached, x = attached_net(mode=mode)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        assert model[0](x).dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.05)
    found.float().square().sum().backward()
    assert all(theta.grad.dtype == torch.float32 for theta in attached.parameters())


@pytest.mark.parametrize("grad", [True, False])
def test_a_model_that_was_moved_is_known_again_under_autocast(grad: bool) -> None:
    """Its weights are looked at in the first pass, which autocast makes of less precision."""
    model, _, x = attached_net()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        assert model(x).isfinite().all()


def test_what_is_kept_of_a_pass_under_autocast_is_exact() -> None:
    model, attached, x = attached_net()
    randomise(attached, 0.1)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        assert torch.equal(model(x), expected(x))


def test_a_merged_state_dict_loads_under_autocast() -> None:
    model, attached, _ = attached_net()
    randomise(attached, 0.1)
    state, wanted = model.state_dict(), attached.singular_values()
    other, loaded, _ = attached_net()
    with torch.autocast("cpu", torch.bfloat16):
        other.load_state_dict(state)
    for name, S in loaded.singular_values().items():
        torch.testing.assert_close(S, wanted[name], rtol=1e-5, atol=1e-5)


def test_a_bfloat16_model_runs_residual_and_keeps_its_output() -> None:
    model = small_net().to(torch.bfloat16)
    store = MemoryStore(model, dtype=torch.float32)
    x = torch.randn(4, 3, 6, 6, dtype=torch.bfloat16)
    expected = model(x).detach()
    attached = svftool.attach(model, store)
    assert torch.equal(model(x).detach(), expected)
    model(x).float().square().sum().backward()
    for theta in attached.parameters():
        assert theta.dtype == torch.float32
        assert theta.grad is not None


def test_casting_the_model_keeps_singular_values_in_float32() -> None:
    model, attached, x = attached_net()
    randomise(attached, 1e-3)
    values = attached.singular_values()
    model.to(torch.bfloat16)
    for name, S in attached.singular_values().items():
        assert torch.equal(S, values[name])
    assert model(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_channels_last_models_stay_so() -> None:
    model, attached, x = attached_net()
    randomise(attached)
    expected = model(x).detach()
    model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    out = model[0](x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-4, atol=1e-5)
    svftool.detach(model)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-4, atol=1e-5)


def test_torch_fast_paths_see_the_tuned_weights() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 4, 8)
    attached = svftool.attach(model, MemoryStore(model, dtype=torch.float32))
    randomise(attached, 0.3)
    expected = model(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.layers[0](x), model.layers[0](x.clone().requires_grad_()))


def test_layers_that_are_not_used_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    model.forward = model["used"].forward  # type: ignore[method-assign]
    svftool.attach(model, MemoryStore(model))
    for _ in range(2):
        model(torch.randn(2, 4))
    assert [record.getMessage() for record in caplog.records] == [
        "1 layer was not used in the first training pass, so singular values there do not "
        "train: idle.weight"
    ]


@pytest.mark.parametrize("parametrisation", ["scale", "shift", "absolute"])
def test_parametrisations_start_at_the_base(parametrisation: str) -> None:
    _, attached, _ = attached_net(parametrisation=parametrisation)
    base = {name: layer.S_base.detach() for name, layer in attached.layers.items()}
    for name, values in attached.singular_values().items():
        assert torch.equal(values, base[name])
    wanted = {name: 1.5 * S + 0.25 for name, S in base.items()}
    attached.set_singular_values(wanted)
    for name, values in attached.singular_values().items():
        torch.testing.assert_close(values, wanted[name], rtol=1e-6, atol=1e-6)


def test_what_a_parametrisation_cannot_express_is_kept_beside_it() -> None:
    model = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.diag(torch.tensor([3.0, 2.0, 0.0])))
    attached = svftool.attach(model, MemoryStore(model), train_rank="top:1")
    wanted = torch.tensor([4.0, 1.0, 0.5])
    attached.set_singular_values({"weight": wanted})
    assert torch.equal(attached.singular_values()["weight"].float(), wanted)
    assert attached.layers["weight"].theta.shape == (1,)


def test_a_band_trains_alone() -> None:
    model, attached, x = attached_net(train_rank="top:2", parametrisation="shift")
    optimiser = torch.optim.SGD(list(attached.parameters()), lr=0.1)
    model(x).square().sum().backward()
    optimiser.step()
    base = {name: layer.S_base.detach() for name, layer in attached.layers.items()}
    for name, values in attached.singular_values().items():
        assert torch.equal(values[2:], base[name][2:])
        assert not torch.equal(values[:2], base[name][:2])


def test_nonnegative_values_stop_at_zero_and_come_back() -> None:
    model = nn.Linear(4, 4, bias=False)
    attached = svftool.attach(model, MemoryStore(model), parametrisation="shift", nonnegative=True)
    layer = attached.layers["weight"]
    with torch.no_grad():
        layer.theta.fill_(-100.0)
    assert torch.equal(layer.values(), torch.zeros_like(layer.S_base))
    layer.values().sum().backward()
    assert torch.equal(layer.theta.grad, torch.ones_like(layer.theta))


def test_frozen_singular_values_run_dense() -> None:
    model, attached, x = attached_net()
    randomise(attached)
    for theta in attached.parameters():
        theta.requires_grad_(False)
    model[0].bias.requires_grad_(True)
    with torch.inference_mode():
        expected = model(x)
    found = model(x)
    torch.testing.assert_close(found.detach(), expected)
    found.square().sum().backward()
    assert model[0].bias.grad is not None
    assert model[0].bias.grad.abs().max() > 0


def test_a_second_attachment_is_refused() -> None:
    model, _, _ = attached_net()
    with pytest.raises(ModelError, match="attached singular values already"):
        svftool.attach(model, MemoryStore(small_net()))
    with pytest.raises(ModelError, match="no attached singular values"):
        svftool.detach(small_net())


def test_a_layer_without_a_place_is_an_error() -> None:
    store = MemoryStore(small_net(), rename={"6.weight": "elsewhere.weight"})
    other = small_net()
    with torch.no_grad():
        other[6].weight.normal_()
    with pytest.raises(FactorsError, match=r"1 of 3 layers has no place .*elsewhere\.weight"):
        svftool.attach(other, store)
    assert "svf" not in repr(other)


def test_other_weights_are_an_error() -> None:
    torch.manual_seed(5)
    other = nn.Sequential(*small_net())
    with torch.no_grad():
        other[0].weight.normal_()
    with pytest.raises(FactorsError, match=r"1 layer is not those of the model: 0\.weight"):
        svftool.attach(other, MemoryStore(small_net()))
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_another_shape_is_an_error() -> None:
    other = small_net()
    other[6] = nn.Linear(96, 7)
    with pytest.raises(FactorsError, match=r"6\.weight \(shape \(7, 96\), expected \(5, 96\)\)"):
        svftool.attach(other, MemoryStore(small_net()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"parametrisation": "log"}, UsageError, "parametrisation 'log', expected one of scale"),
        ({"mode": "fast"}, UsageError, "mode 'fast', expected one of auto"),
        ({"train_rank": "most"}, UsageError, "train rank 'most'"),
        ({"train_rank": "5-5"}, UsageError, "selects no singular value"),
        ({"train_rank": "500-600"}, UsageError, "train rank '500-600': no layer has these"),
        ({"train_rank": "top:3", "regime": "rows"}, UsageError, "--train-rank has no meaning"),
        ({"include": ["nothing*"]}, ModelError, "none of 3 decomposed layers is left"),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attached_net(**options)


def test_include_and_exclude_choose_layers() -> None:
    _, attached, _ = attached_net(include=["0.*", "6.*"], exclude=["6.*"])
    assert list(attached.layers) == ["0.weight"]


def test_singular_values_of_unknown_layers_are_refused() -> None:
    _, attached, _ = attached_net()
    with pytest.raises(FactorsError, match=r"x\.weight \(not attached\)"):
        attached.set_singular_values({"x.weight": torch.ones(3)})
    with pytest.raises(FactorsError, match=r"0\.weight \(\(3,\), expected \(6,\)\)"):
        attached.set_singular_values({"0.weight": torch.ones(3)})
    assert Path("memory") not in Path().iterdir()


def test_offloaded_weights_are_there_when_they_are_used() -> None:
    model, attached, x = attached_net(offload_base=True)
    plain = small_net()
    assert torch.equal(model[6].weight, plain[6].weight)
    assert model[6].weight.stride() == plain[6].weight.stride()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    randomise(attached)
    tuned = model(x).detach()
    twin = copy.deepcopy(model)
    svftool.detach(model)
    torch.testing.assert_close(model(x), tuned, rtol=1e-5, atol=1e-5)
    svftool.detach(twin, merge=False)
    assert torch.equal(twin[6].weight, plain[6].weight)


def test_offloaded_weights_take_no_memory_until_then() -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("resident memory is read from Linux's /proc")

    def anonymous() -> int:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    model = nn.Linear(3000, 3000, bias=False)
    weight = model.weight.detach().clone()
    before = anonymous()
    offload(model.weight)
    assert before - anonymous() > 30_000
    assert torch.equal(model.weight, weight)


def test_layouts_survive_offloading() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    expected = weight.detach().clone()
    offload(weight)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(weight, expected)
