"""Hooks that place proxies for a forward pass and keep state dictionaries as they were."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svftool.attaching.fusion import FusionPlan, OwnHook
from svftool.attaching.layer import PREFIX
from svftool.attaching.proxy import Proxy
from svftool.attaching.weight import AttachedWeight
from svftool.errors import shortlist

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
        shared: dict[int, Tensor] = {}
        placed: list[tuple[nn.Module, str, Any]] = []
        module.__dict__.setdefault(_STACK, []).append(placed)
        for owner, attribute, attached in self.of(module):
            if attribute in owner.__dict__:
                continue
            if id(attached) not in shared:
                shared[id(attached)] = _present(owner._parameters[attribute], attached)
            owner.__dict__[attribute] = shared[id(attached)]
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
                    "%d layers were not used in the first training pass, so their singular values "
                    "do not train: %s",
                    len(idle),
                    shortlist(idle, 5),
                )
        super().__call__(module, args, output)


def _present(base: Tensor | None, attached: AttachedWeight) -> Tensor:
    if base is None:
        raise RuntimeError("the parameter of an attached layer was removed")
    if torch.is_grad_enabled() and attached.trains:
        attached.forget()
        return Proxy.of(attached, base)
    return attached.dense(base)


class SaveMerged(Places):
    """State-dict hook: the merged weights under the parameters' own names."""

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
    ) -> None:
        """Replace the base's weights; parameters that are tied stay tied."""
        for owner, attribute, attached in self.of(module):
            if prefix + attribute in state:
                state[prefix + attribute] = attached.merged(owner.get_parameter(attribute))


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
                errors.append(
                    f"{key}: differs from the base by more than its singular values; "
                    "detach the model before loading other weights."
                )
            state[key] = base.detach()
