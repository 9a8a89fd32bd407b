"""IDX files, MNIST and Fashion-MNIST: hostile files, the places looked in, downloads, the fallback."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import os
import struct
import typing
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from foldbit.training import data, mnist, recipes
from foldbit.training import idx as idx_files
from foldbit.training.data import DataFallback
from foldbit.training.idx import DataError

FILES = tuple(mnist.MNIST.files)
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = FILES
(URL,) = mnist.FASHION_MNIST.urls


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


def change(monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """Change what is known of Fashion-MNIST."""
    monkeypatch.setattr(mnist, "FASHION_MNIST", dataclasses.replace(mnist.FASHION_MNIST, **changes))


def publish(monkeypatch: pytest.MonkeyPatch, contents: dict[str, bytes]) -> None:
    """Make these contents the published ones, of Fashion-MNIST and of MNIST."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    change(monkeypatch, files=digests)
    monkeypatch.setattr(mnist, "MNIST", dataclasses.replace(mnist.MNIST, files=digests))


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

    change(monkeypatch, package=("dataset-fashion-mnist", tmp_path / "no-debian"))
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
        assert url.startswith(URL) and timeout > 0
        return Response(gzip.compress(contents[url.removeprefix(URL).removesuffix(".gz")]))

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
        dict(zip(FILES, [*small_fashion().values()][2:] + [*small_fashion().values()][:2], strict=True)),
        "are train and t10k swapped?",
    ),
    "train twice": (
        dict(zip(FILES, [*small_fashion().values()][:2] * 2, strict=True)),
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
    change(monkeypatch, package=("dataset-fashion-mnist", write_files(tmp_path / "debian", small_fashion())))
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
    assert data.fashion_mnist().source == f"a download from {URL}, kept in {cache}"
    assert asked == [f"{URL}{name}.gz" for name in FILES]
    assert sorted(path.name for path in cache.iterdir()) == sorted(f"{name}.gz" for name in FILES)

    assert data.fashion_mnist().source == f"an earlier download ({cache})"

    change(monkeypatch, package=("dataset-fashion-mnist", write_files(tmp_path / "debian", small_fashion())))
    assert data.fashion_mnist().source.startswith("Debian's package dataset-fashion-mnist")

    mine = write_files(tmp_path / "mine", small_fashion())
    assert data.fashion_mnist(mine).source == f"the folder {mine}"
    assert len(asked) == 4


def test_failures_are_all_told(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        data.fashion_mnist(cache=tmp_path / "cache")
    message = str(caught.value)
    assert f"{tmp_path / 'no-debian'} is not a folder" in message
    assert f"{tmp_path / 'cache'} is not a folder" in message
    assert "no network in tests" in message
    assert "name that folder" in message
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DataError, match=r"a download from .*: not allowed"):
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
    assert asked == [f"{URL}{TEST_IMAGES}.gz"]


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
    change(monkeypatch, package=("dataset-fashion-mnist", REAL))
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


# MNIST


def test_mnist_is_read_as_fashion_mnist_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_files(tmp_path / "mine" / "MNIST" / "raw", small_fashion(), zipped=False).parents[1]
    found = mnist.mnist(folder)
    assert (found.name, found.classes) == ("mnist", tuple("0123456789"))
    np.testing.assert_array_equal(found.train.images[:, 0].numpy(), random_images(40, 1))
    assert "not the published" in found.source
    publish(monkeypatch, small_fashion())
    assert "not the published" not in mnist.mnist(folder).source
    with pytest.raises(DataError, match="nor MNIST/raw"):
        mnist.mnist(write_files(tmp_path / "other" / "FashionMNIST" / "raw", small_fashion()).parents[1])


def test_mnist_downloads_from_the_next_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = small_fashion()
    publish(monkeypatch, contents)
    first, second = mnist.MNIST.urls
    urls = []

    def urlopen(url: str, *, timeout: float) -> Response:
        urls.append(url)
        name = url.rpartition("/")[2]
        if url == first + f"{TRAIN_LABELS}.gz":
            raise urllib.error.URLError("down")
        if url == first + f"{TEST_IMAGES}.gz":
            return Response(gzip.compress(contents[TRAIN_IMAGES]))
        return Response(gzip.compress(contents[name.removesuffix(".gz")]))

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    found = mnist.mnist()
    assert len(found.test) == 20 and "not the published" not in found.source
    assert [url for url in urls if url.startswith(second)] == [
        f"{second}{TRAIN_LABELS}.gz",
        f"{second}{TEST_IMAGES}.gz",
    ]


def test_mnist_that_no_mirror_has(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        mnist.mnist()
    message = str(caught.value)
    assert message.startswith("MNIST is not to be had") and "Debian" not in message
    assert all(
        f"{url}{TRAIN_IMAGES}.gz cannot be had: <urlopen error no network" in message
        for url in mnist.MNIST.urls
    )
    assert f"Put the four .gz files of {mnist.MNIST.urls[0]}" in message


# load


def test_load(tmp_path: Path) -> None:
    mine = write_files(tmp_path / "mine", small_fashion())
    assert data.load("fashion-mnist", mine).name == "fashion-mnist"
    assert data.load("mnist", mine).name == "mnist"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("emnist", {}, "unknown data set 'emnist'; known are fashion-mnist, mnist, digits, cifar10"),
        ("digits", {"folder": "here"}, "take no folder; got 'here'"),
        ("folder", {}, "say which folder your images are in"),
        ("cifar10", {"image_size": 40}, "images of cifar10 have a size of their own"),
        ("folder", {"folder": "here", "image_size": 0}, "image_size is 1 at least; got 0"),
        ("mnist", {"channels": 2}, r"channels are 1 \(grey\) or 3 \(colour\); got 2"),
        ("imagenet", {}, "ImageNet is not downloaded, and no folder is named. Get ILSVRC2012_img_train.tar"),
    ],
)
def test_load_refuses(name: data.Name, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.load(name, **arguments)


def test_recipes_know_the_same_data_sets() -> None:
    names = typing.get_type_hints(recipes.DataConfig)["name"]
    assert typing.get_args(names) == typing.get_args(data.Name)


@pytest.mark.parametrize(
    ("field", "given_value", "least"), [("train_images", 0, 1), ("image_size", -3, 1), ("workers", -1, 0)]
)
def test_recipes_refuse_counts_that_are_none(field: str, given_value: int, least: int) -> None:
    with pytest.raises(ValueError, match=f"data.{field} must be at least {least}; got {given_value}"):
        recipes.DataConfig(**{field: given_value})  # type: ignore[arg-type]


def test_load_in_colour(tmp_path: Path) -> None:
    mine = write_files(tmp_path / "mine", small_fashion())
    grey, colour = data.load("mnist", mine), data.load("mnist", mine, channels=3)
    assert colour.train.shape == colour.test.shape == (3, 28, 28)
    assert torch.equal(colour.train.images, grey.train.images.repeat(1, 3, 1, 1))
    assert (colour.mean, colour.std) == (3 * grey.mean, 3 * grey.std)
    assert (colour.source, colour.classes) == (grey.source, grey.classes)


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
