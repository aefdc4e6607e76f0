"""How images become the network's input: size, crop, normalisation and augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from svftool.errors import UsageError, counted
from svftool.models import Preprocessing, normalise
from svftool.tasks.bands import load_picture
from svftool.tasks.images import ImagePath, image_size

Augment = Literal["none", "light", "strong"]
Transform = Callable[[Tensor], Tensor]

DEFAULT_SIZE = 224
DEFAULT_CROP = 0.875
"""Share of the resized short side that the centre crop keeps, where the checkpoint names none."""

CACHE_BYTES = 1 << 30
DECODERS = 4


@dataclass(frozen=True)
class ImageView:
    """The fixed part of the way from a file to the network.

    Attributes
    ----------
    size : tuple of int
        Height and width that the network sees.
    short_side : int or None
        The short side is resized to this before cropping; None keeps the images as they are.
    interpolation : str
        Name of a torchvision ``InterpolationMode``: ``bilinear``, ``bicubic`` ...
    mean, std : tuple of float
        Of the channels, in units of the full range.
    sides : tuple of int or None
        Height and width that both sides are resized to before cropping, in place of the short one.
    flip_channels : bool
        The network takes blue, green, red.
    crop_down : bool
        See `svftool.models.Preprocessing`.
    """

    size: tuple[int, int]
    short_side: int | None
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sides: tuple[int, int] | None = None
    flip_channels: bool = False
    crop_down: bool = False

    def load(self, path: ImagePath) -> Tensor:
        """Decode and resize one image: (C, height, width) uint8, of as many channels as `mean`."""
        return load_picture(
            path,
            len(self.mean),
            target=self._target,
            interpolation=self.interpolation,
            short_side=None if self.sides else self.short_side,
        )

    def _target(self, own: tuple[int, int]) -> list[int] | None:
        """Return what an image of this height and width is resized to, or its short side is."""
        if self.short_side is not None:
            return [self.short_side] if self.sides is None else list(self.sides)
        if own == self.size:
            return None
        # The images that this view was chosen by were all of one size; this one covers it.
        factor = max(wanted / side for wanted, side in zip(self.size, own, strict=True))
        return [
            max(wanted, round(factor * side)) for wanted, side in zip(self.size, own, strict=True)
        ]

    def to_plain(self) -> dict[str, Any]:
        """Return what JSON holds of it, without the normalisation, which has keys of its own."""
        return {
            "image_size": list(self.size),
            "short_side": self.short_side,
            "interpolation": self.interpolation,
            "sides": None if self.sides is None else list(self.sides),
            "flip_channels": self.flip_channels,
            "crop_down": self.crop_down,
        }

    @classmethod
    def from_plain(cls, value: Any, source: Preprocessing) -> ImageView | None:
        """Read back what `to_plain` gave, with a normalisation; None for anything else."""
        try:
            height, width = map(int, value["image_size"])
            short, sides = value["short_side"], value["sides"]
            return cls(
                (height, width),
                None if short is None else int(short),
                str(value["interpolation"]),
                source.mean,
                source.std,
                sides=None if sides is None else (int(sides[0]), int(sides[1])),
                flip_channels=bool(value["flip_channels"]),
                crop_down=bool(value["crop_down"]),
            )
        except (IndexError, KeyError, TypeError, ValueError):
            return None

    def centre(self, images: Sequence[Tensor]) -> Tensor:
        """Crop the centre and normalise: (N, 3, height, width) float32."""
        from torchvision.transforms.v2.functional import center_crop

        if not self.crop_down:
            return self._normalise([center_crop(image, list(self.size)) for image in images])
        return self._normalise([_cropped_down(image, self.size) for image in images])

    def augmented(
        self, images: Sequence[Tensor], augment: Augment | Transform, generator: torch.Generator
    ) -> Tensor:
        """Augment each image on its own and normalise: (N, 3, height, width) float32.

        Parameters
        ----------
        images : sequence of (3, h, w) uint8 Tensor
            As `load` gives them.
        augment : {"none", "light", "strong"} or callable
            ``light`` crops at random and flips, ``strong`` distorts colours and shapes besides; a
            callable, such as a torchvision transform, must give images of `size`.
        generator : torch.Generator
            Source of all randomness.
        """
        if augment == "none":
            return self.centre(images)
        transform = self._augmentation(augment) if isinstance(augment, str) else augment
        # torchvision draws from the global generator alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            return self._normalise([transform(image) for image in images])

    def _augmentation(self, augment: str) -> Transform:
        from torchvision.transforms import v2

        height, width = self.size
        whole = self.short_side is None or self.short_side <= min(self.size)
        padding = [width // 8, height // 8] if whole else None
        steps: list[Transform] = [v2.TrivialAugmentWide()] if augment == "strong" else []
        steps += [
            v2.RandomCrop((height, width), padding=padding, pad_if_needed=True),
            v2.RandomHorizontalFlip(),
        ]
        return lambda image: reduce(lambda value, step: step(value), steps, image)

    def _normalise(self, images: Sequence[Tensor]) -> Tensor:
        batch = torch.stack(list(images))
        return normalise(batch, self.mean, self.std, flip_channels=self.flip_channels)


def _cropped_down(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop the centre of a (3, h, w) picture, with black around it where it is smaller."""
    height, width = size
    below, right = max(0, height - image.shape[1]), max(0, width - image.shape[2])
    sides = [right // 2, (right + 1) // 2, below // 2, (below + 1) // 2]
    image = torch.nn.functional.pad(image, sides)
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]


def with_normalisation(
    preprocessing: Preprocessing,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    *,
    augment: object = "none",
) -> Preprocessing:
    """Put the user's mean and deviation in the place of the checkpoint's own.

    Parameters
    ----------
    preprocessing : Preprocessing
        Of as many channels as the model takes.
    mean, std : sequence of float or None
        The user's.
    augment : object
        How images will be augmented; ``strong`` needs colours, or grey.

    Raises
    ------
    UsageError
        If they are for another number of channels.
    """
    channels = len(preprocessing.mean)
    for flag, given in (("--mean", mean), ("--std", std)):
        if given is not None and len(given) != channels:
            raise UsageError(
                f"{flag} has {counted(len(given), 'numbers')}, expected {channels}: the model "
                f"takes {counted(channels, 'channels')}"
            )
    if augment == "strong" and channels not in (1, 3):
        raise UsageError(
            f"--augment strong distorts colours, the model takes {channels} channels. Use "
            "--augment light"
        )
    return replace(
        preprocessing,
        mean=tuple(mean) if mean is not None else preprocessing.mean,
        std=tuple(std) if std is not None else preprocessing.std,
    )


def choose_view(
    paths: Sequence[ImagePath],
    preprocessing: Preprocessing,
    *,
    size: int | None = None,
    trained: ImageView | None = None,
) -> ImageView:
    """Choose the size that the network sees, and how images get there.

    Parameters
    ----------
    paths : sequence of Path
        All images, of which only the headers are read.
    preprocessing : Preprocessing
        The checkpoint's own, or the default.
    size : int or None
        The user's choice; None takes the checkpoint's, else the images' own where all agree, else
        224.
    trained : ImageView or None
        What images went through in training; it goes before all but `size`.

    Raises
    ------
    DataError
        If a file is no image.
    UsageError
        If `size` is not positive.
    """
    if size is not None and size < 1:
        raise UsageError(f"--image-size is {size}, expected at least 1")
    if trained is not None and size is None:
        return replace(trained, mean=preprocessing.mean, std=preprocessing.std)
    if trained is not None:
        preprocessing = replace(
            preprocessing,
            interpolation=trained.interpolation,
            flip_channels=trained.flip_channels,
            crop_down=trained.crop_down,
        )
    target, crop = preprocessing.size, preprocessing.crop_pct
    if size is not None:
        target, crop = (size, size), crop or 1.0
    if target is None:
        own = {image_size(path) for path in paths}
        target = own.pop() if len(own) == 1 else None
        if target is not None:
            return _view(target, None, preprocessing)
    target = target or (DEFAULT_SIZE, DEFAULT_SIZE)
    share = crop or DEFAULT_CROP
    resized = _before_crop(target[0], share), _before_crop(target[1], share)
    view = _view(target, max(resized), preprocessing)
    return replace(view, sides=resized) if preprocessing.squash else view


def _before_crop(side: int, share: float) -> int:
    """Round down, as timm and transformers do; a quotient that is whole but for rounding stays."""
    return math.floor(side / share + 1e-6)


def _view(size: tuple[int, int], short_side: int | None, source: Preprocessing) -> ImageView:
    view = ImageView(size, short_side, source.interpolation, source.mean, source.std)
    return replace(view, flip_channels=source.flip_channels, crop_down=source.crop_down)


class Decoded:
    """Files as tensors, decoded by threads and kept while they fit in memory.

    Parameters
    ----------
    paths : sequence of Path
        The files.
    decode : callable
        Gives the tensor of one file.
    cache_bytes : int
        Tensors are kept up to this many bytes.
    """

    def __init__(
        self,
        paths: Sequence[ImagePath],
        decode: Callable[[Any], Tensor],
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.paths = tuple(paths)
        self._decode_one = decode
        self._cache: dict[int, Tensor] = {}
        self._free = cache_bytes

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, indices: Sequence[int]) -> list[Tensor]:
        """Return the tensors of the files at `indices`.

        Raises
        ------
        DataError
            If a file is no image.
        """
        missing = [index for index in dict.fromkeys(indices) if index not in self._cache]
        loaded = dict(zip(missing, self._decode(missing), strict=True))
        result = [
            self._cache[index] if index in self._cache else loaded[index] for index in indices
        ]
        for index, image in loaded.items():
            if image.nbytes <= self._free:
                self._cache[index] = image
                self._free -= image.nbytes
        return result

    def _decode(self, indices: Sequence[int]) -> list[Tensor]:
        with ThreadPoolExecutor(max(1, min(DECODERS, len(indices)))) as pool:
            return list(pool.map(lambda index: self._decode_one(self.paths[index]), indices))


class ImageSet(Decoded):
    """Images of one view: (3, h, w) uint8 tensors.

    Parameters
    ----------
    paths : sequence of Path
        The files.
    view : ImageView
        How they are loaded.
    cache_bytes : int
        See `Decoded`.
    """

    def __init__(
        self, paths: Sequence[ImagePath], view: ImageView, *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        super().__init__(paths, view.load, cache_bytes=cache_bytes)
        self.view = view
