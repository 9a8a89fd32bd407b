"""Image sets, and batches of them: their order and what is in them."""

from __future__ import annotations

import pytest
import torch

from foldbit.training import images
from foldbit.training.idx import DataError
from foldbit.training.images import ImageData, ImageSet

HALF = ((0.5,), (0.25,))


# Image sets


def image_set(count: int = 10, channels: int = 1) -> ImageSet:
    """Images whose every value is their index, as their label is."""
    index = torch.arange(count)
    return ImageSet(index.to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, channels, 3, 2).contiguous(), index)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 3, 3), torch.zeros(2).long(), "got float32 [2, 1, 3, 3]"),
        (torch.zeros(2, 3, 3).byte(), torch.zeros(2).long(), "got uint8 [2, 3, 3]"),
        (torch.zeros(0, 1, 3, 3).byte(), torch.zeros(0).long(), "none of them 0"),
        (torch.zeros(2, 1, 3, 3).byte(), torch.zeros(2), "labels are int64"),
        (torch.zeros(2, 1, 3, 3).byte(), torch.zeros(2, 1).long(), "got int64 [2, 1]"),
        (torch.zeros(2, 1, 3, 3).byte(), torch.zeros(3).long(), "2 images, but 3 labels"),
        (torch.zeros(2, 1, 3, 3).byte(), torch.tensor([0, -1]), "labels count from 0; got -1"),
    ],
)
def test_image_set_refuses(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError) as caught:
        ImageSet(images, labels)
    assert message in str(caught.value)


def test_image_set_can_be_sliced() -> None:
    assert image_set()[2:4].labels.tolist() == [2, 3]
    assert image_set()[torch.arange(10) > 7].images[:, 0, 0, 0].tolist() == [8, 9]
    with pytest.raises(DataError, match="none of them 0"):
        image_set()[:0]


def test_image_data_refuses() -> None:
    ten = tuple("0123456789")
    with pytest.raises(DataError, match="a test label is 9; labels of 9 classes are 0 to 8"):
        ImageData("x", image_set(9), image_set(10), ten[:9], (0.5,), (0.5,), "here")
    with pytest.raises(DataError, match="differ in shape"):
        ImageData("x", image_set(), image_set(channels=3), ten, (0.5,), (0.5,), "here")
    for mean, std in [((0.5, 0.5), (0.5,)), ((0.5,), ()), ((0.5,), (0.0,)), ((float("nan"),), (0.5,))]:
        with pytest.raises(DataError, match="one each for 1 channels"):
            ImageData("x", image_set(), image_set(), ten, mean, std, "here")


def test_image_sets_in_grey_and_in_colour() -> None:
    grey, colour = image_set(), image_set(channels=3)
    assert (grey.shape, colour.shape) == ((1, 3, 2), (3, 3, 2))
    assert grey.with_channels(1) is grey and colour.with_channels(3) is colour
    made = grey.with_channels(3)
    assert torch.equal(made.images, colour.images) and torch.equal(made.labels, grey.labels)
    assert made.images.untyped_storage().nbytes() == grey.images.untyped_storage().nbytes()
    chosen = made.pixels(torch.tensor([7, 2]))
    assert torch.equal(chosen, colour.images[[7, 2]]) and chosen.is_contiguous()
    # Equal red, green and blue are their own grey, at any length.
    long = ImageSet(torch.arange(2500).remainder(256).byte().reshape(-1, 1, 1, 1), torch.zeros(2500).long())
    assert torch.equal(long.with_channels(3).with_channels(1).images, long.images)
    primary = ImageSet((255 * torch.eye(3)).byte().reshape(3, 3, 1, 1), torch.arange(3))
    assert primary.with_channels(1).images.flatten().tolist() == [76, 150, 29]  # of 255: .299, .587, .114
    with pytest.raises(DataError, match="images of 2 channels cannot be given 3"):
        image_set(channels=2).with_channels(3)


# Batches


def indices(loader: object) -> list[list[int]]:
    """The images of each batch, which are labelled by their index."""
    return [labels.tolist() for _, labels in loader]  # type: ignore[attr-defined]


def test_batches_hold_normalized_images() -> None:
    values = torch.randint(0, 256, (5, 2, 4, 3), dtype=torch.uint8)
    mean, std = (0.25, 0.5), (0.5, 0.125)
    loader = images.batches(ImageSet(values, torch.arange(5)), 2, shuffle=True, normalize=(mean, std))
    for batch, labels in loader:
        assert batch.dtype == torch.float32 and labels.dtype == torch.int64
        expected = (values[labels].double() / 255 - torch.tensor(mean).reshape(2, 1, 1)) / torch.tensor(
            std
        ).reshape(2, 1, 1)
        torch.testing.assert_close(batch.double(), expected, rtol=0, atol=1e-6)
    one, label = loader.dataset[3]
    assert one.shape == (2, 4, 3) and label == 3


def test_batches_cover_everything_once() -> None:
    in_order = images.batches(image_set(10), 4, shuffle=False, normalize=HALF)
    assert indices(in_order) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(images.batches(image_set(10), 4, shuffle=False, normalize=HALF, drop_last=True)) == 2
    shuffled = [
        i for batch in indices(images.batches(image_set(50), 4, shuffle=True, normalize=HALF)) for i in batch
    ]
    assert shuffled != list(range(50))
    assert sorted(shuffled) == list(range(50))


def order(seed: int, epoch: int) -> list[int]:
    sampler = images.EpochSampler(range(50), seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    first = order(3, 2)
    torch.manual_seed(2)
    assert order(3, 2) == first
    orders = {tuple(order(seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    # Runs of today are resumed by versions of tomorrow.
    assert list(images.EpochSampler(range(8), 0)) == [4, 1, 3, 5, 0, 2, 6, 7]


def test_a_pass_leaves_the_global_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    indices(images.batches(image_set(), 4, shuffle=True, normalize=HALF))
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_refuse() -> None:
    for size in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="batch_size is a whole number, at least 1"):
            images.batches(image_set(), size, shuffle=False, normalize=HALF)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="drop_last leaves nothing of 10 images"):
        images.batches(image_set(), 11, shuffle=False, normalize=HALF, drop_last=True)
    with pytest.raises(DataError, match="one each for 3 channels"):
        images.batches(image_set(channels=3), 2, shuffle=False, normalize=HALF)
    with pytest.raises(ValueError, match="seed is a whole number"):
        images.batches(image_set(), 2, shuffle=True, seed=-1, normalize=HALF)
    with pytest.raises(ValueError, match="epoch is a whole number"):
        images.EpochSampler(range(3)).set_epoch(-1)


def test_accelerate_keeps_the_order() -> None:
    accelerate = pytest.importorskip("accelerate")

    def loader() -> torch.utils.images.DataLoader:
        return images.batches(image_set(22), 4, shuffle=True, seed=7, normalize=HALF)

    def plain(epoch: int) -> list[list[int]]:
        expected = loader()
        expected.sampler.set_epoch(epoch)
        return indices(expected)

    prepared = accelerate.Accelerator(cpu=True).prepare(loader())
    assert [indices(prepared), indices(prepared)] == [plain(0), plain(1)]  # it counts epochs itself
    prepared.set_epoch(5)
    assert indices(prepared) == plain(5)
    prepared.set_epoch(5)
    assert indices(accelerate.skip_first_batches(prepared, 2)) == plain(5)[2:]


@pytest.mark.parametrize("process", [0, 1])
def test_accelerate_shares_out_the_order(process: int) -> None:
    pytest.importorskip("accelerate")
    from accelerate.data_loader import prepare_data_loader, skip_first_batches

    loader = images.batches(image_set(24), 4, shuffle=True, seed=7, normalize=HALF)
    loader.sampler.set_epoch(5)  # type: ignore[attr-defined]
    expected = indices(loader)[process::2]
    prepared = prepare_data_loader(loader, num_processes=2, process_index=process)
    prepared.set_epoch(5)
    assert indices(prepared) == expected
    prepared.set_epoch(5)
    assert indices(skip_first_batches(prepared, 1)) == expected[1:]
