"""The weights that a run sets aside: those that did best so far."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from svftool.training.state import State


class Best:
    """Copy of the trained parameters where they scored highest; at first, where they start."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._score = -math.inf
        self._keep(0)

    def offer(self, step: int, score: float) -> None:
        """Keep the parameters as they are if `score` is no worse than the best."""
        if score >= self._score:
            self._score = score
            self._keep(step)

    def put_back(self) -> int:
        """Put the best values back, and give the step they are from."""
        with torch.no_grad():
            for parameter, value in zip(self._parameters, self._values, strict=True):
                parameter.copy_(value)
        return self._step

    def state(self) -> State:
        """Give what `restore` needs."""
        tensors = {str(index): value for index, value in enumerate(self._values)}
        return State(tensors, {"step": self._step, "score": self._score})

    def restore(self, state: State) -> None:
        """Go back to a state."""
        self._step, self._score = int(state.facts["step"]), float(state.facts["score"])
        self._values = [state.tensors[str(index)] for index in range(len(self._parameters))]

    def _keep(self, step: int) -> None:
        self._step = step
        self._values = [parameter.detach().to("cpu", copy=True) for parameter in self._parameters]
