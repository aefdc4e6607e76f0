"""Modules of this package on a live model: in no state dictionary, of dtypes of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn


class KeepsDtype(nn.Module):
    """A module without entries in state dictionaries, some of whose parameters keep their dtype."""

    exempt: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: self._parameters[name] for name in self.exempt}
        before = {name: value.detach() for name, value in kept.items() if value is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in before.items():
            parameter = self._parameters[name]
            if parameter is not None and parameter.dtype != value.dtype:
                parameter.data = value.to(parameter.device)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass
