"""How large the code is, and how many modules one command passes through.

Run ``python benchmarks/structure.py`` for the sizes, and with ``--trace WORK`` for the modules of
``decompose``, ``inspect`` and a classification ``finetune`` too: each runs in a process of its own
on the demo's network, and a module counts as executed where one of its functions was called,
whatever its top level did at import.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PROBE = """
import json, sys, threading
from pathlib import Path
from svftool import cli

root, out, *arguments = sys.argv[1:]
package = str(Path(root) / "svftool")
executed = set()

def importing(frame):
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(package):
            return True
        frame = frame.f_back
    return False

def profile(frame, event, _):
    name = frame.f_code.co_filename
    if event == "call" and package and name.startswith(package) and name not in executed:
        if not importing(frame):
            executed.add(name)

threading.setprofile(profile)
sys.setprofile(profile)
try:
    cli.app(arguments)
except SystemExit as end:
    code = end.code
sys.setprofile(None)
threading.setprofile(None)
assert not code, code
imported = {m.__file__ for n, m in list(sys.modules.items()) if n.startswith("svftool")}
Path(out).write_text(json.dumps({"executed": sorted(executed), "imported": sorted(imported)}))
"""


def trees(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Each module of the package with its syntax tree."""
    for path in sorted((root / "svftool").rglob("*.py")):
        yield path.relative_to(root), ast.parse(path.read_text(encoding="utf-8"))


def sizes(root: Path) -> None:
    """Print modules, lines, lengths of functions, parameter lists and names that repeat."""
    lengths, parameters, homes = [], [], defaultdict(list)
    modules = lines = 0
    for path, tree in trees(root):
        modules += 1
        lines += len((root / path).read_text(encoding="utf-8").splitlines())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append((node.end_lineno or 0) - node.lineno + 1)
                args = node.args
                count = len(args.posonlyargs) + len(args.args) + len(args.kwonlyargs)
                parameters.append((count, f"{path}: {node.name}"))
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(str(path))
    deciles = statistics.quantiles(lengths, n=10)
    print(f"modules {modules}, lines {lines}")
    median = statistics.median(lengths)
    print(f"function length: median {median:.0f}, 90th percentile {deciles[8]:.0f}")
    for count, where in sorted(parameters, reverse=True)[:5]:
        print(f"{count} parameters  {where}")
    repeated = {name: found for name, found in homes.items() if len(found) > 1}
    print(f"public class names that repeat: {len(repeated)} {' '.join(sorted(repeated))}")
    print(f"circles of imports, those for types included: {len(circles(root))}")


def circles(root: Path) -> list[set[str]]:
    """Find groups of modules that import each other in a circle, imports for types included."""
    names = {}
    for path, tree in trees(root):
        parts = path.with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = tree
    graph = {name: imports(tree, set(names)) - {name} for name, tree in names.items()}
    return [group for group in components(graph) if len(group) > 1]


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """List the package's modules that are imported at the top of a module, or for types."""
    found = set()
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.If))]
    for node in (node for body in bodies for node in body):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
    return found & (known - {"svftool"})


def components(graph: dict[str, set[str]]) -> list[set[str]]:
    """Group the nodes that reach each other."""

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for name in graph[waiting.pop()] - seen:
                seen.add(name)
                waiting.append(name)
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {frozenset({n for n in reach[name] if name in reach[n]}) for name in graph}
    return [set(group) for group in groups]


def traces(root: Path, work: Path) -> None:
    """Run each command under a profile and print how many modules it executes and imports."""
    work.mkdir(parents=True, exist_ok=True)
    demo = work / "demo"
    if not demo.exists():
        command = [sys.executable, "-m", "svftool", "demo", demo]
        subprocess.run(command, check=True, cwd=root, stdout=subprocess.DEVNULL)
    spec = f"{demo}/digits_net.py:digits_net"
    runs = {
        "decompose": [f"{demo}/digits.safetensors", "-o", f"{work}/factors", "--force"],
        "inspect": [f"{demo}/digits.safetensors", f"{demo}/merged.safetensors"],
        "finetune": [
            *(f"{demo}/factors", "-o", f"{work}/t.svf.safetensors", "--force"),
            *("--data", f"{demo}/unseen", "--model", spec, "--shots", "5", "--steps", "5"),
        ],
    }
    for command, arguments in runs.items():
        out = work / f"{command}.json"
        subprocess.run(
            [sys.executable, "-c", PROBE, root, out, command, *arguments, "-q", "--json"],
            check=True,
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
            stdout=subprocess.DEVNULL,
        )
        found = json.loads(out.read_text())
        few_shot = sum("few_shot" in name for name in found["imported"])
        print(
            f"{command}: modules executed {len(found['executed'])}, "
            f"imported {len(found['imported'])}, of few-shot segmentation {few_shot}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--trace", type=Path, metavar="WORK")
    options = parser.parse_args()
    root = options.root.resolve()
    sizes(root)
    if options.trace is not None:
        traces(root, options.trace.resolve())


if __name__ == "__main__":
    main()
