"""Whole commands on a device and on the CPU, and whether their results agree."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from synthetic_checkpoint import SIZES, write_base
from typer.testing import CliRunner

from svftool.cli import app
from svftool.factors import open_factors, read_tuned
from svftool.numerics import reconstruct

Row = dict[str, Any]

NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 512, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 3),
    )
"""
COLOURS = {"blue": (40, 40, 220), "green": (40, 220, 40), "red": (220, 40, 40)}

# Values in the report of `inspect`: float64 on both sides, in another order of summation.
_CLOSE, _SMALL = 1e-6, 1e-9

# Adam moves every value by about its rate at first, whatever the size of the gradient: rounding
# decides the sign of the smallest ones.
_SAME_TRAINING = 0.2


class Commands:
    """A folder with a base, its code and its pictures, and commands that are run in it.

    Parameters
    ----------
    folder : Path
    apart : bool
        Whether each command is a process; else all are calls, which do not import torch anew.
    """

    def __init__(self, folder: Path, *, apart: bool) -> None:
        self.folder, self._apart = folder, apart
        (folder / "net.py").write_text(NET)
        scope: dict[str, Any] = {}
        exec(compile(NET, "net.py", "exec"), scope)
        save_file(scope["net"]().state_dict(), folder / "base.safetensors", {"format": "pt"})
        g = torch.Generator().manual_seed(0)
        for name, colour in COLOURS.items():
            (folder / "data" / name).mkdir(parents=True)
            for index in range(8):
                noise = 40 * torch.randn(16, 16, 3, generator=g)
                pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / "data" / name / f"{index}.png")

    def run(self, *words: object, setup: str = "") -> tuple[float, dict[str, Any] | None, str]:
        """Run a command; return its seconds, its document (None if it failed) and its errors."""
        arguments = [*map(str, words), "--json", "--quiet"]
        start = time.perf_counter()
        code, output, errors = self._process(arguments, setup) if self._apart else _call(arguments)
        seconds = time.perf_counter() - start
        document = json.loads(output) if code == 0 else None
        return seconds, document, f"{code}: {errors.strip()[-400:]}"

    def _process(self, arguments: list[str], setup: str) -> tuple[int, str, str]:
        code = f"{setup}\nimport sys; from svftool.cli import main; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def both(
        self, name: str, devices: Sequence[str], *words: object, at_once: bool = True
    ) -> tuple[Row, list[Any]]:
        """Run a command on each device, with ``{}`` in its words replaced by the device.

        ``@`` stands for the folder.
        """
        row: Row = {"command": name, "broken": False}
        documents = []

        def run(device: str) -> tuple[float, dict[str, Any] | None, str]:
            place = f"{self.folder}/"
            return self.run(*(str(w).replace("{}", device).replace("@", place) for w in words))

        with ThreadPoolExecutor(len(devices) if at_once and self._apart else 1) as pool:
            done = list(pool.map(run, devices))
        for device, (seconds, document, errors) in zip(devices, done, strict=True):
            row[f"{device} s"] = seconds
            if document is None:
                row |= {"broken": True, "error": f"{device}: {errors}"}
            documents.append(document)
        return row, documents


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Yield a row for each command; in the short mode everything runs on one device."""
    devices = list(dict.fromkeys((device.type, "cpu")))
    with tempfile.TemporaryDirectory() as folder:
        commands = Commands(Path(folder), apart=not quick)
        yield from _small(commands, devices, quick)
        if device.type == "cuda":
            yield _refused(commands)
            if not quick:
                yield from _large(commands, devices)


def _small(commands: Commands, devices: Sequence[str], quick: bool) -> Iterator[Row]:
    at = commands.folder
    row, done = commands.both(
        "decompose", devices, "decompose", "@base.safetensors", "-o", "@f-{}", "--device", "{}"
    )
    if all(done):
        row |= _factors_differ(at / f"f-{devices[0]}", at / f"f-{devices[-1]}")
    yield row
    row, done = commands.both("merge", devices, "merge", "@f-{}", "-o", "@back-{}.safetensors")
    if all(done):
        base = load_file(at / "base.safetensors")
        equal = [_same_bits(base, load_file(at / f"back-{one}.safetensors")) for one in devices]
        row |= {"result": f"the base's bits: {equal}", "broken": not all(equal)}
    yield row
    if quick:
        yield _inspected(commands, devices, f"@back-{devices[-1]}.safetensors")
        return
    fixed = ["--data", "@data", "--model", "@net.py:net", "--shots", 4, "--steps", 12]
    row, done = commands.both(
        "finetune",
        devices,
        "finetune",
        "@f-cpu",
        "-o",
        "@t-{}.safetensors",
        "--device",
        "{}",
        *fixed,
    )
    if all(done):
        row |= _tuned_differ(*(at / f"t-{devices[i]}.safetensors" for i in (0, -1)))
    yield row
    row, done = commands.both("merge, tuned", devices, "merge", "@f-cpu", "@t-{}.safetensors", "-o",
                              "@m-{}.safetensors", "--verify")  # fmt: skip
    yield row
    for option in ([], ["--fast"]):
        yield _inspected(commands, devices, "@m-cpu.safetensors", *option)


def _inspected(commands: Commands, devices: Sequence[str], tuned: str, *option: str) -> Row:
    words = ["inspect", "@base.safetensors", tuned, "--device", "{}", *option]
    row, done = commands.both(" ".join(["inspect", *option]), devices, *words)
    if all(done):
        differing = list(_differing(done[0], done[-1]))
        row |= {"result": f"differing: {differing[:4]}", "broken": bool(differing)}
    return row


def _large(commands: Commands, devices: Sequence[str]) -> Iterator[Row]:
    """Decompose one layer of an 8-billion-parameter model in bfloat16, file to file."""
    size = replace(SIZES["8b"], layers=1, vocabulary=256)
    write_base(commands.folder / "llama", size, 5 * 10**9)
    for rank in ("64", "full"):
        row, done = commands.both(
            f"decompose a Llama-3-8B layer, rank {rank}", devices, "decompose", "@llama", "-o",
            f"@l-{rank}-{{}}", "--device", "{}", "--rank", rank, at_once=False,
        )  # fmt: skip
        if all(done):
            folders = [commands.folder / f"l-{rank}-{one}" for one in devices]
            row |= _values_differ(*folders)
        yield row


def _refused(commands: Commands) -> Row:
    """Train where the device has 8 MB for the process."""
    setup = (
        "import torch; "
        "total = torch.cuda.get_device_properties(0).total_memory; "
        "torch.cuda.set_per_process_memory_fraction(2**23 / total)"
    )
    at = commands.folder
    fixed = ["--data", at / "data", "--model", f"{at}/net.py:net", "--shots", 4, "--steps", 2]
    words = ["finetune", at / "f-cpu", "-o", at / "no.safetensors", "--device", "cuda", *fixed]
    seconds, document, errors = commands.run(*words, setup=setup)
    typed = document is None and errors.startswith("8: ") and "Traceback" not in errors
    left = (at / "no.safetensors").exists()
    return {
        "command": "finetune without memory",
        "cuda s": seconds,
        "broken": left or not typed,
        "result": errors,
    }


def _call(arguments: list[str]) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.stdout, done.stderr


# Comparisons


def _factors_differ(first: Path, second: Path) -> Row:
    worst = {"values": 0.0, "weights": 0.0}
    with open_factors(first) as one, open_factors(second) as two:
        for name in one.layers:
            a, b = one.read(name), two.read(name)
            W, X = (reconstruct(x.U.double(), x.S.double(), x.Vh.double()) for x in (a, b))
            worst["weights"] = max(worst["weights"], float((W - X).norm() / X.norm()))
            worst["values"] = max(worst["values"], float((a.S - b.S).abs().max() / b.S.max()))
    return {
        "result": ", ".join(f"{key} {value:.1e}" for key, value in worst.items()),
        "broken": not (worst["values"] <= 1e-6 and worst["weights"] <= 2e-6),
    }


def _values_differ(first: Path, second: Path) -> Row:
    worst = 0.0
    with open_factors(first) as one, open_factors(second) as two:
        for name in one.layers:
            a, b = one.read_S(name), two.read_S(name)
            worst = max(worst, float((a - b).abs().max() / b.max()))
    return {"result": f"values {worst:.1e}", "broken": not worst <= 1e-6}


def _same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def _tuned_differ(first: Path, second: Path) -> Row:
    one, two = read_tuned(first), read_tuned(second)
    if one.S.keys() != two.S.keys():
        return {"result": f"{sorted(one.S)} and {sorted(two.S)}", "broken": True}
    moved, apart = 0.0, 0.0
    for name in one.S:
        moved += float(two.delta(name).square().sum())
        apart += float((one.delta(name) - two.delta(name)).square().sum())
    off = math.sqrt(apart / moved)
    return {"result": f"changes differ by {off:.1e}", "broken": not off <= _SAME_TRAINING}


def _differing(one: Any, two: Any, path: str = "") -> Iterator[str]:
    """Yield where two documents differ by more than rounding; times are left out."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        for key in one.keys() - {"seconds", "timestamp"}:
            yield from _differing(one[key], two[key], f"{path}.{key}")
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        for index, (a, b) in enumerate(zip(one, two, strict=True)):
            yield from _differing(a, b, f"{path}[{index}]")
    elif isinstance(one, float) and isinstance(two, float):
        if not math.isclose(one, two, rel_tol=_CLOSE, abs_tol=_SMALL):
            yield f"{path}: {one} and {two}"
    elif one != two:
        yield f"{path}: {one} and {two}"
