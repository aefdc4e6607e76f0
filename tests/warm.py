"""``svftool`` in children of a process that has imported everything and computed nothing.

A command then costs its own work and not three seconds of imports, and can be killed, limited and
measured like any process.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

IMPORTED = (
    "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.TiffImagePlugin",
    "accelerate.state", "peft", "safetensors.torch", "svftool.auditing.policy", "svftool.cli",
    "svftool.report.decompose", "svftool.report.evaluate", "svftool.report.extract",
    "svftool.report.finetune", "svftool.report.inspect", "svftool.report.inspect_files",
    "svftool.report.inspect.page", "svftool.report.merge", "svftool.report.training",
    "svftool.stages.audit", "svftool.stages.decompose", "svftool.stages.evaluate",
    "svftool.stages.extract", "svftool.stages.finetune", "svftool.stages.merge",
    "svftool.tasks.classification", "svftool.tasks.few_shot_segmentation", "svftool.tasks.language",
    "svftool.tasks.segmentation", "threadpoolctl", "timm", "torch.optim.adamw",
    "torchmetrics.classification", "torchvision.transforms.v2",
    "transformers.models.llama.modeling_llama", "transformers.models.segformer.modeling_segformer",
    "transformers.models.vit.modeling_vit", "transformers.tokenization_utils_tokenizers",
    "rich._emoji_codes",
)  # fmt: skip

NAMES = ("AutoConfig", "AutoModel", "AutoTokenizer")
ADDRESSES = 6 << 30
"""More addresses than the parent has, in bytes; a greedy child meets an error, not the machine."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: ``code`` is negative for a signal, None where it did not end."""

    code: int | None
    out: str
    err: str
    seconds: float
    peak: int


def options(description: str | None, *, count: int) -> argparse.ArgumentParser:
    """Return a parser with what every script on numbered cases takes."""
    shape = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=shape)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", metavar="SEED:NUMBER")
    return parser


def cases(chosen: argparse.Namespace, *, start: int = 0) -> tuple[int, range]:
    """Return the seed and the numbers of the cases that were asked for."""
    if chosen.replay:
        seed, number = map(int, chosen.replay.split(":"))
        return seed, range(number, number + 1)
    return chosen.seed, range(start, start + chosen.count)


def warm() -> None:
    """Import everything, in one thread."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    for name in IMPORTED:
        importlib.import_module(name)
    import transformers
    from typer.main import get_command

    from svftool.cli import app

    get_command(app).make_context("svftool", ["inspect", "x"])  # what typer imports late

    for name in NAMES:
        getattr(transformers, name)
    gc.collect()
    gc.freeze()  # no page of the parent is copied for being looked at


def start(words: Sequence[str], folder: Path, before: Callable[[], object] | None = None) -> int:
    """Start ``svftool`` with these words in a folder; return the process's number.

    Its output goes to ``stdout`` and ``stderr`` beside the folder.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        code = _run(words, folder, before)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _run(words: Sequence[str], folder: Path, before: Callable[[], object] | None) -> int:
    os.setpgid(0, 0)
    os.chdir(folder)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, stream in enumerate(streams(folder), 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if before is not None:
        before()
    sys.argv = ["svftool", *words]
    from svftool.cli import main

    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def call(function: Callable[[], object]) -> None:
    """Call a function in a child, so that this process keeps to one thread and computes nothing.

    Raises
    ------
    AssertionError
        If it fails.
    """
    child = os.fork()
    if not child:
        code = 1
        try:
            function()
            code = 0
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, f"{function} failed"


def streams(folder: Path) -> tuple[Path, Path]:
    """Return the files of what was printed."""
    return folder.with_name(folder.name + ".stdout"), folder.with_name(folder.name + ".stderr")


def wait(child: int, folder: Path, seconds: float, *, since: float | None = None) -> Ended:
    """Wait for a child, and kill it after so many seconds."""
    begun = time.monotonic() if since is None else since
    code: int | None = None
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() - begun > seconds:
            os.kill(child, signal.SIGKILL)
            usage = os.wait4(child, 0)[2]
            break
        time.sleep(0.001)
    out, err = (path.read_text(errors="backslashreplace") for path in streams(folder))
    return Ended(code, out, err, time.monotonic() - begun, usage.ru_maxrss * 1024)


def run(
    words: Sequence[str],
    folder: Path,
    *,
    seconds: float = 60,
    before: Callable[[], object] | None = None,
) -> Ended:
    """Run ``svftool`` with these words in a folder, and wait for it."""
    return wait(start(words, folder, before), folder, seconds)
