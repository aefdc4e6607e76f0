"""Runs of the spectral family: what they train, what they say, and how they go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pictures import write_pictures
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svftool
from svftool.choices.regimes import lora_rank, parse_regime, say_size
from svftool.choices.training import Settings
from svftool.errors import UsageError
from svftool.progress import Silent
from svftool.stages.finetune import finetune
from svftool.training.loop import _Run

REGIMES = (
    "svf", "svf+scale", "entries:2x", "entries:10:random", "core:1x", "salt:1+norm", "rows",
    "entries:4:band+bias",
)  # fmt: skip


class SmallNet(nn.Module):
    """Two convolutions, a batch norm, a mean and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.two(self.bn(self.conv(images)).relu()).relu().mean((2, 3)))


MODEL = Path(__file__).read_text().partition("class SmallNet")[2].partition("\n\n\n")[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    imports = "import torch\nfrom torch import Tensor, nn\n\n"
    (folder / "net.py").write_text(f"{imports}class SmallNet{MODEL}\n")
    save_file(SmallNet().state_dict(), folder / "base.safetensors", {"format": "pt"})
    svftool.decompose(folder / "base.safetensors", folder / "factors")
    write_pictures(folder / "data", count=5)
    return folder


class Told(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.said.append(message)


def tune(work: Path, output: Path, regimes: tuple[str, ...], **options: object) -> object:
    return finetune(
        work / "factors",
        data=work / "data",
        output=output,
        model=f"{work / 'net.py'}:SmallNet",
        regimes=regimes,
        settings=Settings(steps=6, batch_size=5, lr=0.02),
        shots=3,
        **options,  # type: ignore[arg-type]
    )


def test_every_member_trains_saves_and_merges(work: Path, tmp_path: Path) -> None:
    told = Told()
    found = tune(work, tmp_path / "runs", REGIMES, progress=told)
    parts = {}
    for run in found.runs:  # type: ignore[attr-defined]
        assert run.after["loss"] < run.before["loss"]
        file = svftool.read_tuned(run.output)
        parts[run.regime] = {part for held in file.parts.values() for part in held}
        moved = [name for name in file.S if file.change(name).moves()]
        assert moved == ["conv.weight", "two.weight"]
        merged = svftool.merge(
            work / "factors", [run.output], output=tmp_path / "m.safetensors", force=True
        )
        assert all(bool(one.isfinite().all()) for one in load_file(merged.output).values())
    assert parts == {
        "svf": set(),
        "svf+scale": {"row", "col"},
        "entries:2x": {"index", "value"},
        "entries:10:random": {"index", "value"},
        "core:1x": {"index", "value"},
        "salt:1+norm": {"B", "A"},
        "rows": {"row"},
        "entries:4:band+bias": set(),  # four of a band are on the diagonal
    }
    counts = {run.regime: run.trainable_parameters for run in found.runs}  # type: ignore[attr-defined]
    head = 27
    assert counts["svf"] == head + 16
    assert counts["entries:2x"] == head + 32
    assert counts["core:1x"] == head + 18
    assert counts["svf+scale"] == head + 16 + (8 + 27) + (8 + 72)
    assert counts["salt:1+norm"] == head + 16 + 16 + (8 + 27) + (8 + 72)
    assert counts["rows"] == head + 16
    assert "core:1x: 18 numbers, 1.12 times those of svf" in told.said
    rates = {run.regime: run.learning_rates.keys() for run in found.runs}  # type: ignore[attr-defined]
    assert rates["salt:1+norm"] == {"head", "singular_values", "remainder", "norm"}


class Killed(Exception):
    """Ends a run as a lost process does."""


@pytest.mark.parametrize("regime", ["entries:2x", "salt:1"])
def test_a_killed_run_goes_on_bit_for_bit(
    work: Path, tmp_path: Path, regime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole.svf.safetensors", tmp_path / "cut.svf.safetensors"
    tune(work, whole, (regime,), save_every=2)
    step = _Run.step

    def dies(run: _Run) -> float | None:
        if run.done == 4:
            raise Killed
        return step(run)

    with monkeypatch.context() as patched:
        patched.setattr(_Run, "step", dies)
        with pytest.raises(Killed):
            tune(work, cut, (regime,), save_every=2)
    assert not cut.exists()
    tune(work, cut, (regime,), save_every=2, resume=True)
    assert cut.read_bytes() == whole.read_bytes()


def test_a_regime_larger_than_every_layer_is_refused_before_any_work(
    work: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="core:9: more numbers than any layer has") as refused:
        tune(work, tmp_path / "x.svf.safetensors", ("svf", "core:9"))
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_multiple_of_lora_is_the_nearest_rank() -> None:
    matrices = [(1, 64, 64, 64), (3, 32, 16, 16)]
    svf, thin = 64 + 3 * 16, 128 + 3 * 48
    for times in (0.5, 1.0, 4.0, 10.0):
        regime = parse_regime(f"lora:{times:g}x")
        assert regime.lora is not None
        rank = lora_rank(regime.lora, matrices)
        assert rank == max(1, round(times * svf / thin))
        said = say_size(regime, matrices)
        assert f"rank {rank}, {rank * thin:,} numbers, {rank * thin / svf:.3g} times" in said
    assert say_size(parse_regime("lora:8"), matrices) == ""
    assert say_size(parse_regime("entries:4x:band"), matrices) == ""
