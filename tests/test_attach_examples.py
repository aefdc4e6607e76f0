"""The two training examples run, improve what they train, and leave files that load anywhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

import svftool

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_loop(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    before, after = example("train_loop").main(tmp_path)
    assert after > before + 0.05
    tuned = tmp_path / "blurred.svf.safetensors"
    assert tuned.stat().st_size < 10_000
    svftool.merge(tmp_path / "factors", [tuned], output=tmp_path / "merged.safetensors")
    assert (
        load_file(tmp_path / "merged.safetensors").keys()
        == load_file(tmp_path / "base.safetensors").keys()
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_trainer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    before, after = example("transformers_trainer").main(tmp_path, None, None, steps=12)
    assert after < before
    svftool.merge(
        tmp_path / "factors", [tmp_path / "tuned.svf.safetensors"], output=tmp_path / "again"
    )
    saved, merged = (load_file(tmp_path / n / "model.safetensors") for n in ("merged", "again"))
    assert saved.keys() == merged.keys()
    assert all(torch.equal(saved[name], merged[name]) for name in saved)
    _, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not any(report.values())
