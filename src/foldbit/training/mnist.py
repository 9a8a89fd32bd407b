"""MNIST and Fashion-MNIST: four IDX files each, wherever they can be had.

A download is kept only once its contents are the published ones.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from foldbit.training import downloads
from foldbit.training.idx import AnyPath, DataError, read_idx, read_stream
from foldbit.training.images import ImageData, ImageSet

SIDE = 28


@dataclass(frozen=True)
class IdxSet:
    """A data set of the form that MNIST has: 28x28 grey images and their labels, for training and testing.

    Attributes:
        name: as commands take it; also its folder in the cache.
        title: in words.
        urls: where the four ``.gz`` files are published; tried in this order.
        files: the four files, and the SHA-256 of what each holds when unzipped (``zcat FILE | sha256sum``).
            Not of the ``.gz`` files: those hold a name and a date, and differ while their contents do not.
        classes: the name of each label.
        below: where torchvision puts the files below a folder.
        package: Debian's package of it and where that puts the files, where there is one.
    """

    name: str
    title: str
    urls: tuple[str, ...]
    files: dict[str, str]
    classes: tuple[str, ...]
    below: str
    package: tuple[str, Path] | None = None


FASHION_MNIST = IdxSet(
    name="fashion-mnist",
    title="Fashion-MNIST",
    urls=("https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",),
    files={
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    classes=(
        *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    below="FashionMNIST/raw",
    package=("dataset-fashion-mnist", Path("/usr/share/datasets/fashion-mnist")),
)

MNIST = IdxSet(
    name="mnist",
    title="MNIST",
    urls=("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
    files={
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    classes=tuple("0123456789"),
    below="MNIST/raw",
)


def fashion_mnist(
    folder: AnyPath | None = None, *, download: bool = True, cache: AnyPath | None = None
) -> ImageData:
    """Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28x28, ten classes (Xiao et al., 2017).

    Arguments and errors are :func:`load`'s.
    """
    return load(FASHION_MNIST, folder, download=download, cache=cache)


def mnist(folder: AnyPath | None = None, *, download: bool = True, cache: AnyPath | None = None) -> ImageData:
    """MNIST: 60,000 + 10,000 grey images of handwritten digits, 28x28 (LeCun et al., 1998).

    Arguments and errors are :func:`load`'s.
    """
    return load(MNIST, folder, download=download, cache=cache)


def load(
    idx_set: IdxSet,
    folder: AnyPath | None = None,
    *,
    download: bool = True,
    cache: AnyPath | None = None,
) -> ImageData:
    """A data set of four IDX files.

    Files are found with or without ``.gz``, in the folder itself, in ``raw``, or where torchvision puts them
    (``MNIST/raw``). Other files of the same kind, such as a subset, are accepted; ``source`` then says that
    they are not the published ones.

    Args:
        idx_set: which one.
        folder: the only place to look. None looks in Debian's package, then in ``cache``, then downloads.
        download: whether it may be downloaded.
        cache: where downloads are kept; ``foldbit/NAME`` in the user's cache folder unless given.

    Raises:
        DataError: where a file in ``folder`` is missing or wrong; without a folder, where no place has
            the data, with the reason for each.
    """
    if folder is not None:
        folder = Path(folder).expanduser()
        return _read_folder(idx_set, folder, f"the folder {folder}")
    kept = downloads.cache(idx_set.name) if cache is None else Path(cache).expanduser()
    places: dict[str, Callable[[], ImageData]] = {}

    def add(place: str, read: Callable[[IdxSet, Path, str], ImageData], path: Path) -> None:
        places[place] = partial(read, idx_set, path, place)

    advice = f"Put the four .gz files of {idx_set.urls[0]} into a folder and name that folder"
    if idx_set.package is not None:
        package, path = idx_set.package
        add(f"Debian's package {package} ({path})", _read_folder, path)
        advice = (
            f"Install {package} where Debian's packages are, or put the four .gz files of {idx_set.urls[0]} "
            "into a folder and name that folder"
        )
    add(f"an earlier download ({kept})", _read_folder, kept)
    add(f"a download from {' or '.join(idx_set.urls)}", _download if download else _refuse, kept)
    return downloads.from_places(idx_set.title, places, advice)


_MOST_VALUES = 2**26  # in one of the four files; the largest published one holds 47 million
_MOST_DOWNLOADED = 2**25  # bytes; the largest published .gz has 26 million


def _read_folder(idx_set: IdxSet, folder: Path, source: str) -> ImageData:
    paths = _locate(idx_set, folder)
    arrays = {name: read_idx(path, most_bytes=_MOST_VALUES) for name, path in paths.items()}
    train, test = (_image_set(idx_set, part, arrays, paths) for part in ("train", "t10k"))
    if len(train) < len(test):
        raise DataError(
            f"{folder} has {len(train)} training images and {len(test)} test images; "
            "are train and t10k swapped?"
        )
    if torch.equal(train.images, test.images):
        raise DataError(f"{folder} has the same images for training and for testing")
    if any(_digest(arrays[name]) != published for name, published in idx_set.files.items()):
        source += ", whose files are not the published ones"
    return ImageData.measured(idx_set.name, train, test, idx_set.classes, source)


def _locate(idx_set: IdxSet, folder: Path) -> dict[str, Path]:
    """The four files: all in the first place that has any of them."""
    try:
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder")
        for place in (folder, folder / "raw", folder / idx_set.below):
            found = {
                name: path
                for name in idx_set.files
                for path in (place / name, place / f"{name}.gz")  # of both, the .gz: downloads are
                if path.is_file()
            }
            if len(found) == len(idx_set.files):
                return found
            if found:
                missing = ", ".join(name for name in idx_set.files if name not in found)
                raise DataError(f"{place} lacks {missing} (with or without .gz)")
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error}") from error
    raise DataError(
        f"{folder} has none of {', '.join(idx_set.files)} (with or without .gz), nor {idx_set.below}"
    )


def _image_set(idx_set: IdxSet, part: str, arrays: dict[str, np.ndarray], paths: dict[str, Path]) -> ImageSet:
    images, labels = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
    _check_images(arrays[images], paths[images])
    _check_labels(arrays[labels], paths[labels], len(idx_set.classes))
    try:
        return ImageSet(
            torch.from_numpy(arrays[images]).unsqueeze(1), torch.from_numpy(arrays[labels]).long()
        )
    except DataError as error:
        raise DataError(
            f"{paths[images]} and {paths[labels]} do not belong together: {error}. "
            "Are train and t10k swapped?"
        ) from error


def _check_images(array: np.ndarray, path: Path) -> None:
    if array.ndim == 1:
        raise DataError(f"{path} holds labels instead of images; are the two swapped?")
    if array.ndim != 3 or array.shape[1:] != (SIDE, SIDE):
        raise DataError(f"{path} has the shape {list(array.shape)}; expected images [N, {SIDE}, {SIDE}]")


def _check_labels(array: np.ndarray, path: Path, classes: int) -> None:
    if array.ndim == 3:
        raise DataError(f"{path} holds images instead of labels; are the two swapped?")
    if array.ndim != 1:
        raise DataError(f"{path} has the shape {list(array.shape)}; expected labels [N]")
    if array.max() >= classes:
        raise DataError(f"{path} has the label {array.max()}; expected 0 to {classes - 1}")


def _digest(array: np.ndarray) -> str:
    """SHA-256 of the array's unzipped IDX file."""
    digest = hashlib.sha256(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape))
    digest.update(array.data)
    return digest.hexdigest()


def _refuse(idx_set: IdxSet, cache: Path, source: str) -> ImageData:
    raise DataError("not allowed")


def _download(idx_set: IdxSet, cache: Path, source: str) -> ImageData:
    for name, published in idx_set.files.items():
        path = cache / f"{name}.gz"
        if not _holds(path, published):
            downloads.keep(_fetch(idx_set.urls, path.name, published), path)
    return _read_folder(idx_set, cache, f"{source}, kept in {cache}")


def _holds(path: Path, published: str) -> bool:
    try:
        return _digest(read_idx(path, most_bytes=_MOST_VALUES)) == published
    except DataError:
        return False


def _fetch(mirrors: tuple[str, ...], name: str, published: str) -> bytes:
    """The .gz file from the first mirror that has it as it was published."""
    failures = []
    for mirror in mirrors:
        url = mirror + name
        try:
            data = downloads.fetch(url, _MOST_DOWNLOADED)
            given = _digest(read_stream(io.BytesIO(data), url, _MOST_VALUES))
            if given == published:
                return data
            failures.append(
                f"{url} is not the published file: its contents have SHA-256 {given}, not {published}"
            )
        except DataError as error:
            failures.append(str(error))
    raise DataError("; ".join(failures))
