"""Make the environment that the Makefile runs in: ``python .ci/environment.py EXTRA...``.

The dependencies are several gigabytes, so they are installed once into a cache folder whose name is
a hash of the dependency lists; every clone on the machine shares it. The clone's own ``.venv`` is a
thin environment whose ``.pth`` file points there; it holds svftool in editable form. A second call
does nothing. Needs only Python's standard library.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "svftool"


def requirements(extras: list[str]) -> list[str]:
    """List the requirements of the core and of the extras, references among extras resolved."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    found: set[str] = set(project["dependencies"])
    waiting = list(extras)
    seen: set[str] = set()
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in optional[extra]:
            if requirement.startswith(f"{NAME}["):
                waiting += requirement.removeprefix(f"{NAME}[").removesuffix("]").split(",")
            else:
                found.add(requirement)
    return sorted(found)


def cached_environment(wanted: list[str]) -> Path:
    """Return the shared environment that holds the requirements; install them at first use."""
    facts = json.dumps([wanted, sys.version_info[:3], sys.platform])
    key = hashlib.sha256(facts.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / NAME
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"environment-{key}"
    with (cache / f"environment-{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            print(f"installing {len(wanted)} requirements into {folder} (once)", flush=True)
            venv.create(folder, with_pip=True)
            python = folder / "bin" / "python"
            # The build backend too: a clone's editable install must not need the network again.
            backend = ["hatchling", "editables"]
            subprocess.run([python, "-m", "pip", "install", "-qq", *wanted, *backend], check=True)
            (folder / "complete").touch()
    return folder


def thin_environment(shared: Path) -> None:
    """Make ``.venv`` in the clone: svftool in editable form on top of the shared environment."""
    own = ROOT / ".venv"
    marker = own / "shared"
    text = f"{shared}\n{ROOT}\n"
    if marker.exists() and marker.read_text() == text:
        return
    venv.create(own, clear=True, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = Path("lib") / version / "site-packages"
    (own / packages / "shared.pth").write_text(f"{shared / packages}\n")
    command = [shared / "bin" / "python", "-m", "pip", "--python", own / "bin" / "python"]
    options = ["-qq", "--no-deps", "--no-build-isolation", "--editable"]
    subprocess.run([*command, "install", *options, ROOT], check=True)
    marker.write_text(text)


def main() -> None:
    """Make both environments."""
    if sys.version_info < (3, 11):
        sys.exit(f"svftool needs Python 3.11 or newer, this is {sys.version.split()[0]}")
    thin_environment(cached_environment(requirements(sys.argv[1:])))


if __name__ == "__main__":
    main()
