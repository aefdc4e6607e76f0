"""What comes out of files is checked where it enters: one line of the right kind, and no memory."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from svftool.auditing.policy import read_policy
from svftool.checkpoints import class_labels, open_checkpoint, parse_json, replace_output
from svftool.cli import app
from svftool.errors import (
    DataError,
    FactorsError,
    ModelError,
    ResourceError,
    SvftoolError,
    UsageError,
    brief,
    kept_work,
    system_fault,
)
from svftool.files import output
from svftool.models.load import build_within, no_larger_than
from svftool.models.pretrained import load_transformers
from svftool.report.text import one_line
from svftool.tasks.images import open_image, read_bytes
from svftool.tasks.texts import list_texts
from svftool.tasks.tokens import length_limit
from svftool.training.workspace import RECORDS, Journal


def checkpoint(folder: Path, config: dict[str, Any] | None = None) -> Path:
    """Write a checkpoint of one small layer."""
    folder.mkdir(exist_ok=True)
    save_file({"fc.weight": torch.ones(4, 4)}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "text",
    ["[" * 102 + "]" * 102, '{"a":' * 100_000, '"\\ud800"', '{"\\udfff": 1}', "9" * 5000, "{"],
)
def test_json_that_fails_later_is_refused_at_once(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def test_json_of_usual_depth_is_read() -> None:
    assert parse_json(b"[" * 99 + b"]" * 99)
    assert parse_json('{"a": "\\ud83d\\ude00"}'.encode("utf-16")) == {"a": "😀"}


class Large(torch.nn.Module):
    """A network with a large table, and many modules."""

    def __init__(self, rows: int = 1, modules: int = 0) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.empty(rows, 1 << 10))
        self.more = torch.nn.ModuleList(torch.nn.Identity() for _ in range(modules))


@pytest.mark.parametrize("sizes", [{"rows": 1 << 24}, {"modules": 5000}])
def test_a_network_beyond_its_file_is_not_built(tmp_path: Path, sizes: dict[str, int]) -> None:
    made = []
    with open_checkpoint(checkpoint(tmp_path)) as file:
        with pytest.raises(ModelError, match="many more"):
            build_within(lambda: made.append(1) or Large(**sizes), file)  # type: ignore[func-returns-value]
        assert made == [1]  # on the device without memory
        assert build_within(Large, file).table.device.type == "cpu"
        with no_larger_than(file):
            pass
    Large(rows=2, modules=5000)  # the limit is gone


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 8192},
        {"num_hidden_layers": 5000},
        {"num_hidden_layers": 10**9},
        {"depths": [1, 1 << 40]},
    ],
)
def test_a_transformers_config_beside_a_small_file(tmp_path: Path, changes: dict[str, int]) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16,
              "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 32000}  # fmt: skip
    folder = checkpoint(tmp_path, {**config, **changes})
    with (
        open_checkpoint(folder) as file,
        pytest.raises(ModelError, match=r"many more|expected at most"),
    ):
        load_transformers(file, dtype=torch.float32, trust_remote_code=False)


@pytest.mark.parametrize("known", [{"a": "x"}, {"0": []}, {"9" * 20: "x"}, {"-1": "x"}])
def test_labels_that_are_no_names_by_number(known: Any) -> None:
    with pytest.raises(ModelError, match="id2label"):
        class_labels({"id2label": known})


@pytest.mark.parametrize("value", ["512", [1], {}, True, 1])
def test_lengths_that_are_none(value: Any) -> None:
    with pytest.raises(ModelError, match="n_positions"):
        length_limit({"n_positions": value}, SimpleNamespace())
    assert length_limit({"n_positions": 0, "n_ctx": 64}, SimpleNamespace()) == 64


@pytest.mark.parametrize(
    "text",
    ["x = " + "[" * 3000, "[[rule]]\nlimits = {weight_drift = nan}",
     "[[rule]]\nlimits = {weight_drift = true}",
     f"[[rule]]\nlimits = {{weight_drift = {'9' * 400}}}", "rule = [1]", "\x00"],
)  # fmt: skip
def test_policies_that_cannot_be_held(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(UsageError):
        read_policy(tmp_path / "p.toml")


def test_nothing_is_blamed_that_was_not_given(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "empty.safetensors")])
    assert (result.exit_code, result.stderr) == (0, "")


def test_messages_cut_endless_names() -> None:
    text = one_line(f"tensor {'x' * 5000}: " + "names " * 200)
    assert len(text) < 1500
    assert text.count("names") == 200
    assert len(brief(["x"] * 1000)) < 70


def test_a_picture_that_grows_beyond_memory_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (3000, 1)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match="sides more alike"):
        open_image(tmp_path / "x.png", short_side=224)
    assert open_image(tmp_path / "x.png", short_side=32).size == (3000, 1)


READS = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES, errno.ENOTCONN, 9999)


@pytest.mark.parametrize("code", READS)
def test_what_the_system_refuses_to_read_is_its_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    with open_checkpoint(checkpoint(tmp_path)) as file:

        def refuse(*args: object, **options: object) -> None:
            raise OSError(code, "refused")

        monkeypatch.setattr(os, "preadv", refuse)
        monkeypatch.setattr(Path, "read_bytes", refuse)
        monkeypatch.setattr("PIL.Image.open", refuse)
        for read in (
            lambda: file.read("fc.weight"),
            lambda: list_texts(tmp_path / "x.png"),
            lambda: open_image(tmp_path / "x.png"),
            lambda: read_bytes(tmp_path / "x.png"),
        ):
            with pytest.raises(ResourceError):
                read()


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EISDIR, errno.EINVAL, None])
def test_a_wrong_path_is_not_the_systems_fault(code: int | None) -> None:
    system_fault(OSError(code, "x"), "x")


@pytest.mark.parametrize("error", [KeyError("x"), RecursionError(), RuntimeError("x\ny")])
def test_broken_work_is_one_line(error: Exception) -> None:
    with pytest.raises(FactorsError, match="without --resume") as caught, kept_work(Path("x")):
        raise error
    assert "\n" not in str(caught.value)
    with pytest.raises(SvftoolError, match="mine"), kept_work(Path("x")):
        raise UsageError("mine")


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EIO, errno.EBUSY])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_what_cannot_be_finished_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(code, "refused")

    monkeypatch.setattr(output.os, call, refuse)
    begun = False

    def work() -> None:
        nonlocal begun
        with replace_output(tmp_path / "out", force=False, inputs=[]):
            begun = True

    with pytest.raises(ResourceError):
        work()
    assert not begun
    assert list(tmp_path.iterdir()) == []


LOOPS: tuple[tuple[str, ...], ...] = (
    ("info", "a"),
    ("inspect", "a", "sound"),
    ("inspect", "sound", "a.safetensors"),
    ("merge", "a.safetensors", "sound", "-o", "out"),
    ("decompose", "a", "-o", "out"),
    ("decompose", "sound", "-o", "a"),
    ("extract", "sound", "a.safetensors", "-o", "out"),
    ("evaluate", "a", "--data", "sound"),
    ("finetune", "a", "--data", "sound", "-o", "out"),
)


@pytest.mark.parametrize("words", LOOPS, ids=" ".join)
def test_links_in_a_circle_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "sound")
    for name in ("a", "a.safetensors"):
        (tmp_path / name).symlink_to("between")
        (tmp_path / "between").unlink(missing_ok=True)
        (tmp_path / "between").symlink_to(name)
        result = CliRunner().invoke(app, [word.replace("a.safetensors", name) for word in words])
        assert result.exit_code in (2, 3, 4), result.output
        assert result.stderr.count("error: ") == 1


@pytest.mark.parametrize("damage", [{"lr": "x"}, {"lr": {}}, {"more": 1}, None, 3, []])
def test_damaged_records_of_an_interrupted_run_are_refused(tmp_path: Path, damage: Any) -> None:
    journal = Journal(tmp_path)
    value = {"lr": 0.1, "scores": (1.0, float("inf")), "facts": {"fold": 1}}
    journal.note("run", value)
    assert journal.noted("run") == {**value, "scores": [1.0, float("inf")]}
    path = tmp_path / RECORDS / "run.json"
    kept = json.loads(path.read_text())
    kept["value"] = {**kept["value"], **damage} if isinstance(damage, dict) else damage
    path.write_text(json.dumps(kept))
    with pytest.raises(FactorsError, match="without --resume"):
        journal.noted("run")
