"""Augmentation: what it does to images, and that nothing but seed, epoch and image decides it."""

from __future__ import annotations

import builtins
import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foldbit.training import augment, images
from foldbit.training.idx import DataError
from foldbit.training.images import ImageSet

PLAIN = ((0.0,) * 3, (1.0,) * 3)  # batches are values / 255


def colours(count: int, height: int = 12, width: int = 9, channels: int = 3) -> ImageSet:
    """Random images, labelled by their index."""
    drawn = torch.Generator().manual_seed(count)
    shape = (count, channels, height, width)
    return ImageSet(torch.randint(0, 256, shape, dtype=torch.uint8, generator=drawn), torch.arange(count))


def by_image(loader: object) -> dict[int, Tensor]:
    """The images of a pass, by their labels."""
    return {int(label): x for batch, labels in loader for x, label in zip(batch, labels, strict=True)}  # type: ignore[attr-defined]


def same(one: dict[int, Tensor], other: dict[int, Tensor]) -> bool:
    """Whether these are the same images, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[index], other[index]) for index in one)


# Random numbers


def split_mix(state: int, count: int) -> Iterator[int]:
    """SplitMix64 as it is published, one number after the other."""
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


def test_split_mix_gives_the_numbers_it_is_known_for() -> None:
    # The first outputs from the state 1234567, as Rosetta Code and other implementations list them.
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert list(split_mix(1234567, 4)) == known


@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(0, 2000), st.integers(1, 4))
def test_draws_are_split_mix_at_a_place(seed: int, epoch: int, index: int, count: int) -> None:
    key = int(np.random.SeedSequence((seed, 1)).generate_state(1, np.uint64)[0])
    *_, start = split_mix(key, epoch + 1)
    expected = list(split_mix(start, (index + 1) * count))[-count:]
    assert augment.draws(seed, np.array([epoch]), np.array([index]), count).tolist() == [expected]


def test_draws_of_a_batch_are_those_of_its_images() -> None:
    epochs, indices = np.array([0, 3, 3, 1]), np.array([5, 0, 7, 5])
    together = augment.draws(9, epochs, indices, 3)
    for row, epoch, index in zip(together, epochs, indices, strict=True):
        np.testing.assert_array_equal(row[None], augment.draws(9, np.array([epoch]), np.array([index]), 3))
    assert len(np.unique(together)) == together.size


def test_draws_are_spread_evenly() -> None:
    """Chi-square statistics of crops and flips over images, epochs and seeds stay near their expectation."""
    grid = np.meshgrid(np.arange(20), np.arange(500), indexing="ij")
    epochs, indices = (axis.ravel() for axis in grid)
    for seed in (0, 1):
        numbers = augment.draws(seed, epochs, indices, 3)
        for column, bound in ((0, 9), (1, 9), (2, 2)):
            drawn = augment._below(numbers[:, column], bound)
            counts = np.bincount(drawn, minlength=bound)
            expected = len(drawn) / bound
            statistic = ((counts - expected) ** 2 / expected).sum()
            assert len(counts) == bound
            assert statistic < bound - 1 + 5 * (2 * (bound - 1)) ** 0.5
        together = augment._below(numbers[:, 0], 9) * 9 + augment._below(numbers[:, 1], 9)
        assert (
            np.bincount(together, minlength=81).min() > 60
        )  # of 123 expected: rows and columns are independent
    first, second = (augment.draws(seed, epochs, indices, 1) for seed in (0, 1))
    assert not np.intersect1d(first, second).size


# Crop and flip


def naive_crop_flip(image: np.ndarray, top: int, left: int, flip: bool) -> np.ndarray:
    _, height, width = image.shape
    made = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            from_row, from_column = row + top - 4, column + left - 4
            if 0 <= from_row < height and 0 <= from_column < width:
                made[:, row, width - 1 - column if flip else column] = image[:, from_row, from_column]
    return made


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 10), st.integers(1, 10), st.integers(0, 2**32))
def test_crop_flip(count: int, channels: int, height: int, width: int, seed: int) -> None:
    drawn = np.random.default_rng(seed)
    given_images = drawn.integers(1, 256, (count, channels, height, width), dtype=np.uint8)
    numbers = drawn.integers(0, 2**64, (count, 3), dtype=np.uint64, endpoint=False)
    before = given_images.copy()
    made = augment.crop_flip(torch.from_numpy(given_images), numbers)
    assert made.dtype == torch.uint8 and made.is_contiguous()
    np.testing.assert_array_equal(given_images, before)
    for image, result, (top, left, flip) in zip(given_images, made.numpy(), numbers.tolist(), strict=True):
        # Of 32 bits, the share of 9 and of 2.
        top, left, flip = (top >> 32) * 9 >> 32, (left >> 32) * 9 >> 32, (flip >> 63) == 1
        np.testing.assert_array_equal(result, naive_crop_flip(image, top, left, flip))


def test_crop_flip_reaches_every_place() -> None:
    image = torch.arange(1, 26, dtype=torch.uint8).reshape(1, 1, 5, 5)
    numbers = augment.draws(0, np.zeros(5000, np.int64), np.arange(5000), 3)
    made = augment.crop_flip(image.expand(5000, -1, -1, -1), numbers)
    assert len(np.unique(made.reshape(5000, -1).numpy(), axis=0)) == 2 * 9 * 9


# Batches


def crop_flip_batches(image_set: ImageSet, **changes: object) -> torch.utils.data.DataLoader:
    arguments = {
        "batch_size": 8,
        "shuffle": True,
        "seed": 3,
        "normalize": PLAIN,
        "augment": "crop-flip",
        **changes,
    }
    return images.batches(image_set, **arguments)  # type: ignore[arg-type]


def epoch(loader: torch.utils.data.DataLoader, number: int) -> dict[int, Tensor]:
    loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
    return by_image(loader)


def test_batches_hold_augmented_images() -> None:
    image_set = colours(20)
    made = epoch(crop_flip_batches(image_set), 2)
    for index in range(20):
        numbers = augment.draws(3, np.array([2]), np.array([index]), 3)
        expected = augment.crop_flip(image_set.images[index : index + 1], numbers)[0]
        torch.testing.assert_close(made[index], expected / 255, rtol=0, atol=1e-6)


def test_seed_epoch_and_image_decide_and_nothing_else() -> None:
    image_set = colours(20)
    first = epoch(crop_flip_batches(image_set), 1)
    torch.manual_seed(5)
    for changes in ({}, {"batch_size": 3}, {"batch_size": 20}, {"workers": 2}, {"drop_last": False}):
        assert same(epoch(crop_flip_batches(image_set, **changes), 1), first), changes
    assert not same(epoch(crop_flip_batches(image_set), 2), first)
    assert not same(epoch(crop_flip_batches(image_set, seed=4), 1), first)
    twins = ImageSet(image_set.images[:1].expand(20, -1, -1, -1), image_set.labels)
    assert len({x.numpy().tobytes() for x in epoch(crop_flip_batches(twins), 0).values()}) > 10


def test_without_a_shuffle_every_pass_is_that_of_epoch_0() -> None:
    image_set = colours(20)
    in_order = crop_flip_batches(image_set, shuffle=False)
    shuffled = epoch(crop_flip_batches(image_set), 0)
    assert same(by_image(in_order), shuffled) and same(by_image(in_order), shuffled)


def test_augmentation_leaves_the_global_random_numbers_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    epoch(crop_flip_batches(colours(20)), 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


def test_resuming_through_accelerate_repeats_the_images() -> None:
    accelerate = pytest.importorskip("accelerate")
    image_set = colours(22)
    prepared = accelerate.Accelerator(cpu=True).prepare(crop_flip_batches(image_set, batch_size=4))
    counted = [by_image(prepared), by_image(prepared)]  # it counts epochs itself
    assert [same(made, epoch(crop_flip_batches(image_set), e)) for e, made in enumerate(counted)] == [
        True,
        True,
    ]
    prepared.set_epoch(5)
    whole = list(prepared)
    prepared.set_epoch(5)
    rest = list(accelerate.skip_first_batches(prepared, 2))
    assert len(rest) == len(whole) - 2 == 4
    for (x, labels), (expected, expected_labels) in zip(rest, whole[2:], strict=True):
        assert torch.equal(labels, expected_labels) and torch.equal(x, expected)
    assert same(by_image(whole), epoch(crop_flip_batches(image_set), 5))


@pytest.mark.parametrize("skipped", [0, 1])
def test_several_processes_share_out_the_same_images(skipped: int) -> None:
    pytest.importorskip("accelerate")
    from accelerate.data_loader import prepare_data_loader, skip_first_batches

    image_set = colours(24)
    expected = epoch(crop_flip_batches(image_set), 5)
    seen: dict[int, Tensor] = {}
    for process in range(2):
        prepared = prepare_data_loader(
            crop_flip_batches(image_set, batch_size=4), num_processes=2, process_index=process
        )
        prepared.set_epoch(5)
        seen |= by_image(skip_first_batches(prepared, skipped) if skipped else prepared)
    assert len(seen) == 24 - 8 * skipped
    assert same(seen, {index: expected[index] for index in seen})


def test_augmentation_refuses() -> None:
    with pytest.raises(ValueError, match="augment is none, crop-flip, imagenet; got 'mixup'"):
        crop_flip_batches(colours(10), augment="mixup")
    with pytest.raises(ValueError, match="seed is a whole number"):
        crop_flip_batches(colours(10), shuffle=False, seed=-1)
    with pytest.raises(ValueError, match="workers is a whole number"):
        crop_flip_batches(colours(10), workers=-1)


# ImageNet's, which torchvision computes


def test_without_torchvision_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without(name: str, *arguments: object, **keywords: object) -> object:
        if name.partition(".")[0] == "torchvision":
            raise ImportError("no torchvision")
        return real_import(name, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr("builtins.__import__", without)
    with pytest.raises(DataError, match=r"needs torchvision.*pip install 'foldbit\[vision\]'"):
        crop_flip_batches(colours(10), augment="imagenet")


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_where_torchvision_is_not_installed() -> None:
    with pytest.raises(DataError, match=r"needs torchvision.*pip install 'foldbit\[vision\]'"):
        augment.imagenet((8, 8))
