"""Images to learn from: Fashion-MNIST wherever it can be had, scikit-learn's digits, and batches of either.

Files from outside are hostile until they are checked: :func:`read_idx` believes no header, and a
download is written to disk only once its contents are the published ones.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import importlib.util
import io
import math
import os
import struct
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from foldbit.packed import files

Name = Literal["fashion-mnist", "digits"]
AnyPath = str | os.PathLike[str]
Normalize = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation, each per channel

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


class DataError(ValueError):
    """A data set cannot be had, or is not what it should be. The message names the file."""


class DataFallback(UserWarning):
    """Another data set than the one asked for is used: its numbers must not pass for the other's."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and their classes.

    Attributes:
        images: uint8 ``[N, C, H, W]``.
        labels: int64 ``[N]``, from 0.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or 0 in self.images.shape:
            raise DataError(f"images are uint8 [N, C, H, W], none of them 0; got {_kind(self.images)}")
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise DataError(f"labels are int64 [N]; got {_kind(self.labels)}")
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images)} images, but {len(self.labels)} labels: expected one each")
        if self.labels.min() < 0:
            raise DataError(f"labels count from 0; got {int(self.labels.min())}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: slice | Tensor) -> ImageSet:
        """The images that a slice, or a tensor of indices or booleans, chooses."""
        return ImageSet(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set for classification.

    Attributes:
        name: its name, as :func:`load` takes it.
        train: what to learn from.
        test: what to report on.
        classes: the name of each label.
        mean: of the training images' values / 255, per channel.
        std: their standard deviation, likewise.
        source: where it was found, in words.
    """

    name: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    def __post_init__(self) -> None:
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise DataError(
                f"{self.name}: images of training and test differ in shape: "
                f"{list(self.train.images.shape[1:])} and {list(self.test.images.shape[1:])}"
            )
        for which, image_set in (("train", self.train), ("test", self.test)):
            if image_set.labels.max() >= len(self.classes):
                raise DataError(
                    f"{self.name}: a {which} label is {int(image_set.labels.max())}; "
                    f"labels of {len(self.classes)} classes are 0 to {len(self.classes) - 1}"
                )
        _check_statistics(self.mean, self.std, self.train.images.shape[1])


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
    if name not in get_args(Name):
        raise DataError(f"unknown data set {name!r}; known are {', '.join(get_args(Name))}")
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


class EpochSampler(Sampler[int]):
    """Shuffles, in an order that only the seed and the epoch decide.

    Any epoch can be repeated, or resumed, without those before it. As with torch's DistributedSampler,
    :meth:`set_epoch` comes before an epoch's first batch. A loader that accelerate has prepared passes
    ``loader.set_epoch(epoch)`` on to here, and counts its own epochs where it is not called. To resume
    within an epoch, call it on the prepared loader and skip batches afterwards: on several processes,
    what ``skip_first_batches`` returns does not pass it on.

    Args:
        data: what to draw from; only its length matters.
        seed: at least 0.
    """

    def __init__(self, data: Sized, seed: int = 0) -> None:
        _check_count("seed", seed)
        self.data = data
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order that the next pass takes."""
        _check_count("epoch", epoch)
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        # Mixed, not added: the orders of seed 0 would otherwise be those of seed 1, one epoch late.
        mixed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        yield from torch.randperm(len(self), generator=generator).tolist()


def batches(
    image_set: ImageSet,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int = 0,
    normalize: Normalize,
    drop_last: bool = False,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """A loader of ``(images float32 [B, C, H, W], labels int64 [B])``.

    A batch is taken from memory at once, not image by image: 128 of Fashion-MNIST's take 0.05 ms, so that
    no worker processes are needed.

    Args:
        image_set: what to draw from.
        batch_size: images a batch.
        shuffle: whether to shuffle; the loader's ``sampler`` is then an :class:`EpochSampler`.
        seed: of the order.
        normalize: mean and standard deviation per channel, of values / 255, as :class:`ImageData` has
            them: images become (values / 255 - mean) / std.
        drop_last: leave out a last batch that is not full.

    Raises:
        ValueError: where an argument is out of range, or ``drop_last`` leaves nothing.
    """
    _check_count("batch_size", batch_size, least=1)
    if drop_last and len(image_set) < batch_size:
        raise ValueError(
            f"drop_last leaves nothing of {len(image_set)} images in batches of {batch_size}; "
            "take smaller batches or keep the last"
        )
    return DataLoader(
        _Normalized(image_set, *normalize),
        batch_size=batch_size,
        sampler=EpochSampler(image_set, seed) if shuffle else None,
        collate_fn=_as_is,
        drop_last=drop_last,
        # Its own, though nothing is drawn from it: a pass over the loader would otherwise advance torch's
        # global random numbers, and an evaluation or a resumed epoch change what training draws next.
        generator=torch.Generator(),
    )


class _Normalized(Dataset[tuple[Tensor, Tensor]]):
    """An image set whose ``__getitems__`` returns a whole batch, not a list of samples to collate."""

    def __init__(self, image_set: ImageSet, mean: Sequence[float], std: Sequence[float]) -> None:
        channels = image_set.images.shape[1]
        _check_statistics(mean, std, channels)
        self.image_set = image_set
        # (x / 255 - mean) / std, as one multiplication and one addition.
        deviation = torch.tensor(std, dtype=torch.float64).reshape(channels, 1, 1)
        self.factor = (1 / (255 * deviation)).float()
        self.offset = (-torch.tensor(mean, dtype=torch.float64).reshape(channels, 1, 1) / deviation).float()

    def __len__(self) -> int:
        return len(self.image_set)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(indices)
        images = self.image_set.images.index_select(0, chosen).float()
        return images.mul_(self.factor).add_(self.offset), self.image_set.labels.index_select(0, chosen)


def _as_is(batch: Any) -> Any:
    # A named function, for worker processes could not be sent a lambda.
    return batch


def read_idx(path: AnyPath, *, most_bytes: int = 2**30) -> np.ndarray:
    """Read an IDX file, plain or gzipped, whatever its name says: the format of MNIST and its relatives.

    Two zero bytes, the code of the type (8, unsigned bytes, is the only one read), the number of
    dimensions, each size as a big-endian uint32, then the values. Memory grows with what is really there,
    up to what the header says and never beyond ``most_bytes``.

    Args:
        path: the file.
        most_bytes: refuse a file that claims more values.

    Returns:
        uint8, with the 1 to 4 dimensions of the file.

    Raises:
        DataError: where there is no such file, or anything about it is wrong.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file" + (", but a folder" if path.is_dir() else ""))
        with path.open("rb") as file:
            return _read_stream(file, str(path), most_bytes)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_stream(file: BinaryIO, name: str, most_bytes: int) -> np.ndarray:
    zipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if not zipped:
        return _parse_idx(file, name, most_bytes)
    try:
        with gzip.GzipFile(fileobj=file) as unzipped:
            return _parse_idx(cast(BinaryIO, unzipped), name, most_bytes)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name} is a damaged or truncated gzip file: {error}") from error


def _parse_idx(stream: BinaryIO, name: str, most_bytes: int) -> np.ndarray:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise DataError(
            f"{name} is not an IDX file: it starts with {magic.hex(' ') or 'nothing'}, expected 00 00 08 "
            "and the number of dimensions"
        )
    dtype, ndim = magic[2:]
    if dtype != 8:
        raise DataError(f"{name} holds values of IDX type 0x{dtype:02x}; only 0x08, unsigned bytes, is read")
    if not 1 <= ndim <= 4:
        raise DataError(f"{name} claims {ndim} dimensions; expected 1 to 4")
    header = stream.read(4 * ndim)
    if len(header) < 4 * ndim:
        raise DataError(f"{name} is truncated: it ends within its header")
    sizes = struct.unpack(f">{ndim}I", header)
    expected = math.prod(sizes)
    claim = f"{' x '.join(map(str, sizes))} values"
    if not 1 <= expected <= most_bytes:
        raise DataError(f"{name} claims {claim}; expected 1 to {most_bytes:,}")
    data = bytearray()
    # One byte more is asked for than should be there, to notice it.
    while chunk := stream.read(min(2**20, expected + 1 - len(data))):
        data += chunk
        if len(data) > expected:
            raise DataError(f"{name} has bytes left after the {claim} that its header claims")
    if len(data) < expected:
        raise DataError(f"{name} is truncated: its header claims {claim}, it holds {len(data)}")
    return np.frombuffer(data, np.uint8).reshape(sizes)


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
    given = _digest(_read_stream(io.BytesIO(data), url, _MOST_VALUES))
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
    mean, std = _statistics(train.images)
    return ImageData(name, train, test, classes, mean, std, source)


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of values / 255 per channel, exactly, from how often each value occurs."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(float(mean))
        deviations.append(float((share * (values - mean).square()).sum().sqrt()))
    return tuple(means), tuple(deviations)


def _check_statistics(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    finite = all(map(math.isfinite, (*mean, *std)))
    if len(mean) != channels or len(std) != channels or not finite or min(std) <= 0:
        raise DataError(
            f"mean and std are finite, std positive, one each for {channels} channels; "
            f"got mean {tuple(mean)}, std {tuple(std)}"
        )


def _check_count(name: str, given: object, least: int = 0) -> None:
    if type(given) is not int or given < least:
        raise ValueError(f"{name} is a whole number, at least {least}; got {given!r}")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
