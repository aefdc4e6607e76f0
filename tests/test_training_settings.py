"""Accumulation, loading ahead, patience, smoothing, a rate a regime, frozen bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import write_pictures
from safetensors.torch import save_file
from test_training_batches import Made, classification, language, segmentation
from test_training_compare import Kept, SmallNet
from test_training_loop import KillAt, Killed, LeastSquares, fit, linear
from torch import Tensor, nn

from svftool.attaching import apply_regime
from svftool.checkpoints import TensorInfo, open_checkpoint
from svftool.choices.acting import acting, check_acting
from svftool.choices.regimes import parse_regime
from svftool.choices.training import check_comparison, parse_rates, spelt_among
from svftool.errors import DataError, UsageError
from svftool.factors import FactorStore, open_factors, read_tuned
from svftool.models.load import keep_vectors
from svftool.stages.decompose import decompose
from svftool.stages.finetune import finetune
from svftool.tasks.classification import Classification
from svftool.training import ALONE, Group, Settings, StateFile, TrainingPlan, compare
from svftool.training.batches import Batches
from svftool.training.memory import memory_need
from svftool.training.optimise import rate_factor


def summed(
    draw: Any, model: nn.Module, settings: Settings, *, group: Group = ALONE
) -> tuple[list[Tensor], float]:
    """Return what goes backward of one step, and its loss."""
    parameters = list(model.parameters())
    batches = Batches(model, parameters, draw, settings, seed=0, group=group)
    model.zero_grad()
    value, _ = batches.differentiate(1, False, lambda loss: loss.backward())
    zeros = [torch.zeros_like(one) if one.grad is None else one.grad.clone() for one in parameters]
    return zeros, value


@pytest.mark.parametrize("make", [classification, segmentation, language])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(2, 3), (1, 6), (4, 2)])
def test_accumulated_gradients_are_those_of_the_larger_batch(
    make: Callable[[Path], Made], batch_size: int, accumulate: int, tmp_path: Path
) -> None:
    draw, model = make(tmp_path)
    model.eval()
    large = Settings(batch_size=batch_size * accumulate, steps=4)
    expected, loss = summed(draw, model, large)
    seen: list[int] = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    small = Settings(batch_size=batch_size, accumulate=accumulate, steps=4)
    found, value = summed(draw, model, small)
    handle.remove()
    assert len(seen) >= min(accumulate, draw.size) / 2
    assert value == pytest.approx(loss, rel=1e-5)
    assert any(float(one.abs().max()) > 1e-4 for one in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@dataclass(frozen=True)
class Told(Group):
    """A process that is told how many terms there are over all of them."""

    terms: float = 0.0

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        return [self.terms] if len(values) == 1 else list(values)


@pytest.mark.parametrize("make", [classification, language])
def test_accumulated_shares_of_processes_add_up_to_the_whole(
    make: Callable[[Path], Made], tmp_path: Path
) -> None:
    draw, model = make(tmp_path)
    model.eval()
    settings = Settings(batch_size=2, accumulate=4, steps=4)
    whole = Settings(batch_size=8, steps=4)
    expected, loss = summed(draw, model, whole)
    batches = Batches(model, list(model.parameters()), draw, whole, seed=0, group=ALONE)
    terms = float(draw.terms(batches._batch(1)[1]))
    found = [torch.zeros_like(one) for one in expected]
    total = 0.0
    for rank in range(3):
        parts, value = summed(draw, model, settings, group=Told(rank, 3, terms))
        found = [one + part for one, part in zip(found, parts, strict=True)]
        total += value
    assert total == pytest.approx(loss, rel=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_an_accumulated_run_ends_where_the_larger_batch_does() -> None:
    whole, parts = linear(), linear()
    whole[1].p = parts[1].p = 0.0
    fit(whole, LeastSquares(), steps=20)
    outcome = fit(parts, LeastSquares(), steps=20, batch_size=4, accumulate=4)
    assert outcome.steps == 20
    torch.testing.assert_close(parts[2].weight, whole[2].weight, rtol=1e-4, atol=1e-6)
    assert Settings(batch_size=4, accumulate=4).step_count(1000) == Settings().step_count(1000)


def test_batches_that_are_loaded_ahead_are_the_same() -> None:
    here, ahead = linear(), linear()
    fit(here, LeastSquares(noise=0.3), steps=6)
    draw = LeastSquares(noise=0.3)
    fit(ahead, draw, steps=6, workers=2)
    assert torch.equal(here[2].weight, ahead[2].weight)
    assert len(draw.asked) == 0, "another process loaded them"


def test_an_error_in_another_process_is_the_error() -> None:
    class Broken(LeastSquares):
        def batch(self, indices: Tensor, generator: torch.Generator) -> Any:
            raise DataError("a.png: truncated, expected an image")

    with pytest.raises(DataError, match=r"^a\.png: truncated, expected an image$"):
        fit(linear(), Broken(), steps=3, workers=1)


class Worsening(LeastSquares):
    """Says that the second measurement was the best."""

    def __init__(self) -> None:
        super().__init__(held_out=5)
        self.times = 0

    def evaluate(self, model: nn.Module, part: Any = "query", **_: Any) -> dict[str, float]:
        self.times += 1
        return {"error": 1.0 if self.times == 2 else 1.0 + self.times}


def test_a_run_stops_where_held_out_examples_do_no_better(tmp_path: Path) -> None:
    model = linear()
    outcome = fit(model, Worsening(), patience=3)
    assert (outcome.ending, outcome.steps, outcome.kept) == ("stopped", 50, 20)
    # Gone on from within the wait, it stops at the same step with the same weights.
    state = StateFile(tmp_path / "state", every=30)
    draw = Worsening()
    with pytest.raises(Killed):
        fit(linear(), draw, patience=3, saved=state, log=KillAt(33))
    late, resumed = Worsening(), linear()
    late.times = 3
    found = fit(resumed, late, patience=3, saved=state)
    assert (found.ending, found.steps, found.kept) == ("stopped", 50, 20)
    assert torch.equal(resumed[2].weight, model[2].weight)
    assert fit(linear(), Worsening(), patience=9).ending == "finished"
    with pytest.raises(UsageError, match="--patience: no examples are held out"):
        fit(linear(), LeastSquares(), patience=3)


def test_labels_are_smoothed_in_training_alone(tmp_path: Path) -> None:
    draw, model = classification(tmp_path)
    model.eval()
    settings = Settings(batch_size=6, steps=4)
    _, plain = summed(draw, model, settings)
    _, smooth = summed(draw, model, replace(settings, label_smoothing=0.3))
    inputs, labels = draw.batch(torch.arange(6), torch.Generator())
    logits = model(inputs)
    direct = nn.CrossEntropyLoss(label_smoothing=0.3)(logits, labels)
    found = draw.smoothed_loss(model, (inputs, labels), 0.3)
    torch.testing.assert_close(found, direct)
    assert smooth != pytest.approx(plain, rel=1e-3)
    with pytest.raises(UsageError, match="--label-smoothing has no meaning for this task"):
        fit(linear(), LeastSquares(), label_smoothing=0.1)


def test_a_warm_up_is_a_share_or_a_number_of_steps() -> None:
    assert [rate_factor(step, 40, 4) for step in range(40)] == [
        rate_factor(step, 40, 0.1) for step in range(40)
    ]
    assert rate_factor(0, 40, 0.0) == 1.0
    assert rate_factor(9, 10, 50) == 1.0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0.01", (0.01, {})),
        ("svf=1e-2,full=1e-4", (None, {"svf": 0.01, "full": 1e-4})),
        (" 1e-3, lora:8=0.1", (1e-3, {"lora:8": 0.1})),
    ],
)
def test_rates_are_read(text: str, found: tuple[float | None, dict[str, float]]) -> None:
    assert parse_rates(text) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "--lr 'fast', expected a number such as 1e-3"),
        ("svf=", "expected a number"),
        ("svf=nan", "expected a number"),
        ("1,2", "two rates without a regime"),
        ("svf=1,svf=2", "svf twice"),
        ("svf+bias=1,bias+svf=2", "bias.svf twice"),
        ("svff=1", "regime 'svff', expected one of"),
        ("head=1", "Use --head-lr"),
    ],
)
def test_rates_that_cannot_be_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_rates(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"settings": Settings(lr_of={"full": 1.0})}, "--lr full: not among the regimes"),
        (
            {"against": "lora:8"},
            "--against lora:8: not among the regimes that are trained, svf, he",
        ),
        ({"against": "svf", "regimes": ["svf"]}, "--against: a single regime"),
        ({"against": "svf", "options": {"evaluation": Path("none")}}, "--eval none measures noth"),
        ({"settings": Settings(steps=2, head_first=5)}, "--head-first is 5, expected fewer than"),
        ({"settings": Settings(patience=2)}, "--patience: no examples are held out"),
        (
            {
                "settings": Settings(patience=2),
                "task": "few-shot-segmentation",
                "options": {"select_on": "last"},
            },
            "--select-on last holds nothing out",
        ),
        (
            {"settings": Settings(label_smoothing=0.1), "task": "few-shot-segmentation"},
            "--label-smoothing has no meaning",
        ),
    ],
)
def test_what_has_nothing_to_act_on_is_refused(given: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {
        "settings": Settings(), "regimes": ["svf", "head"], "against": None,
        "task": "classification", "options": {},
    }  # fmt: skip
    chosen = {**usual, **given}
    check_comparison(usual["settings"], usual["regimes"], against="head", task="classification",
                     options={"hold_out": 0.2})  # fmt: skip
    with pytest.raises(UsageError, match=message):
        check_comparison(chosen.pop("settings"), chosen.pop("regimes"), **chosen)


def test_a_regime_is_known_by_what_it_trains() -> None:
    settings = Settings(lr_of=parse_rates("bias+svf=1e-3,entries:4.0x=0.1")[1])
    regimes = ["head", "svf+bias", "entries:4x:gradient"]
    check_comparison(settings, regimes, against="bias+svf", task="classification", options={})
    assert [settings.of_regime(name).lr for name in regimes] == [None, 1e-3, 0.1]
    assert spelt_among("bias+svf", map(parse_regime, regimes)) == "svf+bias"


@pytest.mark.parametrize(
    ("regime", "option", "value"),
    [
        ("rows", "train_rank", "top:3"),
        ("core:8", "train_rank", "top:3"),
        ("entries:8:band", "train_rank", 3),
        ("rows", "nonnegative", True),
        ("rows", "parametrisation", "shift"),
        ("lora:2", "parametrisation", "shift"),
        ("bias", "nonnegative", True),
        ("norm", "include", ["*"]),
        ("full", "exclude", ["nope*"]),
    ],
)
def test_an_option_that_acts_on_no_regime_is_refused(
    regime: str, option: str, value: object
) -> None:
    head, one = parse_regime("head"), parse_regime(regime)
    with pytest.raises(UsageError, match=f"has no meaning for --regime head, {regime}, only for"):
        check_acting([head, one], {option: value})
    check_acting([head, one, parse_regime("svf")], {option: value})
    assert acting(one, {option: value}) == {}


def test_an_option_acts_on_its_regimes_and_the_usual_value_on_none() -> None:
    layers = {"include": ["*"], "exclude": ["*"]}
    assert acting(parse_regime("lora:2"), layers) == layers
    assert acting(parse_regime("salt:1+bias"), {"train_rank": 2}) == {"train_rank": 2}
    assert acting(parse_regime("core:2"), {"nonnegative": True}) == {"nonnegative": True}
    usual = {"include": (), "parametrisation": "scale", "nonnegative": False, "train_rank": None}
    check_acting([parse_regime("full")], usual)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "--accumulate is 0"),
        ({"label_smoothing": 1.0}, "--label-smoothing is 1"),
        ({"label_smoothing": -0.1}, "--label-smoothing is -0.1"),
        ({"patience": 0}, "--patience is 0"),
        ({"workers": 1000}, "--workers is over 256"),
        ({"clip": 0.0}, "--clip-grad is 0"),
        ({"lr_of": {"svf": 0.0}}, "--lr svf is 0"),
        ({"dtype": "bfloat16", "precision": "fp16"}, "--precision fp16"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings(**options)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FactorStore]:
    """Yield the factors of a `SmallNet`."""
    save_file(SmallNet().state_dict(), tmp_path / "base.safetensors", metadata={"format": "pt"})
    decompose(tmp_path / "base.safetensors", tmp_path / "factors")
    with open_factors(tmp_path / "factors") as opened:
        yield opened


def plan_of(store: FactorStore, folder: Path, settings: Settings, **options: Any) -> TrainingPlan:
    def build() -> nn.Module:
        model = SmallNet()
        if settings.dtype == "bfloat16":
            with open_checkpoint(folder / "base.safetensors") as checkpoint:
                keep_vectors(model.to(torch.bfloat16), checkpoint)
        return model

    data = folder / "data"
    if not data.exists():
        write_pictures(data, count=6)
    return TrainingPlan(
        build=build,
        store=store,
        tasks=[Classification(data, shots=3, head="keep", augment="none")],
        settings=settings,
        device=torch.device("cpu"),
        **{"regimes": ["svf"], "seeds": [0], **options},
    )


def test_the_bits_of_a_result_depend_on_all_settings_but_the_workers() -> None:
    usual = Settings(lr=0.1)
    others: dict[str, Any] = {
        "steps": 7, "epochs": 2.0, "batch_size": 3, "optimizer": "sgd", "lr": 0.2,
        "lr_of": {"svf": 1.0}, "head_lr": 0.3, "tune_lr": True, "lr_scale": 2.0, "head_scale": 2.0,
        "decay": 0.1, "head_decay": 0.1, "head_first": 1, "warmup": 0.2, "clip": None,
        "precision": "bf16", "dtype": "bfloat16", "accumulate": 2, "label_smoothing": 0.1,
        "patience": 2, "workers": 2, "safeguard": "always",
    }  # fmt: skip
    assert set(others) == {one.name for one in fields(Settings)}
    same = [n for n, v in others.items()
            if replace(usual, **{n: v}).for_bits() == usual.for_bits()]  # fmt: skip
    assert same == ["workers"]


def test_a_regime_has_its_own_rate(store: FactorStore, tmp_path: Path) -> None:
    settings = Settings(steps=2, lr=0.5, lr_of={"svf": 0.25})
    regimes = ["svf", "bias", "full"]
    runs, _ = compare(plan_of(store, tmp_path, settings, regimes=regimes), Kept())
    rates = {run.regime: max(v for k, v in run.learning_rates.items() if k != "head")
             for run in runs}  # fmt: skip
    assert rates == {"svf": 0.25, "bias": 0.5, "full": 0.5}


@pytest.mark.parametrize("regime", ["head", "svf", "svf+bias", "norm", "lora:2", "full"])
def test_what_is_trained_stays_float32_on_frozen_bfloat16(
    regime: str, store: FactorStore, tmp_path: Path
) -> None:
    if regime.startswith("lora"):
        pytest.importorskip("peft")
    kept: dict[str, dict[str, Tensor]] = {}
    dtypes: dict[str, set[torch.dtype]] = {}

    class Keep(Kept):
        def __call__(self, run: Any, trainable: Any, task: Any) -> Path:
            live = [p for p in trainable.model.parameters() if p.requires_grad]
            dtypes[name] = {p.dtype for p in live}
            frozen = [p for p in trainable.model.parameters() if not p.requires_grad]
            dtypes[f"{name} frozen"] = {p.dtype for p in frozen if p.ndim > 1 and p.numel() > 8}
            kept[name] = trainable.singular_values() | trainable.whole_tensors()
            return super().__call__(run, trainable, task)

    losses = {}
    for name in ("float32", "bfloat16"):
        settings = Settings(steps=20, batch_size=9, dtype=name, lr=0.01, head_lr=0.02)
        runs, _ = compare(plan_of(store, tmp_path, settings, regimes=[regime]), Keep())
        losses[name] = (runs[0].before["loss"], runs[0].after["loss"])
        assert not torch.is_autocast_enabled("cpu")
    assert dtypes["bfloat16"] == {torch.float32}
    assert dtypes["bfloat16 frozen"] <= {torch.bfloat16}
    # Steps are taken and have their effect: a stale copy of the weights would not learn.
    for before, after in losses.values():
        assert after < before
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)


def test_vectors_are_not_rounded(tmp_path: Path) -> None:
    model = SmallNet()
    with torch.no_grad():
        model.bn.running_var.fill_(1.001)
    save_file(model.state_dict(), tmp_path / "m.safetensors", metadata={"format": "pt"})
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        keep_vectors(model.to(torch.bfloat16), checkpoint)
    assert model.conv.weight.dtype == model.fc.weight.dtype == torch.bfloat16
    assert torch.equal(model.bn.running_var, torch.full((8,), 1.001))
    assert model.conv.bias.dtype == model.bn.weight.dtype == torch.float32


def test_the_memory_that_is_said_is_what_is_held(store: FactorStore, tmp_path: Path) -> None:
    with open_checkpoint(tmp_path / "base.safetensors") as checkpoint:
        for dtype in ("float32", "bfloat16"):
            settings = Settings(dtype=dtype)
            need = memory_need(["head", "svf"], checkpoint, store, settings)
            model = SmallNet().to(getattr(torch, dtype))
            keep_vectors(model, checkpoint)
            held = sum(p.nbytes for p in model.parameters())
            trainable = apply_regime(model, "svf", store)
            layer = next(iter(trainable.attachment.layers.values()))
            buffers = sum(b.nbytes for b in SmallNet().buffers() if b.is_floating_point())
            assert need.weights == held + buffers
            assert need.factors == sum(
                one.U.nbytes + one.Vh.nbytes for one in trainable.attachment.layers.values()
            )
            assert layer.U.dtype == getattr(torch, dtype)
        full = memory_need(["head", "full"], checkpoint, store, Settings())
        assert (full.regime, full.factors) == ("full", 0)
        assert full.trained == 4 * full.weights


@dataclass(frozen=True)
class Shape:
    """What is asked of a decomposed layer where nothing is read."""

    matrix: tuple[int, int]

    @property
    def rank(self) -> int:
        return min(self.matrix)


@dataclass(frozen=True)
class Shapes:
    """Stands for a checkpoint and its factors by the shapes of a Llama alone."""

    hidden: int = 4096
    inner: int = 14336
    values: int = 1024
    blocks: int = 32
    words: int = 128256
    path: Path = Path("factors")

    @property
    def layers(self) -> dict[str, Shape]:
        side, inner = self.hidden, self.inner
        block = {"q": (side, side), "k": (self.values, side), "v": (self.values, side),
                 "o": (side, side), "gate": (inner, side), "up": (inner, side),
                 "down": (side, inner)}  # fmt: skip
        return {
            f"{n}.{name}": Shape(one) for n in range(self.blocks) for name, one in block.items()
        }

    @property
    def infos(self) -> dict[str, TensorInfo]:
        outer = {"embed": (self.words, self.hidden), "head": (self.words, self.hidden)}
        vectors = {f"norm.{n}": (self.hidden,) for n in range(2 * self.blocks + 1)}
        shapes = {name: one.matrix for name, one in self.layers.items()} | outer | vectors
        return {n: TensorInfo(n, torch.bfloat16, shape, "") for n, shape in shapes.items()}


def test_a_model_of_eight_billion_numbers_needs_less_than_60_gb() -> None:
    shapes: Any = Shapes()
    assert sum(one.numel for one in shapes.infos.values()) == 8_030_261_248
    need = {
        dtype: memory_need(["svf"], shapes, shapes, Settings(dtype=dtype)).total
        for dtype in ("float32", "bfloat16")
    }
    assert need["float32"] > 60e9 > 40e9 > need["bfloat16"] > 30e9
    adapters = memory_need(["lora:8"], shapes, shapes, Settings(dtype="bfloat16"))
    assert adapters.total < 17e9
    assert (
        "needs about 33."
        in memory_need(["svf"], shapes, shapes, Settings(dtype="bfloat16")).sentence()
    )


def test_a_language_model_is_trained_on_frozen_bfloat16(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from language import write_model, write_texts

    base = write_model(tmp_path / "base")
    decompose(base, tmp_path / "factors")
    texts = write_texts(tmp_path / "t.jsonl", [{"text": "abc abd abe." * n} for n in (1, 2, 3)])
    metrics = {}
    for dtype in ("float32", "bfloat16"):
        settings = Settings(steps=10, lr=0.3, dtype=dtype, batch_size=2, accumulate=2)
        result = finetune(
            tmp_path / "factors", data=texts, output=tmp_path / f"{dtype}.svf.safetensors",
            task="language", evaluation=texts, settings=settings, device="cpu",
        )  # fmt: skip
        (run,) = result.runs
        metrics[dtype] = (run.before["loss"], run.after["loss"])
        assert run.after["loss"] < run.before["loss"] - 0.01
        tuned = read_tuned(tmp_path / f"{dtype}.svf.safetensors")
        assert tuned.training["dtype"] == dtype
        assert {one.dtype for one in tuned.S.values()} == {torch.float32}
    assert metrics["bfloat16"] == pytest.approx(metrics["float32"], rel=0.01)
