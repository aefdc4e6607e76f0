from __future__ import annotations

import subprocess
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest

from svftool.numerics import lapack
from svftool.numerics.threads import Closed, ThreadPool


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_every_block_runs_once(workers: int) -> None:
    ran: list[int] = []
    with ThreadPool(workers) as pool:
        pool.share([partial(ran.append, number) for number in range(100)])
        pool.share([])
    assert sorted(ran) == list(range(100))


def test_idle_threads_help() -> None:
    names: set[str] = set()
    both = threading.Barrier(2, timeout=20)

    def block() -> None:
        names.add(threading.current_thread().name)
        both.wait()  # passes only if two threads are here at once

    with ThreadPool(1) as pool:
        pool.share([block, block])
    assert len(names) == 2


def test_blocks_may_share_blocks_themselves() -> None:
    ran: list[int] = []
    with ThreadPool(2) as pool:
        inner = [partial(ran.append, number) for number in range(5)]
        pool.share([partial(pool.share, inner) for _ in range(6)])
    assert sorted(ran) == sorted(list(range(5)) * 6)


@pytest.mark.parametrize("workers", [0, 3])
def test_an_error_in_a_block_reaches_who_shared_it(workers: int) -> None:
    def fail() -> None:
        raise ArithmeticError("no luck")

    with ThreadPool(workers) as pool:
        with pytest.raises(ArithmeticError, match="no luck"):
            pool.share([time.time, fail, *[time.time] * 20])
        pool.share([time.time] * 3)  # the pool is still of use


def test_whole_work_runs_in_turn_and_can_share() -> None:
    done: list[int] = []
    finished = threading.Event()

    def work(number: int, pool: ThreadPool) -> None:
        pool.share([partial(done.append, number)] * 3)
        if number == 4:
            finished.set()

    with ThreadPool(1) as pool:
        for number in range(5):
            pool.submit(partial(work, number, pool))
        assert finished.wait(20)
    assert done == [number for number in range(5) for _ in range(3)]


def test_a_pool_that_is_given_up_stops_soon() -> None:
    started, stopped = threading.Event(), threading.Event()

    def work(pool: ThreadPool) -> None:
        started.set()
        try:
            while True:
                pool.share([partial(time.sleep, 0.01)] * 2)
        except Closed:
            stopped.set()

    def give_up() -> None:
        with ThreadPool(2) as pool:
            pool.submit(partial(work, pool))
            pool.submit(partial(work, pool))
            assert started.wait(20)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        give_up()
    assert stopped.wait(20)


WITHOUT_THE_PACKAGE = """
import sys
import torch
from svftool.numerics import lapack, svd

svd(torch.randn(9, 5))
assert lapack.available()
assert not [name for name in sys.modules if name.startswith("scipy.linalg")]
import scipy.linalg.cython_lapack
from scipy.linalg import cython_blas, eigh
assert (scipy.linalg.cython_lapack, cython_blas) == lapack.doors()
assert eigh([[2.0]])[0] == [2.0]
"""


def test_a_decomposition_leaves_the_rest_of_scipy_alone_and_whole() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_THE_PACKAGE], check=True)


def test_what_cannot_be_loaded_alone_is_imported_with_its_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "scipy.linalg", raising=False)
    monkeypatch.setattr(lapack, "PathFinder", SimpleNamespace(find_spec=lambda *_: None))
    assert lapack._door("cython_lapack").__name__ == "scipy.linalg.cython_lapack"
