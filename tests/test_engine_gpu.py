"""What runs on a GPU: the rules of sharing one, with a device that is played, and a real one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from svftool.engine import Job, gpu, parse_rank, run, run_svds, run_values
from svftool.engine.gpu import DoesNotFit, Gpu
from svftool.errors import ResourceError
from svftool.machine import explain_out_of_memory, is_out_of_memory
from svftool.numerics import ThreadPool, singular_values, svd

CPU = torch.device("cpu")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """Play a device with the CPU: streams are objects, and nothing has to be given back."""
    monkeypatch.setattr(gpu, "_stream", lambda _: object())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def fail_first(times: int, error: Exception) -> tuple[Callable[[Tensor], str], list[int]]:
    calls: list[int] = []

    def work(tensor: Tensor) -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    return work, calls


@pytest.mark.usefixtures("played")
@pytest.mark.parametrize(
    "error",
    [
        OUT_OF_MEMORY,
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `create`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_a_layer_that_does_not_fit_is_tried_alone_and_then_given_up(error: Exception) -> None:
    assert is_out_of_memory(error)
    work, calls = fail_first(1, error)
    assert Gpu(CPU).run(torch.ones(1), work) == "done"
    assert len(calls) == 2
    work, calls = fail_first(9, error)
    one = Gpu(CPU)
    with pytest.raises(DoesNotFit):
        one.run(torch.ones(1), work)
    assert len(calls) == 2
    assert one.run(torch.ones(1), lambda _: "streams are free again") == "streams are free again"


def test_training_says_what_to_lower_however_memory_runs_out() -> None:
    for text in ("CUBLAS_STATUS_ALLOC_FAILED when calling", "CUDA error: out of memory"):
        with (
            pytest.raises(ResourceError, match=r"batch of 4 examples\. Lower --batch-size"),
            explain_out_of_memory(4),
        ):
            raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="a bug"), explain_out_of_memory(4):
        raise RuntimeError("a bug")


@pytest.mark.usefixtures("played")
def test_other_errors_are_not_tried_again() -> None:
    work, calls = fail_first(9, RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        Gpu(CPU).run(torch.ones(1), work)
    assert len(calls) == 1


@pytest.mark.usefixtures("played")
def test_no_more_layers_than_streams_and_one_alone_while_it_is_tried_again() -> None:
    shared, at_work, most, beside = Gpu(CPU, streams=3), set[int](), [0], [0]
    lock, failed = threading.Lock(), set[int]()

    def work(number: int) -> Callable[[Tensor], None]:
        def inner(tensor: Tensor) -> None:
            with lock:
                at_work.add(number)
                most[0] = max(most[0], len(at_work))
                again = number in failed
                beside[0] = max(beside[0], len(at_work) - 1 if again else 0)
            threading.Event().wait(0.005)
            with lock:
                at_work.remove(number)
                if number % 2 and not again:
                    failed.add(number)
                    raise OUT_OF_MEMORY

        return inner

    threads = [
        threading.Thread(target=shared.run, args=(torch.ones(1), work(number)))
        for number in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
    assert not any(thread.is_alive() for thread in threads)
    assert failed == set(range(1, 12, 2))
    assert most[0] <= 3
    assert beside[0] == 0


@pytest.mark.usefixtures("played")
def test_the_library_is_loaded_once_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []

    def eigh(matrix: Tensor) -> None:
        loaded.append(1)
        threading.Event().wait(0.01)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    shared = Gpu(CPU)
    seen: list[int] = []
    threads = [
        threading.Thread(
            target=shared.run, args=(torch.ones(1), lambda _: seen.append(len(loaded)))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1, 1, 1, 1]


@pytest.mark.usefixtures("played")
def test_nobody_helps_with_a_layer_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread would not work on the layer's stream, and would not wait for it."""
    pools: list[ThreadPool] = []

    def watched(matrix: Tensor, *, pool: ThreadPool, **options: Any) -> Any:
        pools.append(pool)
        return svd(matrix, pool=pool, **options)

    monkeypatch.setattr(run, "svd", watched)
    monkeypatch.setattr(run, "Gpu", lambda place: Gpu(CPU))
    W = torch.randn(300, 260)
    dict(run_svds([Job("w", (300, 260))], lambda _: W, device="cuda", workers=3))
    assert [pool.workers for pool in pools] == [0]


@pytest.mark.usefixtures("played")
def test_small_layers_and_those_that_do_not_fit_have_the_bits_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = {"w": torch.randn(300, 400), "tiny": torch.randn(5, 4)}
    tried: list[tuple[int, ...]] = []

    class Full(Gpu):
        def run(self, tensor: Tensor, work: object) -> Any:
            tried.append(tuple(tensor.shape))
            raise DoesNotFit

    monkeypatch.setattr(run, "Gpu", lambda place: Full(CPU))
    jobs = [Job(name, tuple(W.shape)) for name, W in tensors.items()]
    found = dict(run_svds(jobs, tensors.__getitem__, device="cuda:1"))
    assert tried == [(300, 400)]
    for name, W in tensors.items():
        assert torch.equal(found[name].U, svd(W).U)


# On a real one


real = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LAYERS = {
    "square": (1024, 1024), "tall": (20000, 300), "wide": (300, 5000), "batch": (3, 700, 500),
    "again": (1024, 1000), "third": (900, 800), "fourth": (600, 500), "small": (40, 30),
}  # fmt: skip


def layers() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=g) for name, shape in LAYERS.items()}


@pytest.mark.gpu
@real
@pytest.mark.parametrize("rank", ["full", "20", "energy:0.5"])
def test_all_layers_of_a_real_device_are_in_bounds_and_the_same_bits_again(
    rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, rule = layers(), parse_rank(rank)
    jobs = [Job(name, tuple(W.shape)) for name, W in tensors.items()]

    def once(streams: int) -> dict[str, Any]:
        monkeypatch.setattr(run, "Gpu", lambda place: Gpu(place, streams))
        return dict(run_svds(jobs, tensors.__getitem__, rank=rule, device="cuda", workers=6))

    one, four = once(1), once(4)
    for name, W in tensors.items():
        found = four[name]
        assert found.U.device.type == "cpu"
        expected = singular_values(W)[..., : found.rank]
        off = (found.S.double() - expected).abs().amax() / expected.amax()
        assert float(off) <= 1e-6
        for part in ("U", "S", "Vh"):
            assert torch.equal(getattr(found, part), getattr(one[name], part)), (name, part)


@pytest.mark.gpu
@real
def test_values_of_a_real_device() -> None:
    tensors = layers()
    jobs = [Job(name, tuple(W.shape)) for name, W in tensors.items()]
    for name, S in run_values(jobs, tensors.__getitem__, device="cuda"):
        torch.testing.assert_close(S, singular_values(tensors[name]), rtol=1e-7, atol=1e-7)


@pytest.mark.gpu
@real
def test_an_iteration_on_a_real_device() -> None:
    g = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(1500, 64, generator=g, dtype=torch.float64)).Q for _ in "lr"
    )
    W = (left * (1.0 + torch.arange(64.0)) ** -1.0 @ right.mT).float()
    jobs = [Job(str(index), (1500, 1500)) for index in range(4)]
    rank = parse_rank("16")
    for _, found in run_svds(jobs, lambda _: W, rank=rank, method="randomized", device="cuda"):
        assert found.method == "krylov"
        expected = (1.0 + torch.arange(16.0, dtype=torch.float64)) ** -1.0
        assert float((found.S.double() - expected).abs().max()) <= 1e-6
