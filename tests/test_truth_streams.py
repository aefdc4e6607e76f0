"""stdout and stderr outlast their readers, full disks and narrow encodings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = [sys.executable, "-m", "svftool"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streams") / "base.pth"
    torch.save({"a.weight": torch.randn(8, 8), "b.weight": torch.randn(8, 8)}, path)
    return path


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash with `$S` for svftool; the exit code is that of svftool."""
    program = " ".join(PROGRAM)
    return subprocess.run(
        ["bash", "-c", f"S={program!r}; {line}"],
        capture_output=True,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("words", ["--help", "inspect {base}"])
def test_a_reader_that_has_gone_is_no_error(base: Path, words: str) -> None:
    line = words.format(base=base)
    result = shell(f"$S {line} | true; exit ${{PIPESTATUS[0]}}")
    assert (result.returncode, result.stderr.count(b"Traceback")) == (0, 0), result.stderr


def test_the_work_is_done_although_nobody_reads(base: Path, tmp_path: Path) -> None:
    result = shell(f"$S decompose {base} -o {tmp_path}/f 2>&1 | true; exit ${{PIPESTATUS[0]}}")
    assert result.returncode == 0
    assert (tmp_path / "f" / "svf_config.json").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
@pytest.mark.parametrize("words", ["--help", "inspect {base} --json"])
def test_a_full_disk_under_stdout_is_one_line(base: Path, words: str) -> None:
    result = shell(f"$S {words.format(base=base)} > /dev/full")
    assert result.returncode == 8
    assert b"stdout" in result.stderr
    assert b"Traceback" not in result.stderr


@pytest.mark.parametrize("words", ["inspect", "inspect --json"])
@pytest.mark.parametrize("encoding", ["ascii"])
def test_what_the_encoding_lacks_is_escaped(tmp_path: Path, words: str, encoding: str) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xc3\xa4\xe2\x82\xac"))
    folder.mkdir()
    path = folder / "a.pth"
    torch.save({"ä€.weight": torch.randn(8, 8)}, path)
    result = subprocess.run(
        [*PROGRAM, *words.split(), path],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C"},
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-500:]
    if "--json" in words:
        assert "ä€.weight" in json.dumps(
            json.loads(result.stdout.decode(encoding)), ensure_ascii=False
        )
