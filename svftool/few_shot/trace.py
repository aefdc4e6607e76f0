"""Watching one image go through a network: which modules ran, in what order, fed by what."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from svftool.errors import ModelError, shortlist

PROBE_SIDE = 129


@dataclass
class Trace:
    """What went into and came out of the modules, in the order that they ran."""

    order: list[str]
    inputs: dict[str, Any]
    outputs: dict[str, Any]

    def stride(self, name: str) -> int:
        """Pixels between two positions of a module's output, to the next power of two."""
        return _stride_of(self.outputs[name])

    def stride_before(self, name: str) -> int | None:
        """Return the stride of a module's only input; None if it did not run or that is no map."""
        value = self.inputs.get(name)
        return _stride_of(value) if _is_map(value) else None

    def stride_after(self, name: str) -> int | None:
        """Return the stride of a module's output; None if it did not run or that is no map."""
        value = self.outputs.get(name)
        return _stride_of(value) if _is_map(value) else None

    def chain(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """Find siblings, each fed by the one before, that end with the last wanted one."""
        parents = {name.rpartition(".")[0] for name in wanted}
        if len(parents) != 1:
            return ()
        parent = parents.pop()
        siblings = [name for name in self.order if name.rpartition(".")[0] == parent]
        last = max(siblings.index(name) for name in wanted)
        first = last
        while first and self.inputs[siblings[first]] is self.outputs[siblings[first - 1]]:
            first -= 1
        chain = tuple(siblings[first : last + 1])
        return chain if set(wanted) <= set(chain) else ()


class Seen(Exception):
    """Raised inside a forward pass once all that was wanted has been seen."""


def watch(model: nn.Module, wanted: Iterable[str]) -> Trace:
    """Run a grey image through the model until all wanted modules have run."""
    trace = Trace([], {}, {})
    awaited = set(wanted)

    def watcher(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if name not in trace.outputs:
                trace.order.append(name)
                trace.inputs[name] = inputs[0] if len(inputs) == 1 else None
                trace.outputs[name] = output
            awaited.discard(name)
            if not awaited:
                raise Seen

        return hook

    parameter = next(model.parameters())
    probe = torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE, device=parameter.device)
    handles = [m.register_forward_hook(watcher(name)) for name, m in model.named_modules() if name]
    try:
        with evaluating(model), torch.no_grad():
            model(probe)
    except Seen:
        return trace
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__}: does not take a {PROBE_SIDE} x {PROBE_SIDE} image: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    raise ModelError(
        f"{type(model).__name__}: {shortlist(sorted(awaited))} took no part in a forward pass"
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and every module back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _stride_of(value: Tensor) -> int:
    height = int(value.shape[1] if is_channels_last(value) else value.shape[-2])
    return 1 << round(math.log2((PROBE_SIDE - 1) / max(height - 1, 1)))


def _is_map(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim == 4


def is_channels_last(output: Tensor) -> bool:
    """Tell which sides are height and width: the equal ones, since the probe is square."""
    return output.shape[2] != output.shape[3] and output.shape[1] == output.shape[2]
