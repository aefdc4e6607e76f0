"""Two processes train one set of singular values: only those are reduced, nothing is broadcast."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.nn.parallel import DistributedDataParallel

import svftool
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


def worker(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        model = small_net()
        attached = svftool.attach(model, MemoryStore(model, dtype=torch.float32))
        thetas = list(attached.parameters())
        parallel = DistributedDataParallel(model)
        train(parallel, thetas, images()[:, rank::2])
        reduced = sum(p.numel() for p in model.parameters() if p.requires_grad)
        sent = {name for name, _ in model.named_buffers()}
        torch.save((reduced, sent, attached.singular_values()), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
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
