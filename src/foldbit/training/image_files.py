"""Images in files of their own: found by Pillow, and decoded when they are needed."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from foldbit.training import downloads
from foldbit.training.idx import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

#: What files of images end in.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm")


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images in files, and their classes: ``FOLDER/CLASS/NAME``.

    An image of another size than wanted is resized, so that its shorter side is 256/224 of it, and cropped to
    its centre, as ImageNet's test images are (the antialiased bilinear filter of Pillow, torchvision's
    rounding).

    Attributes:
        folder: the folder of the classes' folders.
        classes: the folders' names.
        names: of the files, as the file system has them (``os.fsencode``): bytes ``[N]``. An array rather
            than a list, so that a million names take little memory and processes share it.
        labels: int64 ``[N]``, which class each file is in.
        shape: channels (1 or 3), height and width that images are brought to.
        upright: whether to turn images as their EXIF data say.
        held: the images, decoded, where they fit into memory; uint8 ``[N, C, H, W]``.
    """

    folder: Path
    classes: tuple[str, ...]
    names: np.ndarray
    labels: Tensor
    shape: tuple[int, int, int]
    upright: bool = True
    held: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.names) != len(self.labels) or not len(self.names):
            raise DataError(f"{len(self.names)} files, but {len(self.labels)} labels: expected one each")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: slice | Tensor) -> ImageFiles:
        """The images that a slice, or a tensor of indices or booleans, chooses."""
        names = self.names[chosen.numpy() if isinstance(chosen, Tensor) else chosen]
        held = None if self.held is None else self.held[chosen]
        return replace(self, names=names, labels=self.labels[chosen], held=held)

    def path(self, index: int) -> Path:
        """The file of an image."""
        name = os.fsdecode(self.names[index])
        return self.folder / self.classes[int(self.labels[index])] / name

    def picture(self, index: int) -> Image:
        """An image as its file has it, in its full size.

        Raises:
            DataError: where it cannot be decoded, naming it.
        """
        return open_image(self.path(index), self.shape[0], self.upright)

    def pixels(self, indices: Tensor) -> Tensor:
        """Images in the size wanted: uint8 ``[B, C, H, W]``.

        From memory where they are held; else decoded, by as many threads as there are processors, or in a
        loader's worker process by one.

        Raises:
            DataError: where one cannot be decoded, naming it.
        """
        if self.held is not None:
            return self.held.index_select(0, indices)
        with ThreadPoolExecutor(os.cpu_count() if get_worker_info() is None else 1) as pool:
            return torch.from_numpy(np.stack(list(pool.map(self._decode, indices.tolist()))))

    def hold(self) -> ImageFiles:
        """The same images, decoded once, by as many threads as there are processors.

        Raises:
            DataError: where images cannot be decoded, naming the first five of them.
        """
        held = np.empty((len(self), *self.shape), np.uint8)

        def decode(index: int) -> None:
            held[index] = self._decode(index)  # by NumPy: torch would bring threads of its own into each

        for_each(decode, len(self), f"decoding {self.folder.name}")
        return replace(self, held=torch.from_numpy(held))

    def _decode(self, index: int) -> np.ndarray:
        image = self.picture(index)
        if image.size[::-1] != self.shape[1:] and max(image.size) > _LONGEST * min(image.size):
            raise DataError(
                f"{self.path(index)} is {image.size[0]}×{image.size[1]}; to be scaled, "
                f"the longer side may be {_LONGEST} times the shorter"
            )
        return to_array(_fit(image, self.shape[1:]))


def for_each(work: Callable[[int], T], count: int, title: str) -> list[T]:
    """What some work on files gives for 0 to ``count - 1``, by as many threads as there are processors.

    Raises:
        DataError: where it raises one for some of them, with the first five.
    """
    done: list[T] = []
    wrong: list[str] = []

    def attempt(index: int) -> T | DataError:
        try:
            return work(index)
        except DataError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool, downloads.progress(title, count) as advance:
        for start in range(0, count, _AT_ONCE):
            for given in pool.map(attempt, range(start, min(start + _AT_ONCE, count))):
                advance(1)
                if isinstance(given, DataError):
                    wrong.append(str(given))
                else:
                    done.append(given)
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if wrong[_SHOWN:] else []
        raise DataError("\n".join([*wrong[:_SHOWN], *more]))
    return done


def pillow() -> ModuleType:
    """Pillow, or an error that says how to get it."""
    try:
        import PIL.Image
    except ImportError as error:
        raise DataError(
            "images in folders are decoded by Pillow, which is not installed; "
            "try pip install 'foldbit[vision]'"
        ) from error
    return PIL.Image


def open_image(path: Path, channels: int, upright: bool) -> Image:
    """Decode an image to grey or to RGB.

    Raises:
        DataError: where it cannot be decoded, or has more than 8 bits a channel, naming it.
    """
    with _opened(path) as image:
        if image.mode not in _EIGHT_BITS:
            raise DataError(f"{path} has pixels of the kind {image.mode!r}; only those of 8 bits are read")
        if "transparency" in image.info:  # otherwise Pillow warns; the colour beneath is kept, as with RGBA
            return _turned(image, upright).convert("RGBA").convert(_MODES[channels])
        return _turned(image, upright).convert(_MODES[channels])


def probe(path: Path, upright: bool) -> tuple[tuple[int, int], bool]:
    """Height and width of an image, and whether it is grey, from its header alone: 0.1 ms.

    Raises:
        DataError: where it is not an image, naming it.
    """
    with _opened(path) as image:
        turned = upright and image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
        size = image.size if turned else image.size[::-1]
        return size, image.mode in _GREY


def to_array(image: Image) -> np.ndarray:
    """Pixels, uint8 ``[C, H, W]``."""
    values = np.array(image)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


_AT_ONCE = 4096  # files that are waited for at once
_SHOWN = 5  # errors of several

_LONGEST = 100  # times the shorter side: scaled to the size wanted, others may not fit into memory

# Pillow knows others, some of which run programs.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_MODES = {1: "L", 3: "RGB"}
_GREY = ("1", "L", "LA", "La")
_EIGHT_BITS = (*_GREY, "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr")
_ORIENTATION = 0x0112


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    image_module = pillow()
    from PIL import UnidentifiedImageError

    try:
        with image_module.open(path, formats=_formats(image_module)) as image:
            yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise DataError(f"{path} is no image of a kind that is read ({', '.join(_FORMATS)})") from None
    except _WHAT_PILLOW_RAISES as error:
        raise DataError(f"{path} cannot be decoded: {error}") from error
    except image_module.DecompressionBombError as error:
        raise DataError(f"{path} is refused: {error}") from error


def _formats(image_module: ModuleType) -> list[str]:
    image_module.init()
    return [name for name in _FORMATS if name in image_module.OPEN]  # it may be built without some


# Nobody lists them; thousands of broken files of each format have brought up no others.
_WHAT_PILLOW_RAISES = (OSError, SyntaxError, ValueError, EOFError, OverflowError, MemoryError, struct.error)


def _turned(image: Image, upright: bool) -> Image:
    if not upright:
        return image
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _fit(image: Image, size: tuple[int, int]) -> Image:
    height, width = size
    if image.size == (width, height):
        return image
    # A size that is not square is the images' own, so that only squares come here.
    short, long = sorted(image.size)
    new_short = round(height * 256 / 224)
    new_long = int(new_short * long / short)
    wide = image.size[0] >= image.size[1]
    resized = image.resize((new_long, new_short) if wide else (new_short, new_long), pillow().BILINEAR)
    left, top = round((resized.size[0] - width) / 2), round((resized.size[1] - height) / 2)
    return resized.crop((left, top, left + width, top + height))
