"""Data sets: Fashion-MNIST wherever it can be had, and scikit-learn's digits.

A download is written to disk only once its contents are the published ones.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import io
import os
import struct
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from foldbit.packed import files
from foldbit.training.idx import AnyPath, DataError, read_idx, read_stream
from foldbit.training.images import ImageData, ImageSet, statistics

Name = Literal["fashion-mnist", "mnist", "digits", "cifar10", "cifar100", "imagenet", "folder"]
_HERE = ("fashion-mnist", "digits")

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
URL = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"

# SHA-256 of what the four files hold when unzipped (zcat FILE | sha256sum). The MD5s that the project
# publishes are of .gz files whose headers hold a name and a date; Debian's headers do not, so its .gz
# files differ from those while their contents are the same.
FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
SIDE = 28
CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


class DataFallback(UserWarning):
    """Another data set than the one asked for is used: its numbers must not pass for the other's."""


def load(
    name: Name, folder: AnyPath | None = None, *, download: bool = True, fall_back: bool = False
) -> ImageData:
    """A data set by name, which is what commands use.

    Args:
        name: ``fashion-mnist`` or ``digits``.
        folder: where Fashion-MNIST's files are; None looks for them (:func:`fashion_mnist`).
        download: whether Fashion-MNIST may be downloaded.
        fall_back: where no Fashion-MNIST is to be had, return the digits instead, with a warning. A
            folder that is named but not right remains an error.

    Raises:
        DataError: for an unknown name, or where the data set cannot be had.

    Warns:
        DataFallback: where it falls back.
    """
    if name not in _HERE:
        raise DataError(f"unknown data set {name!r}; known are {', '.join(_HERE)}")
    if name == "digits":
        if folder is not None:
            raise DataError(f"digits are part of scikit-learn and take no folder; got {os.fspath(folder)!r}")
        return digits()
    try:
        return fashion_mnist(folder, download=download)
    except DataError as error:
        if not fall_back or folder is not None:
            raise
        instead = digits()
        warnings.warn(
            f"DIGITS INSTEAD OF FASHION-MNIST: all numbers that follow are of scikit-learn's "
            f"{len(instead.train) + len(instead.test):,} small digits, an easier task. They are not "
            f"Fashion-MNIST's and do not compare with any. {error}",
            DataFallback,
            stacklevel=2,
        )
        return instead


def fashion_mnist(
    folder: AnyPath | None = None, *, download: bool = True, cache: AnyPath | None = None
) -> ImageData:
    """Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28x28, ten classes (Xiao et al., 2017).

    Files are found with or without ``.gz``, in the folder itself or where torchvision puts them
    (``FashionMNIST/raw``). Other files of the same kind, such as a subset, are accepted; ``source`` then
    says that they are not the published ones.

    Args:
        folder: the only place to look. None looks in Debian's package, then in ``cache``, then downloads.
        download: whether it may be downloaded.
        cache: where downloads are kept; ``foldbit/fashion-mnist`` in the user's cache folder unless given.

    Raises:
        DataError: where a file in ``folder`` is missing or wrong; without a folder, where no place has
            the data, with the reason for each.
    """
    if folder is not None:
        folder = Path(folder).expanduser()
        return _read_folder(folder, f"the folder {folder}")
    cache = _default_cache() if cache is None else Path(cache).expanduser()
    places: dict[str, Callable[[str], ImageData]] = {
        f"Debian's package dataset-fashion-mnist ({DEBIAN})": partial(_read_folder, DEBIAN),
        f"an earlier download ({cache})": partial(_read_folder, cache),
    }
    if download:
        places[f"a download from {URL}"] = partial(_download, cache)
    failures = []
    for place, read in places.items():
        try:
            return read(place)
        except DataError as error:
            failures.append(f"  {place}: {error}")
    if not download:
        failures.append("  a download: not allowed")
    raise DataError(
        "Fashion-MNIST is not to be had:\n" + "\n".join(failures) + "\nInstall dataset-fashion-mnist where "
        f"Debian's packages are, or put the four .gz files of {URL} into a folder and name that folder"
    )


def digits() -> ImageData:
    """Scikit-learn's 1,797 handwritten digits, 8x8: small, but real and always at hand.

    Every fifth digit of a class, in the order of the file, is for testing.

    Raises:
        DataError: where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "digits are part of scikit-learn, which is not installed; try pip install scikit-learn"
        ) from error
    bunch = load_digits()
    values = np.rint(bunch.images * (255 / 16)).astype(np.uint8)  # they are 0 to 16
    # 28x28, so that a network made for Fashion-MNIST takes them as it is: each pixel becomes 3x3, which
    # adds no values of its own, and 2 of background on each side fill up the rest.
    values = np.pad(values.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))
    both = ImageSet(torch.from_numpy(values).unsqueeze(1), torch.from_numpy(bunch.target).long())
    is_test = torch.zeros(len(both), dtype=torch.bool)
    for digit in range(10):
        is_test[(both.labels == digit).nonzero().flatten()[::5]] = True
    classes = tuple("0123456789")
    return _image_data("digits", both[~is_test], both[is_test], classes, "scikit-learn's bundled digits")


_MOST_VALUES = 2**26  # in one of the four files; the largest published one holds 47 million
_MOST_DOWNLOADED = 2**25  # bytes; the largest published .gz has 26 million
_TIMEOUT = 30  # seconds without an answer


def _read_folder(folder: Path, source: str) -> ImageData:
    paths = _locate(folder)
    arrays = {name: read_idx(path, most_bytes=_MOST_VALUES) for name, path in paths.items()}
    sets = []
    for part in ("train", "t10k"):
        images, labels = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
        _check_images(arrays[images], paths[images])
        _check_labels(arrays[labels], paths[labels])
        try:
            image_set = ImageSet(
                torch.from_numpy(arrays[images]).unsqueeze(1), torch.from_numpy(arrays[labels]).long()
            )
        except DataError as error:
            raise DataError(
                f"{paths[images]} and {paths[labels]} do not belong together: {error}. "
                "Are train and t10k swapped?"
            ) from error
        sets.append(image_set)
    train, test = sets
    if len(train) < len(test):
        raise DataError(
            f"{folder} has {len(train)} training images and {len(test)} test images; "
            "are train and t10k swapped?"
        )
    if torch.equal(train.images, test.images):
        raise DataError(f"{folder} has the same images for training and for testing")
    if any(_digest(arrays[name]) != published for name, published in FILES.items()):
        source += ", whose files are not the published ones"
    return _image_data("fashion-mnist", train, test, CLASSES, source)


def _locate(folder: Path) -> dict[str, Path]:
    """The four files: all in the first place that has any of them."""
    try:
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder")
        for place in (folder, folder / "raw", folder / "FashionMNIST" / "raw"):
            found = {
                name: path
                for name in FILES
                for path in (place / name, place / f"{name}.gz")  # of both, the .gz: downloads are
                if path.is_file()
            }
            if len(found) == len(FILES):
                return found
            if found:
                missing = ", ".join(name for name in FILES if name not in found)
                raise DataError(f"{place} lacks {missing} (with or without .gz)")
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error}") from error
    raise DataError(f"{folder} has none of {', '.join(FILES)} (with or without .gz), nor FashionMNIST/raw")


def _check_images(array: np.ndarray, path: Path) -> None:
    if array.ndim == 1:
        raise DataError(f"{path} holds labels instead of images; are the two swapped?")
    if array.ndim != 3 or array.shape[1:] != (SIDE, SIDE):
        raise DataError(f"{path} has the shape {list(array.shape)}; expected images [N, {SIDE}, {SIDE}]")


def _check_labels(array: np.ndarray, path: Path) -> None:
    if array.ndim == 3:
        raise DataError(f"{path} holds images instead of labels; are the two swapped?")
    if array.ndim != 1:
        raise DataError(f"{path} has the shape {list(array.shape)}; expected labels [N]")
    if array.max() >= len(CLASSES):
        raise DataError(f"{path} has the label {array.max()}; expected 0 to {len(CLASSES) - 1}")


def _digest(array: np.ndarray) -> str:
    """SHA-256 of the array's unzipped IDX file."""
    digest = hashlib.sha256(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape))
    digest.update(array.data)
    return digest.hexdigest()


def _default_cache() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification: a path that is not absolute is to be ignored.
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "foldbit" / "fashion-mnist"


def _download(cache: Path, source: str) -> ImageData:
    for name, published in FILES.items():
        path = cache / f"{name}.gz"
        if not _holds(path, published):
            _download_file(URL + path.name, path, published)
    return _read_folder(cache, f"{source}, kept in {cache}")


def _holds(path: Path, published: str) -> bool:
    try:
        return _digest(read_idx(path, most_bytes=_MOST_VALUES)) == published
    except DataError:
        return False


def _download_file(url: str, path: Path, published: str) -> None:
    data = bytearray()
    try:
        with (
            urllib.request.urlopen(url, timeout=_TIMEOUT) as response,
            _progress(path.name, response.length) as advance,
        ):
            while chunk := response.read(2**16):
                data += chunk
                advance(len(chunk))
                if len(data) > _MOST_DOWNLOADED:
                    raise DataError(f"{url} sends more than {_MOST_DOWNLOADED:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url} cannot be had: {error}") from error
    given = _digest(read_stream(io.BytesIO(data), url, _MOST_VALUES))
    if given != published:
        raise DataError(
            f"{url} is not the published file: its contents have SHA-256 {given}, not {published}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, bytes(data))
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from error


@contextmanager
def _progress(title: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """A progress bar's update, where there are tqdm and a terminal."""
    if importlib.util.find_spec("tqdm") is None:
        yield lambda advanced: None
        return
    from tqdm import tqdm

    with tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=None) as bar:
        yield bar.update


def _image_data(
    name: str, train: ImageSet, test: ImageSet, classes: tuple[str, ...], source: str
) -> ImageData:
    mean, std = statistics(train.images)
    return ImageData(name, train, test, classes, mean, std, source)
