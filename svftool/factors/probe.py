"""A seeded probe of each layer's singular vectors, small enough to travel in a tuned file.

A tuned file holds singular values only, so it means something only with the singular vectors that
it was trained on. Another decomposition of the same base gives the same vectors up to rounding and
a common sign, except where singular values repeat: there any rotation is as good. The probe tells
these cases apart: for fixed random signs ``g`` and ``h`` it keeps ``g'u_i`` and ``vh_i h``.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Probe:
    """Projections of a layer's singular vectors on fixed random signs.

    Attributes
    ----------
    left : (..., k) ndarray
        ``g' U``.
    right : (..., k) ndarray
        ``Vh h``.
    """

    left: Float64
    right: Float64

    def mismatch(self, other: Probe, delta: Float64) -> float:
        """Estimate the share of a delta that would land on other singular vectors.

        Parameters
        ----------
        other : Probe
            Probe of the other factors, of the same shape.
        delta : (..., k) ndarray
            Change of each singular value; directions that did not change do not count.

        Returns
        -------
        float
            Root of the `delta`-weighted mean square distance of the vector pairs, where a common
            change of sign of ``u_i`` and ``vh_i`` counts as none. About 0 for the same vectors and
            1.4 for unrelated ones.
        """
        weights = np.square(delta)
        total = float(weights.sum())
        if total == 0.0:
            return 0.0
        same = np.square(self.left - other.left) + np.square(self.right - other.right)
        flipped = np.square(self.left + other.left) + np.square(self.right + other.right)
        return float(np.sqrt((weights * np.minimum(same, flipped)).sum() / (2.0 * total)))


def probe(name: str, U: Tensor, Vh: Tensor) -> Probe:
    """Probe the singular vectors of one layer.

    Parameters
    ----------
    name : str
        Tensor name; it seeds the signs.
    U : (..., m, k) Tensor
        Left singular vectors.
    Vh : (..., k, n) Tensor
        Right singular vectors.
    """
    g = _signs(f"{name}\0left", U.shape[-2])
    h = _signs(f"{name}\0right", Vh.shape[-1])
    left = torch.einsum("m,...mk->...k", g, U.double().cpu())
    right = torch.einsum("...kn,n->...k", Vh.double().cpu(), h)
    return Probe(left.numpy(), right.numpy())


def _signs(seed: str, count: int) -> Tensor:
    # The raw stream of a bit generator is fixed for good, unlike the distributions on top of it.
    key = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(-(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:count]
    return torch.from_numpy(1.0 - 2.0 * bits.astype(np.float64))


def encode_probe(value: Probe) -> dict[str, str]:
    """Pack a probe as base64 of little-endian float16 for a file's metadata."""
    return {"left": _pack(value.left), "right": _pack(value.right)}


def decode_probe(packed: dict[str, str], shape: tuple[int, ...]) -> Probe:
    """Unpack `encode_probe`'s result into arrays of `shape`."""
    return Probe(_unpack(packed["left"], shape), _unpack(packed["right"], shape))


def _pack(values: Float64) -> str:
    return base64.b64encode(values.astype("<f2").tobytes()).decode()


def _unpack(text: str, shape: tuple[int, ...]) -> Float64:
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float64).reshape(shape)
