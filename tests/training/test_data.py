"""Data: hostile files, the places looked in, downloads, the fallback, and the order of batches."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import struct
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from foldbit.training import data, images
from foldbit.training import idx as idx_files
from foldbit.training.data import DataFallback
from foldbit.training.idx import DataError
from foldbit.training.images import ImageData, ImageSet

HALF = ((0.5,), (0.25,))
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = data.FILES


def idx(array: np.ndarray) -> bytes:
    """The IDX file of a uint8 array."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def random_images(count: int, seed: int, side: int = 28) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side), dtype=np.uint8)


def small_fashion() -> dict[str, bytes]:
    """Four files of the right kind: 40 training and 20 test images."""
    labels = np.arange(40, dtype=np.uint8) % 10
    return {
        TRAIN_IMAGES: idx(random_images(40, 1)),
        TRAIN_LABELS: idx(labels),
        TEST_IMAGES: idx(random_images(20, 2)),
        TEST_LABELS: idx(labels[:20]),
    }


def write_files(folder: Path, contents: dict[str, bytes], *, zipped: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


def publish(monkeypatch: pytest.MonkeyPatch, contents: dict[str, bytes]) -> None:
    """Make these contents the published ones."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(data, "FILES", digests)


class Response(io.BytesIO):
    """What urlopen returns."""

    @property
    def length(self) -> int | None:
        return len(self.getbuffer())


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Debian package, an empty cache, no network."""

    def unreachable(url: str, **_: object) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr(data, "DEBIAN", tmp_path / "no-debian")
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A network that serves the small files, which are then the published ones; the addresses asked for."""
    contents = small_fashion()
    publish(monkeypatch, contents)
    urls: list[str] = []

    def urlopen(url: str, *, timeout: float) -> Response:
        urls.append(url)
        assert url.startswith(data.URL) and timeout > 0
        return Response(gzip.compress(contents[url.removeprefix(data.URL).removesuffix(".gz")]))

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return urls


# IDX files


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("idx") / "file"


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=6)), st.booleans())
def test_idx_round_trip(scratch: Path, array: np.ndarray, zipped: bool) -> None:
    scratch.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    read = idx_files.read_idx(scratch)
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)


@given(
    st.binary(max_size=64),
    st.sampled_from([b"", b"\0\0\x08", b"\0\0\x08\x01", b"\x1f\x8b", b"\x1f\x8b\x08\0"]),
)
def test_idx_of_arbitrary_bytes_is_read_or_refused(scratch: Path, rest: bytes, start: bytes) -> None:
    scratch.write_bytes(start + rest)
    try:
        assert idx_files.read_idx(scratch).size >= 1
    except DataError as error:
        assert str(scratch) in str(error)


ARRAY = np.arange(12, dtype=np.uint8).reshape(3, 4)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with nothing"),
        (b"\0\0\x08", "not an IDX file"),
        (b"PNG!" + idx(ARRAY), "starts with 50 4e 47 21"),
        (b"\0\0\x0d\x01" + struct.pack(">I", 1) + b"\0\0\0\0", "IDX type 0x0d"),
        (b"\0\0\x08\0" + b"\0" * 8, "claims 0 dimensions"),
        (b"\0\0\x08\x05" + struct.pack(">5I", 1, 1, 1, 1, 1) + b"\0", "claims 5 dimensions"),
        (b"\0\0\x08\x02\0\0\0\x03", "ends within its header"),
        (idx(ARRAY)[:-1], "truncated: its header claims 3 x 4 values, it holds 11"),
        (idx(ARRAY)[:12], "it holds 0"),
        (idx(ARRAY) + b"\0", "bytes left"),
        (b"\0\0\x08\x01\0\0\0\0", "claims 0 values"),
        (b"\0\0\x08\x02" + b"\xff" * 8 + b"\0" * 9, "claims 4294967295 x 4294967295 values"),
        (b"\0\0\x08\x04" + b"\xff" * 16, "claims 4294967295 x 4294967295 x"),
        (b"\0\0\x08\x04\0\0\0\0" + b"\xff" * 12, "claims 0 x 4294967295"),
    ],
)
def test_idx_refuses(tmp_path: Path, content: bytes, message: str, zipped: bool) -> None:
    path = tmp_path / "some-file"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(DataError) as caught:
        idx_files.read_idx(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_idx_refuses_damaged_gzip(tmp_path: Path) -> None:
    path = tmp_path / "file.gz"
    whole = gzip.compress(idx(random_images(3, 0)))
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # in the checksum
    for content in (whole[:-20], whole[:5], bytes(flipped), whole + b"rubbish", whole[:10] + b"\xff" * 50):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"file\.gz is a damaged or truncated gzip"):
            idx_files.read_idx(path)


def test_idx_name_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "plain.gz").write_bytes(idx(ARRAY))
    np.testing.assert_array_equal(idx_files.read_idx(tmp_path / "plain.gz"), ARRAY)


def test_idx_reads_no_more_than_the_header_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 100) + bytes(50_000_000), 1))
    unzipped = 0
    read = gzip.GzipFile.read

    def counting(self: gzip.GzipFile, size: int | None = -1) -> bytes:
        nonlocal unzipped
        chunk = read(self, size)
        unzipped += len(chunk)
        return chunk

    monkeypatch.setattr(gzip.GzipFile, "read", counting)
    with pytest.raises(DataError, match="bytes left"):
        idx_files.read_idx(path)
    assert unzipped < 200


def test_idx_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(idx(ARRAY))
    assert idx_files.read_idx(path, most_bytes=12).size == 12
    with pytest.raises(DataError, match="expected 1 to 11"):
        idx_files.read_idx(path, most_bytes=11)


def test_idx_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: no such file"):
        idx_files.read_idx(tmp_path / "absent")
    with pytest.raises(DataError, match="but a folder"):
        idx_files.read_idx(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait forever
    with pytest.raises(DataError, match="no such file"):
        idx_files.read_idx(tmp_path / "pipe")


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


# Fashion-MNIST: where it is found


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("below", [".", "raw", "FashionMNIST/raw"])
def test_folder(tmp_path: Path, below: str, zipped: bool) -> None:
    write_files(tmp_path / "mine" / below, small_fashion(), zipped=zipped)
    found = data.fashion_mnist(tmp_path / "mine")
    images = random_images(40, 1)
    assert found.name == "fashion-mnist" and len(found.classes) == 10
    np.testing.assert_array_equal(found.train.images[:, 0].numpy(), images)
    assert found.test.images.shape == (20, 1, 28, 28)
    assert found.test.labels.tolist() == [*range(10), *range(10)]
    assert found.mean == pytest.approx([images.mean() / 255])
    assert found.std == pytest.approx([images.std() / 255])
    assert str(tmp_path / "mine") in found.source
    assert "not the published" in found.source


def test_published_files_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(monkeypatch, small_fashion())
    assert (
        "not the published" not in data.fashion_mnist(write_files(tmp_path / "mine", small_fashion())).source
    )


def swapped(first: str, second: str) -> dict[str, bytes]:
    contents = small_fashion()
    return {**contents, first: contents[second], second: contents[first]}


WRONG_LABELS = idx(np.full(40, 10, np.uint8))
WRONG_FILES: dict[str, tuple[dict[str, bytes], str]] = {
    "images and labels swapped": (swapped(TRAIN_IMAGES, TRAIN_LABELS), f"{TRAIN_IMAGES}.gz holds labels"),
    "images for labels": (swapped(TEST_LABELS, TRAIN_IMAGES), f"{TRAIN_IMAGES}.gz holds labels"),
    "train and test images swapped": (swapped(TRAIN_IMAGES, TEST_IMAGES), "20 images, but 40 labels"),
    "train and test labels swapped": (swapped(TRAIN_LABELS, TEST_LABELS), "40 images, but 20 labels"),
    "train and test swapped": (
        dict(zip(data.FILES, [*small_fashion().values()][2:] + [*small_fashion().values()][:2], strict=True)),
        "are train and t10k swapped?",
    ),
    "train twice": (
        dict(zip(data.FILES, [*small_fashion().values()][:2] * 2, strict=True)),
        "same images for training and for testing",
    ),
    "label 10": ({**small_fashion(), TRAIN_LABELS: WRONG_LABELS}, "has the label 10; expected 0 to 9"),
    "labels of two dimensions": (
        {**small_fashion(), TRAIN_LABELS: idx(ARRAY)},
        f"{TRAIN_LABELS}.gz has the shape [3, 4]; expected labels [N]",
    ),
    "labels that are images": (
        {**small_fashion(), TRAIN_LABELS: small_fashion()[TRAIN_IMAGES]},
        f"{TRAIN_LABELS}.gz holds images instead of labels",
    ),
    "image size": (
        {**small_fashion(), TEST_IMAGES: idx(random_images(20, 0, side=8))},
        f"{TEST_IMAGES}.gz has the shape [20, 8, 8]; expected images [N, 28, 28]",
    ),
    "not IDX": ({**small_fashion(), TEST_IMAGES: b"<html>"}, f"{TEST_IMAGES}.gz is not an IDX file"),
    "too many": (
        {**small_fashion(), TRAIN_LABELS: b"\0\0\x08\x01\x7f\xff\xff\xff"},
        "claims 2147483647 values; expected 1 to 67,108,864",
    ),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_folder_of_wrong_files(tmp_path: Path, case: str) -> None:
    contents, message = WRONG_FILES[case]
    with pytest.raises(DataError) as caught:
        data.fashion_mnist(write_files(tmp_path / "mine", contents))
    assert message in str(caught.value)
    assert str(tmp_path / "mine") in str(caught.value)


def test_named_folder_must_be_right(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "DEBIAN", write_files(tmp_path / "debian", small_fashion()))
    contents = small_fashion()
    del contents[TEST_LABELS]
    with pytest.raises(DataError, match=f"lacks {TEST_LABELS} "):
        data.fashion_mnist(write_files(tmp_path / "mine", contents))
    with pytest.raises(DataError, match="has none of train-images"):
        data.fashion_mnist(write_files(tmp_path / "empty", {}))
    with pytest.raises(DataError, match="absent is not a folder"):
        data.fashion_mnist(tmp_path / "absent")
    assert not asked


def test_search_order(tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "xdg" / "foldbit" / "fashion-mnist"
    assert data.fashion_mnist().source == f"a download from {data.URL}, kept in {cache}"
    assert asked == [f"{data.URL}{name}.gz" for name in data.FILES]
    assert sorted(path.name for path in cache.iterdir()) == sorted(f"{name}.gz" for name in data.FILES)

    assert data.fashion_mnist().source == f"an earlier download ({cache})"

    monkeypatch.setattr(data, "DEBIAN", write_files(tmp_path / "debian", small_fashion()))
    assert data.fashion_mnist().source.startswith("Debian's package dataset-fashion-mnist")

    mine = write_files(tmp_path / "mine", small_fashion())
    assert data.fashion_mnist(mine).source == f"the folder {mine}"
    assert len(asked) == 4


def test_failures_are_all_told(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        data.fashion_mnist(cache=tmp_path / "cache")
    message = str(caught.value)
    assert f"{data.DEBIAN} is not a folder" in message
    assert f"{tmp_path / 'cache'} is not a folder" in message
    assert "no network in tests" in message
    assert "name that folder" in message
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DataError, match="download: not allowed"):
        data.fashion_mnist(download=False)


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        write_files(tmp_path / ".cache" / "foldbit" / "fashion-mnist", small_fashion())
        assert str(tmp_path / ".cache") in data.fashion_mnist(download=False).source


# Fashion-MNIST: downloads


def test_download_repairs_the_cache(tmp_path: Path, asked: list[str]) -> None:
    cache = write_files(tmp_path / "cache", small_fashion())
    (cache / f"{TEST_IMAGES}.gz").write_bytes(b"damaged")
    assert len(data.fashion_mnist(cache=cache).test) == 20
    assert asked == [f"{data.URL}{TEST_IMAGES}.gz"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (gzip.compress(idx(random_images(40, 3))), "not the published file: its contents have SHA-256"),
        (gzip.compress(small_fashion()[TRAIN_IMAGES])[:-100], "damaged or truncated gzip"),
        (b"<html>Please log in</html>", "not an IDX file"),
        (b"", "not an IDX file"),
    ],
)
def test_wrong_download_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, message: str
) -> None:
    publish(monkeypatch, small_fashion())
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: Response(answer))
    with pytest.raises(DataError) as caught:
        data.fashion_mnist(cache=tmp_path / "cache")
    assert message in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_endless_download_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(Response):
        length = None

        def read(self, size: int | None = -1) -> bytes:
            return b"\0" * (size or 0)

    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: Endless())
    with pytest.raises(DataError, match="sends more than 33,554,432 bytes"):
        data.fashion_mnist(cache=tmp_path / "cache")


def test_cache_that_cannot_be_written(tmp_path: Path, asked: list[str]) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot be written"):
        data.fashion_mnist(cache=tmp_path / "cache")


# The real data sets


REAL = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not REAL.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_real_fashion_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DEBIAN", REAL)
    real = data.fashion_mnist(download=False)
    assert (
        real.source == f"Debian's package dataset-fashion-mnist ({REAL})"
    )  # and not "... not the published ones"
    assert (len(real.train), len(real.test)) == (60_000, 10_000)
    assert real.mean == pytest.approx([0.2860], abs=5e-5)
    assert real.std == pytest.approx([0.3530], abs=5e-5)
    assert real.train.labels.bincount().tolist() == [6000] * 10
    assert real.test.labels.bincount().tolist() == [1000] * 10


def test_digits() -> None:
    pytest.importorskip("sklearn")
    digits = data.digits()
    assert (len(digits.train), len(digits.test)) == (1433, 364)
    assert digits.train.images.shape[1:] == (1, 28, 28)
    assert digits.train.images.max() == 255
    assert not digits.train.images[:, :, [0, 1, -2, -1]].any()
    small = digits.train.images[:, :, 2:-2:3, 2:-2:3]
    enlarged = torch.nn.functional.interpolate(small, scale_factor=3, mode="nearest")
    torch.testing.assert_close(digits.train.images[:, :, 2:-2, 2:-2], enlarged, rtol=0, atol=0)
    shares = digits.test.labels.bincount() / (digits.train.labels.bincount() + digits.test.labels.bincount())
    assert ((shares - 0.2).abs() < 0.01).all()
    assert torch.equal(digits.test.images, data.digits().test.images)


# load


def test_load(tmp_path: Path) -> None:
    assert data.load("fashion-mnist", write_files(tmp_path / "mine", small_fashion())).name == "fashion-mnist"
    with pytest.raises(DataError, match="unknown data set 'mnist'; known are fashion-mnist, digits"):
        data.load("mnist")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="take no folder"):
        data.load("digits", tmp_path)


def test_load_falls_back_only_when_told_to(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    assert data.load("digits").name == "digits"
    with pytest.raises(DataError, match="not to be had"):
        data.load("fashion-mnist")
    with pytest.raises(DataError, match="is not a folder"):
        data.load("fashion-mnist", tmp_path / "absent", fall_back=True)
    with pytest.warns(DataFallback, match="not Fashion-MNIST's") as caught:
        assert data.load("fashion-mnist", fall_back=True).name == "digits"
    assert caught[0].filename == __file__


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
