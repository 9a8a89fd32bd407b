"""Data sets by name: published ones, wherever they can be had, and images of one's own in folders."""

from __future__ import annotations

import os
import warnings
from typing import Literal, get_args

import numpy as np
import torch

from foldbit.training import cifar, folders
from foldbit.training.idx import AnyPath, DataError
from foldbit.training.images import ImageData, ImageSet
from foldbit.training.mnist import fashion_mnist, mnist

Name = Literal["fashion-mnist", "mnist", "digits", "cifar10", "cifar100", "imagenet", "folder"]


class DataFallback(UserWarning):
    """Another data set than the one asked for is used: its numbers must not pass for the other's."""


def load(
    name: Name,
    folder: AnyPath | None = None,
    *,
    download: bool = True,
    fall_back: bool = False,
    image_size: int | None = None,
    channels: int | None = None,
) -> ImageData:
    """A data set by name, which is what commands use.

    Args:
        name: ``fashion-mnist``, ``mnist``, ``digits``, ``cifar10``, ``cifar100``, ``imagenet``, or ``folder``
            for images of the user's own.
        folder: where its files are; None looks for them, or takes those that were downloaded earlier.
        download: whether it may be downloaded.
        fall_back: where no Fashion-MNIST is to be had, return the digits instead, with a warning. A
            folder that is named but not right remains an error.
        image_size: height and width, for ``folder`` and ``imagenet`` (:func:`foldbit.training.folders.own`).
        channels: what the network takes: 1 makes images grey, 3 makes them colour; None leaves them as they
            are.

    Raises:
        DataError: for an unknown name or an argument that does not fit, or where the data set cannot be had,
            with how to get it.

    Warns:
        DataFallback: where it falls back.
    """
    _check(name, folder, image_size, channels)
    if name == "folder":
        assert folder is not None
        return folders.own(folder, image_size=image_size, channels=channels)
    if name == "imagenet":
        return folders.imagenet(folder, image_size=image_size, channels=channels)
    images = _published(name, folder, download, fall_back)
    if channels is None or channels == images.train.shape[0]:
        return images
    assert isinstance(images.train, ImageSet) and isinstance(images.test, ImageSet)  # as published sets are
    train, test = images.train.with_channels(channels), images.test.with_channels(channels)
    return ImageData.measured(images.name, train, test, images.classes, images.source)


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
    return ImageData.measured(
        "digits", both[~is_test], both[is_test], classes, "scikit-learn's bundled digits"
    )


def _check(name: str, folder: AnyPath | None, image_size: int | None, channels: int | None) -> None:
    if name not in get_args(Name):
        raise DataError(f"unknown data set {name!r}; known are {', '.join(get_args(Name))}")
    if name == "digits" and folder is not None:
        raise DataError(f"digits are part of scikit-learn and take no folder; got {os.fspath(folder)!r}")
    if name == "folder" and folder is None:
        raise DataError("say which folder your images are in: --data.folder")
    if image_size is not None and name not in ("folder", "imagenet"):
        raise DataError(
            f"images of {name} have a size of their own; only folder and imagenet take an image_size"
        )
    if image_size is not None and image_size < 1:
        raise DataError(f"image_size is 1 at least; got {image_size}")
    if channels not in (None, 1, 3):
        raise DataError(f"channels are 1 (grey) or 3 (colour); got {channels}")


def _published(name: Name, folder: AnyPath | None, download: bool, fall_back: bool) -> ImageData:
    """A data set that is held in memory."""
    if name == "digits":
        return digits()
    if name == "mnist":
        return mnist(folder, download=download)
    if name in ("cifar10", "cifar100"):
        return cifar.load(cifar.CIFAR10 if name == "cifar10" else cifar.CIFAR100, folder, download=download)
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
            stacklevel=3,
        )
        return instead
