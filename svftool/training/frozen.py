"""Outputs of what is frozen and comes before all that is trained, computed once an example.

Where examples look the same in every epoch, the modules before the first trained one give the same
outputs in every epoch. They are then computed once, for neighbours in the data set together,
whatever order the examples come in, so that a run that is resumed sees the same bits.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

LARGEST = 1 << 30
"""Bytes of outputs that are kept at most, on the model's device; with more, nothing is kept."""

CLOSE = 1e-4
"""How far a loss may be from the whole model's, relative to it: other batches round otherwise."""

Loss = Callable[[Tensor], Tensor]
"""Gives the loss of the examples at some indices, by the whole model."""


class FrozenOutputs:
    """What the frozen beginning of a model makes of each example.

    Parameters
    ----------
    model : nn.Module
        In training mode.
    loss : callable
        Runs the model on the examples at some indices.
    size : int
        Examples.
    together : int
        How many neighbours are computed at once; no more than there are.
    """

    def __init__(self, model: nn.Module, loss: Loss, *, size: int, together: int) -> None:
        self._model, self._loss = model, loss
        self._size, self._together = size, together
        self._stubs: list[_Stub] = []
        self._seen: set[int] = set()

    @classmethod
    def of(
        cls, model: nn.Module, loss: Loss, probe: Tensor, *, size: int, together: int
    ) -> FrozenOutputs | None:
        """Find the frozen beginning, and try it on the examples `probe`.

        Returns
        -------
        FrozenOutputs or None
            None where nothing before the first trained module holds weights, its outputs are
            random (those before the first random one are kept) or too many, or the loss with
            them is not that of the whole model.
        """
        found = cls(model, loss, size=size, together=together)
        with torch.no_grad(), torch.random.fork_rng(devices=_devices(model)):
            modules = _frozen_beginning(model, lambda: loss(probe), len(probe))
            modules = found._repeating(modules, int(probe[0]) // together)
            # Mostly the last output is all that matters, and the others need not be kept.
            for kept in (modules[-1:], modules):
                found._place(modules, kept)
                if modules and found._works(probe):
                    logger.info("outputs of %d frozen modules are kept", len(modules))
                    return found
        return None

    @contextmanager
    def standing_in(self, indices: Tensor) -> Iterator[None]:
        """Context in which the model, run on these examples, begins with what is kept."""
        with torch.no_grad():
            for part in sorted({index // self._together for index in indices.tolist()}):
                if part not in self._seen:
                    self._learn(part)
        with ExitStack() as stack:
            for stub in self._stubs:
                stack.enter_context(stub.standing_in(indices))
            yield

    def _place(self, modules: Sequence[nn.Module], kept: Sequence[nn.Module]) -> None:
        self._seen = set()
        self._stubs = [_Stub(one, keep=one in kept) for one in modules]

    def _repeating(self, modules: list[nn.Module], part: int) -> list[nn.Module]:
        """Take the modules before the first whose output is another one every time."""
        if not modules:
            return []
        self._place(modules, ())
        outputs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            self._learn(part)
            outputs.append([stub.latest[0] for stub in self._stubs])
        same = [torch.equal(one, two) for one, two in zip(*outputs, strict=True)]
        return modules[: [*same, False].index(False)]

    def _learn(self, part: int) -> None:
        # As many as ever at the end too: a smaller batch would round otherwise.
        first = min(part * self._together, self._size - self._together)
        neighbours = torch.arange(first, first + self._together)
        for stub in self._stubs:
            stub.forget()
        with ExitStack() as stack:
            stack.enter_context(_stopping_after(self._stubs[-1].module))
            for stub in self._stubs:
                stack.enter_context(stub.listening(neighbours, since=part * self._together))
            self._loss(neighbours)
        self._seen.add(part)

    def _works(self, probe: Tensor) -> bool:
        try:
            return self._suits(probe)
        except Exception as error:  # noqa: BLE001
            # Whatever a model does with what stands in for a part of it: it can be run whole.
            logger.info("outputs of frozen modules are not kept: %s", error)
            return False

    def _suits(self, probe: Tensor) -> bool:
        """Whether outputs are few enough, and stand in for the modules."""
        self._learn(int(probe[0]) // self._together)
        if self._size * sum(stub.row_bytes for stub in self._stubs) > LARGEST:
            return False
        torch.manual_seed(1)
        whole = self._loss(probe)
        torch.manual_seed(1)
        with self.standing_in(probe):
            kept = self._loss(probe)
        return bool((whole - kept).abs() <= CLOSE * whole.abs())


@dataclass
class _Stub:
    """A frozen module, and its outputs by example; zeros in their place where none are kept."""

    module: nn.Module
    keep: bool
    rows: dict[int, Tensor] = field(default_factory=dict)
    latest: list[Tensor] = field(default_factory=list)

    @property
    def row_bytes(self) -> int:
        return self.latest[0][:1].nbytes if self.keep else 0

    def forget(self) -> None:
        self.latest = []

    @contextmanager
    def listening(self, indices: Tensor, since: int) -> Iterator[None]:
        def hear(module: nn.Module, arguments: Any, output: Tensor) -> None:
            # A copy: what follows may change the output in place.
            value = output.detach().clone()
            self.latest.append(value)
            if self.keep:
                rows = zip(indices.tolist(), value, strict=True)
                self.rows.update((index, row) for index, row in rows if index >= since)

        handle = self.module.register_forward_hook(hear, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def standing_in(self, indices: Tensor) -> Iterator[None]:
        def give(*_: Any, **__: Any) -> Tensor:
            if self.keep:
                return torch.stack([self.rows[index] for index in indices.tolist()])
            like = self.latest[0]
            return like.new_zeros(len(indices), *like.shape[1:])

        own = self.module.__dict__.get("forward")
        self.module.__dict__["forward"] = give
        try:
            yield
        finally:
            del self.module.__dict__["forward"]
            if own is not None:
                self.module.__dict__["forward"] = own


def _frozen_beginning(model: nn.Module, run: Callable[[], object], count: int) -> list[nn.Module]:
    """Find the largest modules with weights that end before the first trained one begins.

    In the order in which they end. What is no module of its own in them, such as an addition,
    runs as ever.
    """
    calls = _calls(model, run, count)
    names = {module: name for name, module in model.named_modules()}
    begun = {names[call.module]: call.begin for call in reversed(calls)}
    starts = [
        _first_use(name, begun) for name, one in model.named_parameters() if one.requires_grad
    ]
    first = min(starts, default=0)
    times = Counter(call.module for call in calls)
    fitting = [
        call.module
        for call in sorted(calls, key=lambda call: call.end)
        if call.end < first and times[call.module] == 1 and call.fits
    ]
    inner = {part for one in fitting for part in one.modules() if part is not one}
    return [one for one in fitting if one not in inner and any(True for _ in one.parameters())]


def _first_use(parameter: str, begun: dict[str, int]) -> int:
    """When the innermost module around a parameter that is ever called begins."""
    name = parameter
    while name:
        name = name.rpartition(".")[0]
        if name in begun:
            return begun[name]
    return 0


@dataclass
class _Call:
    """One call of a module: when it began and ended, in steps of a common clock."""

    module: nn.Module
    begin: int
    end: int = 1 << 62
    fits: bool = False
    """Whether the output is a tensor with a row an example, and all that anybody sees of it."""


def _heard(module: nn.Module) -> bool:
    """Whether a module has other hooks than the two that `_calls` gives to each."""
    return len(module._forward_hooks) > 1 or len(module._forward_pre_hooks) > 1


def _calls(model: nn.Module, run: Callable[[], object], count: int) -> list[_Call]:
    calls: list[_Call] = []
    running: list[_Call] = []
    clock = iter(range(1 << 62))

    def begin(module: nn.Module, arguments: Any) -> None:
        calls.append(_Call(module, next(clock)))
        running.append(calls[-1])

    def end(module: nn.Module, arguments: Any, output: Any) -> None:
        call = running.pop()
        call.end = next(clock)
        rows = isinstance(output, Tensor) and output.shape[:1] == (count,)
        # Somebody may listen to a part of it: a feature map, say, of a backbone run for its sake.
        call.fits = rows and not any(_heard(part) for part in module.modules() if part != module)

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(begin).remove)
            stack.callback(module.register_forward_hook(end).remove)
        run()
    return calls


class _EnoughError(Exception):
    """All that was wanted of a forward pass has been seen."""


@contextmanager
def _stopping_after(module: nn.Module) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _EnoughError

    handle = module.register_forward_hook(stop)
    try:
        yield
    except _EnoughError:
        pass
    finally:
        handle.remove()


def _devices(model: nn.Module) -> Sequence[torch.device]:
    return [one for one in {p.device for p in model.parameters()} if one.type == "cuda"]
