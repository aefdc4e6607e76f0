"""Six routines of BLAS and LAPACK, called on torch's memory without copies and without the GIL.

torch offers the symmetric eigenproblem only whole. Its parts are reached through
``scipy.linalg.cython_lapack``, scipy's public door to its LAPACK for compiled callers: the address
of each routine is in a capsule, and ctypes lets go of the GIL while it runs. All matrices here are
column-major to LAPACK, so that the rows of a torch tensor are LAPACK's columns.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

LARGEST = 40_000
"""Largest side whose work space LAPACK can count in 32 bits."""

_ROUTINES = ("dsyrk", "dsytrd", "dsbtrd", "dsterf", "dstedc", "dstemr")
_BLOCK = 64

# Rows whose length is a multiple of 128 numbers fall on the same few sets of a cache: a gap of one
# cache line moves them apart.
_EVEN, _GAP = 128, 8


class NotConverged(ArithmeticError):
    """An iteration of LAPACK did not converge."""


@cache
def doors() -> tuple[ModuleType, ModuleType]:
    """Load ``scipy.linalg.cython_lapack`` and ``cython_blas``, and the libraries behind them."""
    return _door("cython_lapack"), _door("cython_blas")


def _door(name: str) -> ModuleType:
    """Load a module of ``scipy.linalg`` without the package around it, where that can be done.

    The package takes 0.13 s to import, and 0.4 s where Python may not keep what it compiles
    [measured]. Whoever imports it later gets this same module, in its place there.
    """
    whole = f"scipy.linalg.{name}"
    if "scipy.linalg" not in sys.modules:
        import scipy

        spec = PathFinder.find_spec(whole, [str(Path(one, "linalg")) for one in scipy.__path__])
        if spec is not None and spec.loader is not None:
            with suppress(ImportError):
                module = module_from_spec(spec)
                try:
                    spec.loader.exec_module(module)
                    return module
                finally:
                    sys.modules.pop(whole, None)  # Cython puts itself there
    return import_module(whole)


@cache
def _routine(name: str) -> Callable[..., None] | None:
    """Return a routine of scipy's BLAS or LAPACK; None where it has another integer type."""
    for module in doors():
        capsule = getattr(module, "__pyx_capi__", {}).get(name)
        if capsule is not None:
            break
    else:
        return None
    api = ctypes.pythonapi
    name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", api))
    address_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", api)
    )
    signature = name_of(capsule)
    if b"int *" not in signature:
        return None
    arguments = [ctypes.c_void_p] * (signature.count(b",") + 1)
    return ctypes.CFUNCTYPE(None, *arguments)(address_of(capsule, signature))


def available() -> bool:
    """Tell whether every routine of this module can be called."""
    return all(_routine(name) for name in _ROUTINES)


def _call(name: str, *arguments: Any) -> None:
    """Call a routine with tensors, text and integers, and with its `info` argument last."""
    routine = _routine(name)
    if routine is None:
        raise RuntimeError(f"scipy offers no {name}")
    kept: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            kept.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, str):
            kept.append(ctypes.c_char_p(argument.encode()))
        elif isinstance(argument, float):
            kept.append(ctypes.byref(ctypes.c_double(argument)))
        else:
            kept.append(ctypes.byref(ctypes.c_int(argument)))
    routine(*kept)


def _call_checked(name: str, *arguments: Any) -> None:
    info = torch.zeros(1, dtype=torch.int32)
    _call(name, *arguments, info)
    if info.item() != 0:
        raise NotConverged(f"{name} returned {info.item()}")


def uneven(like: Tensor, rows: int, n: int | None = None) -> Tensor:
    """Allocate a (rows, n) matrix, whose rows do not start a power of two apart.

    Such rows compete for the same places of the cache [measured: 5 to 15 % of the time of a
    tridiagonal reduction, n = 512 to 2048].
    """
    n = rows if n is None else n
    gap = _GAP if n % _EVEN == 0 else 0
    return like.new_empty(rows, n + gap)[:, :n]


def add_gram(G: Tensor, X: Tensor) -> None:
    """Add ``X' X`` to the upper triangle of a tile; the lower one is left alone.

    Parameters
    ----------
    G : (n, n) Tensor
        float64, rows contiguous; changed.
    X : (r, n) Tensor
        float64; copied unless its rows or its columns are contiguous.
    """
    r, n = X.shape
    if X.stride(0) == 1 and X.stride(1) >= r:
        _call("dsyrk", "L", "T", n, r, 1.0, X, X.stride(1), 1.0, G, G.stride(0))
        return
    if X.stride(1) != 1 or X.stride(0) < n:
        X = X.contiguous()
    _call("dsyrk", "L", "N", n, r, 1.0, X, max(X.stride(0), n), 1.0, G, G.stride(0))


def tridiagonalise(G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce a symmetric matrix to tridiagonal form in place.

    Parameters
    ----------
    G : (n, n) Tensor
        float64, rows contiguous, upper triangle (in torch's order); on return row j holds the j-th
        Householder vector in its columns from j + 2.

    Returns
    -------
    d : (n,) Tensor
        Diagonal.
    e : (n - 1,) Tensor
        Off-diagonal.
    tau : (n - 1,) Tensor
        Factors of the reflectors ``I - tau v v'``.
    """
    n = G.shape[0]
    d, e, tau = G.new_empty(n), G.new_empty(max(n - 1, 1)), G.new_empty(max(n - 1, 1))
    work = G.new_empty(_BLOCK * n)
    _call_checked("dsytrd", "L", n, G, G.stride(0), d, e, tau, work, work.numel())
    return d, e[: n - 1], tau[: n - 1]


def band_to_tridiagonal(band: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce a symmetric band matrix to tridiagonal form.

    Parameters
    ----------
    band : (n, width + 1) Tensor
        float64, the entry (i, i + j) of the matrix at [i, j]; overwritten.

    Returns
    -------
    d : (n,) Tensor
        Diagonal.
    e : (n - 1,) Tensor
        Off-diagonal.
    """
    n, columns = band.shape
    d, e, work = band.new_empty(n), band.new_empty(max(n - 1, 1)), band.new_empty(n)
    unused = band.new_empty(1)
    _call_checked("dsbtrd", "N", "L", n, columns - 1, band, columns, d, e, unused, 1, work)
    return d, e[: n - 1]


def tridiagonal_values(d: Tensor, e: Tensor) -> Tensor:
    """Return the eigenvalues of a tridiagonal matrix, ascending."""
    d, e = d.clone(), torch.cat((e, e.new_zeros(1)))
    _call_checked("dsterf", len(d), d, e)
    return d


def largest_vectors(d: Tensor, e: Tensor, count: int) -> Tensor:
    """Return eigenvectors of the largest eigenvalues of a tridiagonal matrix, ascending, as rows.

    By relatively robust representations, which take time in proportion to `count`.
    """
    n = len(d)
    d, e = d.clone(), torch.cat((e, e.new_zeros(1)))
    values, Z = d.new_empty(n), d.new_empty(count, n)
    work = d.new_empty(18 * n)
    found, support, whole, try_hard = (
        torch.ones(size, dtype=torch.int32) for size in (1, 2 * n, 10 * n, 1)
    )
    bounds = (0.0, 0.0, n - count + 1, n)
    sizes = (work, work.numel(), whole, whole.numel())
    _call_checked(
        "dstemr", "V", "I", n, d, e, *bounds, found, values, Z, n, count, support, try_hard, *sizes
    )
    return Z


def tridiagonal_vectors(d: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of a tridiagonal matrix, ascending, and its eigenvectors as rows."""
    n = len(d)
    d, e = d.clone(), torch.cat((e, e.new_zeros(1)))
    Z = uneven(d, n)
    work = d.new_empty(1 + 4 * n + n * n)
    whole = torch.empty(3 + 5 * n, dtype=torch.int32)
    sizes = (work, work.numel(), whole, whole.numel())
    _call_checked("dstedc", "I", n, d, e, Z, Z.stride(0), *sizes)
    return d, Z
