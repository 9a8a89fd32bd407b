"""Images with their classes, and batches of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from foldbit.training.idx import DataError

Normalize = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation, each per channel


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

    def __getitem__(self, split: Literal["train", "test"]) -> ImageSet:
        """The images of a split."""
        return {"train": self.train, "test": self.test}[split]

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
