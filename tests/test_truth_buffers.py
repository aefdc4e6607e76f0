"""Matrices that the model calls buffers are left whole: nothing trains them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import svftool
from svftool.errors import ModelError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fb", torch.rand(8, 6))
        self.body = nn.Linear(6, 5)
        self.fc = nn.Linear(5, 4)


def test_buffers_are_not_attached(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    svftool.decompose(tmp_path / "net.safetensors", output=tmp_path / "f")
    before = model.fb.clone()
    with caplog.at_level("WARNING"):
        attachment = svftool.attach(model, tmp_path / "f")
    assert list(attachment.layers) == ["body.weight"]
    assert "fb" in caplog.text
    assert torch.equal(model.fb, before)
    svftool.detach(model)
    with pytest.raises(ModelError, match="fb"):
        svftool.attach(model, tmp_path / "f", include=["fb"])
