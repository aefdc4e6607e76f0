"""Matrices that are buffers are left whole: by their names, or because the model says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import svftool
from svftool.checkpoints import TensorInfo
from svftool.checkpoints.selection import Selection, select
from svftool.errors import ModelError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fb", torch.rand(8, 6))
        self.register_buffer("table", torch.rand(8, 6))
        self.body = nn.Linear(6, 5)
        self.fc = nn.Linear(5, 4)


def test_buffers_are_not_attached(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    svftool.decompose(tmp_path / "net.safetensors", output=tmp_path / "f")
    before = model.table.clone()
    with caplog.at_level("WARNING"):
        attachment = svftool.attach(model, tmp_path / "f")
    assert list(attachment.layers) == ["body.weight"]
    assert "table" in caplog.text
    assert torch.equal(model.table, before)
    svftool.detach(model)
    with pytest.raises(ModelError, match="table"):
        svftool.attach(model, tmp_path / "f", include=["table"])


BUFFERS = [
    "mel_scale.fb", "frontend.mel_filters", "stft.forward_basis", "mfcc.dct_mat",
    "model.layers.0.self_attn.rotary_emb.cos_cached", "freqs_cis", "rope.inv_freq",
    "layers.0.blocks.1.attn.relative_coords_table", "h.0.attn.bias", "h.0.attn.tril",
    "layers.1.blocks.0.attn_mask", "model.24.anchors", "model.24.anchor_grid", "quantizer.codebook",
    "quantize.embed_avg", "quantizer.layers.0._codebook.embed", "queue", "image_queue",
    "memory_bank", "bn.running_cov", "prompt.positional_encoding_gaussian_matrix",
    "synthesis.b4.resample_filter", "model.encoder.embed_positions.weights", "b8.noise_const",
]  # fmt: skip
LAYERS = [
    "stem.fb.weight", "queue.weight", "anchors.weight", "codebook_proj.weight", "visual.proj",
    "text_projection", "attn.in_proj_weight", "lstm.weight_ih_l0", "mlp.experts.gate_up_proj",
    "frontend.mel_proj.weight", "grid_proj.weight", "noise_proj.weight", "x_proj.weight",
]  # fmt: skip


def test_matrices_that_models_register_as_buffers_are_left_whole_with_a_reason() -> None:
    names = [*BUFFERS, *LAYERS]
    infos = {name: TensorInfo(name, torch.float32, (8, 6), "") for name in names}
    chosen, whole = select(infos, Selection())
    assert [one.name for one in chosen] == LAYERS
    assert {one.name: bool(one.reason) for one in whole} == dict.fromkeys(BUFFERS, True)
    asked, _ = select(infos, Selection(include=("mel_scale.fb",)))
    assert [one.name for one in asked] == ["mel_scale.fb"]


def test_the_decomposition_says_which_buffers_it_left_and_why(tmp_path: Path) -> None:
    model = Net()
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    result = svftool.decompose(tmp_path / "net.safetensors", output=tmp_path / "f")
    assert result.config.left_whole["fb"] == "fixed filters or transform, a buffer"
