"""Factor checkpoints in memory, in float64, for tests of the attached layers' arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from svftool.factors import FactorStore, LayerFactors, LayerRecord


class MemoryStore(FactorStore):
    """Float64 factors of some parameters of a model, which the file is taken to name alike."""

    def __init__(
        self,
        model: nn.Module,
        names: list[str] | None = None,
        *,
        rank: int | None = None,
        batch: tuple[str, ...] = (),
        dtype: torch.dtype = torch.float64,
        rename: Mapping[str, str] | None = None,
    ) -> None:
        parameters = dict(model.named_parameters())
        chosen = names or [name for name, p in parameters.items() if p.ndim > 1]
        self.path = Path("memory")
        self.factors: dict[str, LayerFactors] = {}
        records: dict[str, LayerRecord] = {}
        for name in chosen:
            key = (rename or {}).get(name, name)
            value = parameters[name].detach().double()
            view = "batch" if name in batch else "matrix"
            matrix = value if view == "batch" else value.reshape(value.shape[0], -1)
            U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
            k = rank or S.shape[-1]
            U, S, Vh = U[..., :k], S[..., :k], Vh[..., :k, :]
            error = float(((U * S.unsqueeze(-2)) @ Vh - matrix).norm() / matrix.norm())
            self.factors[key] = LayerFactors(U.to(dtype), S, Vh.to(dtype))
            records[key] = LayerRecord(
                name=key,
                shape=tuple(value.shape),
                dtype="float64",
                view=view,
                matrix=tuple(matrix.shape),
                rank=k,
                method="test",
                reconstruction_error=error,
                orthogonality_error=0.0,
                energy=1.0,
            )
        self.layers = records
        left = {(rename or {}).get(n, n): "test" for n in parameters if n not in chosen}
        self.config = SimpleNamespace(left_whole=left)  # type: ignore[assignment]
        self.whole = ()

    def read(self, name: str) -> LayerFactors:
        """Return the factors of one layer."""
        return self.factors[name]

    def read_S(self, name: str) -> Tensor:
        """Return its singular values."""
        return self.factors[name].S

    def close(self) -> None:
        """Do nothing."""


def randomise(attachment: object, scale: float = 0.1, seed: int = 0) -> None:
    """Move every trainable number away from where it starts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for theta in attachment.parameters():  # type: ignore[attr-defined]
            theta.add_(scale * torch.randn(theta.shape, generator=generator, dtype=theta.dtype))
