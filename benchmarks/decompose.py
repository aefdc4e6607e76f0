"""svftool's engine beside a loop of torch.linalg.svd over the same matrices.

Both sides take turns in one process, on the same cores and the same data in memory, and the medians
are compared; every result of both is checked against float64 LAPACK. Memory is what each side takes
beside its input.

    python benchmarks/decompose.py                                 all cases, 5 turns each
    python benchmarks/decompose.py resnet50 vit_b_16 --repeats 3
    python benchmarks/decompose.py --data ../shared/data           real spectra and weights
    python benchmarks/decompose.py --process vgg16                 whole processes, file to file
    python benchmarks/decompose.py --process FOLDER --rank 64      of any checkpoint
    python benchmarks/decompose.py --quick                         correctness alone, for CI
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from layers import (
    NETWORKS,
    profile_of,
    random_layers,
    real_layers,
    trained_layers,
    with_spectrum,
)
from names import chosen
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from watch import Watch

from svftool.engine import Job, parse_rank, run_svds, run_values

Layers = dict[str, Tensor]
Factors = tuple[Tensor, Tensor, Tensor]
BOUNDS = {"values": 1e-6, "reconstruction": 1e-6, "orthogonality": 1e-5}
RANK = 64


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes
    ----------
    name : str
    layers : callable
        Makes the matrices.
    kind : {"full", "values", "rank"}
        All factors; singular values alone; the 64 largest against torch's full decomposition.
    """

    name: str
    layers: Callable[[], Layers]
    kind: str = "full"


@dataclass(frozen=True)
class Row:
    """What was measured: medians of seconds, worst errors over the layers, largest memory."""

    case: str
    ours: float
    torch: float
    our_errors: dict[str, float]
    torch_errors: dict[str, float]
    our_bytes: int
    torch_bytes: int
    methods: dict[str, int]
    turns: list[tuple[float, float]]

    @property
    def ratio(self) -> float:
        """How many times as long torch takes."""
        return self.torch / self.ours


# The two sides


def ours(layers: Layers, kind: str) -> tuple[dict[str, Factors], dict[str, int]]:
    jobs = [Job(name, tuple(W.shape), W.dtype) for name, W in layers.items()]
    read = layers.__getitem__
    if kind == "values":
        values = run_values(jobs, read)
        return {name: (torch.empty(0), S, torch.empty(0)) for name, S in values}, {}
    rank = parse_rank(str(RANK) if kind == "rank" else "full")
    found, methods = {}, {}
    for name, result in run_svds(jobs, read, rank=rank):
        found[name] = (result.U, result.S, result.Vh)
        methods[result.method] = methods.get(result.method, 0) + 1
    return found, methods


def torch_loop(layers: Layers, kind: str) -> dict[str, Factors]:
    if kind == "values":
        return {
            name: (torch.empty(0), torch.linalg.svdvals(W.float()), torch.empty(0))
            for name, W in layers.items()
        }
    return {
        name: tuple(torch.linalg.svd(W.float(), full_matrices=False)) for name, W in layers.items()
    }


# Errors


def worst_errors(layers: Layers, found: dict[str, Factors], expected: Layers) -> dict[str, float]:
    """Return the largest error of each kind over the layers, taken in float64."""
    worst: dict[str, float] = {}
    for name, W in layers.items():
        for kind, error in errors_of(W.double(), found[name], expected[name]):
            worst[kind] = max(worst.get(kind, 0.0), error)
    return worst


def errors_of(W: Tensor, factors: Factors, expected: Tensor) -> Iterator[tuple[str, float]]:
    U, S, Vh = (factor.double() for factor in factors)
    k = len(S)
    yield "values", float((S - expected[:k]).abs().max() / expected[0])
    if not U.numel():
        return
    eye = torch.eye(k, dtype=torch.float64)
    yield "orthogonality", float((U.mT @ U - eye).abs().max())
    yield "orthogonality", float((Vh @ Vh.mT - eye).abs().max())
    if k == min(W.shape):
        left = torch.linalg.vector_norm(W - U * S @ Vh) / torch.linalg.vector_norm(W)
        yield "reconstruction", float(left)


def reference(layers: Layers) -> Layers:
    """Take the singular values in float64; a long matrix is reduced to a triangle first."""
    values = {}
    for name, W in layers.items():
        wide = W.double() if W.shape[0] >= W.shape[1] else W.double().mT
        values[name] = torch.linalg.svdvals(torch.linalg.qr(wide, mode="r").R)
    return values


# Running


def run_case(case: Case, repeats: int) -> Row:
    layers = case.layers()
    found, methods = ours(layers, case.kind)
    expected = reference(layers)
    our_errors = worst_errors(layers, found, expected)
    torch_errors: dict[str, float] = {}
    del found
    turns, our_bytes, torch_bytes = [], 0, 0
    for turn in range(repeats):
        with Watch() as first:
            result = ours(layers, case.kind)
        del result
        with Watch() as second:
            peer = torch_loop(layers, case.kind)
        if turn == 0:
            torch_errors = worst_errors(layers, peer, expected)
        del peer
        turns.append((first.seconds, second.seconds))
        our_bytes = max(our_bytes, first.peak_bytes)
        torch_bytes = max(torch_bytes, second.peak_bytes)
    medians = [statistics.median(side) for side in zip(*turns, strict=True)]
    return Row(
        case.name,
        medians[0],
        medians[1],
        our_errors,
        torch_errors,
        our_bytes,
        torch_bytes,
        methods,
        turns,
    )


def all_cases(data: Path | None) -> list[Case]:
    profile, _ = profile_of(data)
    falling = (1.0 + torch.arange(1024.0)) ** -0.7
    cases = []
    for kind in ("full", "values"):
        for name in ("resnet50", "vgg16", "vit_b_16", "llama block"):
            shapes = NETWORKS[name]
            trained = falling if name in ("vit_b_16", "llama block") else profile
            label = name + (" values" if kind == "values" else "")
            cases += [
                Case(label, lambda shapes=shapes: random_layers(shapes), kind),
                Case(
                    f"{label}, trained",
                    lambda shapes=shapes, trained=trained: trained_layers(shapes, trained),
                    kind,
                ),
            ]
    square = {(4096, 4096): 1}
    first = (1.0 + torch.arange(4096.0)) ** -1.0
    cases += [
        Case("rank 64 of 4096, flat", lambda: random_layers(square), "rank"),
        Case("rank 64 of 4096, 1/i", lambda: trained_layers(square, first), "rank"),
        Case("rank 64 of 4096, i^-0.5", lambda: trained_layers(square, first.sqrt()), "rank"),
    ]
    if data is not None:
        cases.append(Case("real checkpoints", lambda: real_layers(data)))
        cases.append(Case("real checkpoints values", lambda: real_layers(data), "values"))
    return cases


def quick_cases(data: Path | None) -> list[Case]:
    quick, profile = NETWORKS["quick"], (1.0 + torch.arange(256.0)) ** -0.7
    bottom = torch.logspace(0, -9, 300)
    cases = [
        Case("quick", lambda: random_layers(quick)),
        Case("quick, trained", lambda: trained_layers(quick, profile)),
        Case("quick, graded", lambda: {"w": with_spectrum(torch.randn(600, 300), bottom)}),
        Case("quick, half", lambda: {n: W.half() for n, W in random_layers(quick).items()}),
        Case("quick values", lambda: random_layers(quick), "values"),
        Case("quick rank 64", lambda: trained_layers({(1200, 1100): 1}, profile), "rank"),
    ]
    if data is not None:
        cases.append(Case("real checkpoints", lambda: real_layers(data)))
    return cases


# Whole processes

LOOP = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
place, rank = Path(sys.argv[1]), sys.argv[3]
factors = {}
for file in sorted(place.glob("*.safetensors")) if place.is_dir() else [place]:
    for name, W in load_file(file).items():
        if W.ndim < 2:
            factors[name] = W
            continue
        U, S, Vh = torch.linalg.svd(W.float().flatten(1), full_matrices=False)
        k = len(S) if rank == "full" else int(rank)
        factors[f"{name}.U"] = U[:, :k].contiguous()
        factors |= {f"{name}.S": S[:k].contiguous(), f"{name}.Vh": Vh[:k].contiguous()}
save_file(factors, sys.argv[2])
"""


def whole_processes(name: str, options: argparse.Namespace, console: Console) -> None:
    """Time ``svftool decompose`` beside a script that loads, loops and saves.

    The two take turns, each first in every other turn.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    with tempfile.TemporaryDirectory() as folder:
        ours_at, loop_at = str(Path(folder, "f")), str(Path(folder, "l"))
        source = name
        if name in NETWORKS:
            source = str(Path(folder, "w.safetensors"))
            save_file(random_layers(NETWORKS[name]), source)
        tool = [sys.executable, "-m", "svftool", "decompose", source, "-o", ours_at, "--force"]
        sides = {
            "svftool": [*tool, "--rank", options.rank, "--quiet", "--json"],
            "loop": [sys.executable, "-c", LOOP, source, loop_at, options.rank],
        }
        turns: dict[str, list[float]] = {side: [] for side in sides}
        peaks = dict.fromkeys(sides, 0)
        for turn in range(options.repeats):
            for side in sorted(sides, reverse=turn % 2 == 0):
                with Watch() as watch:
                    child = subprocess.Popen(
                        sides[side], env=environment, stdout=subprocess.DEVNULL
                    )
                    _, status, used = os.wait4(child.pid, 0)
                    child.returncode = os.waitstatus_to_exitcode(status)
                if child.returncode != 0:
                    raise SystemExit(f"{side} of {name}: exit code {child.returncode}")
                turns[side].append(watch.seconds)
                peaks[side] = max(peaks[side], used.ru_maxrss >> 10)
    first, second = (statistics.median(turns[side]) for side in ("svftool", "loop"))
    console.print(
        f"{name}, rank {options.rank}, whole processes: {second / first:.2f}x; svftool "
        f"{first:.1f} s {peaks['svftool']} MB, loop {second:.1f} s {peaks['loop']} MB; load "
        f"{os.getloadavg()[0]:.1f}",
        highlight=False,
    )


def table_of(rows: list[Row]) -> Table:
    table = Table(
        title="seconds: medians; errors: worst against float64 LAPACK; MB beside the input"
    )
    for heading in ("case", "svftool s", "torch s", "ratio"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for heading in ("values", "reconstruction", "orthogonality"):
        table.add_column(f"{heading} svftool | torch", justify="right")
    table.add_column("MB svftool | torch", justify="right")
    table.add_column("methods")
    for row in rows:
        table.add_row(
            row.case,
            f"{row.ours:.2f}",
            f"{row.torch:.2f}",
            f"{row.ratio:.1f}x",
            *(
                f"{row.our_errors.get(kind, 0.0):.1e} | {row.torch_errors.get(kind, 0.0):.1e}"
                for kind in BOUNDS
            ),
            f"{row.our_bytes >> 20} | {row.torch_bytes >> 20}",
            " ".join(f"{count} {method}" for method, count in row.methods.items()),
        )
    return table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="beginnings of the names of cases; all by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, help="folder of real checkpoints")
    parser.add_argument("--quick", action="store_true", help="small cases, once: correctness alone")
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--process", action="store_true", help="networks as whole processes")
    parser.add_argument("--rank", default="full", help="of whole processes: full, or a count")
    parser.add_argument("--json", type=Path, help="write what was measured here")
    return parser.parse_args()


def main() -> int:
    options = parse()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.threads :])
    torch.set_num_threads(options.threads)
    cases = quick_cases(options.data) if options.quick else all_cases(options.data)
    console = Console(width=200)
    if options.process:
        for one in options.cases or ["resnet50", "vit_b_16"]:
            for name in [one] if Path(one).exists() else chosen([one], NETWORKS):
                whole_processes(name, options, console)
        return 0
    names = chosen(options.cases, [case.name for case in cases])
    wanted = [case for case in cases if case.name in names]
    if options.list:
        console.print("\n".join(case.name for case in wanted), highlight=False)
        return 0
    rows = []
    for case in wanted:
        rows.append(run_case(case, 1 if options.quick else options.repeats))
        row = rows[-1]
        console.print(f"{row.case}: {row.ours:.2f} s, torch {row.torch:.2f} s", highlight=False)
    console.print(table_of(rows))
    if options.json:
        documents = [{**asdict(row), "ratio": row.ratio} for row in rows]
        options.json.write_text(json.dumps(documents, indent=2), encoding="utf-8")
    missed = [
        f"{row.case}: {kind} error {error:.1e}, expected at most {BOUNDS[kind]:.0e}"
        for row in rows
        for kind, error in row.our_errors.items()
        if not error <= BOUNDS[kind]
    ]
    console.print("\n".join(missed), style="bold red", highlight=False)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
