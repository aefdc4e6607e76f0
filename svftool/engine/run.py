"""Run the decompositions of many layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from svftool.engine.ranks import FULL, RankRule
from svftool.errors import NumericalError
from svftool.numerics import Method, Svd, singular_values, svd, truncate
from svftool.progress import SILENT, Progress

Skip = Callable[[str, NumericalError], None]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Job:
    """One layer to decompose.

    Attributes
    ----------
    name : str
        Name of the tensor.
    matrix : tuple of int
        (m, n), or (E, m, n) for a batch.
    dtype : torch.dtype
        Of the tensor as it is read.
    """

    name: str
    matrix: tuple[int, ...]
    dtype: torch.dtype = torch.float32


def run_svds(
    jobs: Iterable[Job],
    read: Callable[[str], Tensor],
    *,
    rank: RankRule = FULL,
    method: Method = "auto",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    skip: Skip | None = None,
    progress: Progress = SILENT,
) -> Iterator[tuple[str, Svd]]:
    """Decompose layers; they come in the order they are done.

    Parameters
    ----------
    jobs : iterable of Job
    read : callable
        Gives the tensor of a name, in any shape with the elements of ``job.matrix``.
    rank : RankRule
    method : {"auto", "exact", "randomized"}
    dtype : torch.dtype
        float32 or float64, of the factors.
    device : str or torch.device
    skip : callable, optional
        Told of each layer that cannot be decomposed, which is then left out; without it the
        first one ends the run.
    progress : Progress

    Yields
    ------
    name : str
    result : Svd

    Raises
    ------
    NumericalError
        If a layer holds NaN or infinity and there is no `skip`; the message names it.
    """

    def one(tensor: Tensor, job: Job) -> Svd:
        m, n = job.matrix[-2:]
        fixed = rank.fixed(m, n)
        result = svd(tensor, rank=fixed, method=method, dtype=dtype)
        return result if fixed is not None else truncate(result, rank.rank_of(result.S, m, n))

    return _run(jobs, read, one, "decomposing", skip, progress)


def run_values(
    jobs: Iterable[Job],
    read: Callable[[str], Tensor],
    *,
    device: str | torch.device = "cpu",
    skip: Skip | None = None,
    progress: Progress = SILENT,
) -> Iterator[tuple[str, Tensor]]:
    """Take the singular values of layers; they come in the order they are done.

    Parameters and errors are those of `run_svds`.

    Yields
    ------
    name : str
    values : (k,) or (E, k) Tensor
        float64, non-increasing.
    """
    return _run(jobs, read, lambda t, _: singular_values(t), "taking spectra", skip, progress)


def _run(
    jobs: Iterable[Job],
    read: Callable[[str], Tensor],
    one: Callable[[Tensor, Job], _T],
    what: str,
    skip: Skip | None,
    progress: Progress,
) -> Iterator[tuple[str, _T]]:
    listed = list(jobs)
    with progress.task(what, total=len(listed), unit="layers") as task:
        for job in listed:
            try:
                result = one(read(job.name).reshape(job.matrix), job)
            except NumericalError as exc:
                named = NumericalError(f"{job.name}: {exc}")
                if skip is None:
                    raise named from exc
                skip(job.name, named)
            else:
                yield job.name, result
            task.advance(1, detail=job.name)
