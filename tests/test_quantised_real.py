"""A real GGUF model: as transformers loads it, and against its dequantised copy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from svftool import audit, decompose
from svftool.checkpoints import open_checkpoint

HOME = Path(os.environ.get("SVFTOOL_MODELS") or Path.home() / ".cache" / "svftool-models")
MODEL = HOME / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = ["model.layers.0.*"]

pytest.importorskip("gguf")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.is_file(), reason=f"{MODEL} is not there"),
]


@pytest.mark.filterwarnings("ignore")
def test_values_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL.parent, gguf_file=MODEL.name, dtype=torch.float32
    ).state_dict()
    with open_checkpoint(MODEL) as found:
        assert loaded.keys() - found.infos.keys() == {"lm_head.weight"}
        assert all(torch.equal(found.read(name), loaded[name]) for name in found.infos)


def test_commands(tmp_path: Path) -> None:
    with open_checkpoint(MODEL) as found:
        save_file({name: found.read(name) for name in found.infos}, tmp_path / "copy.safetensors")
    (one,) = audit(MODEL, [tmp_path / "copy.safetensors"], include=LAYERS).comparisons
    assert {row.verdict.name for row in one.rows if row.verdict is not None} == {"untouched"}
    assert sum("Q4_1" in row.dtype for row in one.rows) == 7
    result = decompose(MODEL, tmp_path / "factors", include=LAYERS)
    assert len(result.config.layers) == 7
    errors = [layer.reconstruction_error for layer in result.config.layers.values()]
    assert max(errors) < 1e-5
