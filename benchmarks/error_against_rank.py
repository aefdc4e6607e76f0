"""How much of a fine-tune a LoRA holds at each rank: a table in Markdown, and a plot.

    python benchmarks/error_against_rank.py --plot docs/error-against-rank.svg \
        "NAME=BASE,TUNED" ["NAME=BASE,TUNED" ...]

Each point is an extraction in float32; its error is ``||D - BA||_F / ||D||_F`` over the layers that
become two matrices. Beside it stands what singular values alone leave (``svftool extract``), which
take fewer numbers than rank 1.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from svftool import LoraOptions, extract, extract_lora

RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Curve:
    """Errors of one pair, by rank, with the size in bytes; and that of singular values."""

    name: str
    errors: list[float]
    sizes: list[int]
    svf: float


def curve(name: str, base: str, tuned: str) -> Curve:
    errors, sizes = [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank in RANKS:
            options = LoraOptions(rank=str(rank), dtype="float32")
            done = extract_lora(base, tuned, output=Path(folder, str(rank)), options=options)
            errors.append(done.layer_error)
            sizes.append(done.bytes)
        svf = extract(base, tuned, output=Path(folder, "x.svf.safetensors")).error
    return Curve(name, errors, sizes, svf)


def table(curves: list[Curve]) -> str:
    head = ["pair", *(f"rank {rank}" for rank in RANKS), "singular values alone"]
    rows = [head, ["---"] * len(head)]
    for one in curves:
        rows.append([one.name, *(f"{e:.1%}" for e in one.errors), f"{one.svf:.1%}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(curves: list[Curve], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "svftool"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for at, one in enumerate(curves):
        axes.plot(RANKS, [100 * e for e in one.errors], marker="o", markersize=4, color=f"C{at}")
        axes.annotate(
            one.name, (RANKS[0], 100 * one.errors[0]), xytext=(6, 2),
            textcoords="offset points", color=f"C{at}", fontsize=8,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
    axes.set(xlabel="rank of the LoRA", ylabel="lost, % of the change (norm)", ylim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="+", metavar="NAME=BASE,TUNED")
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    curves = []
    for pair in asked.pairs:
        name, _, files = pair.partition("=")
        base, _, tuned = files.partition(",")
        curves.append(curve(name, base, tuned))
    print(table(curves))
    if asked.plot is not None:
        plot(curves, asked.plot)


if __name__ == "__main__":
    main()
