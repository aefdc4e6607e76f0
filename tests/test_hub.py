"""Hub ids and pushes, against a stand-in on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import Hub, files_of, serve
from safetensors.torch import save
from test_pipelines import COMPONENTS, contents, make
from typer.testing import CliRunner

from svftool.checkpoints import open_checkpoint
from svftool.cli import app
from svftool.errors import CheckpointError

pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serve(tmp_path / "cache", monkeypatch) as found:
        yield found


def weights(value: float) -> bytes:
    return save({"a.weight": value * torch.eye(4)}, {"format": "pt"})


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*map(str, args), "-q"])
    assert result.exit_code == code, (result.stderr, result.exception)
    return result


@pytest.fixture
def model(hub: Hub) -> Hub:
    main = {
        "model.safetensors": weights(1),
        "pytorch_model.bin": b"",
        "config.json": b"{}",
        "unet/model.safetensors": weights(3),
        "unet/config.json": b"{}",
        "onnx/m.onnx": b"",
    }
    hub.repos["me/model"] = {
        "main": main,
        "v2": {"model.safetensors": weights(2)},
        "refs/pr/1": {"model.safetensors": weights(4)},
    }
    return hub


@pytest.mark.parametrize(
    ("text", "value", "fetched"),
    [
        ("me/model", 1, {"model.safetensors", "config.json"}),
        ("me/model@v2", 2, {"model.safetensors"}),
        ("me/model@refs/pr/1", 4, {"model.safetensors"}),
        ("me/model/unet", 3, {"unet/model.safetensors", "unet/config.json"}),
        ("me/model/unet@main", 3, {"unet/model.safetensors", "unet/config.json"}),
    ],
)
def test_an_id_names_a_revision_and_a_folder_and_only_that_is_fetched(
    model: Hub, text: str, value: float, fetched: set[str]
) -> None:
    with open_checkpoint(text) as opened:
        assert opened.hub_id == text
        assert torch.equal(opened.read("a.weight"), value * torch.eye(4))
    assert set(model.fetched) == fetched


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("me/none", "no such repository, or a private one"),
        ("me/gated", "gated.*Ask for access on the page of me/gated"),
        ("me/model@v9", "no such revision"),
        ("me/model/vae", "has no folder 'vae', expected one of onnx, unet"),
        ("me/model/onnx", "no weights"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(model: Hub, text: str, words: str) -> None:
    model.gated.add("me/gated")
    with pytest.raises(CheckpointError, match=words) as caught:
        open_checkpoint(text)
    assert "\n" not in str(caught.value)


def test_offline_what_the_cache_holds_is_read_and_the_rest_is_one_line(
    model: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    open_checkpoint("me/model/unet").close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    open_checkpoint("me/model/unet").close()
    with pytest.raises(CheckpointError, match="offline"):
        open_checkpoint("me/other")


def test_a_pipeline_on_the_hub_goes_component_by_component(hub: Hub, tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    more = {"all.safetensors": weights(1), "unet/diffusion_pytorch_model.bin": b"x"}
    hub.repos["me/pipe"] = {"main": files_of(base) | more}
    run("decompose", "me/pipe", "-o", "f")
    assert not set(more) & set(hub.fetched)
    run("merge", "f", "-o", "m")
    assert contents(tmp_path / "m") == contents(base)
    result = run("inspect", "me/pipe", base, "--json")
    assert list(json.loads(result.stdout)["components"]) == list(COMPONENTS)


def test_both_sides_of_extract_may_be_on_the_hub(model: Hub, tmp_path: Path) -> None:
    words = ["extract", "me/model", "me/model@v2", "-o", "x", "--as", "lora", "--rank", 4]
    assert json.loads(run(*words, "--json").stdout)["error"] < 1e-6
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/model"
