"""Optimiser, schedule and decay of a run, from its groups of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from svftool.choices.training import Settings
from svftool.errors import UsageError
from svftool.training.group import ALONE, Group
from svftool.training.state import State

MOMENTUM = 0.9


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: linear up, cosine down to 0.

    `warmup` is a share of the steps, or their number from 1 on.

    Examples
    --------
    >>> [round(rate_factor(step, 10, 0.2), 2) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.04]
    """
    rise = min(steps, math.ceil(warmup if warmup >= 1 else warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


class Optimiser:
    """One optimiser over named groups of parameters, each with its own peak learning rate.

    Parameters
    ----------
    groups : mapping of str to sequence of Parameter
        Parameters by kind: ``singular_values``, ``head`` ... None is empty.
    settings : Settings
        Everything else.
    steps : int
        Length of the schedule.

    Raises
    ------
    UsageError
        If the head is to be trained first and there is none, or nothing would be left to train.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[nn.Parameter]],
        settings: Settings,
        *,
        steps: int,
    ) -> None:
        self.parameters = [parameter for group in groups.values() for parameter in group]
        self._settings = settings
        self._steps = steps
        self._head = list(groups.get("head", ()))
        self._alone = settings.head_first if len(self._head) < len(self.parameters) else 0
        _require_head(self._alone, self._head, steps)
        self._inner = _build(
            [
                {"params": list(parameters), "peak": settings.learning_rate(name), "kind": name}
                for name, parameters in groups.items()
            ],
            settings,
        )
        device = self.parameters[0].device.type
        self._scaler = torch.amp.GradScaler(device, enabled=settings.precision == "fp16")
        self._start: list[Tensor] = []
        if any(settings.decay_of(name) for name in groups):
            self._start = [parameter.detach().clone() for parameter in self.parameters]

    def factor(self, step: int, kind: str = "head") -> float:
        """Share of the peak learning rate of one kind of parameter at a step."""
        begin = 0 if kind == "head" else self._alone
        if step < begin:
            return 0.0
        return rate_factor(step - begin, self._steps - begin, self._settings.warmup)

    def rates(self) -> dict[str, float]:
        """Learning rates of the last step, as ``lr/KIND``."""
        return {f"lr/{group['kind']}": group["lr"] for group in self._inner.param_groups}

    def step(self, loss: Tensor, step: int, group: Group = ALONE) -> None:
        """Update every parameter by the gradient of `loss`, at the rate of this step.

        Parameters
        ----------
        loss : 0-d Tensor
            Of several processes, each one's part of a sum.
        step : int
            From 0.
        group : Group
            The processes that the gradient is summed over.
        """
        self.backward(loss, step)
        self.update(step, group)

    def backward(self, loss: Tensor, step: int) -> None:
        """Add the gradient of a part of the loss of a step to what is there of it."""
        alone = step < self._alone
        torch.autograd.backward(self._scaler.scale(loss), inputs=self._head if alone else None)

    def update(self, step: int, group: Group = ALONE) -> None:
        """Update every parameter by the gradient that is there, and forget it; see `step`."""
        for each in self._inner.param_groups:
            each["lr"] = each["peak"] * self.factor(step, each["kind"])
        group.sum_gradients(self._head if step < self._alone else self.parameters)
        if self._settings.clip is not None:
            self._scaler.unscale_(self._inner)
            nn.utils.clip_grad_norm_(self.parameters, self._settings.clip)
        self._decay()
        self._scaler.step(self._inner)
        self._scaler.update()
        self._inner.zero_grad(set_to_none=True)

    def state(self) -> State:
        """Return what `restore` needs: moments and counters of the optimiser, the loss's scale."""
        tensors = {f"start.{index}": value for index, value in enumerate(self._start)}
        for index, moments in self._inner.state_dict()["state"].items():
            for name, value in moments.items():
                if value is not None:
                    tensors[f"{index}.{name}"] = value
        return State(tensors, {"scaler": self._scaler.state_dict()})

    def restore(self, state: State) -> None:
        """Go back to a state."""
        start = state.part("start")
        self._start = [start[str(i)].to(old) for i, old in enumerate(self._start)]
        inner = self._inner.state_dict()
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.tensors.items():
            index, _, name = key.partition(".")
            if index != "start":
                moments.setdefault(int(index), {})[name] = value
        self._inner.load_state_dict({**inner, "state": moments})
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(dict(state.facts["scaler"]))

    @torch.no_grad()
    def _decay(self) -> None:
        if not self._start:
            return
        start = iter(self._start)
        for group in self._inner.param_groups:
            decay = self._settings.decay_of(group["kind"])
            for parameter in group["params"]:
                parameter.lerp_(next(start), group["lr"] * decay)


def _require_head(alone: int, head: Sequence[nn.Parameter], steps: int) -> None:
    if alone and not head:
        raise UsageError("--head-first: no head is trained here. Leave the option out")
    if alone and alone >= steps:
        raise UsageError(f"--head-first is {alone}, expected fewer than the {steps} steps of a run")


def _build(groups: list[dict[str, object]], settings: Settings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=MOMENTUM)
    return torch.optim.AdamW(groups, weight_decay=0.0)
