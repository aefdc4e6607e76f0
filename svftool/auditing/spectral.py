"""A layer of a tuned file: singular values before and after, in one and the same basis."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from svftool.auditing.pair import Array, MatrixPair
from svftool.numerics import participation_ratio
from svftool.numerics.shares import Shares
from svftool.numerics.subspace import INTRUDER_TOP


class SpectralPair:
    """A layer known only by its singular values before and after, in one and the same basis.

    Parameters
    ----------
    S, S_tuned : (k,) Tensor
        By index, as a tuned file holds them.
    m, n : int
        Sides of the matrix; k where they are not known.
    energy : float, optional
        ``||W||_F^2`` where the factors were truncated.
    """

    def __init__(
        self, S: Tensor, S_tuned: Tensor, *, m: int, n: int, energy: float | None = None
    ) -> None:
        self.m, self.n, self.paired = m, n, True
        self._S, self._S_tuned = S.double().numpy(), S_tuned.double().numpy()
        self.along: Array | None = self._S_tuned - self._S
        self.identical = not bool(self.along.any())
        self._order = np.argsort(-np.abs(self._S_tuned), kind="stable")
        self._base_order = np.argsort(-np.abs(self._S), kind="stable")
        self.base: Array = np.abs(self._S)[self._base_order]
        self.tuned: Array | None = np.abs(self._S_tuned)[self._order]
        self.index_change: Array | None = self.along
        self.change_values: Array = np.sort(np.abs(self.along))[::-1]
        self.base_energy = float(self._S @ self._S) if energy is None else energy
        outside = max(self.base_energy - float(self._S @ self._S), 0.0)
        self.change_energy = float(self.along @ self.along)
        self.tuned_energy = float(self._S_tuned @ self._S_tuned) + outside
        self.inner = float(self._S @ self._S_tuned) + outside
        self.shares = None if self.identical else Shares(1.0, 0.0, 0.0)
        self.change_participation = participation_ratio(self.change_values)
        self.left_overlaps: Tensor | None = self._matching()
        self.right_overlaps: Tensor | None = self.left_overlaps

        before, after = self._S**2, self._S_tuned**2
        scale = math.sqrt(float(before @ before) * float(after @ after))
        self.cka: float | None = float(before @ after) / scale if scale > 0.0 else None
        self.amplification = self._amplification()

    def _amplification(self) -> float | None:
        assert self.along is not None
        top = np.argsort(-np.abs(self.along), kind="stable")[:INTRUDER_TOP]
        norm = float(np.linalg.norm(self._S[top[self.along[top] != 0.0]]))
        return math.sqrt(self.change_energy) / norm if norm > 0.0 else None

    def _matching(self) -> Tensor:
        eye = torch.eye(len(self._S), dtype=torch.float64)
        base, tuned = torch.from_numpy(self._base_order), torch.from_numpy(self._order)
        return eye[base][:, tuned[:INTRUDER_TOP]]

    def bases(self, r: int, *, left: bool) -> tuple[Tensor, Tensor] | None:
        """Leading vectors of base and tuned in the basis of the factors, (k, r) each."""
        del left
        eye = torch.eye(len(self._S), dtype=torch.float64)
        base, tuned = torch.from_numpy(self._base_order), torch.from_numpy(self._order)
        return eye[:, base[:r]], eye[:, tuned[:r]]


AnyPair = MatrixPair | SpectralPair
"""Whatever metrics and evidence are taken of."""
