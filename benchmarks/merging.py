"""Merging of many fine-tunes against the decompositions that it needs, and its memory.

    python benchmarks/merging.py [--blocks 12] [--inputs 8] [--method tsv] [--rounds 1] [--torch]
    python benchmarks/merging.py --memory [--megabytes 1000] [--inputs 8] [--method tsv]

Speed: a base and its fine-tunes of the shape of CLIP's ViT-B/32, on the disk. Every round runs the
whole merge, reports and files included, and then nothing but the singular value decompositions that
TSV-M needs: of each change, and of the left and the right vectors put side by side. These run
through the same engine on matrices that are in memory already; with --torch one after another by
``torch.linalg.svd``, as the authors' code does, too.

Memory: checkpoints of square layers 2048 wide, merged by a process of its own whose peak of
anonymous memory is measured; all files are removed again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from svftool.engine import Job, run_svds
from svftool.stages.combine import combine
from svftool.stages.combine_options import CombineOptions

WIDTH = 768


def vision(blocks: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "visual.conv1.weight": (WIDTH, 3, 32, 32),
        "visual.positional_embedding": (50, WIDTH),
        "visual.ln_pre.weight": (WIDTH,),
    }
    for block in range(blocks):
        place = f"visual.transformer.resblocks.{block}"
        shapes |= {
            f"{place}.attn.in_proj_weight": (3 * WIDTH, WIDTH),
            f"{place}.attn.out_proj.weight": (WIDTH, WIDTH),
            f"{place}.mlp.c_fc.weight": (4 * WIDTH, WIDTH),
            f"{place}.mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
            f"{place}.ln_1.weight": (WIDTH,),
            f"{place}.mlp.c_fc.bias": (4 * WIDTH,),
        }
    return shapes


def wide(megabytes: int) -> dict[str, tuple[int, ...]]:
    side = 2048
    count = max(1, megabytes * 1_000_000 // (4 * side * side))
    return {f"layers.{i}.weight": (side, side) for i in range(count)}


def write(folder: Path, shapes: dict[str, tuple[int, ...]], inputs: int) -> tuple[Path, list[Path]]:
    base = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(i)) / 20
        for i, (name, shape) in enumerate(shapes.items())
    }
    save_file(base, folder / "base.safetensors")
    paths = []
    for number in range(inputs):
        generator = torch.Generator().manual_seed(1000 + number)
        tuned = {
            name: value + 1e-3 * torch.randn(value.shape, generator=generator)
            for name, value in base.items()
        }
        paths.append(folder / f"tuned-{number}.safetensors")
        save_file(tuned, paths[-1])
        del tuned
    return folder / "base.safetensors", paths


def needed(base: Path, paths: list[Path]) -> dict[str, Tensor]:
    """Return every matrix that is decomposed; the vectors side by side are as good as any."""
    start = load_file(base)
    found = {}
    for number, path in enumerate(paths):
        for name, value in load_file(path).items():
            if value.ndim > 1 and "embedding" not in name:
                found[f"{name}/{number}"] = (value - start[name]).flatten(1)
    for name, value in start.items():
        if value.ndim > 1 and "embedding" not in name:
            m, n = value.flatten(1).shape
            for side, long in (("left", m), ("right", n)):
                found[f"{name}/{side}"] = torch.randn(long, min(m, n)) / long**0.5
    return found


def speed(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place)
        base, paths = write(folder, vision(args.blocks), args.inputs)
        matrices = needed(base, paths)
        jobs = [Job(name, tuple(one.shape)) for name, one in matrices.items()]
        print(f"{len(jobs)} decompositions, {torch.get_num_threads()} threads", flush=True)

        def merged(number: int) -> None:
            options = CombineOptions(method=args.method)
            combine(base, paths, output=folder / f"o{number}.safetensors", options=options)

        def engine(number: int) -> None:
            for _, svd in run_svds(jobs, matrices.__getitem__):
                del svd

        def plain(number: int) -> None:
            for one in matrices.values():
                torch.linalg.svd(one, full_matrices=False)

        ways = {"merge": merged, "decompositions": engine} | (
            {"torch": plain} if args.torch else {}
        )
        for number in range(args.rounds):
            seen = {name: timed(way, number) for name, way in ways.items()}
            for name, (wall, cpu) in seen.items():
                ratios = [seen["merge"][i] / (wall, cpu)[i] for i in range(2)]
                print(
                    f"{name}: {wall:.1f} s, {cpu:.1f} s of the processor; the merge takes "
                    f"{ratios[0]:.2f} and {ratios[1]:.2f} times that",
                    flush=True,
                )


def timed(work: Callable[[int], None], number: int) -> tuple[float, float]:
    """Return seconds that pass, and seconds of all threads: a busy machine changes the first."""
    wall, cpu = time.perf_counter(), time.process_time()
    work(number)
    return time.perf_counter() - wall, time.process_time() - cpu


def memory(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place)
        base, paths = write(folder, wide(args.megabytes), args.inputs)
        watch = Path(__file__).with_name("process_memory.py")
        command = [sys.executable, str(watch), sys.executable, "-m", "svftool", "merge", str(base)]
        command += [*map(str, paths), "-o", str(folder / "merged"), "--method", args.method, "-q"]
        print(f"{args.inputs} fine-tunes of {base.stat().st_size / 1e6:.0f} MB by {args.method}")
        subprocess.run(command, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--inputs", type=int, default=8)
    parser.add_argument("--method", default="tsv")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--folder", default=None, help="where the files go for the time being")
    args = parser.parse_args()
    (memory if args.memory else speed)(args)


if __name__ == "__main__":
    main()
