"""Verdicts in words, from stated rules over the evidence; docs/metrics.md explains each.

The rules are asked in this order, and the first that holds gives the verdict: broken, untouched,
rearranged, rounding noise or quantisation only, spectrum only, unrelated, low rank, full fine-tune.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from svftool.auditing.evidence import ROTATED, Evidence, Noise
from svftool.errors import counted

Confidence = Literal["high", "medium", "low"]

UNTOUCHED = "untouched"
ROUNDING = "rounding noise"
QUANTISED = "quantisation only"
SPECTRUM_ONLY = "spectrum only"
LOW_RANK = "low rank"
FULL = "full fine-tune"
SCREENED = "full fine-tune or mixed (screened)"
UNRELATED = "unrelated"
REARRANGED = "rearranged"
CHANGED = "changed"
BROKEN = "broken"
MIXED = "mixed"
UNDECIDED = "undecided"

VERDICTS = {
    UNTOUCHED: "not one value differs",
    ROUNDING: "the change is no larger than what rounding to the dtype makes",
    QUANTISED: "the change is no larger than what storing weights as codes makes",
    SPECTRUM_ONLY: "singular values changed, singular vectors did not: a singular value fine-tune",
    LOW_RANK: "the change has few singular values: a LoRA-like update",
    FULL: "singular values and vectors changed, in many directions",
    SCREENED: "changed, in a way that a screen cannot tell; without --screen it is told",
    UNRELATED: "almost no correlation with the base: retrained, or another model",
    REARRANGED: "same singular values, other entries: permuted, sign-flipped or rotated",
    CHANGED: "norms, biases, codes or other tensors that are no matrices of numbers changed",
    MIXED: "layers changed in different ways",
    BROKEN: "values that are not finite, a weight that became zero, or another shape",
    UNDECIDED: "not every tensor could be compared, and those that were are as in the base",
}
"""Each verdict with what it means. ``changed`` and ``mixed`` are for tensors that are no matrices
and for whole comparisons, ``undecided`` for whole comparisons and for tensors not compared."""

STILL = (UNTOUCHED, ROUNDING, QUANTISED)
"""Verdicts on what nobody trained."""

MAY_BE = (FULL, MIXED, LOW_RANK, SPECTRUM_ONLY, REARRANGED, UNRELATED)
"""What a change may be that a screen cannot tell."""

STEPS = 1.0
"""Steps of the dtype up to which a moved entry counts as rounded."""

REBUILT = 1e-6
"""Weight drift that rebuilding a weight from float32 factors may cause, whatever its dtype."""

SVF_SHARE = 0.95
"""Share of a change, rounding noise taken off, that must lie on the diagonal."""

COSINE = 0.2
"""Absolute cosine with the base below which a weight counts as unrelated."""

RANK_SHARE = 0.5
"""Share of the short side up to which a change's rank counts as low."""

TAIL = 2.0
"""How many times the expected noise the rest of a low-rank change may hold."""

_TRACE = 1e-3
"""Part of a change's energy that a plain rescaling may leave unexplained."""

_SCREEN_SUMS = 5e-7
"""How far sums in float32, as a screen has them, may shift the square of a cosine."""

_EXACT_TAIL = 1e-9
_ORDER: tuple[Confidence, ...] = ("low", "medium", "high")


@dataclass(frozen=True)
class Verdict:
    """What happened to a layer, or to a whole checkpoint.

    Attributes
    ----------
    name : str
        A key of `VERDICTS`.
    confidence : {"high", "medium", "low"}
    evidence : str
        The numbers it rests on, as a sentence without a capital and a full stop.
    rank : int or None
        Of a low-rank change.
    """

    name: str
    confidence: Confidence
    evidence: str
    rank: int | None = None

    @property
    def text(self) -> str:
        """The verdict with its rank, where it has one."""
        return self.name if self.rank is None else f"{self.name} {self.rank}"


def judge(found: Evidence) -> Verdict:
    """Return the verdict on one matrix or batch of matrices.

    Parameters
    ----------
    found : Evidence

    Returns
    -------
    Verdict
    """
    if found.broken:
        return Verdict(BROKEN, "high", found.broken)
    if found.identical:
        return Verdict(UNTOUCHED, "high", "every value is equal")
    if found.tuned_energy == 0.0:
        return Verdict(BROKEN, "high", "all values became zero")
    if found.change_energy == 0.0:
        return Verdict(ROUNDING, "medium", _UNFELT)
    if found.base_energy == 0.0:
        return Verdict(UNRELATED, "medium", _moved_by(found))
    screened = found.screened is not None
    rules: tuple[Callable[[Evidence], Verdict | None], ...]
    rules = (_rearranged, _rounding, *((_not_certain, _by_symmetry) if screened else ()))
    for rule in (*rules, _spectrum_only, _unrelated, _low_rank):
        verdict = rule(found)
        if verdict is not None:
            return verdict
    return _not_told(found) if screened else _full(found)


def judge_tensor(found: Evidence) -> Verdict:
    """Return the verdict on a tensor that is no matrix: a norm, a bias, a counter."""
    if found.broken:
        return Verdict(BROKEN, "high", found.broken)
    if found.identical:
        return Verdict(UNTOUCHED, "high", "every value is equal")
    if found.change_energy == 0.0:
        return Verdict(ROUNDING, "medium", _UNFELT)
    rounded = None if found.whole else _rounding(found)
    if rounded is not None:
        return rounded
    if found.rearranged:
        return Verdict(REARRANGED, "medium", found.rearranged)
    return Verdict(CHANGED, "high", _moved_by(found))


_UNFELT = "what differs is smaller than can be measured beside the rest"


def _moved_by(found: Evidence) -> str:
    if found.base_energy == 0.0:
        return "all zeros in the base and not in the fine-tune: an infinite drift"
    return f"moved by {_percent(found.weight_drift)} of its norm"


def _rearranged(found: Evidence) -> Verdict | None:
    # Singular values that swapped places also leave the spectrum as it was.
    swapped = found.rearranged == ROTATED and (found.svf_share or 0.0) >= SVF_SHARE
    if not found.rearranged or swapped:
        return None
    return Verdict(REARRANGED, "high", found.rearranged)


def _rounding(found: Evidence) -> Verdict | None:
    noise = found.noise
    if noise is not None and noise.storage:
        return _quantised(found, noise)
    if 0.0 < found.weight_drift <= REBUILT:
        evidence = f"moved by {_percent(found.weight_drift)}, as rebuilding from factors does"
        return Verdict(ROUNDING, "medium", evidence)
    if noise is None or noise.steps is None or noise.steps > STEPS:
        return None
    evidence = (
        f"no entry moved by more than {noise.steps:.2g} steps of {noise.name}, "
        f"by {_percent(found.weight_drift)} in all"
    )
    # Rounding an entry to the nearest number moves it by half a step and spreads evenly.
    single = noise.steps <= 0.51 and found.change_energy <= 2.0 * noise.energy
    return Verdict(ROUNDING, "high" if single else "medium", evidence)


_CLIPPED = 4.0
"""Steps that a format may move a few entries by, whose scales are chosen for the others."""


def _quantised(found: Evidence, noise: Noise) -> Verdict | None:
    """As of rounding, with the steps of the codes."""
    assert noise.steps is not None
    expected = found.change_energy <= 1.5 * noise.energy
    if noise.steps > (_CLIPPED if expected else STEPS):
        return None
    evidence = (
        f"no entry moved by more than {noise.steps:.2g} steps of {noise.name}, "
        f"by {_percent(found.weight_drift)} in all"
    )
    return Verdict(QUANTISED, "high" if expected and noise.steps <= STEPS else "medium", evidence)


def _spectrum_only(found: Evidence) -> Verdict | None:
    if found.svf_share is None:
        return None
    for noise in _noises(found):
        share, noisy = _cleaned_share(found, noise)
        if share < SVF_SHARE or noisy > 0.9:
            continue
        evidence = f"{_percent(found.svf_share)} of the change is one of singular values"
        if noise is not None and found.svf_share < 0.99:
            evidence += f", {_percent(share)} without the rounding noise of {noise.name}"
        if _is_rescaling(found):
            evidence += "; it is a plain rescaling"
        return Verdict(SPECTRUM_ONLY, _spectral_confidence(found, noisy), evidence)
    return None


def _not_certain(found: Evidence) -> Verdict | None:
    """Say nothing more where a screen cannot tell which of the rules that follow comes first."""
    screened = found.screened
    assert screened is not None
    return _not_told(found) if screened.may_be_rotated or screened.spectral is None else None


def _by_symmetry(found: Evidence) -> Verdict | None:
    screened = found.screened
    assert screened is not None
    if not screened.spectral:
        return None
    evidence = (
        f"symmetric in the base's directions: about {_percent(screened.asymmetry or 0.0)} of the "
        "change cannot be one of singular values"
    )
    if _is_rescaling(found):
        evidence += "; it is a plain rescaling"
    noisy = found.noise_share
    return Verdict(SPECTRUM_ONLY, _spectral_confidence(found, noisy), evidence)


def _is_rescaling(found: Evidence) -> bool:
    """Whether all of the change but a trace is the base times a number, as far as can be told.

    A small change leaves the cosine near 1, whatever it is: what is not along the base counts
    against the change, together with what the rounding of the sums may hide.
    """
    if found.cosine is None:
        return False
    apart = max(0.0, 1.0 - found.cosine**2)
    hidden = 1e-13 if found.screened is None else _SCREEN_SUMS
    return (apart + hidden) * found.tuned_energy <= _TRACE * found.change_energy


def _not_told(found: Evidence) -> Verdict:
    assert found.screened is not None
    parts = [_moved_by(found)]
    if found.screened.may_be_rotated:
        parts.append("the norm is the same, as a rotation leaves it")
    if found.screened.asymmetry is not None:
        share = _percent(min(1.0, found.screened.asymmetry))
        parts.append(f"about {share} of that not by singular values")
    return Verdict(SCREENED, "low", ", ".join(parts))


def _spectral_confidence(found: Evidence, noisy: float) -> Confidence:
    if found.side < 4 or noisy > 0.5:
        return "low"
    return "high" if noisy < 0.1 else "medium"


def _cleaned_share(found: Evidence, noise: Noise | None) -> tuple[float, float]:
    """Share on the diagonal once noise is taken off, which falls there by chance, and its part."""
    assert found.svf_share is not None
    energy = 0.0 if noise is None else noise.energy
    left = found.change_energy - energy
    if left <= 0.0:
        return 0.0, 1.0
    chance = energy / max(found.m, found.n)
    return (found.svf_share * found.change_energy - chance) / left, energy / found.change_energy


def _noises(found: Evidence) -> Iterable[Noise | None]:
    """Return the finer precision first: a change may need no coarser noise to explain it."""
    kinds = [noise for noise in (found.tuned_noise, found.noise) if noise is not None]
    return kinds or [None]


def _unrelated(found: Evidence) -> Verdict | None:
    cosine = found.cosine
    entries = found.m * found.n * found.count
    limit = max(COSINE, 3.0 / math.sqrt(entries))
    if cosine is None or abs(cosine) >= limit:
        return None
    confidence: Confidence = "high" if abs(cosine) < COSINE / 2 and entries >= 400 else "medium"
    return Verdict(
        UNRELATED, confidence if entries >= 100 else "low", f"cosine with the base {cosine:.2f}"
    )


def _low_rank(found: Evidence) -> Verdict | None:
    rank = found.rank
    if rank is None or not 1 <= rank <= RANK_SHARE * found.side:
        return None
    for noise in _noises(found):
        energy = 0.0 if noise is None else noise.energy
        if found.tail > 0.5 * found.change_energy:
            continue
        if found.tail <= max(TAIL * energy, _EXACT_TAIL * found.change_energy):
            noisy = energy / found.change_energy
            kept = 1.0 - found.tail / found.change_energy
            evidence = f"{rank} of {found.side} directions hold {_percent(kept)} of the change"
            if noise is not None:
                evidence += f", the rest is within the rounding of {noise.name}"
            return Verdict(LOW_RANK, _rank_confidence(found, rank, noisy), evidence, rank)
    return None


def _rank_confidence(found: Evidence, rank: int, noisy: float) -> Confidence:
    if noisy > 0.3 or found.side < 8:
        return "low"
    return "high" if noisy < 0.05 and rank <= found.side / 4 else "medium"


def _full(found: Evidence) -> Verdict:
    parts = [_moved_by(found)]
    if found.svf_share is not None:
        parts.append(f"{_percent(found.svf_share)} of that by singular values")
    if found.rank:
        parts.append(f"rank {found.rank} of {found.side}")
    if found.noise is not None and found.noise_share > 0.3:
        parts.append(f"rounding to {found.noise.name} hides what was done")
    confidence: Confidence = "high"
    if found.svf_share is None or found.side < 4 or found.noise_share > 0.3:
        confidence = "medium"
    if found.noise_share > 0.7 or found.side < 2:
        confidence = "low"
    return Verdict(FULL, confidence, ", ".join(parts))


def judge_codes(*, equal: bool) -> Verdict:
    """Return the verdict on a tensor that is not read as numbers, only as bytes."""
    if equal:
        return Verdict(UNTOUCHED, "high", "every byte is equal")
    return Verdict(CHANGED, "high", "its bytes differ; they are codes, not read as numbers")


def judge_all(
    matrices: Sequence[tuple[Verdict, Evidence | None]],
    others: Sequence[Verdict],
    codes: Sequence[Verdict] = (),
    *,
    not_compared: int = 0,
) -> Verdict:
    """Return the verdict on a whole comparison.

    Parameters
    ----------
    matrices : sequence of (Verdict, Evidence)
        Of every matrix that both sides have.
    others : sequence of Verdict
        Of the tensors that are no matrices.
    codes : sequence of Verdict
        Of those compared by their bytes alone.
    not_compared : int
        How many tensors of either side were not compared.

    Returns
    -------
    Verdict
        Never that all is as in the base where something was not compared.
    """
    found = _judge_compared(matrices, others, codes)
    if not not_compared:
        return found
    left = f"{_tensors(not_compared)} not compared"
    if found.name not in STILL:
        return replace(found, evidence=f"{found.evidence}; undecided: {left}")
    done = len(matrices) + len(others) + len(codes)
    rest = "nothing else is there"
    if done:
        way = {UNTOUCHED: "equal", QUANTISED: "equal but for quantisation"}.get(
            found.name, "equal but for rounding"
        )
        rest = f"the {done} compared {'is' if done == 1 else 'are'} {way}"
    return Verdict(UNDECIDED, "low", f"{left}; {rest}")


def _tensors(count: int) -> str:
    return f"{count} tensor{'' if count == 1 else 's'}"


def _judge_compared(
    matrices: Sequence[tuple[Verdict, Evidence | None]],
    others: Sequence[Verdict],
    codes: Sequence[Verdict],
) -> Verdict:
    """Return the verdict on what was compared."""
    broken = sum(verdict.name == BROKEN for verdict in (*(v for v, _ in matrices), *others))
    if broken:
        return broken_verdict(broken)
    moved = [(v, e) for v, e in matrices if v.name not in STILL]
    if not moved:
        return _still(matrices, others, codes)
    counts = Counter(verdict.name for verdict in _absorbed(moved))
    name, most = counts.most_common(1)[0]
    total, still = len(moved), len(matrices) - len(moved)
    if most < 0.8 * total and SCREENED in counts:
        name = SCREENED
    elif most < 0.8 * total:
        name = MIXED if FULL not in counts or counts[FULL] < 0.5 * total else FULL
    alike = [verdict for verdict, _ in moved if verdict.name == name] or [v for v, _ in moved]
    evidence = _tally(counts, len(matrices), still) + _say_codes(codes)
    ranks = sorted(verdict.rank for verdict in alike if verdict.rank is not None)
    rank = ranks[-1] if name == LOW_RANK else None
    if rank is not None and ranks[0] != rank:
        evidence += f"; ranks {ranks[0]} to {rank}"
    return Verdict(name, _joint(alike), evidence, rank)


def broken_verdict(count: int) -> Verdict:
    """Return the verdict on a checkpoint with broken tensors."""
    return Verdict(BROKEN, "high", f"{count} {'tensor is' if count == 1 else 'tensors are'} broken")


def _say_codes(codes: Sequence[Verdict]) -> str:
    changed = sum(verdict.name == CHANGED for verdict in codes)
    differ = "differs in its" if changed == 1 else "differ in their"
    return f"; {_tensors(changed)} of codes {differ} bytes" if changed else ""


def _still(
    matrices: Sequence[tuple[Verdict, Evidence | None]],
    others: Sequence[Verdict],
    codes: Sequence[Verdict],
) -> Verdict:
    coded = sum(verdict.name == QUANTISED for verdict, _ in matrices)
    rounded = coded + sum(verdict.name == ROUNDING for verdict, _ in matrices)
    changed = sum(verdict.name in (CHANGED, REARRANGED) for verdict in others)
    in_codes = _say_codes(codes)
    if changed or in_codes:
        part = "all matrices of numbers are as in the base"
        if rounded:
            part += " but for rounding"
        others_changed = "norm, bias or buffer" if changed == 1 else "norms, biases or buffers"
        if changed:
            part += f"; {changed} {others_changed} changed"
        return Verdict(CHANGED, "high", part + in_codes)
    if rounded or any(verdict.name == ROUNDING for verdict in others):
        name = QUANTISED if coded else ROUNDING
        alike = [verdict for verdict, _ in matrices if verdict.name == name]
        return Verdict(
            name,
            _joint(alike or others),
            f"{counted(rounded, 'matrices', of=len(matrices))}, by "
            f"{'quantisation' if coded else 'rounding'}",
        )
    total = len(matrices) + len(others) + len(codes)
    return Verdict(UNTOUCHED, "high", f"all {total} tensors are equal")


def _absorbed(moved: Sequence[tuple[Verdict, Evidence | None]]) -> list[Verdict]:
    """Count a full change of a small layer as low rank, where the others' rank would fill it."""
    ranks = [verdict.rank for verdict, _ in moved if verdict.rank is not None]
    top = max(ranks) if len(ranks) >= 0.5 * len(moved) else 0
    return [
        Verdict(LOW_RANK, "medium", verdict.evidence)
        if verdict.name == FULL and found is not None and top > RANK_SHARE * found.side
        else verdict
        for verdict, found in moved
    ]


def _tally(counts: Counter[str], matrices: int, still: int) -> str:
    moved = matrices - still
    text = (
        f"{moved} of {matrices} matrices changed" if still else f"all {matrices} matrices changed"
    )
    if len(counts) < 2:
        return text
    return f"{text}: {', '.join(f'{count} {name}' for name, count in counts.most_common())}"


def _joint(verdicts: Sequence[Verdict]) -> Confidence:
    """Return the confidence that at least four of five of them have."""
    levels = sorted(_ORDER.index(verdict.confidence) for verdict in verdicts)
    return _ORDER[levels[len(levels) // 5]] if levels else "high"


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return "infinitely many times"
    if share >= 0.1:
        return f"{share:.0%}"
    return f"{share:.2%}" if share >= 1e-4 else f"{100 * share:.1e} %"
