"""One matrix before and after: everything that metrics read, computed when first asked for.

With the long side of W first and D the change, three Gram matrices of the short side hold all that
singular values, shares and overlaps need: ``G = W'W``, ``C = W'D`` and ``H = D'D`` (a prime
transposes); that of the tuned matrix is ``G + C + C' + H``. They are summed in float64 over blocks
of rows, so memory is set by the short side, and ``N = U'DV = S^-1 V'C V`` needs no long factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from svftool.numerics import ThreadPool
from svftool.numerics.eigen import eigenvalues, eigenvectors, gram
from svftool.numerics.shares import Shares, count_regular, divide, groups
from svftool.numerics.subspace import INTRUDER_TOP
from svftool.numerics.tall import ALL, Choose, Tall, cuts, tall

# A property that is computed once, without a lock.


_T = TypeVar("_T")


class lazy(Generic[_T]):
    """What ``functools.cached_property`` is, for instances that each belong to one thread.

    Before Python 3.12 that one holds a lock which all instances of a class share, so that two
    threads with a matrix each would wait for each other.
    """

    def __init__(self, compute: Callable[[Any], _T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> lazy[_T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> _T: ...

    def __get__(self, instance: object | None, owner: type) -> lazy[_T] | _T:
        if instance is None:
            return self
        value = instance.__dict__[self._name] = self._compute(instance)
        return value


# The change of a matrix, computed a block at a time from both sides and never stored whole.


@dataclass(frozen=True)
class Difference(Tall):
    """``D = W' - W`` with its long side first.

    Attributes
    ----------
    before : (rows, n) Tensor or None
        W as `matrix` is W'; None where `matrix` is the change itself.
    """

    before: Tensor | None = None

    def double(self, rows: slice, columns: slice = slice(None)) -> Tensor:
        """Return a block in float64."""
        block = super().double(rows, columns)
        if self.before is None:
            return block
        return block - self.before[rows, columns]

    def energy(self) -> float:
        """Return the sum of squares."""
        norms = (torch.linalg.vector_norm(self.double(rows)) for rows in self.slices(_ROWS))
        return sum(float(norm.square()) for norm in norms)

    def any(self) -> bool:
        """Whether an entry is not zero."""
        return any(bool(self.double(rows).any()) for rows in self.slices(_ROWS))


def difference(base: Tensor, tuned: Tensor | None, change: Tensor | None) -> Difference:
    """Look at a change with its long side first.

    Parameters
    ----------
    base : (m, n) Tensor
    tuned, change : (m, n) Tensor or None
        One of the two; nothing is copied.
    """
    after = tuned if change is None else change
    if after is None:
        raise ValueError("either a weight or a change is needed")
    before = base if change is None else None
    transposed = base.shape[0] < base.shape[1]
    if transposed:
        after, before = after.mT, None if before is None else before.mT
    return Difference(after, transposed, exponent=0, top=0.0, before=before)


Array = npt.NDArray[np.float64]
_TILE = 1024
_ROWS = 1024
_CANCELLED = 1e-8
"""Share of the base's energy below which float64 keeps less than half of its digits."""


class MatrixPair:
    """A base matrix and what became of it; of a matrix alone, only the base's side is there.

    Parameters
    ----------
    base : (m, n) Tensor
        Finite, any floating dtype.
    tuned : (m, n) Tensor or None
        Finite, any floating dtype.
    change : (m, n) Tensor or None
        The change, where it is known better than as a difference; then `tuned` is not needed.
    vectors : bool
        Whether singular vectors may be computed. Without them the shares and overlaps are None.
    pool : ThreadPool, optional
        Threads that share the blocks of large products.

    Attributes
    ----------
    m, n : int
        Sides of the matrix.
    """

    def __init__(
        self,
        base: Tensor,
        tuned: Tensor | None = None,
        *,
        change: Tensor | None = None,
        vectors: bool = True,
        pool: ThreadPool | None = None,
    ) -> None:
        self.m, self.n = base.shape
        self._vectors = vectors
        self._pool = pool or ThreadPool(0)
        self._base = base
        self._tuned = tuned
        self._change = change
        self.paired = tuned is not None or change is not None
        self._shared: dict[str, Tensor] = {}

    def with_tuned(self, tuned: Tensor | None, change: Tensor | None = None) -> MatrixPair:
        """Hold the same base against a fine-tune; what is known of it is kept."""
        other = MatrixPair(self._base, tuned, change=change, vectors=self._vectors, pool=self._pool)
        other._shared = self._shared
        return other

    # What the matrices are.

    @lazy
    def identical(self) -> bool:
        """Whether nothing changed: every entry is equal."""
        same = self._tuned is not None and self._tuned.dtype == self._base.dtype
        if same and torch.equal(self._base, self._tuned):  # type: ignore[arg-type]
            return True
        return not self._D.any()

    @lazy
    def _A(self) -> Tall:
        return _unscaled(self._base)

    @lazy
    def _D(self) -> Difference:
        return difference(self._base, self._tuned, self._change)

    # Gram matrices of the short side, upper triangles but for C.

    @property
    def _G(self) -> Tensor:
        if "gram" not in self._shared:
            self._shared["gram"] = gram(self._A, self._pool)
        return self._shared["gram"]

    @lazy
    def _H(self) -> Tensor:
        return gram(self._D, self._pool)

    @lazy
    def _C(self) -> Tensor:
        A, D = self._A, self._D
        C = torch.zeros(A.n, A.n, dtype=torch.float64, device=A.matrix.device)
        columns = cuts(A.n, _TILE if A.on_cpu else A.n)
        blocks = A.slices(_ROWS if A.on_cpu else None)

        def tile(i: slice, j: slice) -> None:
            for rows in blocks:
                C[i, j].addmm_(A.double(rows, i).mT, D.double(rows, j))

        self._pool.share([partial(tile, i, j) for i in columns for j in columns])
        return C

    @lazy
    def _G_tuned(self) -> Tensor:
        if self._vectors or self._tuned is None:
            return self._G + self._C + self._C.mT + self._H
        return gram(_unscaled(self._tuned), self._pool)

    # Spectra.

    @property
    def _base_eigen(self) -> tuple[Tensor, Tensor]:
        if "vectors" not in self._shared:
            values, rows = eigenvectors(self._G.clone(), ALL, self._pool)
            self._shared["values"] = values.clamp_min(0.0).sqrt()
            self._shared["vectors"] = rows
        return self._shared["values"], self._shared["vectors"]

    @lazy
    def _tuned_eigen(self) -> tuple[Tensor, Tensor]:
        values, rows = eigenvectors(self._G_tuned.clone(), Choose(INTRUDER_TOP), self._pool)
        return values.clamp_min(0.0).sqrt(), rows

    @lazy
    def base(self) -> Array:
        """Singular values of the base, (k,), non-increasing."""
        if "values" not in self._shared:
            if self._vectors and self.paired and not self.identical:
                return _numpy(self._base_eigen[0])
            values = eigenvalues(self._G.clone(), self._pool)
            self._shared["values"] = values.clamp_min(0.0).sqrt()
        return _numpy(self._shared["values"])

    @lazy
    def tuned(self) -> Array | None:
        """Singular values of the tuned matrix, (k,), non-increasing."""
        if not self.paired:
            return None
        if self.identical:
            return self.base
        if self._vectors:
            return _numpy(self._tuned_eigen[0])
        return _roots(eigenvalues(self._G_tuned.clone(), self._pool))

    @lazy
    def index_change(self) -> Array | None:
        """Change of each singular value, the i-th largest against the i-th largest."""
        return None if self.tuned is None else self.tuned - self.base

    @lazy
    def change_values(self) -> Array | None:
        """Singular values of the change."""
        if not self.paired:
            return None
        if self.identical:
            return np.zeros_like(self.base)
        return _roots(eigenvalues(self._H.clone(), self._pool))

    @lazy
    def change_participation(self) -> float:
        """Participation ratio of the change's spectrum, a lower bound of its rank."""
        energy = self._H.trace()
        if not 0.0 < float(energy) < math.inf:
            return 0.0
        shares = self._H / energy  # whose squares are within the range of floats, whatever H is
        squares = 2.0 * float(shares.triu_(1).square_().sum())
        squares += float((self._H.diagonal() / energy).square().sum())
        return 1.0 / squares

    # Norms.

    @lazy
    def base_energy(self) -> float:
        """``||W||_F^2``."""
        return float(self._G.trace())

    @lazy
    def change_energy(self) -> float:
        """``||D||_F^2``, exactly 0 where nothing changed."""
        if not self.paired or self.identical:
            return 0.0
        if self._vectors:
            return float(self._H.trace())
        return self._D.energy()

    @lazy
    def tuned_energy(self) -> float:
        """``||W'||_F^2``, exactly 0 for a weight of zeros."""
        if self.identical:
            return self.base_energy
        energy = float(self._G_tuned.trace())
        # The Gram matrix is a sum in which nearly all of the base may cancel.
        return energy if energy > _CANCELLED * self.base_energy else self._tuned_energy_summed()

    def _tuned_energy_summed(self) -> float:
        total = 0.0
        for rows in self._A.slices(_ROWS):
            block = self._A.double(rows) + self._D.double(rows)
            total += float(block.square().sum())
        return total

    @lazy
    def inner(self) -> float:
        """``<W, W'>``."""
        return (self.base_energy + self.tuned_energy - self.change_energy) / 2.0

    # What needs singular vectors.

    @lazy
    def _VC(self) -> Tensor:
        return self._base_eigen[1] @ self._C

    @lazy
    def along(self) -> Array | None:
        """Change along each singular direction of the base, ``diag(U' D V)``, (k,)."""
        if not self._comparable:
            return None
        S, V = self._base_eigen
        r = count_regular(S)
        along = torch.zeros_like(S)
        along[:r] = (self._VC[:r] * V[:r]).sum(dim=1) / S[:r]
        return _numpy(along)

    @lazy
    def shares(self) -> Shares | None:
        """Shares of the change; None where there is none, or vectors were not asked for."""
        if not self._comparable:
            return None
        S, V = self._base_eigen
        r = count_regular(S)
        rows = self._VC[:r] / S[:r, None]
        inside, outside, null = float(rows.square().sum()), 0.0, 0.0
        if r == len(S):
            outside = self.change_energy - inside
        else:
            H = _symmetric(self._H)
            rest = ((V @ H) * V).sum(dim=1) - (rows @ V.mT).square().sum(dim=0)
            outside, null = float(rest[:r].sum()), float(rest[r:].sum())
        if max(inside, 0.0) + max(outside, 0.0) + max(null, 0.0) == 0.0:
            return None  # smaller than the root of what float64 holds
        return divide(
            (rows * V[:r]).sum(dim=1),
            [rows[a:b] @ V[a:b].mT for a, b in groups(S[:r]) if b - a > 1],
            inside=inside,
            outside=outside,
            null=null,
            square=self.m == self.n,
        )

    @property
    def _comparable(self) -> bool:
        return self._vectors and self.paired and not self.identical

    @lazy
    def left_overlaps(self) -> Tensor | None:
        """``U' u'_j`` of all base vectors with the leading tuned ones, (k, t)."""
        return self._overlaps(short=self._A.transposed)

    @lazy
    def right_overlaps(self) -> Tensor | None:
        """``V' v'_j`` of all base vectors with the leading tuned ones, (k, t)."""
        return self._overlaps(short=not self._A.transposed)

    def _overlaps(self, *, short: bool) -> Tensor | None:
        if not (self._vectors and self.paired):
            return None
        if self.identical:
            return torch.eye(self._A.n, min(INTRUDER_TOP, self._A.n), dtype=torch.float64)
        S, V = self._base_eigen
        S_tuned, V_tuned = self._tuned_eigen
        inner = V @ V_tuned.mT
        if not short:
            # u_i'u'_j = v_i' (G + C) v'_j / (s_i s'_j), and V G = S^2 V.
            inner = S.square()[:, None] * inner + self._VC @ V_tuned.mT
            scale = S[:, None] * S_tuned[: len(V_tuned)]
            floor = 1e-12 * float(S[0]) * float(S_tuned[0])
            inner = torch.where(scale > floor, inner / scale.clamp_min(1e-300), 0.0)
        return inner.clamp(-1.0, 1.0).cpu()

    @lazy
    def cka(self) -> float | None:
        """``||W'W'_||_F^2 / (||W'W||_F ||W'_'W'_||_F)`` of base W and tuned W_, uncentred."""
        if not (self._vectors and self.paired) or self.base_energy * self.tuned_energy == 0.0:
            return None
        if self.identical:
            return 1.0
        G, T = _symmetric(self._G), _symmetric(self._G_tuned)
        # With the rows as the short side, ||W'T||^2 is the inner product of WW' and TT'.
        inner = (G * T).sum() if self._A.transposed else (G + self._C).square().sum()
        return float(inner / (G.square().sum() * T.square().sum()).sqrt())

    @lazy
    def amplification(self) -> float | None:
        """``||D||_F / ||U_D' W V_D||_F`` over the leading 10 directions of the change."""
        if not self._comparable:
            return None
        values, V = eigenvectors(self._H.clone(), Choose(INTRUDER_TOP), self._pool)
        S = values[: len(V)].clamp_min(0.0).sqrt()
        kept = 1e-7 * S[0] < S
        # U_D' W V_D = S_D^-1 V_D' D'W V_D
        inner = (V[kept] @ self._C.mT @ V[kept].mT) / S[kept, None]
        norm = float(inner.square().sum().sqrt())
        return math.sqrt(self.change_energy) / norm if norm > 0.0 else None

    def bases(self, r: int, *, left: bool) -> tuple[Tensor, Tensor] | None:
        """Leading singular vectors of base and tuned, (side, r) each; None without vectors."""
        if not (self._vectors and self.paired):
            return None
        V = self._base_eigen[1][:r].mT
        V_tuned = V if self.identical else self._tuned_eigen[1][:r].mT
        if left == self._A.transposed:
            return V, V_tuned
        U = _orthonormal(self._long(V, tuned=False))
        return (U, U) if self.identical else (U, _orthonormal(self._long(V_tuned, tuned=True)))

    def _long(self, V: Tensor, *, tuned: bool) -> Tensor:
        blocks = []
        for rows in self._A.slices(_ROWS):
            block = self._A.double(rows)
            blocks.append((block + self._D.double(rows) if tuned else block) @ V)
        return torch.cat(blocks)


def _symmetric(G: Tensor) -> Tensor:
    return G.triu() + G.triu(1).mT


def _unscaled(matrix: Tensor) -> Tall:
    A = tall(matrix)
    return Tall(A.matrix, A.transposed, 0, A.top)


def _orthonormal(columns: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(columns).Q
    return Q


def norm_ratio(part: float, whole: float) -> float:
    """``sqrt(part / whole)`` of two sums of squares; infinite where only the whole is 0."""
    if part == 0.0:
        return 0.0
    return math.sqrt(part / whole) if whole > 0.0 else math.inf


def _numpy(values: Tensor) -> Array:
    array: Array = values.cpu().numpy()
    return array


def _roots(values: Tensor) -> Array:
    return _numpy(values.clamp_min(0.0).sqrt())
