from __future__ import annotations

import math
import threading
import time

import pytest
import torch
from torch import Tensor

from svftool.engine import Job, flow, parse_rank, run, run_svds, run_values
from svftool.errors import NumericalError, ResourceError
from svftool.numerics import ThreadPool, singular_values, svd


def weights() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(64, 27), (10, 6, 3, 3), (33, 90), (1, 8), (40, 40), (3, 12, 20), (200, 150)]
    return {str(number): torch.randn(*s, generator=g) for number, s in enumerate(shapes)}


def jobs_of(tensors: dict[str, Tensor]) -> list[Job]:
    batches = {"5"}
    return [
        Job(name, tuple(t.shape) if name in batches else (len(t), t.numel() // len(t)), t.dtype)
        for name, t in tensors.items()
    ]


def test_every_layer_comes_once_with_the_bits_of_a_lone_decomposition() -> None:
    tensors = weights()
    jobs = jobs_of(tensors)
    for workers in (1, 3):
        found = dict(run_svds(reversed(jobs), tensors.__getitem__, workers=workers))
        assert found.keys() == tensors.keys()
        for job in jobs:
            alone = svd(tensors[job.name].reshape(job.matrix))
            for part in ("U", "S", "Vh"):
                assert torch.equal(getattr(found[job.name], part), getattr(alone, part))
            assert found[job.name].seconds > 0


def test_values() -> None:
    tensors = weights()
    jobs = jobs_of(tensors)
    found = dict(run_values(jobs, tensors.__getitem__))
    for job in jobs:
        assert torch.equal(found[job.name], singular_values(tensors[job.name].reshape(job.matrix)))


@pytest.mark.parametrize("text", ["3", "0.5", "energy:0.9"])
def test_rank_rules_hold_for_matrices_and_batches(text: str) -> None:
    tensors, rule = weights(), parse_rank(text)
    jobs = jobs_of(tensors)
    for name, result in run_svds(jobs, tensors.__getitem__, rank=rule):
        job = next(job for job in jobs if job.name == name)
        values = singular_values(tensors[name].reshape(job.matrix))
        assert result.rank == rule.rank_of(values, *job.matrix[-2:])
        assert result.U.shape[-1] == result.Vh.shape[-2] == result.rank


def test_a_bad_layer_is_named() -> None:
    tensors = weights()
    tensors["2"][3, 4] = math.nan
    with pytest.raises(NumericalError, match="2: 1 of 2970 entries are NaN or infinite"):
        list(run_svds(jobs_of(tensors), tensors.__getitem__))
    skipped: dict[str, NumericalError] = {}
    found = dict(run_values(jobs_of(tensors), tensors.__getitem__, skip=skipped.__setitem__))
    assert skipped.keys() == {"2"}
    assert found.keys() == tensors.keys() - {"2"}


def test_an_error_of_reading_ends_the_run() -> None:
    tensors = weights()

    def read(name: str) -> Tensor:
        if name == "3":
            raise OSError(5, "Input/output error")
        return tensors[name]

    before = threading.active_count()
    with pytest.raises(OSError, match="Input/output"):
        list(run_svds(jobs_of(tensors), read))
    wait_for(lambda: threading.active_count() == before)


def test_a_caller_that_stops_early_leaves_nothing_running() -> None:
    tensors = weights()
    before = threading.active_count(), torch.get_num_threads()
    results = run_svds(jobs_of(tensors), tensors.__getitem__)
    next(results)
    results.close()
    wait_for(lambda: (threading.active_count(), torch.get_num_threads()) == before)


def wait_for(condition: object) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("still not so after ten seconds")


def test_layers_in_memory_are_bounded() -> None:
    held, most = 0, 0
    lock = threading.Lock()

    class Held:
        def __init__(self) -> None:
            nonlocal held, most
            with lock:
                held += 1
                most = max(most, held)

        def let_go(self) -> None:
            nonlocal held
            with lock:
                held -= 1

    def work(job: Job, tensor: Tensor, pool: ThreadPool) -> Held:
        return kept[job.name]

    kept: dict[str, Held] = {}

    def read_and_keep(name: str) -> Tensor:
        kept[name] = Held()
        return torch.zeros(4)

    jobs = [Job(str(number), (2, 2)) for number in range(30)]
    outcomes = flow.flow(jobs, read_and_keep, work, size=lambda _: 10, budget=45, workers=2)
    for number, (_, outcome) in enumerate(outcomes):
        if number % 7 == 0:
            time.sleep(0.02)  # a slow writer holds the reader back
        outcome.let_go()
    assert most <= 4 + 1  # the one being handed out is let go of before its room is
    assert most > 1


def test_a_layer_larger_than_the_budget_runs_alone() -> None:
    running: list[str] = []
    seen: list[tuple[str, ...]] = []

    def work(job: Job, tensor: Tensor, pool: ThreadPool) -> None:
        running.append(job.name)
        time.sleep(0.01)
        seen.append(tuple(running))
        running.remove(job.name)

    sizes = {"large": 100, "a": 3, "b": 3, "c": 3}
    jobs = [Job(name, (1, 1)) for name in sizes]
    read = lambda _: torch.zeros(1)  # noqa: E731
    size = lambda job: sizes[job.name]  # noqa: E731
    assert len(list(flow.flow(jobs, read, work, size=size, budget=10, workers=3))) == 4
    assert ("large",) in seen
    assert not any("large" in names and len(names) > 1 for names in seen)


def test_too_little_memory_is_said_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "available_memory", lambda: 3 << 30)
    read: list[str] = []
    jobs = [Job("small", (4, 4)), Job("model.large", (40000, 20000))]
    with pytest.raises(
        ResourceError, match=r"model.large: a matrix of 40000 x 20000 needs"
    ) as info:
        list(run_svds(jobs, read.append))
    assert not read
    assert "found 3.0 GiB free" in str(info.value)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)
def test_memory_that_runs_out_is_said(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(run, "svd", fail)
    with pytest.raises(ResourceError, match="w: out of memory in a matrix of 3 x 4") as info:
        list(run_svds([Job("w", (3, 4))], lambda _: torch.ones(3, 4)))
    assert info.value.__cause__ is error


def test_other_errors_of_a_layer_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(run, "svd", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        list(run_svds([Job("w", (3, 4))], lambda _: torch.ones(3, 4)))
