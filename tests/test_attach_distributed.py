"""Two processes train one set of singular values, of which only those are reduced, and merge."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, multiprocessing
from torch.nn.parallel import DistributedDataParallel

import svftool
from svftool.processes import before_joining, leave_processes
from svftool.stages.combine_result import CombineResult
from tests.attaching import MemoryStore
from tests.test_attach_attachment import small_net

STEPS, BATCH = 3, 4


def images() -> Tensor:
    return torch.randn(STEPS, BATCH, 3, 6, 6, generator=torch.Generator().manual_seed(7))


def train(model: torch.nn.Module, thetas: list[torch.nn.Parameter], batches: Tensor) -> None:
    optimiser = torch.optim.SGD(thetas, lr=0.1)
    for batch in batches:
        model(batch).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


def write_fine_tunes(folder: Path) -> None:
    """Write a base of several matrices, and three fine-tunes of it."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"layers.{i}.weight": (20 + i, 24) for i in range(5)} | {"norm.weight": (24,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(base, folder / "base.safetensors")
    for number in range(3):
        tuned = {
            name: value + 0.1 * torch.randn(value.shape, generator=generator)
            for name, value in base.items()
        }
        save_file(tuned, folder / f"tuned-{number}.safetensors")


def merge(folder: Path, name: str) -> CombineResult:
    inputs = [(folder / f"tuned-{number}.safetensors", 0.5 + number) for number in range(3)]
    options = svftool.CombineOptions(method="tsv", verify=True)
    base = folder / "base.safetensors"
    return svftool.combine(base, inputs, output=folder / name, options=options)


def gloo_threads() -> list[str]:
    """Return the names of threads that send messages; none where the system does not tell."""
    names = [one.read_text().strip() for one in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def work(rank: int, folder: str) -> None:
    """Train a share of every batch, and merge."""
    model = small_net()
    attached = svftool.attach(model, MemoryStore(model, dtype=torch.float32))
    thetas = list(attached.parameters())
    train(DistributedDataParallel(model), thetas, images()[:, rank::2])
    reduced = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sent = {name for name, _ in model.named_buffers()}
    torch.save((reduced, sent, attached.singular_values()), f"{folder}/{rank}.pt")
    os.environ["WORLD_SIZE"] = "2"  # as torchrun says it
    merge(Path(folder), "shared.safetensors")


def worker(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    before_joining()
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        work(rank, folder)
        assert gloo_threads() or not Path("/proc/self/task").exists()
    finally:
        leave_processes()
    assert not gloo_threads()


def test_two_processes_are_one(tmp_path: Path) -> None:
    write_fine_tunes(tmp_path)
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    model = small_net()
    attached = svftool.attach(model, MemoryStore(model, dtype=torch.float32))
    train(model, list(attached.parameters()), images())
    expected = attached.singular_values()
    for rank in range(2):
        reduced, buffers, found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert reduced == sum(S.numel() for S in expected.values())
        assert not [name for name in buffers if "svf" in name]
        for name, values in found.items():
            torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-6)
            assert not torch.equal(values, attached.layers[name].S_base.detach())
    # A merge of many that they shared has the bytes of one that a single process makes.
    result = merge(tmp_path, "alone.safetensors")
    assert len(result.layers) == 5
    shared = (tmp_path / "shared.safetensors").read_bytes()
    assert shared == (tmp_path / "alone.safetensors").read_bytes()
    assert not [one for one in tmp_path.iterdir() if "partial" in one.name]
