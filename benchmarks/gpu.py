"""What svftool does on a GPU: is it right, how fast is it, do whole commands agree with the CPU.

    python benchmarks/gpu.py --device cuda                    all of it, under 8 minutes
    python benchmarks/gpu.py --device cuda bounds networks    some parts of it
    python benchmarks/gpu.py --device cpu --quick             small, in seconds: does it run, for CI

bounds     every method on matrices that are hard, against float64 LAPACK
networks   the decompositions of whole networks, beside torch.linalg.svd with each of its drivers
training   one optimiser step of each regime
memory     what a layer takes of the device, and what happens where that is too little
commands   decompose, finetune, merge and inspect as processes, on the device and on the CPU

It ends with 1 where a bound is broken or a command's result differs. Nothing of the device is set;
its clocks are as they are found. What is measured is written to ``--json`` after every row.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gpu_bounds
import gpu_commands
import gpu_memory
import gpu_networks
import gpu_training
import torch
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
PARTS: dict[str, Callable[[torch.device, bool], Iterator[Row]]] = {
    "bounds": gpu_bounds.rows,
    "networks": gpu_networks.rows,
    "training": gpu_training.rows,
    "memory": gpu_memory.rows,
    "commands": gpu_commands.rows,
}


def machine(device: torch.device) -> Row:
    """Say what was measured on."""
    found: Row = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": platform.processor() or platform.machine(),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,memory.total"]
        done = subprocess.run(
            [*asked, "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
        found["driver, clocks, memory"] = done.stdout.strip()
    return found


def _kept_going(rows: Iterator[Row]) -> Iterator[Row]:
    """Yield rows; an error becomes one, because the other parts are wanted all the same."""
    try:
        yield from rows
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        yield {"broken": True, "error": f"{type(error).__name__}: {error}"[:300]}


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}"
    return "" if value is None else str(value)


def table_of(title: str, rows: list[Row]) -> Table:
    """Return a table with a column for each key, in the order of the first row that has it."""
    table = Table(title=title)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    for key in keys:
        left = all(isinstance(row.get(key), (str, type(None))) for row in rows)
        table.add_column(key, justify="left" if left else "right")
    for row in rows:
        table.add_row(*(shown(row.get(key)) for key in keys), style="red" if broken(row) else None)
    return table


def broken(row: Row) -> bool:
    return bool(row.get("broken"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="some; all by default")
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--quick", action="store_true", help="small cases: does it run")
    parser.add_argument("--json", type=Path, help="write what was measured here")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is available. Use --device cpu")
    return options


def main() -> int:
    options = parse()
    device = torch.device("cpu" if options.device == "cpu" else "cuda:0")
    console = Console(width=180)
    document: Row = {"machine": machine(device)}
    console.print(document["machine"])
    begun = time.perf_counter()
    for part in options.parts or PARTS:
        rows = document[part] = []
        start = time.perf_counter()
        for row in _kept_going(PARTS[part](device, options.quick)):
            rows.append(row)
            document["seconds"] = time.perf_counter() - begun
            if options.json:
                options.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
        took = time.perf_counter() - start
        console.print(table_of(f"{part}: {took:.0f} s, {document['machine']['device']}", rows))
    wrong = [(part, row) for part in PARTS for row in document.get(part, []) if broken(row)]
    for part, row in wrong:
        console.print(f"{part}: {row}", style="bold red", highlight=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
