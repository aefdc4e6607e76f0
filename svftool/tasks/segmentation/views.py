"""How images and their label maps become the network's input, together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from svftool.errors import UsageError
from svftool.models import Preprocessing, normalise
from svftool.tasks.bands import load_picture
from svftool.tasks.images import image_size
from svftool.tasks.views import Augment, Transform

DEFAULT_SIZE = 512
JITTER = (0.75, 1.5)
"""Range of the short side in augmentation, relative to its own."""


@dataclass(frozen=True)
class DenseView:
    """The fixed part of the way from image and map to the network.

    Attributes
    ----------
    crop : tuple of int
        Height and width that training sees. Evaluation sees whole images.
    short_side : int or None
        The short side is resized to this first; None keeps the images as they are.
    interpolation : str
        Name of a torchvision ``InterpolationMode``.
    mean, std : tuple of float
        Of the channels, in units of the full range.
    ignore : int
        Label of what augmentation puts beside the image.
    flip_channels : bool
        The network takes blue, green, red.
    """

    crop: tuple[int, int]
    short_side: int | None
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ignore: int
    flip_channels: bool = False

    def load(self, path: Path) -> Tensor:
        """Decode and resize one image: (C, height, width) uint8, of as many channels as `mean`."""
        target = None if self.short_side is None else [self.short_side]
        return load_picture(
            path,
            len(self.mean),
            target=lambda _: target,
            interpolation=self.interpolation,
            short_side=self.short_side,
        )

    def normalised(self, images: Sequence[Tensor]) -> Tensor:
        """Stack uint8 images of one size and normalise: (N, 3, height, width) float32."""
        batch = torch.stack([image.as_subclass(Tensor) for image in images])
        return normalise(batch, self.mean, self.std, flip_channels=self.flip_channels)

    def training(
        self,
        images: Sequence[Tensor],
        maps: Sequence[Tensor],
        augment: Augment | Transform,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Augment each image with its map, crop and normalise.

        Parameters
        ----------
        images : sequence of (3, h, w) uint8 Tensor
            As `load` gives them.
        maps : sequence of (H, W) uint8 Tensor
            At their own size.
        augment : {"none", "light", "strong"} or callable
            ``light`` changes the size, crops and flips at random, ``strong`` distorts colours
            besides, ``none`` crops the centre. A callable takes an Image and a Mask of
            torchvision's ``tv_tensors`` and gives them at the size of `crop`.
        generator : torch.Generator
            Source of all randomness.

        Returns
        -------
        (N, 3, height, width) float32 Tensor and (N, height, width) int64 Tensor
        """
        transform = self._transform(augment) if isinstance(augment, str) else augment
        # torchvision draws from the global generator alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            done = [
                transform(*self._together(image, labels))  # type: ignore[call-arg]
                for image, labels in zip(images, maps, strict=True)
            ]
        pictures, labels = zip(*done, strict=True)
        targets = torch.stack([one.as_subclass(Tensor) for one in labels]).to(torch.int64)
        return self.normalised(pictures), targets

    def _together(self, image: Tensor, labels: Tensor) -> tuple[Any, Any]:
        from torchvision import tv_tensors
        from torchvision.transforms.v2.functional import resize

        mask = tv_tensors.Mask(labels)
        size = list(image.shape[-2:])
        return tv_tensors.Image(image), mask if list(mask.shape) == size else resize(mask, size)

    def _transform(self, augment: str) -> Transform:
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        paint = [round(255 * value) for value in self.mean]
        fill = {tv_tensors.Image: paint, tv_tensors.Mask: self.ignore}
        crop = v2.RandomCrop(self.crop, pad_if_needed=True, fill=fill)
        if augment == "none":
            large = v2.Lambda(lambda value: self._padded(value, fill))
            return v2.Compose([large, v2.CenterCrop(self.crop)])  # type: ignore[no-any-return]
        side = self.short_side or min(self.crop)
        steps = [v2.RandomPhotometricDistort()] if augment == "strong" else []
        steps += [
            v2.RandomResize(*(round(side * factor) for factor in JITTER), antialias=True),
            crop,
            v2.RandomHorizontalFlip(),
        ]
        return v2.Compose(steps)  # type: ignore[no-any-return]

    def _padded(self, value: Any, fill: Any) -> Any:
        """Pad an image or a map that is smaller than the crop: CenterCrop would invent labels."""
        from torchvision.transforms.v2.functional import pad

        height, width = value.shape[-2:]
        below, right = max(0, self.crop[0] - height), max(0, self.crop[1] - width)
        return pad(value, [0, 0, right, below], fill=fill[type(value)]) if below or right else value


def choose_dense_view(
    paths: Sequence[Path],
    preprocessing: Preprocessing,
    *,
    size: int | None,
    ignore: int,
    trained: Mapping[str, Any] = MappingProxyType({}),
) -> DenseView:
    """Choose the size that training sees.

    Parameters
    ----------
    paths : sequence of Path
        All images, of which only the headers are read.
    preprocessing : Preprocessing
        The checkpoint's own, or the default.
    size : int or None
        The user's choice; None takes the checkpoint's, else the images' own where all agree, else
        512.
    ignore : int
        See `DenseView`.
    trained : mapping
        ``crop``, ``short_side`` and ``interpolation`` of training, where they are known; they go
        before all but `size`.

    Raises
    ------
    UsageError
        If `size` is not positive.
    """
    if size is not None and size < 1:
        raise UsageError(f"--image-size is {size}, expected at least 1")
    if isinstance(trained.get("interpolation"), str):
        preprocessing = replace(preprocessing, interpolation=trained["interpolation"])
        # Images that were all of one size kept it; others are made as large.
        if size is None:
            known = (int(trained["crop"][0]), int(trained["crop"][1]))
            return _view(known, trained["short_side"] or min(known), preprocessing, ignore)
    crop = preprocessing.size if size is None else (size, size)
    short: int | None = None if crop is None else min(crop)
    if crop is None:
        own = {image_size(path) for path in paths}
        if len(own) == 1:
            crop = own.pop()
        else:
            crop, short = (DEFAULT_SIZE, DEFAULT_SIZE), DEFAULT_SIZE
    return _view(crop, short, preprocessing, ignore)


def _view(
    crop: tuple[int, int], short: int | None, source: Preprocessing, ignore: int
) -> DenseView:
    return DenseView(
        crop, short, source.interpolation, source.mean, source.std, ignore, source.flip_channels
    )
