"""CIFAR-10 and CIFAR-100: colour images of 32x32, from the pickles they are published as.

The pickles are read by :mod:`foldbit.training.pickles`, which executes nothing, straight from the published
``.tar.gz`` or from the folder it unpacks to. Nothing is unpacked to disk.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

import numpy as np
import torch

from foldbit.training import downloads, pickles
from foldbit.training.idx import AnyPath, DataError
from foldbit.training.images import ImageData, ImageSet

SIDE = 32


@dataclass(frozen=True)
class Cifar:
    """One of the two data sets (Krizhevsky, 2009).

    Attributes:
        name: as commands take it; also its folder in the cache.
        title: in words.
        url: the published archive, whose files lie in ``folder``.
        md5: the archive's published checksum.
        folder: where the files lie in the archive.
        train, test, meta: those files, with their published MD5 (as torchvision lists them).
        labels, names: the keys of the labels, and of their names in ``meta``.
        classes: how many there are.
    """

    name: str
    title: str
    url: str
    md5: str
    folder: str
    train: dict[str, str]
    test: dict[str, str]
    meta: dict[str, str]
    labels: str
    names: str
    classes: int

    @property
    def archive(self) -> str:
        """The file name of the published archive."""
        return self.url.rpartition("/")[2]

    @property
    def files(self) -> dict[str, str]:
        """All files that are read, with their published MD5."""
        return {**self.train, **self.test, **self.meta}


CIFAR10 = Cifar(
    name="cifar10",
    title="CIFAR-10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    md5="c58f30108f718f92721af3b95e74349a",
    folder="cifar-10-batches-py",
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    meta={"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"},
    labels="labels",
    names="label_names",
    classes=10,
)

CIFAR100 = Cifar(
    name="cifar100",
    title="CIFAR-100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    md5="eb9058c3a382ffc7106e4002c42a8d85",
    folder="cifar-100-python",
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    meta={"meta": "7973b15100ade9c7d40fb424638fde48"},
    labels="fine_labels",
    names="fine_label_names",
    classes=100,
)


def load(
    cifar: Cifar,
    folder: AnyPath | None = None,
    *,
    download: bool = True,
    cache: AnyPath | None = None,
) -> ImageData:
    """CIFAR-10 or CIFAR-100: 50,000 + 10,000 colour images, 32x32, ten or a hundred classes.

    Other files of the same kind, such as a subset, are accepted; ``source`` then says that they are not the
    published ones.

    Args:
        cifar: which one.
        folder: the only place to look: the archive itself, the folder it lies in, the folder that it unpacks
            to, or the one above. None looks in ``cache``, then downloads.
        download: whether it may be downloaded: 170 MB, kept packed.
        cache: where downloads are kept; ``foldbit/NAME`` in the user's cache folder unless given.

    Raises:
        DataError: where a file in ``folder`` is missing or wrong; without a folder, where no place has
            the data, with the reason for each.
    """
    if folder is not None:
        return _read(cifar, Path(folder).expanduser(), "")
    kept = downloads.cache(cifar.name) if cache is None else Path(cache).expanduser()
    places: dict[str, Callable[[], ImageData]] = {
        f"an earlier download ({kept})": partial(_read_kept, cifar, kept),
        f"a download from {cifar.url}": partial(_download if download else _refuse, cifar, kept),
    }
    advice = f"Put {cifar.archive}, from {cifar.url}, into a folder and name that folder"
    return downloads.from_places(cifar.title, places, advice)


_MOST_BYTES = 2**28  # in one file; the largest published one has 155 MB
_MOST_UNPACKED = 2**29  # in an archive; the larger one unpacks to 186 MB
_MOST_MEMBERS = 100  # in an archive; they have 4 and 9
_MOST_DOWNLOADED = 2**28


def _refuse(cifar: Cifar, cache: Path) -> ImageData:
    raise DataError("not allowed")


def _read_kept(cifar: Cifar, cache: Path) -> ImageData:
    archive = cache / cifar.archive
    if not archive.is_file():
        raise DataError(f"{archive}: no such file")
    return _read(cifar, archive, f"an earlier download ({archive})")


def _download(cifar: Cifar, cache: Path) -> ImageData:
    archive = cache / cifar.archive
    data = downloads.fetch(cifar.url, _MOST_DOWNLOADED)
    given = _md5(data)
    if given != cifar.md5:
        raise DataError(f"{cifar.url} is not the published file: it has MD5 {given}, not {cifar.md5}")
    downloads.keep(data, archive)
    return _read(cifar, archive, f"a download from {cifar.url}, kept in {archive}")


def _read(cifar: Cifar, place: Path, source: str) -> ImageData:
    """The data set from an archive or a folder; ``source`` in words, made up where it is empty."""
    try:
        found = _locate(cifar, place)
        if found.is_dir():
            files = {name: _read_file(found / name) for name in cifar.files}
        else:
            with found.open("rb") as archive:
                files = _unpack(cifar, archive, str(found))
    except OSError as error:
        raise DataError(f"{place} cannot be read: {error}") from error
    source = source or f"{'the folder' if found.is_dir() else 'the archive'} {found}"
    if any(_md5(files[name]) != published for name, published in cifar.files.items()):
        source += ", whose files are not the published ones"
    (meta,) = cifar.meta
    classes = _classes(cifar, pickles.read(files[meta], str(found / meta)), str(found / meta))
    train, test = (
        _join(
            [_batch(cifar, pickles.read(files[name], str(found / name)), str(found / name)) for name in part]
        )
        for part in (cifar.train, cifar.test)
    )
    return ImageData.measured(cifar.name, train, test, classes, source)


def _locate(cifar: Cifar, place: Path) -> Path:
    """The archive, or the folder that holds the files."""
    if place.is_file():
        return place
    if not place.is_dir():
        raise DataError(f"{place}: no such folder or archive")
    for folder in (place, place / cifar.folder):
        if any((folder / name).is_file() for name in cifar.files):
            missing = [name for name in cifar.files if not (folder / name).is_file()]
            if missing:
                raise DataError(f"{folder} lacks {', '.join(missing)}")
            return folder
    if (place / cifar.archive).is_file():
        return place / cifar.archive
    raise DataError(f"{place} has neither {cifar.folder} nor {cifar.archive}")


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise DataError(f"{path} has more than {_MOST_BYTES:,} bytes")
    return data


def _unpack(cifar: Cifar, archive: BinaryIO, name: str) -> dict[str, bytes]:
    """The files of an archive, in memory. Anything in it that a plain archive would not have is refused."""
    files: dict[str, bytes] = {}
    try:
        with gzip.GzipFile(fileobj=archive) as unzipped:
            bounded = _Bounded(unzipped, name)
            with tarfile.open(fileobj=cast(BinaryIO, bounded), mode="r|") as tar:
                for count, member in enumerate(tar, 1):
                    _check_member(member, count, name)
                    folder, _, file = member.name.rpartition("/")
                    if folder == cifar.folder and file in cifar.files:
                        if file in files:
                            raise DataError(f"{name} holds {member.name} twice")
                        content = tar.extractfile(member)
                        files[file] = content.read() if content is not None else b""
            while bounded.read(2**16):  # to the end, where gzip's checksum is
                pass
    except DataError:
        raise
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, OverflowError, ValueError) as error:
        raise DataError(f"{name} is a damaged or truncated .tar.gz archive: {error}") from error
    missing = [file for file in cifar.files if file not in files]
    if missing:
        raise DataError(f"{name} lacks {', '.join(missing)} in {cifar.folder}; is it {cifar.archive}?")
    return files


def _check_member(member: tarfile.TarInfo, count: int, name: str) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{name} is refused: its entry {member.name!r} points outside the archive")
    if not (member.isdir() or member.isfile()) or member.issparse():
        raise DataError(f"{name} is refused: its entry {member.name!r} is neither a plain file nor a folder")
    if member.size > _MOST_BYTES:
        raise DataError(f"{name} is refused: its entry {member.name!r} claims {member.size:,} bytes")
    if count > _MOST_MEMBERS:
        raise DataError(f"{name} is refused: it has more than {_MOST_MEMBERS} entries")


class _Bounded(io.RawIOBase):
    """What an archive unzips to, up to a limit."""

    def __init__(self, unzipped: gzip.GzipFile, name: str) -> None:
        self._unzipped = unzipped
        self._name = name
        self._left = _MOST_UNPACKED

    def read(self, size: int = -1) -> bytes:
        data = self._unzipped.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise DataError(f"{self._name} is refused: it unpacks to more than {_MOST_UNPACKED:,} bytes")
        return data


def _classes(cifar: Cifar, meta: dict[object, object], name: str) -> tuple[str, ...]:
    given = _entry(meta, cifar.names, name)
    if not isinstance(given, list) or len(given) != cifar.classes:
        raise DataError(f"{name} does not list {cifar.classes} names of classes in {cifar.names!r}")
    classes = []
    for label in given:
        text = label.decode("utf-8", "replace") if isinstance(label, bytes) else label
        if not isinstance(text, str) or not text.isprintable() or not text:
            raise DataError(f"{name} has a class without a name that can be printed")
        classes.append(text)
    return tuple(classes)


def _batch(cifar: Cifar, batch: dict[object, object], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A file's images, uint8 ``[N, 3072]``: planes of red, green, blue, each by rows; and labels ``[N]``."""
    images, labels = _entry(batch, "data", name), _entry(batch, cifar.labels, name)
    if not isinstance(images, np.ndarray) or images.ndim != 2 or images.shape[1] != 3 * SIDE * SIDE:
        shape = list(images.shape) if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError(f"{name} has {shape} as data; expected uint8 [N, {3 * SIDE * SIDE}]")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{name} has other labels than a list of whole numbers")
    if len(labels) != len(images):
        raise DataError(f"{name} has {len(images)} images, but {len(labels)} labels")
    for index, label in enumerate(labels):
        if not 0 <= label < cifar.classes:
            raise DataError(f"{name} gives its image {index} a label that is not 0 to {cifar.classes - 1}")
    return images, np.array(labels, np.int64)


def _entry(content: dict[object, object], key: str, name: str) -> object:
    """An entry by its key, which Python 2 wrote as bytes."""
    for written in (key.encode(), key):
        if written in content:
            return content[written]
    raise DataError(f"{name} has no {key!r}")


def _join(parts: list[tuple[np.ndarray, np.ndarray]]) -> ImageSet:
    images = np.concatenate([images for images, _ in parts]).reshape(-1, 3, SIDE, SIDE)
    labels = np.concatenate([labels for _, labels in parts])
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels))


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
