"""Images with their classes, in memory or in files, and batches of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from foldbit.training import augment as augmentation
from foldbit.training.augment import Augment
from foldbit.training.idx import DataError
from foldbit.training.image_files import ImageFiles, to_array

Normalize = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation, each per channel


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and their classes, in memory.

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

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def pixels(self, indices: Tensor) -> Tensor:
        """The images at these places: uint8 ``[B, C, H, W]``."""
        return self.images.index_select(0, indices)

    def with_channels(self, channels: int) -> ImageSet:
        """The images in grey (1 channel) or colour (3).

        Grey images take the same value in each of three channels, without taking more memory. Colour becomes
        grey as Pillow does it: .299 red + .587 green + .114 blue (ITU-R 601), in integers.
        """
        if channels == self.shape[0]:
            return self
        if (self.shape[0], channels) == (1, 3):
            return ImageSet(self.images.expand(-1, 3, -1, -1), self.labels)
        if (self.shape[0], channels) == (3, 1):
            grey = torch.empty_like(self.images[:, :1])
            for part, images in zip(grey.split(1024), self.images.split(1024), strict=True):
                red, green, blue = images.int().unbind(1)
                part[:, 0] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
            return ImageSet(grey, self.labels)
        raise DataError(
            f"images of {self.shape[0]} channels cannot be given {channels}; grey has 1, colour 3"
        )


Images = ImageSet | ImageFiles


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set for classification.

    Attributes:
        name: its name, as :func:`load` takes it.
        train: what to learn from.
        test: what to report on.
        classes: the name of each label.
        mean: what to subtract from values / 255, per channel: the mean of the training images or, of images
            in files, of ImageNet's.
        std: what to divide by then: their standard deviation, likewise.
        source: where it was found, in words.
    """

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str

    @classmethod
    def measured(
        cls, name: str, train: ImageSet, test: ImageSet, classes: tuple[str, ...], source: str
    ) -> ImageData:
        """A data set in memory, with the mean and the standard deviation of its training images."""
        return cls(name, train, test, classes, *statistics(train.images), source)

    def __getitem__(self, split: Literal["train", "test"]) -> Images:
        """The images of a split."""
        return {"train": self.train, "test": self.test}[split]

    def __post_init__(self) -> None:
        if self.train.shape != self.test.shape:
            raise DataError(
                f"{self.name}: images of training and test differ in shape: "
                f"{list(self.train.shape)} and {list(self.test.shape)}"
            )
        for which, image_set in (("train", self.train), ("test", self.test)):
            if image_set.labels.max() >= len(self.classes):
                raise DataError(
                    f"{self.name}: a {which} label is {int(image_set.labels.max())}; "
                    f"labels of {len(self.classes)} classes are 0 to {len(self.classes) - 1}"
                )
        _check_statistics(self.mean, self.std, self.train.shape[0])


class EpochSampler(Sampler[int]):
    """Shuffles, in an order that only the seed and the epoch decide.

    It draws from the images of all epochs, one epoch after the other: image i in epoch e is ``e * len(data) +
    i``. So what changes images by the epoch learns of it with each of them, in whatever process it works.

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
        order = torch.randperm(len(self), generator=generator)
        yield from (order + self.epoch * len(self)).tolist()


def batches(
    image_set: Images,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int = 0,
    normalize: Normalize,
    drop_last: bool = False,
    augment: Augment = "none",
    workers: int = 0,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """A loader of ``(images float32 [B, C, H, W], labels int64 [B])``.

    A batch is taken from memory at once, not image by image: 128 of Fashion-MNIST's take 0.1 ms, and 0.8 ms
    with augment crop-flip, so that no worker processes are needed.

    Augmentation depends on the seed, the epoch and the image alone, not on the batch it is in, the order or
    the process. Without ``shuffle`` every pass is that of epoch 0.

    Args:
        image_set: what to draw from.
        batch_size: images a batch.
        shuffle: whether to shuffle; the loader's ``sampler`` is then an :class:`EpochSampler`.
        seed: of the order, and of the augmentation.
        normalize: mean and standard deviation per channel, of values / 255, as :class:`ImageData` has
            them: images become (values / 255 - mean) / std.
        drop_last: leave out a last batch that is not full.
        augment: ``none``; ``crop-flip`` (:func:`foldbit.training.augment.crop_flip`); or ``imagenet``
            (:func:`foldbit.training.augment.imagenet`), of the images as their files have them.
        workers: processes that work where images are decoded or changed one by one. There are none where a
            batch is taken from memory at once, which is faster than to pass it on.

    Raises:
        ValueError: where an argument is out of range, or ``drop_last`` leaves nothing.
        DataError: where ``imagenet`` is asked for and torchvision is not installed.
    """
    _check_count("batch_size", batch_size, least=1)
    _check_count("workers", workers)
    if drop_last and len(image_set) < batch_size:
        raise ValueError(
            f"drop_last leaves nothing of {len(image_set)} images in batches of {batch_size}; "
            "take smaller batches or keep the last"
        )
    dataset = _Batches(image_set, *normalize, augment, seed)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=EpochSampler(image_set, seed) if shuffle else None,
        collate_fn=_as_is,
        drop_last=drop_last,
        num_workers=workers if dataset.one_by_one else 0,
        # Its own, though nothing is drawn from it: a pass over the loader would otherwise advance torch's
        # global random numbers, and an evaluation or a resumed epoch change what training draws next.
        generator=torch.Generator(),
    )


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """An image set whose ``__getitems__`` returns a whole batch, not a list of samples to collate.

    Indices count the images of all epochs, as :class:`EpochSampler` gives them.
    """

    def __init__(
        self, image_set: Images, mean: Sequence[float], std: Sequence[float], augment: Augment, seed: int
    ) -> None:
        _check_count("seed", seed)
        if augment not in get_args(Augment):
            raise ValueError(f"augment is {', '.join(get_args(Augment))}; got {augment!r}")
        channels = image_set.shape[0]
        _check_statistics(mean, std, channels)
        self.image_set = image_set
        self.augment = augment
        self.seed = seed
        self.from_pictures = augmentation.imagenet(image_set.shape[1:]) if augment == "imagenet" else None
        # (x / 255 - mean) / std, as one multiplication and one addition.
        deviation = torch.tensor(std, dtype=torch.float64).reshape(channels, 1, 1)
        self.factor = (1 / (255 * deviation)).float()
        self.offset = (-torch.tensor(mean, dtype=torch.float64).reshape(channels, 1, 1) / deviation).float()

    @property
    def one_by_one(self) -> bool:
        """Whether images are decoded or changed one by one."""
        in_files = isinstance(self.image_set, ImageFiles) and self.image_set.held is None
        return in_files or self.from_pictures is not None

    def __len__(self) -> int:
        return len(self.image_set)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        epochs, chosen = np.divmod(np.array(indices), len(self))
        where = torch.from_numpy(chosen)
        images = self._pixels(epochs, where).float()
        return images.mul_(self.factor).add_(self.offset), self.image_set.labels.index_select(0, where)

    def _pixels(self, epochs: np.ndarray, chosen: Tensor) -> Tensor:
        """Augmented images, uint8 ``[B, C, H, W]``."""
        if self.augment == "none":
            return self.image_set.pixels(chosen)
        numbers = augmentation.draws(self.seed, epochs, chosen.numpy(), 3)
        if self.from_pictures is None:
            return augmentation.crop_flip(self.image_set.pixels(chosen), numbers)
        images = []
        for index, number in zip(chosen.tolist(), numbers[:, 0].tolist(), strict=True):
            if isinstance(self.image_set, ImageFiles):
                changed = self.from_pictures(self.image_set.picture(index), number)
                images.append(torch.from_numpy(to_array(changed)))
            else:
                images.append(self.from_pictures(self.image_set.images[index], number))
        return torch.stack(images)


def _as_is(batch: Any) -> Any:
    # A named function, for worker processes could not be sent a lambda.
    return batch


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
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
