"""Labelled images on disk: how they and their classes are listed, and how one is decoded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from svftool.errors import DataError, MissingDependencyError, counted, shortlist, system_fault
from svftool.files.texts import check_columns, read_rows
from svftool.tasks.saved_datasets import StoredImage, is_saved_dataset, stored_images

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".npy", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
ARRAY_SUFFIX = ".npy"
"""Of arrays of NumPy, which hold any number of channels."""
_EXIF_ORIENTATION = 0x0112


ImagePath = Path | StoredImage
"""What can be opened as an image."""


@dataclass(frozen=True)
class LabelledImage:
    """A file, or a row of a saved data set, and the name of its class."""

    path: ImagePath
    label: str


def list_images(data: Path) -> list[LabelledImage]:
    """List the images of a folder of class folders, a CSV file of path,label, or a saved data set.

    Parameters
    ----------
    data : Path
        A folder whose sub-folders are the classes, a folder of ``datasets.Dataset.save_to_disk``,
        or a CSV file. A first row that names the
        columns ``path`` and ``label`` is a header; without one the first two columns are taken.
        Paths are relative to the CSV file's folder.

    Returns
    -------
    list of LabelledImage
        By class and path for a folder, in the order of the rows for a CSV file.

    Raises
    ------
    DataError
        If nothing is there, a class folder is empty, or a row is not a path and a label.
    """
    if data.is_dir() and is_saved_dataset(data):
        images = [LabelledImage(image, label) for image, label in stored_images(data)]
    elif data.is_dir():
        images = _list_folder(data)
    elif data.is_file():
        images = _list_csv(data)
    else:
        raise DataError(f"{data}: not found, expected a folder of class folders or a CSV file")
    if not images:
        raise DataError(f"{data}: {_what_is_wrong(data)}")
    require_encodable({image.label for image in images}, str(data))
    return images


_NOT_READ = frozenset(
    {
        ".avif", ".heic", ".heif", ".jfif", ".jif", ".jpe", ".jp2", ".jxl", ".pjp", ".pjpeg",
        ".svg", ".tga",
    }
)  # fmt: skip
"""Suffixes of images that are not listed."""


def left_out(data: Path) -> list[str]:
    """Say which images of a folder `list_images` leaves out, in a sentence; nothing where none.

    Those that lie beside the class folders, and those in them whose suffix is not known.
    """
    if not data.is_dir() or is_saved_dataset(data):
        return []
    known = (SUFFIXES - {ARRAY_SUFFIX}) | _NOT_READ
    beside = sorted(one.name for one in data.iterdir() if _is_picture(one, data, known))
    unknown = (one for one in data.rglob("*") if _is_picture(one, data, _NOT_READ))
    odd = sorted(one for one in unknown if one.parent != data)
    kinds = sorted({file.suffix.lower() for file in odd})
    parts = []
    if beside:
        parts.append(f"{len(beside)} beside the class folders ({shortlist(beside, 3)})")
    if odd:
        names = shortlist([file.relative_to(data) for file in odd], 3)
        parts.append(f"{len(odd)} of kinds that are not read ({', '.join(kinds)}: {names})")
    if not parts:
        return []
    return [
        f"{data}: images left out: {' and '.join(parts)}. Move them into a class folder, or save "
        "them as PNG or JPEG"
    ]


def _is_picture(file: Path, root: Path, suffixes: Collection[str]) -> bool:
    return file.suffix.lower() in suffixes and not is_hidden(file, root) and file.is_file()


def _what_is_wrong(data: Path) -> str:
    """Say what data without a labelled image has, and what was expected."""
    if data.is_file():
        return "no images, expected rows of path,label"
    loose = 0 if is_saved_dataset(data) else len(pictures_in(data, data))
    found = f"{counted(loose, 'images')} outside of class folders" if loose else "no images"
    return f"{found}, expected a folder for each class with images in it"


_SPLITS = frozenset(
    [
        "train",
        "training",
        "trn",
        "test",
        "testing",
        "tst",
        "val",
        "valid",
        "validation",
        "eval",
        "evaluation",
        "dev",
    ]
)


def is_hidden(file: Path, root: Path) -> bool:
    """Whether a file below `root`, or a folder on the way to it, is hidden: its name has a dot."""
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def encodable(text: str) -> bool:
    """Whether a string can be written: half a surrogate pair cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def refuse_splits(folder: Path, names: Iterable[str]) -> None:
    """Refuse folders that are the parts of a data set and no classes.

    A class may be called train, as a vehicle is; beside one called test or val it is a part.

    Parameters
    ----------
    folder : Path
        What holds them.
    names : iterable of str
        The folders in it that would be classes.

    Raises
    ------
    DataError
        Names the parts, and how to give one of them.
    """
    names = sorted(names)
    parts = [name for name in names if name.lower() in _SPLITS]
    training = [name for name in parts if name.lower().startswith("tr")]
    if len(parts) < 2 or len(training) == len(parts) or not (training or parts == names):
        return
    first = (training or parts)[0]
    other = next(name for name in parts if name not in {first, *training})
    raise DataError(
        f"{folder}: holds {shortlist(parts)}, the parts of a data set, expected a folder for each "
        f"class. Give {folder / first}, and {folder / other} with --eval"
    )


def pictures_in(folder: Path, root: Path) -> list[Path]:
    """List the pictures below a folder: arrays are among them where there are no others.

    Beside pictures, arrays mostly hold something else.

    Parameters
    ----------
    folder : Path
    root : Path
        Below it, hidden files and folders do not count.
    """
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and not is_hidden(file, root)
    )
    return [file for file in found if not is_array(file)] or found


def _list_folder(folder: Path) -> list[LabelledImage]:
    refuse_splits(folder, (s.name for s in folder.iterdir() if s.is_dir() and s.name[:1] != "."))
    images = []
    for sub in sorted(folder.iterdir()):
        if not sub.is_dir() or sub.name.startswith("."):
            continue
        files = pictures_in(sub, folder)
        if not files:
            raise DataError(
                f"{sub}: no images, expected some in each class folder "
                f"({', '.join(sorted(SUFFIXES))}). Fill the folder or remove it."
            )
        images += [LabelledImage(file, sub.name) for file in files]
    return images


def require_encodable(names: Iterable[str], where: str) -> None:
    """Refuse class names that no file takes.

    Raises
    ------
    DataError
        Names the first, and `where` it is.
    """
    wrong = sorted(name for name in names if not encodable(name))
    if wrong:
        raise DataError(
            f"{where}: the class name {wrong[0]!r} has half a surrogate pair, expected text that "
            "can be written as UTF-8. Rename the class"
        )


def _list_csv(file: Path) -> list[LabelledImage]:
    rows = read_rows(file, "a CSV file of path,label")
    names = [name.strip().lower() for name in rows[0][1]] if rows else []
    path_column, label_column = 0, 1
    if "path" in names and "label" in names:
        check_columns(file, names)
        path_column, label_column = names.index("path"), names.index("label")
        rows = rows[1:]
    images = []
    for line, row in rows:
        if len(row) <= max(path_column, label_column) or not row[label_column].strip():
            raise DataError(f"{file}: line {line}: {','.join(row)!r}, expected path,label")
        path = file.parent / row[path_column].strip()
        if not path.is_file():
            raise DataError(
                f"{file}: line {line}: {row[path_column]!r} is no file, expected an image"
            )
        images.append(LabelledImage(path, row[label_column].strip()))
    return images


def short_name(path: ImagePath) -> str:
    """Name an image by its file and folder, which does not tell where the data lies."""
    if isinstance(path, StoredImage):
        return f"row {path.row + 1}"
    return f"{path.parent.name}/{path.name}"


_MOST_PIXELS = 1 << 26
"""Pixels of an image whose short side was resized, at most."""


def open_image(path: ImagePath, *, short_side: int | None = None) -> Image:
    """Decode an image to RGB, turned upright by its EXIF orientation.

    Ordinary images become what ``PIL.Image.convert("RGB")`` makes of them: of an animation the
    first picture, of a palette its colours, without transparency. Deeper ones (12, 16 and 32 bits,
    floats) are scaled by what the file says of its range.

    Parameters
    ----------
    path : ImagePath
    short_side : int, optional
        What the short side will be resized to.

    Raises
    ------
    DataError
        If the file is no image, or only a part of one, or its values have no range that is known,
        or it is so long that memory would not hold it once it is resized.
    """
    refuse_long(path, short_side)
    pillow = _pillow()
    try:
        with pillow.open(_content(path)) as opened:
            deep = depth_of(opened, path)
            image = upright(opened)
            if deep is not None:
                image = pillow.fromarray(scaled(np.asarray(image), deep, path))
            shown: Image = image.convert("RGB")
            return shown
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they meet
        raise _unreadable(path, error) from error


def refuse_long(path: ImagePath, short_side: int | None) -> None:
    """Refuse an image that memory would not hold once its short side is resized.

    Raises
    ------
    DataError
        If it is so long.
    """
    if short_side is None:
        return
    short, long = sorted(image_size(path))
    if short_side * short_side * long > _MOST_PIXELS * short:
        raise DataError(
            f"{path}: {short} pixels by {long}, expected sides more alike: with a short side "
            f"of {short_side} it has more than {_MOST_PIXELS:,} pixels. Remove it, or give a "
            "smaller --image-size"
        )


def upright(opened: Image) -> Image:
    """Turn an image as its EXIF orientation says."""
    from PIL import ImageOps

    turned: Image = ImageOps.exif_transpose(opened)
    return turned


def is_array(path: ImagePath) -> bool:
    """Whether a picture is an array of NumPy by its name."""
    return isinstance(path, Path) and path.suffix.lower() == ARRAY_SUFFIX


# Values of more than 8 bits: what stands for black and for white.


@dataclass(frozen=True)
class Depth:
    """The range of a deep image: what its file says, or what its kind of number implies."""

    black: float
    white: float
    unsigned: bool = False
    """Pillow reads 32 bits without a sign as if they had one."""
    inverted: bool = False


_BITS, _PHOTOMETRIC, _FORMAT = 258, 262, 339
_LEAST, _MOST, _TYPED_LEAST, _TYPED_MOST = 280, 281, 340, 341
_UNSIGNED, _SIGNED = 1, 2


def depth_of(opened: Image, path: ImagePath) -> Depth | None:
    """Return the range of an image of more than 8 bits; None for others."""
    tags: Mapping[int, Any] = getattr(opened, "tag_v2", {})
    if not opened.mode.startswith(("I", "F")):
        _require_whole_range(path, tags)
        return None
    bits, kind = int(_first(tags.get(_BITS), 16)), int(_first(tags.get(_FORMAT), _UNSIGNED))
    if opened.mode == "F":
        white = 1.0
    elif tags and kind == _SIGNED:
        white = 2.0 ** (bits - 1) - 1
    else:
        white = 2.0**bits - 1
    return Depth(
        black=float(_first(tags.get(_TYPED_LEAST), _first(tags.get(_LEAST), 0.0))),
        white=float(_first(tags.get(_TYPED_MOST), _first(tags.get(_MOST), white))),
        unsigned=bool(tags) and kind == _UNSIGNED and opened.mode == "I",
        inverted=tags.get(_PHOTOMETRIC) == 0,
    )


def _first(value: Any, default: float) -> float:
    """Read a tag of one number, or of one a channel."""
    if isinstance(value, (tuple, list)):
        value = value[0] if value else None
    return default if value is None else float(value)


def _require_whole_range(path: ImagePath, tags: Mapping[int, Any]) -> None:
    """Refuse deep colour whose values end early: Pillow keeps the upper 8 bits, which are black."""
    bits = _first(tags.get(_BITS), 8)
    most = _first(tags.get(_TYPED_MOST), _first(tags.get(_MOST), 2**bits - 1))
    if bits > 8 and most < 2 ** (bits - 1):
        raise DataError(
            f"{path}: colours of {bits:.0f} bits of which the largest is {most:.0f}, expected up "
            f"to {2**bits - 1:.0f}. Save it with 8 bits a channel"
        )


def scaled(values: npt.NDArray[Any], depth: Depth, path: ImagePath) -> npt.NDArray[np.uint8]:
    """Scale values to 0 to 255.

    Raises
    ------
    DataError
        If they are beyond black and white, or not finite.
    """
    if depth.unsigned:
        values = values.astype(np.uint32)
    wide = values.astype(np.float64)
    low, high = float(wide.min()), float(wide.max())
    inside = depth.black <= low and high <= depth.white  # not a number is neither
    if not inside or not depth.black < depth.white:
        raise DataError(
            f"{path}: values from {low:g} to {high:g}, expected {depth.black:g} to "
            f"{depth.white:g}, from black to white. Save it with 8 bits a channel"
        )
    share = (wide - depth.black) / (depth.white - depth.black)
    share = 1.0 - share if depth.inverted else share
    return np.rint(share * 255).astype(np.uint8)


@contextmanager
def open_raw(path: ImagePath) -> Iterator[Image]:
    """Context with a picture in its own mode, such as a label map.

    Raises
    ------
    DataError
        If the file is no image, or only a part of one.
    """
    pillow = _pillow()
    try:
        with pillow.open(_content(path)) as opened:
            opened.load()
            yield opened
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they meet
        raise _unreadable(path, error) from error


LABELS = 256
"""Class numbers that a label map may hold: 0 to one less."""


def class_numbers(picture: Image, path: ImagePath) -> npt.NDArray[np.uint8]:
    """Read a label map: the index of each pixel of a palette, or its grey value.

    Whole numbers of any kind will do: 1, 8, 16 and 32 bits, and floats without fractions.

    Parameters
    ----------
    picture : Image
        In its own mode.
    path : Path
        Where it is from.

    Returns
    -------
    (height, width) uint8 array

    Raises
    ------
    DataError
        If it has colours, pixels that cannot be seen, or values that are no class numbers.
    """
    if picture.mode not in _NUMBERED:
        raise DataError(
            f"{path}: a colour picture ({picture.mode}), expected class numbers (grey or indexed)"
        )
    if picture.mode.endswith("A"):
        require_opaque(picture, path)
    values = np.asarray(picture)
    values = values[..., 0] if values.ndim == 3 else values
    low, high = values.min(), values.max()
    if not (low >= 0 and high < LABELS and bool((values == np.floor(values)).all())):
        raise DataError(
            f"{path}: values from {low} to {high}, expected one class number from 0 to "
            f"{LABELS - 1} a pixel"
        )
    return values.astype(np.uint8)


_NUMBERED = frozenset({"1", "L", "LA", "P", "PA", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"})


def require_opaque(picture: Image, path: ImagePath) -> None:
    """Refuse a label map whose alpha channel hides pixels: they have a colour and do not show it.

    Raises
    ------
    DataError
        Says how many they are.
    """
    alpha = np.asarray(picture.getchannel("A"))
    hidden = int((alpha < alpha.max()).sum())
    if hidden:
        raise DataError(
            f"{path}: {hidden} transparent pixels, expected a class for every pixel. Save the map "
            "without transparency"
        )


def image_size(path: ImagePath) -> tuple[int, int]:
    """Read (height, width) of the upright image from the file's header.

    Raises
    ------
    DataError
        If the file is no image.
    """
    if is_array(path):
        return _array_size(Path(str(path)))
    try:
        with _pillow().open(_content(path)) as opened:
            width, height = opened.size
            turned = opened.getexif().get(_EXIF_ORIENTATION, 1) >= 5
    except MissingDependencyError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they meet
        raise _unreadable(path, error) from error
    return (width, height) if turned else (height, width)


def _array_size(path: Path) -> tuple[int, int]:
    try:
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
    except (OSError, ValueError, EOFError) as error:
        system_fault(error, path)
        raise DataError(f"{path}: {error}, expected an array of numbers as .npy") from error
    if len(shape) not in (2, 3) or 0 in shape:
        raise DataError(f"{path}: an array of {shape}, expected height, width and channels")
    # Of three sizes the smallest are the channels, first or last.
    first = len(shape) == 3 and shape[0] < shape[2]
    height, width = (shape[1], shape[2]) if first else (shape[0], shape[1])
    return int(height), int(width)


def to_tensor(image: Image) -> Tensor:
    """Copy an RGB image to a (3, height, width) uint8 tensor."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    tensor: Tensor = pil_to_tensor(image)
    return tensor


def _content(path: ImagePath) -> Any:
    return path.open() if isinstance(path, StoredImage) else path


def read_bytes(path: ImagePath) -> bytes:
    """Read an image as it is stored.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    try:
        content = _content(path)
        return content.read_bytes() if isinstance(content, Path) else bytes(content.getvalue())
    except OSError as error:
        system_fault(error, path)
        raise DataError(f"{path}: {error.strerror or error}, expected an image") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependencyError("PIL", extra="vision", purpose="reading images") from None
    return Image


def _unreadable(path: ImagePath, error: Exception) -> DataError:
    system_fault(error, path)
    return DataError(
        f"{path}: {type(error).__name__} while decoding, expected an image. "
        "Replace the file or remove it"
    )
