"""Run the decompositions of many layers over the cores or on a GPU.

One thread reads ahead, longest layer first; each worker takes a whole layer or helps with the
blocks of a large one; the caller gets results as they are done and holds back the reading by taking
its time. A layer's result depends on none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from svftool.choices.ranks import FULL, RankRule
from svftool.engine.flow import flow
from svftool.engine.gpu import STREAMS, DoesNotFit, Gpu, to_host
from svftool.engine.plan import Job, budget, job_bytes, longest_first, seconds
from svftool.errors import NumericalError, ResourceError
from svftool.machine import available_memory, is_out_of_memory
from svftool.numerics import Method, Svd, ThreadPool, singular_values, svd
from svftool.progress import SILENT, Progress

Skip = Callable[[str, NumericalError], None]
_T = TypeVar("_T")
_SMALL = 256
_GIB = float(1 << 30)


def run_svds(
    jobs: Iterable[Job],
    read: Callable[[str], Tensor],
    *,
    rank: RankRule = FULL,
    method: Method = "auto",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    memory: int | None = None,
    in_order: bool = False,
    skip: Skip | None = None,
    progress: Progress = SILENT,
) -> Iterator[tuple[str, Svd]]:
    """Decompose layers; they come in the order they are done, or `in_order`.

    Parameters
    ----------
    jobs : iterable of Job
    read : callable
        Gives the tensor of a name, in any shape with the elements of ``job.matrix``. It is called
        from one other thread.
    rank : RankRule
    method : {"auto", "exact", "randomized"}
    seed : int
        Of the randomized method.
    dtype : torch.dtype
        float32 or float64, of the factors.
    device : str or torch.device
        A layer that does not fit there is done on the CPU.
    workers : int, optional
        Layers at a time; by default the number of torch's threads. The factors do not depend on
        it.
    memory : int, optional
        Bytes that the layers at work may hold together; by default `svftool.engine.budget`. A layer
        that needs more runs alone.
    in_order : bool
        Begin and hand out the layers in the order given; otherwise the longest are begun first,
        which ends sooner.
    skip : callable, optional
        Told of each layer that cannot be decomposed, which is then left out; without it the first
        one ends the run.
    progress : Progress

    Yields
    ------
    name : str
    result : Svd
        On the CPU. Let go of it before asking for the next one: what it takes is counted until
        then.

    Raises
    ------
    NumericalError
        If a layer holds NaN or infinity and there is no `skip`; the message names it.
    ResourceError
        If a layer does not fit in memory, before anything is computed.
    """

    def fixed(job: Job) -> int | None:
        return rank.fixed(*job.matrix[-2:])

    def work(job: Job, tensor: Tensor, pool: ThreadPool) -> Svd:
        m, n = job.matrix[-2:]
        kept = fixed(job) or partial(rank.rank_of, m=m, n=n)
        result = svd(tensor, rank=kept, method=method, seed=seed, dtype=dtype, pool=pool)
        return replace(result, U=to_host(result.U), S=to_host(result.S), Vh=to_host(result.Vh))

    return run_layers(
        jobs,
        read,
        work,
        size=lambda job: job_bytes(job, fixed(job)),
        title="decomposing",
        device=device,
        workers=workers,
        memory=memory,
        in_order=in_order,
        skip=skip,
        progress=progress,
    )


def run_values(
    jobs: Iterable[Job],
    read: Callable[[str], Tensor],
    *,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    memory: int | None = None,
    skip: Skip | None = None,
    progress: Progress = SILENT,
) -> Iterator[tuple[str, Tensor]]:
    """Take the singular values of layers; they come in the order they are done.

    Parameters and errors are those of `run_svds`.

    Yields
    ------
    name : str
    values : (k,) or (E, k) Tensor
        float64, non-increasing, on the CPU.
    """

    def work(job: Job, tensor: Tensor, pool: ThreadPool) -> Tensor:
        return singular_values(tensor, pool=pool).cpu()

    return run_layers(
        jobs,
        read,
        work,
        size=partial(job_bytes, values_only=True),
        title="taking spectra",
        device=device,
        workers=workers,
        memory=memory,
        skip=skip,
        progress=progress,
    )


def run_layers(
    jobs: Iterable[Job],
    read: Callable[[str], Tensor],
    work: Callable[[Job, Tensor, ThreadPool], _T],
    *,
    size: Callable[[Job], int],
    title: str,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    memory: int | None = None,
    in_order: bool = False,
    skip: Skip | None = None,
    progress: Progress = SILENT,
) -> Iterator[tuple[str, _T]]:
    """Run any work on layers; the results come in the order they are done, or `in_order`.

    Parameters
    ----------
    jobs, read, device, workers, memory, in_order, skip, progress
        As in `run_svds`.
    work : callable
        Makes the result of a job from its tensor, with the help of a pool.
    size : callable
        Bytes that a job takes until its result is released.
    title : str
        What is shown beside the progress.

    Yields
    ------
    name : str
    result : object

    Raises
    ------
    NumericalError
        As `work` raises it, with the layer's name.
    ResourceError
        If a layer does not fit in memory, before anything is computed.
    """
    ordered, place = list(jobs) if in_order else longest_first(jobs), torch.device(device)
    if ordered:
        largest = max(ordered, key=size)
        _check_memory(largest, size(largest))
    gpu = None if place.type == "cpu" else Gpu(place)
    outcomes = flow(
        ordered,
        read,
        partial(_on, gpu, work),
        size=size,
        budget=memory or budget(ordered),
        workers=workers or max(torch.get_num_threads(), 1 if gpu is None else STREAMS),
        in_order=in_order,
    )
    total = sum(map(seconds, ordered))
    with progress.task(title, total=total, unit="work") as task, closing(outcomes):
        for job, outcome in outcomes:
            if not isinstance(outcome, NumericalError):
                yield job.name, outcome
                del outcome
            elif skip is None:
                raise NumericalError(f"{job.name}: {outcome}") from outcome
            else:
                skip(job.name, NumericalError(f"{job.name}: {outcome}"))
            task.advance(seconds(job), detail=job.name)


def _on(
    gpu: Gpu | None,
    work: Callable[[Job, Tensor, ThreadPool], _T],
    job: Job,
    tensor: Tensor,
    pool: ThreadPool,
) -> _T:
    """Run on a GPU what is large enough for it, and on the CPU what does not fit there."""
    if gpu is not None and job.sides[1] >= _SMALL:
        try:
            # Nobody helps: another thread would work on a stream of its own, and not wait for this.
            return gpu.run(tensor, lambda moved: work(job, moved, ThreadPool()))
        except DoesNotFit:
            pass
    try:
        return work(job, tensor, pool)
    except (MemoryError, RuntimeError) as exc:
        raise _as_resource_error(job, exc) or exc from exc


def _check_memory(job: Job, needed: int) -> None:
    """Refuse a layer that cannot fit, before anything is computed.

    Raises
    ------
    ResourceError
        With the size needed and what is free.
    """
    free = available_memory()
    if free is not None and needed > free:
        raise ResourceError(
            f"{job.name}: a matrix of {_shape(job)} needs {needed / _GIB:.1f} GiB of memory, found "
            f"{free / _GIB:.1f} GiB free. Leave it out with --exclude, keep fewer singular values "
            "with --rank, or use a machine with more memory."
        )


def _as_resource_error(job: Job, error: Exception) -> ResourceError | None:
    """Tell what an allocation that failed means to the user; None for any other error."""
    if not is_out_of_memory(error):
        return None
    return ResourceError(
        f"{job.name}: out of memory in a matrix of {_shape(job)}. What is finished is kept. "
        "Keep fewer singular values with --rank, or use a machine with more memory."
    )


def _shape(job: Job) -> str:
    return " x ".join(map(str, job.matrix))
