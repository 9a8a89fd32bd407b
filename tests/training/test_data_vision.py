"""What torchvision computes for training, or publishes the same of: against torchvision itself."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foldbit.training import augment, cifar, data, folders, image_files, images, mnist
from foldbit.training.image_files import ImageFiles
from foldbit.training.images import ImageSet

torchvision = pytest.importorskip("torchvision", reason="torchvision is in the vision environment only")
from PIL import Image  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

pytestmark = pytest.mark.vision


def picture(number: int, height: int, width: int, mode: str = "RGB") -> Image.Image:
    """A smooth image that its number decides."""
    small = np.random.default_rng(number).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def write(folder: Path, counts: dict[str, int], mode: str = "RGB") -> Path:
    """Images of several sizes in folders."""
    for start, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(100 * start, 100 * start + count):
            image = picture(number, 20 + number % 7, 30 - number % 11, mode)
            image.save(folder / name / f"{number}.png")
    return folder


# Test images


@pytest.mark.parametrize(
    "size", [(256, 256), (300, 400), (401, 299), (500, 60), (60, 500), (225, 224), (37, 41)]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_are_resized_and_cropped_as_torchvision_does(size: tuple[int, int], mode: str) -> None:
    image = picture(3, *size, mode)
    expected = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])(image)
    made = image_files._fit(image, (224, 224))
    assert made.size == (224, 224)
    np.testing.assert_array_equal(np.asarray(made), np.asarray(expected))


def test_classes_are_those_of_torchvision(tmp_path: Path) -> None:
    folder = write(tmp_path / "train", {"b": 3, "a": 4, "Z": 2, "ä": 2})
    write(tmp_path / "test", {"b": 1, "a": 1, "Z": 1, "ä": 1})
    theirs = torchvision.datasets.ImageFolder(folder)
    ours = data.load("folder", tmp_path, image_size=16)
    assert list(ours.classes) == theirs.classes
    assert isinstance(ours.train, ImageFiles)
    labels = {ours.train.path(i): int(ours.train.labels[i]) for i in range(len(ours.train))}
    assert labels == {Path(path): label for path, label in theirs.samples}


# Published checksums


@pytest.mark.parametrize("known", [cifar.CIFAR10, cifar.CIFAR100], ids=lambda known: known.name)
def test_checksums_of_cifar_are_those_of_torchvision(known: cifar.Cifar) -> None:
    theirs = getattr(torchvision.datasets, known.name.upper())
    assert (known.url, known.md5, known.folder) == (theirs.url, theirs.tgz_md5, theirs.base_folder)
    assert known.archive == theirs.filename
    assert [list(item) for item in known.train.items()] == theirs.train_list
    assert [list(item) for item in known.test.items()] == theirs.test_list
    ((name, md5),) = known.meta.items()
    assert theirs.meta == {"filename": name, "key": known.names, "md5": md5}


def test_mnist_comes_from_where_torchvision_finds_it() -> None:
    theirs = torchvision.datasets.MNIST
    assert sorted(mnist.MNIST.urls) == sorted(theirs.mirrors)
    assert [f"{name}.gz" for name in mnist.MNIST.files] == [name for name, _ in theirs.resources]
    classes = torchvision.datasets.FashionMNIST.classes
    assert [name.lower() for name in mnist.FASHION_MNIST.classes] == [name.lower() for name in classes]


# Augmentation


def test_crop_flip_is_that_of_torchvision() -> None:
    drawn = torch.randint(0, 256, (40, 3, 9, 13), dtype=torch.uint8)
    numbers = augment.draws(1, np.zeros(40, np.int64), np.arange(40), 3)
    made = augment.crop_flip(drawn, numbers)
    where = augment._below(numbers[:, :2], 9).tolist()
    flips = augment._below(numbers[:, 2], 2).tolist()
    for image, result, (top, left), flip in zip(drawn, made, where, flips, strict=True):
        expected = v2.functional.crop(v2.functional.pad(image, [4]), top, left, 9, 13)
        assert torch.equal(result, v2.functional.hflip(expected) if flip else expected)


def pass_of(image_set: images.Images, epoch: int = 3, **changes: Any) -> dict[int, Tensor]:
    """The images of an epoch, by their place in the set."""
    channels = image_set.shape[0]
    arguments = {"batch_size": 4, "shuffle": True, "seed": 2, "augment": "imagenet", **changes}
    loader = images.batches(image_set, normalize=((0.0,) * channels, (1.0,) * channels), **arguments)  # type: ignore[arg-type]
    if arguments["shuffle"]:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        order = [index % len(image_set) for index in loader.sampler]
    else:
        order = list(range(len(image_set)))
    made = torch.cat([x for x, _ in loader])
    return dict(zip(order, made, strict=False))


def same(one: dict[int, Tensor], other: dict[int, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[index], other[index]) for index in one)


@pytest.fixture(params=["files", "grey files", "memory", "grey memory"])
def image_set(request: pytest.FixtureRequest, tmp_path: Path) -> images.Images:
    grey = request.param.startswith("grey")
    if "memory" in request.param:
        drawn = torch.randint(0, 256, (10, 1 if grey else 3, 16, 12), dtype=torch.uint8)
        return ImageSet(drawn, torch.arange(10))
    write(tmp_path, {"cat": 6, "dog": 6}, "L" if grey else "RGB")
    found = data.load("folder", tmp_path, image_size=16).train
    assert len(found) == 10 and found.shape == (1 if grey else 3, 16, 16)
    return found


def test_seed_epoch_and_image_decide_imagenet_augmentation(image_set: images.Images) -> None:
    first = pass_of(image_set)
    assert first[0].shape == image_set.shape
    before = torch.get_rng_state()
    for changes in ({}, {"batch_size": 3}, {"workers": 2}, {"workers": 1, "batch_size": 10}):
        assert same(pass_of(image_set, **changes), first), changes
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert same(pass_of(image_set), first)
    assert same(pass_of(image_set, shuffle=False), pass_of(image_set, epoch=0))
    for changes in ({"epoch": 4}, {"seed": 3}, {"augment": "none"}):
        other = pass_of(image_set, **changes)
        assert not any(torch.equal(first[index], other[index]) for index in first)


def test_resuming_repeats_imagenet_augmentation(image_set: images.Images) -> None:
    accelerate = pytest.importorskip("accelerate")
    channels = image_set.shape[0]
    loader = images.batches(
        image_set,
        3,
        shuffle=True,
        normalize=((0.0,) * channels, (1.0,) * channels),
        augment="imagenet",
        workers=1,
    )
    prepared = accelerate.Accelerator(cpu=True).prepare(loader)
    prepared.set_epoch(5)
    whole = list(prepared)
    prepared.set_epoch(5)
    rest = list(accelerate.skip_first_batches(prepared, 2))
    assert len(rest) == 2
    for (x, _), (expected, _) in zip(rest, whole[2:], strict=True):
        assert torch.equal(x, expected)


def test_imagenet_augmentation_is_of_the_whole_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the file has, not of the centre in the size wanted, whether that is held in memory or not."""
    write(tmp_path, {"cat": 5, "dog": 5})
    held = data.load("folder", tmp_path, image_size=16).train
    monkeypatch.setattr(folders, "_MOST_HELD", 0)
    decoded = data.load("folder", tmp_path, image_size=16).train
    assert isinstance(held, ImageFiles) and held.held is not None
    assert isinstance(decoded, ImageFiles) and decoded.held is None
    first = pass_of(held)
    assert same(first, pass_of(decoded))
    number = int(augment.draws(2, np.array([3]), np.array([0]), 3)[0, 0])
    torch.manual_seed(number)
    expected = v2.Compose(
        [
            v2.RandomResizedCrop(16),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.4, 0.4, 0.4),
            v2.PILToTensor(),
        ]
    )(Image.open(held.path(0)))
    torch.testing.assert_close(first[0], expected / 255, rtol=0, atol=1e-6)


def test_imagenet_augmentation_can_be_sent_to_processes_that_are_not_forked(image_set: images.Images) -> None:
    channels = image_set.shape[0]
    normalize = ((0.0,) * channels, (1.0,) * channels)
    dataset = images.batches(image_set, 2, shuffle=True, normalize=normalize, augment="imagenet").dataset
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[13][0], dataset[13][0])


def test_imagenet_augmentation_is_spread_out() -> None:
    """Half of the images are mirrored, and their parts are all sizes: a ramp shows which part was taken."""
    ramp = torch.arange(64, dtype=torch.uint8).expand(1, 64, 64)
    image_set = ImageSet(ramp.expand(400, 1, 64, 64), torch.arange(400))
    transform = augment.imagenet((64, 64))
    transform.transform.transforms[2] = torch.nn.Identity()  # type: ignore[attr-defined]
    numbers = augment.draws(0, np.zeros(400, np.int64), np.arange(400), 3)[:, 0].tolist()
    made = torch.stack([transform(image_set.images[i], n) for i, n in enumerate(numbers)]).float()
    widths = made[:, 0, 32, -1] - made[:, 0, 32, 0]  # negative where mirrored
    assert 150 < int((widths < 0).sum()) < 250
    assert widths.abs().min() < 24 and widths.abs().max() > 55
