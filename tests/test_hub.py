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


# Pushing.


@pytest.fixture
def known(model: Hub) -> Hub:
    run("decompose", "me/model", "-o", "f")
    return model


def commands(tmp_path: Path) -> dict[str, list[object]]:
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "model.safetensors").write_bytes(weights(2))
    return {
        "decompose": ["decompose", "me/model", "-o", "out"],
        "merge": ["merge", "f", "-o", "out"],
        "extract": ["extract", "me/model", "tuned", "-o", "out.svf.safetensors"],
        "lora": ["extract", "me/model", "tuned", "-o", "out", "--as", "lora", "--rank", 2],
    }


RELATIONS = {
    "decompose": ("quantized", "svftool"),
    "merge": ("finetune", None),
    "extract": ("adapter", "svftool"),
    "lora": ("adapter", "peft"),
}


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("flag", ["", "--private", "--create-pr"])
def test_what_was_written_is_pushed_with_a_card(
    known: Hub, tmp_path: Path, name: str, flag: str
) -> None:
    from huggingface_hub import ModelCard

    words = [*commands(tmp_path)[name], "--push-to-hub", "me/new", *filter(None, [flag])]
    run(*words)
    (commit,) = known.commits
    assert (commit["repo"], commit["create_pr"]) == ("me/new", flag == "--create-pr")
    made = [one.get("visibility") == "private" for one in known.created]
    assert made == ([] if flag == "--create-pr" else [flag == "--private"])
    output = tmp_path / str(words[words.index("-o") + 1])
    written = files_of(output) if output.is_dir() else {output.name: output.read_bytes()}
    pushed = dict(commit["files"])
    text = pushed.pop("README.md").decode()
    assert pushed == {key: value for key, value in written.items() if key != "README.md"}
    assert set(known.cards) == {text}  # the hub has checked it
    card = ModelCard(text)
    relation, library = RELATIONS[name]
    assert card.data.base_model == "me/model"
    assert card.data.to_dict()["base_model_relation"] == relation
    assert card.data.library_name == library
    assert f"svftool {words[0]} {words[1]}" in card.text
    assert output.name in card.text


def test_a_pipeline_is_pushed_whole(hub: Hub, tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    hub.repos["me/pipe"] = {"main": files_of(base)}
    run("decompose", "me/pipe", "-o", "f", "--push-to-hub", "me/f")
    run("merge", "f", "-o", "m", "--push-to-hub", "me/m")
    factors, merged = (dict(one["files"]) for one in hub.commits)
    assert "unet/svf_config.json" in factors
    card = merged.pop("README.md").decode()
    assert "base_model: me/pipe" in card
    assert "library_name: diffusers" in card
    expected = contents(base)
    expected.pop("README.md")
    assert merged == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--private"], "--private is an option of --push-to-hub"),
        (["--create-pr"], "--create-pr is an option of --push-to-hub"),
        (["--push-to-hub", "new"], "expected a repository, OWNER/NAME"),
        (["--push-to-hub", "me/a/b"], "expected a repository, OWNER/NAME"),
        (["--push-to-hub", "me/new@v1"], "expected a repository, OWNER/NAME"),
        (["--push-to-hub", "me/a..b"], "--push-to-hub: "),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_any_work(
    model: Hub, tmp_path: Path, words: list[str], said: str
) -> None:
    refused = run("decompose", "me/model", "-o", "out", *words, code=2)
    assert said in refused.stderr
    assert not (tmp_path / "out").exists()
    assert not model.fetched


def test_without_a_token_nothing_begins(
    model: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    refused = run("decompose", "me/model", "-o", "out", "--push-to-hub", "me/new", code=2)
    assert "no token" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_what_the_hub_refuses_stays_here(known: Hub, tmp_path: Path) -> None:
    known.refuse_card = '"base_model" is wrong'
    refused = run("merge", "f", "-o", "out", "--push-to-hub", "me/new", code=8)
    assert '"base_model" is wrong' in refused.stderr
    assert "hf upload me/new out" in refused.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not known.created
    assert not known.commits
