"""Images in folders, a folder a class: one's own, and ImageNet."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from foldbit.training.idx import AnyPath, DataError
from foldbit.training.image_files import SUFFIXES, ImageFiles, for_each, pillow, probe
from foldbit.training.images import ImageData

#: Mean and standard deviation of ImageNet's training images / 255, which pretrained networks expect; for grey
#: ones, the means of both over colours. Images in folders are normalized by these, so that a network is
#: always given what it was trained on, in whatever folder the images are.
STATISTICS = {
    3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    1: ((0.449,), (0.226,)),
}


def own(
    folder: AnyPath, *, image_size: int | None = None, channels: int | None = None, seed: int = 0
) -> ImageData:
    """Images of the user's own: ``FOLDER/train/CLASS/*.jpg`` and ``FOLDER/test/CLASS/*.jpg`` (or ``val``).

    With the classes alone, ``FOLDER/CLASS/*.jpg``, a fifth of each class is for testing. Which ones, a hash
    of the seed and their names decides, so that adding an image moves at most one other from one split to the
    other. Classes are the names of folders, sorted. Either split is in the order of that hash, so that its
    first images have the share of each class that all have.

    Images are turned as their EXIF data say. Where all of them, decoded, take a GiB at most, they are decoded
    once and held in memory; else each time that they are needed.

    Args:
        folder: the folder.
        image_size: height and width to bring them to (:class:`ImageFiles` says how); None keeps their own,
            where all have the same.
        channels: 1 for grey, 3 for colour; None is grey where all of them are.
        seed: of the split and of the order.

    Raises:
        DataError: where the folder is not as described, or images cannot be decoded, naming them.
    """
    pillow()
    folder = Path(folder).expanduser()
    train, test, source = _splits(folder, seed)
    size = (image_size, image_size) if image_size is not None else None
    if size is None or channels is None:
        paths = [*train.paths(), *test.paths()]
        heads = for_each(lambda i: probe(paths[i], upright=True), len(paths), "reading headers")
        size = size or _own_size(paths, heads)
        channels = channels or (1 if all(grey for _, grey in heads) else 3)
    return _image_data("folder", (train, test), (channels, *size), seed, True, source)


def imagenet(
    folder: AnyPath | None, *, image_size: int | None = None, channels: int | None = None
) -> ImageData:
    """ImageNet's images of ILSVRC 2012: ``FOLDER/train/n01440764/*.JPEG``, and the same in ``FOLDER/val``.

    That is what torchvision's ``ImageNet`` makes of the published archives. Classes are the WordNet ids,
    sorted, which is the order of pretrained networks' outputs. A subset of the classes is accepted;
    ``source`` says so.

    Args:
        folder: the folder.
        image_size: height and width to bring them to (:class:`ImageFiles` says how); None is 224.
        channels: 1 for grey; None is colour.

    Raises:
        DataError: where it is not there, for ImageNet is never downloaded; or as :func:`own` does.
    """
    if folder is None:
        raise DataError(f"ImageNet is not downloaded, and no folder is named. {_WHERE_IMAGENET}")
    folder = Path(folder).expanduser()
    missing = [name for name in ("train", "val") if not (folder / name).is_dir()]
    if missing:
        raise DataError(f"{folder} has no {' and no '.join(missing)}. {_WHERE_IMAGENET}")
    pillow()
    train, test = _find(folder / "train"), _find(folder / "val")
    _check_same_classes(train, test)
    for name in train.files:
        if not re.fullmatch(r"n\d{8}", name):
            raise DataError(f"{train.folder / name} is not called by a WordNet id, such as n01440764")
    source = f"the folder {folder}{_left_out(train, test)}"
    if len(train.files) != 1000:
        source += f", with {len(train.files)} of ImageNet's 1,000 classes"
    size = 224 if image_size is None else image_size
    return _image_data("imagenet", (train, test), (channels or 3, size, size), 0, False, source)


_WHERE_IMAGENET = (
    "Get ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz from "
    "image-net.org (one registers and agrees to its terms), let torchvision.datasets.ImageNet unpack them "
    "into train/ and val/, a folder for each WordNet id, and name the folder that holds both: --data.folder"
)
_MOST_HELD = 2**30  # bytes, of both splits


@dataclass(frozen=True)
class _Split:
    """The files of a split by class, sorted, and what lies between them that is no image by its name."""

    folder: Path
    files: dict[str, list[bytes]]
    left_out: tuple[str, ...]

    def paths(self) -> Iterable[Path]:
        return (
            self.folder / name / os.fsdecode(file) for name, files in self.files.items() for file in files
        )


def _find(folder: Path) -> _Split:
    """Read the names of a split's files; of the files themselves nothing."""
    files: dict[str, list[bytes]] = {}
    left_out: list[str] = []
    for name in sorted(_folders(folder)):
        images, others = _list(folder / name)
        if not images:
            raise DataError(
                f"{folder / name} has no images; expected files that end in {', '.join(SUFFIXES)}"
            )
        files[name] = sorted(images)
        left_out += others
    if len(files) < 2:
        raise DataError(
            f"{folder} has {f'the folder {next(iter(files))} only' if files else 'no folders'}; "
            "expected one for each class, two at least, with its images in it"
        )
    return _Split(folder, files, tuple(left_out))


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error}") from error


def _list(folder: Path) -> tuple[list[bytes], list[str]]:
    """The images in a folder, and what else is there; hidden files count for neither."""
    images, others = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    raise DataError(f"{entry.path} is a folder; {folder} should hold images and no folders")
                if not entry.name.lower().endswith(SUFFIXES):
                    others.append(entry.path)
                elif entry.is_file():  # opening a pipe would wait forever
                    images.append(os.fsencode(entry.name))
                else:
                    raise DataError(f"{entry.path} is neither a file nor a link to one")
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error}") from error
    return images, others


def _splits(folder: Path, seed: int) -> tuple[_Split, _Split, str]:
    """Training and test images, and in words where they are from."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    # Only what has folders in it is a split: a class, too, may be called train.
    there = [
        name for name in ("train", "test", "val") if (folder / name).is_dir() and _folders(folder / name)
    ]
    if not there:
        found = _find(folder)
        train, test = _divide(found, seed)
        return train, test, f"the folder {folder}, a fifth of each class for testing{_left_out(found)}"
    if "train" not in there or there == ["train"]:
        lacks = "train" if "train" not in there else "test and no val"
        raise DataError(
            f"{folder} has {' and '.join(there)}, but no {lacks}; expected train/CLASS and test/CLASS or "
            "val/CLASS, or the folders of classes alone"
        )
    train, test = _find(folder / "train"), _find(folder / there[1])
    _check_same_classes(train, test)
    return train, test, f"the folder {folder}, {there[1]} for testing{_left_out(train, test)}"


def _divide(found: _Split, seed: int) -> tuple[_Split, _Split]:
    """A fifth of each class for testing, one image at least."""
    train, test = {}, {}
    for name, files in found.files.items():
        if len(files) < 2:
            raise DataError(
                f"{found.folder / name} has one image; expected one to train on and one to test at least"
            )
        order = _arranged(name, files, seed)
        count = max(1, round(len(order) / 5))
        test[name], train[name] = order[:count], order[count:]
    return _Split(found.folder, train, ()), _Split(found.folder, test, ())


def _arranged(name: str, files: list[bytes], seed: int) -> list[bytes]:
    """A class's files in the order of a hash."""
    start = f"{seed}/".encode() + os.fsencode(name) + b"/"
    return sorted(files, key=lambda file: hashlib.sha256(start + file).digest())


def _check_same_classes(train: _Split, test: _Split) -> None:
    for one, other in ((train, test), (test, train)):
        missing = [name for name in one.files if name not in other.files]
        if missing:
            raise DataError(
                f"{one.folder} has the class {missing[0]}, {other.folder} has not; "
                f"expected the same classes in both ({len(missing)} are not)"
            )


def _left_out(*splits: _Split) -> str:
    others = [path for split in splits for path in split.left_out]
    if not others:
        return ""
    files = f"{len(others)} files that are no images by their names, such as" if others[1:] else "the file"
    return f", without {files} {others[0]}"


def _own_size(paths: list[Path], heads: list[tuple[tuple[int, int], bool]]) -> tuple[int, int]:
    """The size that all images have."""
    first, _ = heads[0]
    for path, (size, _) in zip(paths, heads, strict=True):
        if size != first:
            raise DataError(
                f"images differ in size: {paths[0]} has {first[0]}x{first[1]} pixels (height, width), {path} "
                f"{size[0]}x{size[1]}; say what size to bring them to, such as --data.image_size 64"
            )
    return first


def _image_data(
    name: str,
    splits: tuple[_Split, _Split],
    shape: tuple[int, int, int],
    seed: int,
    upright: bool,
    source: str,
) -> ImageData:
    classes = tuple(splits[0].files)
    train, test = (_image_files(split, shape, seed, upright) for split in splits)
    if (len(train) + len(test)) * math.prod(shape) <= _MOST_HELD:
        train, test = train.hold(), test.hold()
    return ImageData(name, train, test, classes, *STATISTICS[shape[0]], source)


def _image_files(split: _Split, shape: tuple[int, int, int], seed: int, upright: bool) -> ImageFiles:
    """A split's files, in an order whose every beginning has the share of each class that the whole has."""
    names = np.array([file for name, files in split.files.items() for file in _arranged(name, files, seed)])
    counts = np.array([len(files) for files in split.files.values()])
    labels = np.repeat(np.arange(len(counts)), counts)
    rank = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    order = np.lexsort((labels, rank))
    return ImageFiles(
        split.folder,
        tuple(split.files),
        names[order],
        torch.from_numpy(labels[order]),
        shape,
        upright,
    )
