"""A checkpoint's fingerprint: the same whatever its format, sharding, or order."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from svftool.checkpoints.base import Checkpoint
from svftool.checkpoints.dtypes import dtype_name
from svftool.progress import SILENT, Progress

_THREADS = 4


class Fingerprint:
    """SHA-256 over the sorted names, dtypes, shapes and digests of tensors added in any order.

    Examples
    --------
    >>> import torch
    >>> one, two = Fingerprint(), Fingerprint()
    >>> one.add("a", torch.ones(2)), one.add("b", torch.zeros(3))
    (None, None)
    >>> two.add("b", torch.zeros(3)), two.add("a", torch.ones(2))
    (None, None)
    >>> one.hexdigest() == two.hexdigest()
    True
    """

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor; NaN counts by its bits.

        Raises
        ------
        ValueError
            If the name was added before.
        """
        self.add_digest(name, dtype_name(tensor.dtype), tuple(tensor.shape), tensor_digest(tensor))

    def add_digest(self, name: str, dtype: str, shape: Sequence[int], sha: str) -> None:
        """Add a tensor of which only the digest of its bytes is at hand.

        Parameters
        ----------
        name : str
        dtype : str
            As `dtype_name` gives it.
        shape : sequence of int
        sha : str
            As `tensor_digest` gives it.

        Raises
        ------
        ValueError
            If the name was added before.
        """
        if name in self._lines:
            raise ValueError(f"{name!r} is in the fingerprint already")
        self._lines[name] = json.dumps([name, dtype, list(shape), sha])

    def hexdigest(self) -> str:
        """Return the fingerprint of what was added so far, 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for name in sorted(self._lines):
            digest.update(self._lines[name].encode() + b"\n")
        return digest.hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, in C order, as hexadecimal digits."""
    digest = hashlib.sha256()
    for part in _dense_parts(tensor.detach().cpu()):
        if part.numel():
            digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _dense_parts(tensor: Tensor) -> list[Tensor]:
    """Return the dense tensors that make up a tensor of any layout."""
    if tensor.is_quantized:
        return [tensor.int_repr(), *_quantisation(tensor)]
    if tensor.layout is torch.strided:
        return [tensor.resolve_conj().resolve_neg()]
    coordinates = tensor.to_sparse(layout=torch.sparse_coo).coalesce()
    return [coordinates.indices(), coordinates.values()]


def _quantisation(tensor: Tensor) -> list[Tensor]:
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)]
    return [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the fingerprint of named tensors, in whatever order they come."""
    total = Fingerprint()
    for name, tensor in tensors:
        total.add(name, tensor)
    return total.hexdigest()


def fingerprint_checkpoint(checkpoint: Checkpoint, *, progress: Progress = SILENT) -> str:
    """Return the fingerprint of all tensors of a checkpoint, read by a few threads."""
    total = Fingerprint()
    infos = checkpoint.infos
    size = sum(info.nbytes for info in infos.values())
    with (
        progress.task("fingerprint", size, unit="bytes") as task,
        ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool,
    ):
        digests = pool.map(lambda name: tensor_digest(checkpoint.read(name)), infos)
        for info, sha in zip(infos.values(), digests, strict=True):
            total.add_digest(info.name, dtype_name(info.dtype), info.shape, sha)
            task.advance(info.nbytes)
    return total.hexdigest()
