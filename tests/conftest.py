"""Fixtures that every test file may use: the real data, and a small real checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Two test processes of two threads each share two cores: a thread that spins while it waits takes
# the core from the one it waits for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from documents import checked
from hypothesis import HealthCheck, settings
from safetensors.torch import save_file

from svftool.cli.common import Display

REPOSITORY = Path(__file__).resolve().parents[1]

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# What a shell starts in the background ignores interruptions, and Python would leave it at that.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile(
    "svftool",
    max_examples=50,
    deadline=None,
    # The function-scoped fixtures in use here are folders: each example writes files of its own.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("svftool")


@pytest.fixture(scope="session", autouse=True)
def _documents_fit_their_schemas() -> Iterator[None]:
    """Hold every document of a command that a test runs in this process against its schema."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Display, "emit", checked(Display.emit))
        yield


@pytest.fixture(scope="session")
def data() -> Path:
    """Return the folder of real weights and images; skip where it is absent."""
    named = os.environ.get("SVFTOOL_TEST_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not (folder / "checkpoints").is_dir():
        pytest.skip(f"no real checkpoints in {folder} (set SVFTOOL_TEST_DATA to the data folder)")
    return folder


def tiny_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return one tensor of each kind that a checkpoint may hold; one pair shares storage."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    embedding = normal(12, 8)
    return {
        "embed_tokens.weight": embedding,
        "conv.weight": normal(6, 3, 3, 3),
        "conv.bias": normal(6),
        "conv1d.weight": normal(4, 6, 3),
        "linear.weight": normal(10, 8),
        "linear.bias": normal(10),
        "half.weight": normal(9, 5).to(torch.float16),
        "brain.weight": normal(7, 11).to(torch.bfloat16),
        "norm.weight": torch.ones(8),
        "norm.num_batches_tracked": torch.tensor(3, dtype=torch.int64),
        "scale": torch.tensor(0.5),
        "empty": torch.zeros(0, 4),
        "index": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "mask": torch.tensor([True, False]),
        "lm_head.weight": embedding,
    }


TinyCheckpoint = Callable[..., Path]


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> TinyCheckpoint:
    """Return a factory that writes a small real safetensors file into the test's own folder.

    ``tiny_checkpoint()`` writes `tiny_tensors`; ``tiny_checkpoint("x.safetensors", {...})`` writes
    the tensors given. The tied pair is written twice, because safetensors cannot share storage.
    """

    def write(
        name: str = "tiny.safetensors",
        tensors: dict[str, torch.Tensor] | None = None,
        *,
        metadata: dict[str, str] | None = None,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        chosen = tiny_tensors() if tensors is None else tensors
        alone = {key: value.clone().contiguous() for key, value in chosen.items()}
        save_file(alone, path, metadata={"format": "pt"} if metadata is None else metadata)
        return path

    return write
