"""How much of a training is kept, by what it does to examples that were left out of it.

With few examples training can leave a model worse than its start. Two trainings on a half of the
support set each are therefore held against the other half, at several shares of the way from the
start to their end: the interpolation of Wortsman et al. 2022 (Robust fine-tuning of zero-shot
models, arXiv 2109.01903). With a new head, the smallest share that is as good as the best one,
within a standard error, is what the run itself goes (the rule of Breiman et al. 1984,
Classification and Regression Trees, section 3.4.3). With the checkpoint's own head it is the
largest one that does no harm, see `svftool.training.kept.choose_share`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from svftool.attaching import Trainable
from svftool.choices.training import LEARNING_RATES, Settings
from svftool.tasks.base import Draw, JudgesExamples
from svftool.training.fold_trials import FOLDS, FoldTrials
from svftool.training.group import ALONE
from svftool.training.kept import SHARES, Judged, Safeguard, decide
from svftool.training.loop import Outcome, train

MOST_A_CLASS = 20
"""Examples a class up to which a support set is few."""


class Way:
    """The way of parameters from where they are now to where training leaves them.

    Parameters
    ----------
    parameters : sequence of Parameter
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._start = [one.detach().clone() for one in parameters]
        self._end: list[Tensor] = []

    @torch.no_grad()
    def go(self, share: float) -> None:
        """Put the parameters at ``start + share (end - start)``; the first call fixes the end.

        The ends are met bit for bit.
        """
        if not self._end:
            self._end = [one.detach().clone() for one in self._parameters]
        ways = zip(self._parameters, self._start, self._end, strict=True)
        for parameter, start, end in ways:
            parameter.copy_(end if share == 1.0 else start.lerp(end, share))


@dataclass(frozen=True)
class Guard(FoldTrials):
    """Decides for the runs of one comparison how much of their training is kept.

    Each trial has the run's steps divided by the number of folds, at that multiple of its rates:
    together they take as many steps as the run.
    """

    def watches(self, draw: Draw) -> bool:
        """Whether a run on this data is judged: few examples a class, with none held out already.

        With ``always``, any number of examples of a task that judges them.
        """
        if not self.settings.guarded or not isinstance(draw, JudgesExamples):
            return False
        few = draw.a_class <= MOST_A_CLASS and not draw.held_out
        return few or self.settings.safeguard == "always"

    def judge(
        self,
        draw: Draw,
        start: Callable[[Draw], tuple[Trainable, bool]],
        *,
        seed: int,
        name: str,
        label: str,
    ) -> Safeguard | None:
        """Decide how much of a run's training is kept, on its support set alone.

        Parameters
        ----------
        draw : Draw
            The run's data; only its folds are used.
        start : callable
            Gives a fresh model with the regime attached, for a fold, and whether its head is new.
        seed : int
            Seed of the run; chooses the folds too.
        name : str
            Name of the run, for the journal.
        label : str
            What the run is called in messages.

        Returns
        -------
        Safeguard or None
            None where it was interrupted.
        """
        folds = self.folds(draw, seed)
        if len(folds) < FOLDS:
            why = "one example a class leaves none to judge training by"
            return self._said(Safeguard(0.0, why), label)
        steps = max(1, self.settings.step_count(draw.size) // FOLDS)
        record = f"{name}-safeguard"
        noted: dict[str, Any] = self.noted(record)
        for number, fold in enumerate(folds):
            if str(number) not in noted:
                shown = f"{label}: what training is worth, part {number + 1} of {len(folds)}"
                values = self._try(fold, start, steps, seed=seed, label=shown)
                if values is None:
                    return None
                noted[str(number)], noted["new_head"] = values
                self.note(record, noted)
        found = [[Judged(*one) for one in noted[str(number)]] for number in range(len(folds))]
        decided = decide(found, steps * len(folds), new_head=noted["new_head"])
        return self._said(decided, label)

    def _try(
        self,
        fold: Draw,
        start: Callable[[Draw], tuple[Trainable, bool]],
        steps: int,
        *,
        seed: int,
        label: str,
    ) -> tuple[list[Any], bool] | None:
        """Train on a fold; judge what it leaves out, at the start and at every share.

        Returns
        -------
        tuple of list and bool, or None
            Values of each `Judged`, none where training diverged, and whether the head is new; None
            where it was interrupted.
        """
        trainable, new_head = start(fold)
        parameters = [one for group in trainable.groups.values() for one in group]
        self.group.copy_from_first(parameters)
        way = Way(parameters)
        shorter = self._shortened(steps)
        suited = suited_head_rate(shorter, trainable.groups, FOLDS * steps)
        outcome = self.train(
            trainable, fold, suited if new_head else shorter, seed=seed, label=label
        )
        if outcome.ending == "interrupted":
            return None
        found: list[Any] = []
        if outcome.ending == "diverged":
            return found, new_head
        for share in (0.0, *SHARES):
            way.go(share)
            found.append(self.group.once(lambda: _judged(fold, trainable.model)))
        return found, new_head

    def _shortened(self, steps: int) -> Settings:
        """As far as the run goes, in fewer steps."""
        head_first = min(self.settings.head_first // FOLDS, steps - 1)
        shorter = replace(
            self.settings, steps=steps, epochs=None, head_first=head_first, safeguard="never"
        )
        return shorter.scaled(FOLDS)

    def _said(self, found: Safeguard, label: str) -> Safeguard:
        if found.kept == "start":
            way_out = "Train anyway with --safeguard never"
            self.say(f"{label}: the start is kept: {found.why}. {way_out}")
        else:
            self.say(f"{label}: {found.share:.1%} of the way: {found.why}")
        return found


def _judged(draw: Draw, model: nn.Module) -> list[Any]:
    """Plain values of a `Judged`, for the journal and the other processes."""
    assert isinstance(draw, JudgesExamples)
    losses, right = draw.judged(model.eval(), "query")
    return [losses.tolist(), int(right.sum())]


def suited_head_rate(
    settings: Settings, groups: Mapping[str, Sequence[nn.Parameter]], steps: int
) -> Settings:
    """Let the head's default rate go by the size of the weights that it starts from.

    Adam moves every weight by about the rate in every step. Over the steps of a cosine that is half
    of the peak rate times their number: it is made the root mean square of the head's weights.

    Parameters
    ----------
    settings : Settings
    groups : mapping of str to sequence of Parameter
        What is trained; a new head at its start.
    steps : int
        Steps of the run.
    """
    weights = [one.detach().flatten() for one in groups.get("head", ()) if one.ndim > 1]
    if not weights or settings.optimizer != "adamw":
        return settings
    size = float(torch.cat(weights).float().square().mean().sqrt())
    if not size > 0.0:  # a head of zeros has no size to go by, and would never be trained
        return settings
    rate = size / (0.5 * steps)
    return replace(settings, head_scale=rate / LEARNING_RATES["head"])


def train_guarded(
    safeguard: Safeguard | None,
    model: nn.Module,
    groups: Mapping[str, Sequence[nn.Parameter]],
    draw: Draw,
    settings: Settings,
    **options: Any,
) -> Outcome:
    """Train as `svftool.training.loop.train` does, and keep what the safeguard says of it.

    The start is kept without training.
    """
    if safeguard is not None and safeguard.kept == "start":
        model.eval()
        return Outcome("finished", 0, 0, None, None, 0.0, None)
    parameters = [one for group in groups.values() for one in group]
    part = safeguard is not None and safeguard.kept == "part"
    if part:
        options.get("group", ALONE).copy_from_first(parameters)
    way = Way(parameters) if part else None
    outcome = train(model, groups, draw, settings, **options)
    if way is not None and safeguard is not None:
        way.go(safeguard.share)
    return outcome
