"""Hooks that place proxies for a forward pass and keep state dictionaries as they were."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from svftool.attaching.functions import reentrant_frame, region, untraced
from svftool.attaching.fusion import FusionPlan, OwnHook
from svftool.attaching.layer import PREFIX
from svftool.attaching.proxy import Proxy
from svftool.attaching.weight import AttachedWeight
from svftool.errors import ModelError, counted, shortlist

logger = logging.getLogger(__name__)

_STACK = "_svf_placed"

Place = tuple[nn.Module, str, AttachedWeight]


class Places(OwnHook):
    """Paths from a module to the attached parameters that its forward pass may use.

    Paths rather than modules, so that a copied or unpickled model finds its own.
    """

    def __init__(self, places: Sequence[tuple[str, str]]) -> None:
        self.places = tuple(places)
        self._found: tuple[nn.Module, list[Place]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_found": None}

    def of(self, root: nn.Module) -> list[Place]:
        """Return owner, attribute and attached weight of every place below `root`."""
        if self._found is None or self._found[0] is not root:
            owners = [(root.get_submodule(path), attribute) for path, attribute in self.places]
            found = [(owner, name, getattr(owner, PREFIX + name)) for owner, name in owners]
            self._found = (root, found)
        return self._found[1]


class Enter(Places):
    """Forward pre-hook: shadow each parameter by what this pass is to use."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Place a proxy, or the dense weight where no gradient is asked for."""
        self._place(module)

    def _place(self, module: nn.Module) -> None:
        placed: list[tuple[nn.Module, str, Any]] = []
        module.__dict__.setdefault(_STACK, []).append(placed)
        covered: list[Proxy] = []
        fresh: list[tuple[nn.Module, str, AttachedWeight, Tensor]] = []
        for owner, attribute, attached in self.of(module):
            base = _base(owner, attribute)
            if attribute not in owner.__dict__:
                fresh.append((owner, attribute, attached, base))
            elif isinstance(owner.__dict__[attribute], Proxy):
                covered.append(owner.__dict__[attribute])
        inside = region() if fresh or covered else None
        if inside is not None and not torch.is_grad_enabled():
            _check_reentrant()
        for proxy in covered:
            proxy.region = inside
        for owner, attribute, value in _values(fresh, inside):
            owner.__dict__[attribute] = value
            placed.append((owner, attribute, None))
        recurrent = {owner for owner, _, _ in placed if isinstance(owner, nn.RNNBase)}
        for owner in recurrent:
            # These read a list of their own, made when the parameters were registered.
            placed.append((owner, "_flat_weights", owner._flat_weights))
            owner.__dict__["_flat_weights"] = [getattr(owner, n) for n in owner._flat_weights_names]


class EnterRoot(Enter):
    """The same for the whole model, which alone may fuse what follows: it runs as it was traced."""

    def __init__(self, places: Sequence[tuple[str, str]], plan: FusionPlan) -> None:
        super().__init__(places)
        self.plan = plan

    def __call__(  # type: ignore[override]
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Place what the pass is to use, and tell proxies what follows them."""
        fusions = list(self.plan.fusions(module, args, kwargs)) if torch.is_grad_enabled() else []
        self._place(module)
        for fusion in fusions:
            weight = fusion.layer.__dict__.get("weight")
            if isinstance(weight, Proxy):
                weight.next_norm, weight.next_relu = fusion.norm, fusion.relu


class Leave(OwnHook):
    """Forward hook, called whatever happens: uncover the parameters that `Enter` shadowed."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Take away what was placed last."""
        stack = module.__dict__.get(_STACK)
        for owner, attribute, before in stack.pop() if stack else ():
            owner.__dict__.pop(attribute, None)
            if before is not None:
                owner.__dict__[attribute] = before


class LeaveRoot(Leave):
    """The same for the whole model; says once which weights a training pass did not use."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Look at what was placed, then take it away."""
        stack = module.__dict__.get(_STACK)
        proxies = [owner.__dict__.get(name) for owner, name, _ in (stack[-1] if stack else ())]
        recorded = [proxy for proxy in proxies if isinstance(proxy, Proxy)]
        if recorded and output is not None and not self._said:
            self._said = True
            idle = [layer.name for s in recorded if not s.used for layer, _ in s.attached.layers()]
            if idle:
                logger.warning(
                    "%s not used in the first training pass, so singular values there do "
                    "not train: %s",
                    counted(len(idle), "layers", "were"),
                    shortlist(idle, 5),
                )
        super().__call__(module, args, output)


def _base(owner: nn.Module, attribute: str) -> Tensor:
    """Return the base's parameter, which anybody may have taken away since."""
    base = owner._parameters.get(attribute)
    if base is not None:
        return base
    if getattr(owner, "_is_replica", False):
        raise ModelError(
            "replicas of torch.nn.DataParallel do not train singular values, expected one model a "
            "process. Use torch.nn.parallel.DistributedDataParallel."
        )
    raise ModelError(
        f"{type(owner).__name__}.{attribute} is no parameter any more (pruned, parametrised or "
        "removed), expected the one that was attached to. Call svftool.detach before changing it."
    )


def _values(
    fresh: Sequence[tuple[nn.Module, str, AttachedWeight, Tensor]], inside: object
) -> list[tuple[nn.Module, str, Tensor]]:
    """Return what stands for each parameter in this pass, one value for each attached weight."""
    bases = {id(attached): (attached, base) for _, _, attached, base in fresh}
    recording = torch.is_grad_enabled()
    training = [attached for attached, _ in bases.values() if recording and attached.trains]
    if not torch.compiler.is_compiling():
        _check(bases.values(), training=bool(training))
    still = {id(attached) for attached in training}
    rest = [attached for attached, _ in bases.values() if id(attached) not in still]
    shared: dict[int, Tensor] = {}
    with untraced():
        current = AttachedWeight.unchanged(rest)
        for key, (attached, base) in bases.items():
            if key in still:
                attached.forget()
                shared[key] = Proxy.of(attached, base, inside)
            else:
                shared[key] = attached.dense(base, current=current)
    return [(owner, attribute, shared[id(attached)]) for owner, attribute, attached, _ in fresh]


def _check(bases: Collection[tuple[AttachedWeight, Tensor]], *, training: bool) -> None:
    """Refuse what would be wrong, take over what others wrote, freeze what somebody set free."""
    wrapped = any(torch._C._functorch.is_functorch_wrapped_tensor(base) for _, base in bases)
    if training or wrapped:
        _check_plain()
    for attached, base in bases:
        attached.check(base)
        attached.take_back(base)
    free = [layer.name for one, base in bases if one.freeze(base) for layer, _ in one.layers()]
    if free:
        logger.warning(
            "%s set free and frozen again, as only singular values train: %s",
            counted(len(free), "attached weights", "were"),
            shortlist(free, 3),
        )


def _check_plain() -> None:
    """Refuse transforms and traces that see no gradient of singular values."""
    for running, name in (
        (torch._C._functorch.peek_interpreter_stack() is not None, "a transform of torch.func"),
        (torch._C._get_tracing_state() is not None, "torch.jit.trace"),
        (is_fx_symbolic_tracing(), "torch.fx.symbolic_trace"),
    ):
        if running:
            raise ModelError(
                f"{name} does not take in an attached model that trains, expected a plain call. "
                "Call svftool.detach first, or run it under torch.no_grad()."
            )


def _check_reentrant() -> None:
    """Refuse a reentrant checkpoint through which no gradient would come."""
    frame = reentrant_frame()
    given = () if frame is None else frame.f_locals.get("args", ())
    if not any(isinstance(one, Tensor) and one.requires_grad for one in given):
        raise ModelError(
            "a reentrant checkpoint of inputs that need no gradient trains nothing, expected "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False) or inputs that need one."
        )


class SaveMerged(Places):
    """State-dict hook: the merged weights under the parameters' own names."""

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        """Replace the base's weights; parameters that are tied stay tied."""
        for owner, attribute, attached in self.of(module):
            if prefix + attribute in state:
                state[prefix + attribute] = attached.lend(owner.get_parameter(attribute))


class LoadMerged(Places):
    """Load pre-hook: take singular values out of the weights of a state dictionary.

    The base stays as it is. A weight that differs from it by more than singular values is refused.
    """

    def __call__(
        self,
        module: nn.Module,
        state: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Set the singular values, and hand the base itself on to be loaded."""
        for owner, attribute, attached in self.of(module):
            key = prefix + attribute
            base = owner.get_parameter(attribute)
            if key not in state or state[key].shape != base.shape:
                continue
            share = attached.absorb(base, state[key])
            if share > 1.0:
                errors.append(f"{key}: {_reason(attached)}")
            state[key] = base.detach()


def _reason(attached: AttachedWeight) -> str:
    """Say why a weight cannot be loaded, and the way out."""
    if all(layer.tells for layer, _ in attached.layers()):
        return (
            "differs from the base by more than its singular values; "
            "detach the model before loading other weights."
        )
    return (
        "differs from the base by more than its singular values, and its scales or remainder are "
        "not among those that this model has given out. Load a tuned file with svftool.load_tuned, "
        "or detach the model before loading other weights."
    )
