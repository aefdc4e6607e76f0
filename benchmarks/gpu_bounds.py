"""Every method of the engine on a device, against float64 LAPACK on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from layers import with_spectrum
from torch import Tensor

from svftool.engine import parse_rank
from svftool.numerics import Svd, singular_values, svd

Row = dict[str, Any]
BOUNDS = {"values": 1e-6, "residual": 1e-6, "orthogonality": 1e-5}

SHAPES = [(1, 1), (1, 9), (5, 4), (64, 147), (256, 256), (300, 700), (1500, 300), (800, 900)]
QUICK = [(1, 1), (1, 9), (5, 4), (64, 40)]


def _normal(m: int, n: int) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(m + n))


def _falling(m: int, n: int, *, decades: float) -> Tensor:
    k = min(m, n)
    g = torch.Generator().manual_seed(m * n)
    left, right = (
        torch.linalg.qr(torch.randn(side, k, generator=g, dtype=torch.float64)).Q for side in (m, n)
    )
    return left * torch.logspace(0, -decades, k, dtype=torch.float64) @ right.mT


def _low_rank(m: int, n: int) -> Tensor:
    r = max(1, min(m, n) // 3)
    return _normal(m, r) @ _normal(r, n)


def _steps(m: int, n: int) -> Tensor:
    k = min(m, n)
    return with_spectrum(_normal(m, n), torch.where(torch.arange(k) < (k + 1) // 2, 2.0, 1.0))


KINDS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": _normal,
    "graded to 1e-3": partial(_falling, decades=3.0),
    "graded to 1e-12": partial(_falling, decades=12.0),
    "a third of the rank": _low_rank,
    "two values": _steps,
    "huge": lambda m, n: _normal(m, n) * 1e30,
    "tiny": lambda m, n: _normal(m, n) * 1e-30,
    "zero": torch.zeros,
    "equal columns": lambda m, n: _normal(m, 1).expand(m, n).clone(),
}


def _rank(m: int, n: int) -> int:
    return max(1, min(m, n) // 20)


Way = Callable[[Tensor], Svd]
WAYS: dict[str, Way] = {
    "full": svd,
    "full, float64": partial(svd, dtype=torch.float64),
    "rank": lambda W: svd(W, rank=_rank(*W.shape[-2:])),
    "rank, randomized": lambda W: svd(W, rank=_rank(*W.shape[-2:]), method="randomized"),
    "energy:0.9": lambda W: svd(W, rank=_energy(W)),
}


def _energy(W: Tensor) -> Callable[[Tensor], int]:
    rule = parse_rank("energy:0.9")
    return lambda S: rule.rank_of(S, *W.shape[-2:])


def errors_of(W: Tensor, found: Svd, expected: Tensor) -> Row:
    """Return the worst errors over the matrices of a batch, in float64 on the CPU.

    The residual of truncated factors is ``||W V - U diag(S)|| / ||W||`` with the long side of W
    first.
    """
    worst = dict.fromkeys(BOUNDS, 0.0)
    batch = [one if one.ndim > count else one[None] for one, count in _parts(W, found, expected)]
    for A, U, S, Vh, reference in zip(*batch, strict=True):
        k, norm = len(S), float(torch.linalg.vector_norm(A)) or 1.0
        eye = torch.eye(k, dtype=torch.float64)
        whole = k == min(A.shape)
        if A.shape[0] < A.shape[1]:
            A, U, Vh = A.mT, Vh.mT, U.mT
        off = A - U * S @ Vh if whole else A @ Vh.mT - U * S
        measured = (
            float((S - reference[:k]).abs().max() / (reference[0] or 1.0)),
            float(torch.linalg.vector_norm(off)) / norm,
            float(torch.maximum((U.mT @ U - eye).abs(), (Vh @ Vh.mT - eye).abs()).max()),
        )
        for key, error in zip(BOUNDS, measured, strict=True):
            # A NaN is the worst of all and equal to none.
            worst[key] = error if not error <= worst[key] else worst[key]
    return worst


def _parts(W: Tensor, found: Svd, expected: Tensor) -> list[tuple[Tensor, int]]:
    sides = ((W, 2), (found.U, 2), (found.S, 1), (found.Vh, 2), (expected, 1))
    return [(one.cpu().double(), count) for one, count in sides]


def _broken(errors: Row) -> bool:
    return any(not error <= BOUNDS[key] for key, error in errors.items())


def _matrices(quick: bool) -> Iterator[tuple[str, list[Tensor]]]:
    shapes = QUICK if quick else SHAPES
    for kind, make in KINDS.items():
        yield kind, [make(m, n) for m, n in shapes]
    yield "for an iteration", [_falling(700, 640, decades=20.0)]
    yield "bfloat16", [_normal(m, n).bfloat16() for m, n in shapes]
    yield "float16", [_normal(m, n).half() for m, n in shapes]
    yield "float64", [_normal(m, n).double() for m, n in shapes]
    yield "batches", [torch.stack([_normal(m, n)] * 3) for m, n in shapes[:6]]


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Yield the worst errors of each kind of matrix over all shapes, a row for each way."""
    for kind, matrices in _matrices(quick):
        reference = [torch.linalg.svdvals(W.double()) for W in matrices]
        for name, way in WAYS.items():
            row: Row = {"matrices": kind, "way": name, **dict.fromkeys(BOUNDS, 0.0)}
            methods: dict[str, int] = {}
            for W, expected in zip(matrices, reference, strict=True):
                try:
                    found = way(W.to(device))
                    errors = errors_of(W, found, expected)
                except Exception as error:  # noqa: BLE001 (the other rows are wanted all the same)
                    row |= {"broken": True, "error": f"{tuple(W.shape)}: {error!r}"[:300]}
                    continue
                methods[found.method] = methods.get(found.method, 0) + 1
                row["broken"] = row.get("broken", False) or _broken(errors)
                row |= {key: error for key, error in errors.items() if not error <= row[key]}
            yield row | {"methods": " ".join(f"{n} {method}" for method, n in methods.items())}
        yield _values_alone(kind, matrices, reference, device)


def _values_alone(
    kind: str, matrices: list[Tensor], reference: list[Tensor], device: torch.device
) -> Row:
    row: Row = {"matrices": kind, "way": "values only", "values": 0.0, "broken": False}
    for W, expected in zip(matrices, reference, strict=True):
        try:
            found = singular_values(W.to(device)).cpu()
        except Exception as error:  # noqa: BLE001 (the other rows are wanted all the same)
            row |= {"broken": True, "error": f"{tuple(W.shape)}: {error!r}"[:300]}
            continue
        off = float(((found - expected).abs() / expected[..., :1].clamp_min(1e-300)).max())
        row["broken"] = row["broken"] or not off <= BOUNDS["values"]
        row["values"] = off if not off <= row["values"] else row["values"]
    return row
