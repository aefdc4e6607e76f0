"""``svftool`` in processes of their own that start at once, to be interrupted and killed.

They are forked from a process that has imported what a fine-tune needs and has computed nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

PRELOADED = (
    "accelerate.state",
    "peft",
    "svftool.cli",
    "svftool.stages.finetune",
    "svftool.tasks.classification",
    "torch.optim.adamw",
    "torchmetrics.classification",
    "torchvision.transforms.v2",
)


@dataclass(frozen=True)
class Forked:
    """A running ``svftool``, and the files that its output goes to."""

    process: BaseProcess
    folder: Path

    @property
    def ended(self) -> bool:
        return not self.process.is_alive()

    def send(self, signum: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signum)

    def wait(self, timeout: float = 60) -> int:
        """Wait for the end, and give the exit code."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()


def start(words: list[str], folder: Path, **environment: object) -> Forked:
    """Start ``svftool`` with these words, on as many threads as here, for the same bits."""
    more = {name: str(value) for name, value in environment.items()}
    threads = torch.get_num_threads()
    process = _context().Process(target=_run, args=(words, folder, threads, more))  # type: ignore[attr-defined]
    process.start()
    return Forked(process, folder)


def _context() -> BaseContext:
    if os.name == "nt":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def _run(words: list[str], folder: Path, threads: int, environment: dict[str, str]) -> None:
    from svftool.cli import main

    torch.set_num_threads(threads)
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = ["svftool", *words]
    main()
