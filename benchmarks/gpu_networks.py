"""The decompositions of whole networks beside torch.linalg.svd with each of its drivers.

Both sides begin with the weights in the machine's memory and end with the factors there. svftool is
timed over a whole network. A loop of torch takes the sum of what its matrices take, so one matrix
of each shape is timed, in turns with the others, and counts as often as the network holds it.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from layers import (
    LLAMA_BLOCK,
    RESNET50,
    VIT_B_16,
    Shapes,
    profile_of,
    random_layers,
    trained_layers,
)
from torch import Tensor

from svftool.engine import Job, parse_rank, run_svds, run_values

Row = dict[str, Any]
_SMALL: Shapes = {(64, 147): 1, (100, 80): 2}
BOUNDS = {"values": 1e-6, "residual": 1e-6, "orthogonality": 1e-5}
RANK = 64
TURNS = 3

# A side that took this long once is not timed again: its spread is small beside it.
_LONG = 0.5

# Drivers that take longer than this for one matrix are not tried on a longer one.
_TOO_LONG = 8.0

Peer = Callable[[Tensor], tuple[Tensor, ...]]


def _full(driver: str | None) -> Peer:
    return lambda W: tuple(
        part.cpu() for part in torch.linalg.svd(W, full_matrices=False, driver=driver)
    )


def _values(driver: str | None) -> Peer:
    return lambda W: (torch.linalg.svdvals(W, driver=driver).cpu(),)


def _low_rank(W: Tensor) -> tuple[Tensor, ...]:
    U, S, V = torch.svd_lowrank(W, RANK, niter=2)
    return U.cpu(), S.cpu(), V.mT.cpu()


def _peers(kind: str, device: torch.device) -> dict[str, Peer]:
    drivers = (None, "gesvd", "gesvdj", "gesvda") if device.type == "cuda" else (None,)
    make = _values if kind == "values" else _full
    found = {driver or "default": make(driver) for driver in drivers}
    return {"svd_lowrank": _low_rank} if kind == "rank" else found


def ours(layers: dict[str, Tensor], kind: str, device: torch.device) -> dict[str, Any]:
    """Decompose a network; return what was found by layer."""
    jobs = [Job(name, tuple(W.shape), W.dtype) for name, W in layers.items()]
    if kind == "values":
        return dict(run_values(jobs, layers.__getitem__, device=device))
    rank = parse_rank(str(RANK) if kind == "rank" else "full")
    return dict(run_svds(jobs, layers.__getitem__, rank=rank, device=device))


def seconds_of(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Time until the device has done what was asked of it; return the result too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


class Timed:
    """Takes turns, and leaves out what takes too long to be repeated."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: dict[Any, list[float]] = {}
        self.failed: dict[Any, str] = {}

    def turn(self, key: Any, work: Callable[[], object], *, twice: bool = False) -> Any:
        """Time once more; the first time after an untimed one, unless that took long.

        Returns
        -------
        object
            What the first call gave; None of the later ones.
        """
        times, result = self.times.get(key, []), None
        if key in self.failed or (times and times[0] > _LONG and not twice):
            return None
        try:
            taken, result = seconds_of(work, self._device)
            if not times and (twice or taken <= _LONG):
                taken, _ = seconds_of(work, self._device)
        except (RuntimeError, ValueError) as error:
            self.failed[key] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            return None
        self.times.setdefault(key, []).append(taken)
        return None if times else result

    def median(self, key: Any) -> float | None:
        """Return the median, None where it failed or was left out."""
        return statistics.median(self.times[key]) if key in self.times else None


class Comparison:
    """svftool and every peer on one network: times, and the errors of what they give.

    Parameters
    ----------
    name : str
    layers : dict of str to Tensor
    kind : {"full", "values", "rank"}
    device : torch.device
    """

    def __init__(
        self, name: str, layers: dict[str, Tensor], kind: str, device: torch.device
    ) -> None:
        self._name, self._layers, self._kind, self._device = name, layers, kind, device
        self._timed, self._peers = Timed(device), _peers(kind, device)
        self._counts = Counter(tuple(W.shape) for W in layers.values())
        one_each = {tuple(W.shape): W for W in layers.values()}
        self._one_each = dict(sorted(one_each.items(), key=lambda one: max(one[0]) * min(one[0])))
        self._errors: dict[str, Row] = {}

    def rows(self, known: dict[str, float] | None = None) -> Iterator[Row]:
        """Measure, and yield a row for each peer; of `known` ones the seconds are given."""
        for _ in range(1 if self._name.startswith("quick") else TURNS):
            self._turn()
        mine = self._timed.median("svftool")
        assert mine is not None, self._timed.failed
        row: Row = {"network": self._name, "kind": self._kind, "svftool s": mine}
        for peer, taken in (known or {}).items():
            yield row | {"peer": peer, "ratio": taken / mine, "peer s": taken}
        if "svftool" in self._errors:
            yield row | {"peer": "", **self._errors["svftool"]}
        for peer in self._peers:
            yield row | {"peer": peer} | self._of(peer, mine)

    def _of(self, peer: str, mine: float) -> Row:
        times = {sides: self._timed.median((peer, sides)) for sides in self._one_each}
        missing = [sides for sides, taken in times.items() if taken is None]
        errors = {f"its {key}": error for key, error in self._errors.get(peer, {}).items()}
        if missing:
            failed = (why for key, why in self._timed.failed.items() if key[0] == peer)
            return {"not timed": f"{missing}: {next(failed, 'too long')}", **errors}
        taken = sum(self._counts[sides] * (one or 0.0) for sides, one in times.items())
        return {"ratio": taken / mine, "peer s": taken, **errors}

    def _turn(self) -> None:
        found = self._timed.turn("svftool", self._ours, twice=True)
        if found is not None:
            # Values alone are taken just as the reference takes them: that they agree says nothing.
            for name, one in found.items() if self._kind != "values" else ():
                self._note("svftool", self._layers[name], (one.U, one.S, one.Vh))
        del found
        for peer, work in self._peers.items():
            for sides, W in self._one_each.items():
                if (
                    max(self._timed.median((peer, one)) or 0.0 for one in self._one_each)
                    > _TOO_LONG
                ):
                    break
                given = self._timed.turn((peer, sides), lambda work=work, W=W: self._moved(work, W))
                if given is not None:
                    self._note(peer, W, given)

    def _ours(self) -> dict[str, Any]:
        return ours(self._layers, self._kind, self._device)

    def _moved(self, work: Peer, W: Tensor) -> tuple[Tensor, ...]:
        return work(W.to(self._device))

    def _note(self, side: str, W: Tensor, parts: tuple[Tensor, ...]) -> None:
        worst = self._errors.setdefault(side, {})
        for key, error in errors_of(W, parts, self._device):
            worst[key] = error if not error <= worst.get(key, 0.0) else worst.get(key, 0.0)
        if side == "svftool":
            worst["broken"] = any(not worst[key] <= BOUNDS[key] for key in worst.keys() & BOUNDS)


def errors_of(
    W: Tensor, parts: tuple[Tensor, ...], device: torch.device
) -> Iterator[tuple[str, float]]:
    """Yield the errors of values or factors, in float64 on the device.

    The reference are the roots of the float64 Gram matrix's eigenvalues, which are as good as
    float32 needs for values above 1e-6 of the largest. They are how the engine finds them too; the
    part ``bounds`` holds it against LAPACK.
    """
    A = W.to(device).double()
    A = A if A.shape[0] >= A.shape[1] else A.mT
    expected = torch.linalg.eigvalsh(A.mT @ A).flip(0).clamp_min(0.0).sqrt()
    S = parts[len(parts) // 2].to(device).double()
    k = len(S)
    yield "values", float((S - expected[:k]).abs().max() / expected[0])
    if len(parts) == 1:
        return
    U, Vh = (parts[index].to(device).double() for index in (0, 2))
    eye = torch.eye(k, dtype=torch.float64, device=device)
    for basis in (U, Vh.mT):
        yield "orthogonality", float((basis.mT @ basis - eye).abs().max())
    if k == len(expected):
        off = W.to(device).double() - U * S @ Vh
        yield "residual", float(torch.linalg.vector_norm(off) / torch.linalg.vector_norm(A))


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Yield rows for each network: full, values alone, and the 64 largest of two spectra."""
    profile, _ = profile_of(None)
    ours(random_layers(_SMALL), "full", device)  # what is loaded at the first use
    networks = {"llama block": LLAMA_BLOCK, "vit_b_16": VIT_B_16, "resnet50": RESNET50}
    for name, shapes in ({"quick": _SMALL} if quick else networks).items():
        layers = random_layers(shapes)
        full = list(Comparison(name, layers, "full", device).rows())
        yield from full
        yield from Comparison(name, layers, "values", device).rows()
        trained = trained_layers(shapes, profile)
        default = {one["peer"]: one["peer s"] for one in full if one["peer"] == "default"}
        for spectrum, weights in (("random", layers), ("trained", trained)):
            label = f"{name}, {spectrum}"
            yield from Comparison(label, weights, "rank", device).rows(default)
        yield _with_errors(f"{name}, trained", trained, device)


def _with_errors(name: str, layers: dict[str, Tensor], device: torch.device) -> Row:
    """Decompose a network whose spectra fall as those of trained layers."""
    taken, found = seconds_of(lambda: ours(layers, "full", device), device)
    row: Row = {"network": name, "kind": "full", "svftool s": taken}
    worst: Row = {}
    for layer, one in found.items():
        for key, error in errors_of(layers[layer], (one.U, one.S, one.Vh), device):
            worst[key] = error if not error <= worst.get(key, 0.0) else worst.get(key, 0.0)
    counts = Counter(one.method for one in found.values())
    said = " ".join(f"{count} {method}" for method, count in counts.items())
    broken = any(not worst[key] <= BOUNDS[key] for key in worst)
    return row | worst | {"broken": broken, "methods": said}
