"""Classifier heads: whether the checkpoint's fits the data, and a new one from class means."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from scipy.special import bdtrc
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize

from svftool.errors import ModelError, shortlist

ClassifierType = Literal["linear", "cosine"]

_SCALES = (5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0, 80.0)
_ONE_SHOT_SCALE = 15.0


def logits_of(output: Any) -> Tensor:
    """Find the logits in what a model returns: a tensor, ``.logits``, or the first of a tuple.

    Raises
    ------
    ModelError
        If there is no tensor to be found.
    """
    for candidate in (output, getattr(output, "logits", None)):
        if isinstance(candidate, Tensor):
            return candidate
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise ModelError(
        f"the model returns {type(output).__name__}, expected logits: a tensor, an object with "
        "'.logits' or a tuple that starts with a tensor"
    )


def pool(features: Tensor) -> Tensor:
    """Average a feature map (N, F, H, W) or a sequence (N, T, F) to (N, F); pass (N, F) through."""
    if features.ndim == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.ndim == 3 else features


class CosineHead(nn.Module):
    """Classifier by the cosine between features and a direction for each class.

    The logits are ``scale * cos(features, weight[c])``, so that neither the length of a feature nor
    that of a weight favours a class (Gidaris and Komodakis, CVPR 2018).

    Parameters
    ----------
    features, classes : int
        Sizes of the head.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features))
        self.scale = nn.Parameter(torch.tensor(_ONE_SHOT_SCALE))
        nn.init.normal_(self.weight, std=features**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """Logits, (N, classes), of features (N, F)."""
        return self.scale * linear(normalize(features, dim=-1), normalize(self.weight, dim=-1))


class WithHead(nn.Module):
    """A network without a classifier, and one on its pooled output.

    Parameters
    ----------
    backbone : nn.Module
        Gives features: (N, F), a map (N, F, H, W) or a sequence (N, T, F).
    head : nn.Module
        Takes features, (N, F).
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head.to(next(backbone.parameters()))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (N, classes)."""
        logits: Tensor = self.head(pool(logits_of(self.backbone(images))))
        return logits


def new_head(
    model: nn.Module,
    module: str | None,
    classes: int,
    features: int,
    *,
    kind: ClassifierType = "linear",
) -> tuple[nn.Module, str]:
    """Put an untrained classifier in the place of the model's own, or behind a model without one.

    Parameters
    ----------
    model : nn.Module
        Changed in place where it has a head.
    module : str or None
        Name of the head to replace: a linear layer or a 1x1 convolution. None wraps the model in
        a `WithHead`.
    classes : int
        Outputs of the new head.
    features : int
        Its inputs, where `module` is None.
    kind : {"linear", "cosine"}
        A linear layer (a 1x1 convolution where the old head is one), or a `CosineHead`.

    Returns
    -------
    tuple of nn.Module and str
        The model with the head, and the name of the head's module.

    Raises
    ------
    ModelError
        If the head is another kind of layer.
    """
    if module is None:
        layer = CosineHead if kind == "cosine" else nn.Linear
        return WithHead(model, layer(features, classes)), "head"
    old = model.get_submodule(module)
    parent, _, name = module.rpartition(".")
    new = resized(old, module, classes) if kind == "linear" else _cosine(old, module, classes)
    setattr(model.get_submodule(parent), name, new)
    return model, module


def _cosine(old: nn.Module, name: str, classes: int) -> nn.Module:
    if not isinstance(old, nn.Linear):
        raise ModelError(
            f"head {name!r} is a {type(old).__name__}, expected a linear layer for a cosine head. "
            "Use --head-type linear"
        )
    return CosineHead(old.in_features, classes).to(old.weight)


def resized(old: nn.Module, name: str, classes: int) -> nn.Module:
    """Make an untrained layer of the kind of an old one, with another number of outputs.

    Raises
    ------
    ModelError
        If the old one is no linear layer or 1x1 convolution.
    """
    options: dict[str, Any] = {}
    if isinstance(old, (nn.Linear, nn.Conv2d)):
        options = {"device": old.weight.device, "dtype": old.weight.dtype}
        options["bias"] = old.bias is not None
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, classes, **options)
    if isinstance(old, nn.Conv2d) and old.kernel_size == (1, 1) and old.groups == 1:
        return nn.Conv2d(old.in_channels, classes, 1, **options)
    raise ModelError(
        f"head {name!r} is a {type(old).__name__}, expected a linear layer or a 1x1 convolution "
        "for a new head"
    )


def require_module(model: nn.Module, name: str, *, option: str = "--head-name") -> None:
    """Refuse a name given with an option that no module has.

    Raises
    ------
    ModelError
        If there is none; lists those there are.
    """
    names = [found for found, _ in model.named_modules() if found]
    if name not in names:
        raise ModelError(f"{option} {name!r} is no module of the model: {shortlist(names)}")


def head_inputs(
    model: nn.Module,
    head: str,
    batches: Iterable[Any],
    *,
    run: Callable[[nn.Module, Any], Any] | None = None,
    reduce: Callable[[Tensor, Any], Tensor] | None = None,
) -> Tensor:
    """Run the model and catch what its head sees: (N, F) float32.

    Parameters
    ----------
    model : nn.Module
    head : str
        Name of its head.
    batches : iterable
        What the model takes.
    run : callable, optional
        Runs the model on a batch that is no single argument.
    reduce : callable, optional
        Makes (N, F) of what the head sees of a batch, by default `pool`.
    """
    caught: list[Tensor] = []

    def catch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        caught.append(arguments[0])

    found = []
    handle = model.get_submodule(head).register_forward_pre_hook(catch)
    try:
        for batch in batches:
            caught.clear()
            model(batch) if run is None else run(model, batch)
            seen = [pool(one) if reduce is None else reduce(one, batch) for one in caught]
            found += [one.float() for one in seen]
    finally:
        handle.remove()
    return torch.cat(found)


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Weights of a linear classifier that goes by the cosine to each class's mean direction.

    The scale is the one that explains the examples best when each is left out of its own class's
    mean (of the scales 5 to 80); with one example a class it is 15.

    Parameters
    ----------
    features : (N, F) Tensor
        Inputs of the head.
    labels : (N,) int64 Tensor
        Classes; each must occur.
    classes : int
        Number of classes.

    Returns
    -------
    (classes, F) Tensor
        For features of typical length the logits are scale times cosine.
    """
    weights, scale = mean_directions(features, labels, classes)
    result: Tensor = weights * (scale / features.norm(dim=1).mean())
    return result


def mean_directions(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, float]:
    """Return unit directions of class means, (classes, F), and a scale; see `class_means`."""
    directions = normalize(features, dim=1)
    sums = directions.new_zeros(classes, features.shape[1]).index_add_(0, labels, directions)
    weights = normalize(sums, dim=1)
    scale = _ONE_SHOT_SCALE
    if int(torch.bincount(labels, minlength=classes).min()) > 1:
        cosines = directions @ weights.T
        others = normalize(sums[labels] - directions, dim=1)
        cosines[torch.arange(len(labels)), labels] = (others * directions).sum(1)
        scale = min(_SCALES, key=lambda s: float(cross_entropy(s * cosines, labels)))
    return weights, scale


def start_head(head: nn.Module, features: Tensor, labels: Tensor, classes: int) -> None:
    """Start a new head from the mean directions of the classes' features, (N, F)."""
    if isinstance(head, CosineHead):
        weights, scale = mean_directions(features, labels, classes)
        with torch.no_grad():
            head.weight.copy_(weights)
            head.scale.fill_(scale)
    else:
        set_head(head, class_means(features, labels, classes))


def keep_rows(head: nn.Module, old: nn.Module | None, rows: Sequence[int]) -> bool:
    """Give a new head the weights of some outputs of an old one; whether both are of one kind."""
    if old is None or type(old) is not type(head):
        return False
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(old.get_parameter(name)[list(rows)])
    return True


def set_head(head: nn.Module, weights: Tensor) -> None:
    """Give a new head these weights, (classes, F), and no bias."""
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            value = weights if name == "weight" else torch.zeros(())
            parameter.copy_(value.reshape(parameter.shape) if name == "weight" else value)


# Whether the checkpoint's head is for the data's classes: by their names, else by its predictions.


def head_rows(names: Sequence[str], head: Sequence[str]) -> list[int] | None:
    """Find the output of a head for each class of the data, by their names in normal form.

    Case, hyphens, underscores and spaces do not count. A head's name may list others of the same
    class after commas, as ImageNet's do.

    Parameters
    ----------
    names : sequence of str
        The data's classes.
    head : sequence of str
        The head's, in the order of its outputs.

    Returns
    -------
    list of int or None
        None unless every class has one output, and no two have the same.

    Examples
    --------
    >>> head_rows(["sea_lion", "Crane"], ["crane", "tench", "Sea lion, Zalophus"])
    [2, 0]
    >>> head_rows(["dog"], ["crane", "tench"]) is None
    True
    """
    outputs: dict[str, set[int]] = {}
    for row, name in enumerate(head):
        for form in {_normal(name), *map(_normal, name.split(","))}:
            outputs.setdefault(form, set()).add(row)
    found = [outputs.get(_normal(name), set()) for name in names]
    rows = [next(iter(several)) for several in found if len(several) == 1]
    return rows if len(set(rows)) == len(names) else None


def are_telling(names: Sequence[str]) -> bool:
    """Whether names say what the classes are: numbers, and words that differ by one, do not.

    Examples
    --------
    >>> are_telling(["cat", "dog"]), are_telling(["1", "2"]), are_telling(["class_1", "class_2"])
    (True, False, False)
    """
    return len({re.sub(r"[0-9]+", "#", _normal(name)) for name in names}) > 1


def _normal(name: str) -> str:
    text = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(re.sub(r"[-_\s]+", " ", text).split())


LEVEL = 0.05
"""Of the test whether a head is at chance: how often one that is would pass as better."""
MOST_JUDGED = 512
"""Images that a head is judged by, at most."""


@dataclass(frozen=True)
class HeadTrial:
    """How a head does on images of the data, and how it would do by chance.

    Attributes
    ----------
    images, right : int
        Images, and those for which it finds the class.
    chance : float
        Share that predictions as frequent as these would find if they had nothing to do with the
        images.
    p_value : float
        Probability that chance finds as many or more: the tail of a binomial distribution.
    decidable : bool
        Whether so few images could tell a perfect head from chance.
    """

    images: int
    right: int
    chance: float
    p_value: float
    decidable: bool

    @property
    def at_chance(self) -> bool:
        """Whether the head knows nothing of these classes, as far as the images say."""
        return self.decidable and self.p_value > LEVEL

    def plain(self) -> dict[str, Any]:
        """Return plain values for results and tuned files."""
        return {**asdict(self), "accuracy": self.right / self.images}


def try_head(predicted: Tensor, labels: Tensor, classes: int) -> HeadTrial:
    """Hold a head's predictions against the labels, by an exact binomial test.

    Parameters
    ----------
    predicted, labels : (N,) int64 Tensor
    classes : int
        Number of classes.

    Examples
    --------
    >>> labels = torch.arange(3).repeat(4)
    >>> try_head(labels, labels, 3).at_chance, try_head(labels * 0, labels, 3).at_chance
    (False, True)
    """
    count = len(labels)
    shares = torch.bincount(labels, minlength=classes).double() / count
    guessed = torch.bincount(predicted, minlength=classes)[:classes].double() / count
    right = int((predicted == labels).sum())
    chance = float((shares * guessed).sum())
    p_value = float(bdtrc(right - 1, count, chance)) if right else 1.0
    decidable = float((shares**2).sum()) ** count <= LEVEL
    return HeadTrial(count, right, chance, p_value, decidable)
