"""Factors + tuned file + an image -> what the directions that moved most see in it.

The pictures of figures 4 and 5 in Sun et al., Singular Value Fine-tuning, NeurIPS 2022: the
response of a layer's input to single right singular vectors, before and after training.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from svftool.attaching import Attachment, attach
from svftool.errors import FactorsError, ModelError
from svftool.factors import SpectralChange, TunedFile, check_tuned, open_factors, read_tuned
from svftool.models import build_model, find_preprocessing
from svftool.progress import SILENT, Progress
from svftool.tasks.views import choose_view

LAYERS = 3
DIRECTIONS = 2


@dataclass(frozen=True)
class DirectionMap:
    """One singular direction's response to an image.

    Attributes
    ----------
    layer : str
        Tensor name.
    index : int
        Of the direction, from 0 for the largest singular value.
    moved : {"most", "least"}
        Whether its singular value moved most or least in its layer.
    S_base, S : float
        The singular value before and after training.
    before, after : (h, w) Tensor
        ``S_i (Vh_i * x)`` over the positions of the layer's input ``x`` in the base and in the
        tuned network.
    """

    layer: str
    index: int
    moved: Literal["most", "least"]
    S_base: float
    S: float
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class FeatureMaps:
    """Responses of the directions that moved most and least, in the layers that moved most.

    Attributes
    ----------
    picture : (3, H, W) Tensor
        The network's input, uint8 before normalisation.
    maps : tuple of DirectionMap
        By layer, those that moved most first.
    """

    picture: Tensor
    maps: tuple[DirectionMap, ...]


def feature_maps(
    factors: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    image: str | os.PathLike[str],
    *,
    model: str = "auto",
    base: str | os.PathLike[str] | None = None,
    layers: int = LAYERS,
    directions: int = DIRECTIONS,
    image_size: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> FeatureMaps:
    """Look at one image through single singular directions, before and after training.

    Parameters
    ----------
    factors : path-like
        Factor checkpoint.
    tuned : path-like
        Tuned file of it; heads and other whole tensors in it are left aside.
    image : path-like
        What the network looks at.
    model : str
        See `svftool.models.build_model`.
    base : path-like, optional
        Where the base is, if not at its recorded place.
    layers : int
        How many layers, by ``||S - S_base|| / ||S_base||``.
    directions : int
        How many directions of each layer that moved most, and as many that moved least.
    image_size : int, optional
        Overrides the checkpoint's.
    trust_remote_code : bool
        Whether code that lies beside the checkpoint may run.
    progress : Progress
        Told how far the work is.

    Raises
    ------
    FactorsError
        If factors and tuned file do not belong together, or nothing moved.
    ModelError
        If no layer that moved looks at positions of the image.
    """
    trained = read_tuned(tuned)
    with open_factors(factors) as store:
        trained = check_tuned(trained, store)
        with store.open_base(base, progress=progress) as checkpoint:
            net = build_model(model, checkpoint=checkpoint, trust_remote_code=trust_remote_code)
            preprocessing = find_preprocessing(checkpoint, net)
        view = choose_view([Path(image)], preprocessing, size=image_size)
        picture = view.load(Path(image))
        attachment = attach(net, store)
        ranked = [name for name in _by_movement(trained) if _spatial(attachment, name)]
        seen = [
            _inputs(attachment, ranked, view.centre([picture]), changes)
            for changes in ({}, {name: trained.change(name) for name in trained.S})
        ]
        positioned = [name for name in ranked if all(_has_positions(one[name]) for one in seen)]
        if not positioned:
            raise ModelError(
                f"{trained.path}: none of the layers that moved looks at positions of the image, "
                "expected a convolution or a linear layer over tokens"
            )
        maps = [
            made
            for name in positioned[:layers]
            for made in _layer_maps(
                name, store.read(name).Vh, trained, _owner(attachment, name), seen, directions
            )
        ]
    # Shown as a picture, whatever the network sees of it.
    shown = picture if len(picture) == 3 else picture[:1].expand(3, -1, -1)
    return FeatureMaps(shown, tuple(maps))


def _by_movement(trained: TunedFile) -> list[str]:
    moved = {
        name: float((S - trained.S_base[name]).norm() / trained.S_base[name].norm())
        for name, S in trained.S.items()
    }
    ordered = sorted((name for name in moved if moved[name] > 0), key=lambda n: -moved[n])
    if not ordered:
        raise FactorsError(f"{trained.path}: no singular value moved, expected a trained file")
    return ordered


def _owner(attachment: Attachment, name: str) -> nn.Module:
    live = attachment.names.live_names(name)[0]
    return attachment.model.get_submodule(live.rpartition(".")[0])


def _spatial(attachment: Attachment, name: str) -> bool:
    """Whether a layer is one whose right singular vectors can be laid over its input."""
    if name not in attachment.layers:
        return False
    owner = _owner(attachment, name)
    return (isinstance(owner, nn.Conv2d) and owner.groups == 1) or isinstance(owner, nn.Linear)


def _inputs(
    attachment: Attachment,
    names: Sequence[str],
    image: Tensor,
    changes: Mapping[str, SpectralChange],
) -> dict[str, Tensor]:
    """Run the network with changed layers and give what they were fed."""
    attachment.set_changes({n: one for n, one in changes.items() if n in attachment.layers})
    found: dict[str, Tensor] = {}
    with _listening(attachment, names, found), torch.no_grad():
        attachment.model.eval()(image)
    return {name: found.get(name, torch.empty(0)) for name in names}


@contextmanager
def _listening(
    attachment: Attachment, names: Sequence[str], found: dict[str, Tensor]
) -> Iterator[None]:
    def listen(name: str) -> RemovableHandle:
        def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            found[name] = given[0].detach().clone()

        return _owner(attachment, name).register_forward_pre_hook(keep)

    handles = [listen(name) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has_positions(value: Tensor) -> bool:
    return value.ndim == 4 or (value.ndim == 3 and _grid(value.shape[1]) is not None)


def _grid(tokens: int) -> tuple[int, int] | None:
    """Find the square grid of a row of tokens, and how many stand before it; None for none."""
    side = math.isqrt(tokens)
    before = tokens - side * side
    return (side, before) if side > 1 and before <= 8 else None


def _layer_maps(
    name: str,
    Vh: Tensor,
    trained: TunedFile,
    owner: nn.Module,
    seen: Sequence[Mapping[str, Tensor]],
    directions: int,
) -> Iterator[DirectionMap]:
    S_base, S = trained.S_base[name], trained.S[name]
    order = (S - S_base).abs().argsort(descending=True).tolist()
    chosen = [(i, "most") for i in order[:directions]]
    chosen += [(i, "least") for i in order[directions:][::-1][:directions]]
    before, after = seen
    for index, moved in chosen:
        yield DirectionMap(
            name,
            index,
            "most" if moved == "most" else "least",
            float(S_base[index]),
            float(S[index]),
            _response(owner, Vh[index].float(), before[name]) * S_base[index],
            _response(owner, Vh[index].float(), after[name]) * S[index],
        )


def _response(owner: nn.Module, direction: Tensor, given: Tensor) -> Tensor:
    """Lay one right singular vector over a layer's input: (h, w)."""
    if isinstance(owner, nn.Conv2d):
        kernel = direction.view(1, owner.in_channels, *owner.kernel_size)
        padding = owner.padding
        return F.conv2d(given, kernel, None, owner.stride, padding, owner.dilation)[0, 0]
    values = given[0] @ direction
    if values.ndim == 2:
        return values
    grid = _grid(len(values))
    assert grid is not None
    side, before = grid
    return values[before:].view(side, side)
