"""The machine: which device a name means, and how much memory there is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from svftool import machine
from svftool.cli import app
from svftool.errors import UsageError
from svftool.machine import pick_device


def test_available_memory_is_told() -> None:
    free = machine.available_memory()
    assert free is None or 0 < free < 1 << 50
    assert (free is not None) == Path("/proc/meminfo").exists()


@pytest.mark.parametrize(("rank", "expected"), [(None, "cuda:0"), ("1", "cuda:1"), ("5", "cuda:1")])
def test_processes_of_a_host_take_a_gpu_each(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert str(pick_device("auto")) == expected
    assert str(pick_device("cuda")) == expected
    assert str(pick_device("cuda:0")) == "cuda:0"
    assert str(pick_device("cpu")) == "cpu"


@pytest.mark.parametrize(
    "name", ["gpu", "mps", "meta", "cuda:", "cuda:-1", "cuda:x", "cpu:1", "CPU", "", "cuda:0 "]
)
def test_names_that_mean_nothing_are_refused(name: str):
    with pytest.raises(UsageError, match="expected one of auto, cpu, cuda, cuda:INDEX"):
        pick_device(name)


@pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, count: int):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UsageError, match=f"^--device '{name}': {count} GPUs are available"):
        pick_device(name)


def test_without_a_gpu_auto_is_the_processor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")


COMMANDS = [
    ["decompose", "no.safetensors", "-o", "factors"],
    ["decompose", "no.safetensors", "-o", "factors", "--dry-run"],
    ["inspect", "no.safetensors", "other.safetensors"],
    ["evaluate", "no.safetensors", "--data", "data"],
    ["finetune", "factors", "-o", "t.svf.safetensors", "--data", "data"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
@pytest.mark.parametrize("device", ["toaster", "cuda:99"])
def test_every_command_refuses_a_device_before_it_looks_at_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], device: str
):
    """The inputs do not exist, and are not what is complained of."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*command, "--device", device])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert f"--device '{device}'" in result.stderr
    assert list(tmp_path.iterdir()) == []
