from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from svftool.engine import Job, budget, job_bytes, parse_rank, peak_memory, seconds, share

sides = st.integers(1, 5000)
shapes = st.one_of(st.tuples(sides, sides), st.tuples(st.integers(1, 8), sides, sides))


def jobs_of(found: list[tuple[int, ...]]) -> list[Job]:
    return [Job(f"layer.{number}", shape) for number, shape in enumerate(found)]


@given(st.lists(shapes, max_size=40), st.integers(1, 9), st.randoms(use_true_random=False))
def test_shares_are_a_partition_whatever_the_order(
    found: list[tuple[int, ...]], count: int, mixer: random.Random
) -> None:
    jobs = jobs_of(found)
    shares = share(jobs, count)
    assert len(shares) == count
    assert sorted(job.name for part in shares for job in part) == sorted(job.name for job in jobs)
    mixed = list(jobs)
    mixer.shuffle(mixed)
    assert share(mixed, count) == shares


@given(st.lists(shapes, min_size=1, max_size=40), st.integers(1, 9))
def test_shares_are_even(found: list[tuple[int, ...]], count: int) -> None:
    """Graham: no more than 4/3 of the best possible, which is no less than the mean or a job."""
    jobs = jobs_of(found)
    costs = [seconds(job) for job in jobs]
    load = max(sum(map(seconds, part)) for part in share(jobs, count))
    ordered = sorted(costs, reverse=True)
    pair = ordered[count - 1] + ordered[count] if len(costs) > count else 0.0
    best = max(sum(costs) / count, ordered[0], pair)
    assert load <= 4 / 3 * best * (1 + 1e-9)


@given(shapes, st.integers(1, 100))
def test_less_work_never_costs_more(shape: tuple[int, ...], rank: int) -> None:
    job = Job("w", shape)
    assert 0 < seconds(job, values_only=True) <= seconds(job)
    assert seconds(job, rank) <= seconds(job)
    assert job_bytes(job, values_only=True) <= job_bytes(job)
    assert job_bytes(job, rank) <= 2 * job_bytes(job)  # the iteration works on a float32 copy


def test_orientation_does_not_matter_and_batches_add_up() -> None:
    assert seconds(Job("w", (30, 500))) == seconds(Job("w", (500, 30)))
    assert seconds(Job("w", (4, 30, 50))) == 4 * seconds(Job("w", (30, 50)))


def test_budget_follows_the_largest_matrix() -> None:
    small, large = Job("a", (100, 100)), Job("b", (4096, 8192))
    assert budget([small, large]) == budget([large])
    assert budget([large]) == (512 << 20) + 4 * 8 * 4096 * 8192
    assert budget([]) == 512 << 20
    assert budget([Job("c", (10, 4096, 8192))]) == budget([large])


def test_one_layer_fits_the_budget() -> None:
    """Of a square matrix the eigenproblem is the largest; of a long one, its factors."""
    for shape in ((16384, 16384), (128256, 4096), (4096, 14336), (10**6, 64)):
        job = Job("w", shape, torch.float32)
        assert job_bytes(job) <= budget([job])


def test_peak_memory_does_not_grow_with_the_number_of_layers() -> None:
    job = Job("w", (4096, 4096), torch.bfloat16)
    one, many = peak_memory([job] * 8), peak_memory([job] * 800)
    assert one == many
    assert peak_memory([job]) < one
    assert peak_memory([Job("tiny", (4, 4))]) < 600 << 20


def test_peak_memory_follows_the_rank_and_the_workers() -> None:
    jobs = [Job(str(index), (8192, 3072), torch.bfloat16) for index in range(90)]
    low, full = (peak_memory(jobs, parse_rank(rank), workers=2) for rank in ("64", "full"))
    assert low < full
    # What a 3.2-billion-parameter checkpoint of these layers was measured to take.
    assert 1412 << 20 <= low < 1700 << 20
    assert peak_memory(jobs, parse_rank("64"), workers=1) < low
    assert peak_memory(jobs, parse_rank("energy:0.9"), workers=2) == full
