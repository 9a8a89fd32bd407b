"""Images in folders: layouts, splits, sizes and colours, files that are no images, ImageNet's folders."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foldbit.training import data, folders, image_files, images
from foldbit.training.idx import DataError
from foldbit.training.image_files import ImageFiles
from foldbit.training.images import ImageData

Image = pytest.importorskip("PIL.Image", reason="Pillow, which decodes images, is not installed")


def picture(number: int, height: int = 6, width: int = 6, mode: str = "RGB") -> Any:
    """An image that its number decides."""
    drawn = np.random.default_rng(number)
    values = drawn.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def write(path: Path, image: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def write_class(folder: Path, count: int, start: int = 0, **shape: Any) -> None:
    for number in range(start, start + count):
        write(folder / f"{number}.png", picture(number, **shape))


def two_splits(folder: Path, test: str = "test", **shape: Any) -> Path:
    """Cats 0 to 9 and dogs 100 to 105 to train on; cats 10 to 12 and dogs 110 to 113 to test."""
    write_class(folder / "train" / "cat", 10, **shape)
    write_class(folder / "train" / "dog", 6, 100, **shape)
    write_class(folder / test / "cat", 3, 10, **shape)
    write_class(folder / test / "dog", 4, 110, **shape)
    return folder


def names(part: images.Images) -> list[str]:
    """The files, below the folder of their split."""
    assert isinstance(part, ImageFiles)
    return [str(part.path(index).relative_to(part.folder)) for index in range(len(part))]


def check_pixels(part: images.Images, **shape: Any) -> None:
    """Every image is that of its file's number, and has its class."""
    assert isinstance(part, ImageFiles)
    for index in range(len(part)):
        expected = np.asarray(picture(int(part.path(index).stem), **shape))
        np.testing.assert_array_equal(
            part.pixels(torch.tensor([index]))[0].permute(1, 2, 0).numpy(), expected
        )
        assert part.path(index).parent.name == part.classes[part.labels[index]]


# Layouts


@pytest.mark.parametrize("test", ["test", "val"])
def test_two_splits(tmp_path: Path, test: str) -> None:
    found = data.load("folder", two_splits(tmp_path / "mine", test))
    assert (found.name, found.classes) == ("folder", ("cat", "dog"))
    assert found.source == f"the folder {tmp_path / 'mine'}, {test} for testing"
    assert sorted(names(found.train)) == sorted(
        [*(f"cat/{i}.png" for i in range(10)), *(f"dog/{i}.png" for i in range(100, 106))]
    )
    assert sorted(names(found.test)) == [
        *(
            "cat/10.png",
            "cat/11.png",
            "cat/12.png",
            "dog/110.png",
            "dog/111.png",
            "dog/112.png",
            "dog/113.png",
        )
    ]
    assert found.train.shape == (3, 6, 6)
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for part in (found.train, found.test):
        check_pixels(part)


def test_test_comes_before_val(tmp_path: Path) -> None:
    folder = two_splits(tmp_path)
    write_class(folder / "val" / "cat", 1, 50)
    write_class(folder / "val" / "dog", 1, 51)
    found = data.load("folder", folder)
    assert len(found.test) == 7 and "test for testing" in found.source


def one_level(folder: Path) -> Path:
    write_class(folder / "cat", 23)
    write_class(folder / "dog", 5, 100)
    write_class(folder / "eel", 2, 200)
    return folder


def test_one_level_is_split(tmp_path: Path) -> None:
    found = data.load("folder", one_level(tmp_path))
    assert found.classes == ("cat", "dog", "eel") and "a fifth of each class for testing" in found.source
    assert found.train.labels.bincount().tolist() == [18, 4, 1]
    assert found.test.labels.bincount().tolist() == [5, 1, 1]
    assert len({*names(found.train), *names(found.test)}) == 30
    for part in (found.train, found.test):
        check_pixels(part)


def test_the_split_is_a_function_of_seed_and_names(tmp_path: Path) -> None:
    def test_names(seed: int = 0) -> set[str]:
        return set(names(folders.own(tmp_path, seed=seed).test))

    first = test_names(one_level(tmp_path) and 0)
    for path in sorted(
        tmp_path.rglob("*.png"), reverse=True
    ):  # in another order on disk, with other contents
        path.unlink()
        write(path, picture(7))
    assert test_names() == first != test_names(seed=1)
    write(tmp_path / "cat" / "another.png", picture(1))
    assert len(first ^ test_names()) <= 2
    # Splits of today are those of tomorrow: a network must not be tested on what it was trained on.
    assert sorted(name for name in first if name.startswith("d")) == DOGS


DOGS = ["dog/103.png"]


def test_any_first_images_have_the_share_of_each_class(tmp_path: Path) -> None:
    write_class(tmp_path / "cat", 40, height=1, width=1)
    write_class(tmp_path / "dog", 20, 100, height=1, width=1)
    labels = data.load("folder", tmp_path).train.labels
    assert labels.tolist() != sorted(labels.tolist())
    for count in range(1, len(labels)):
        dogs = int(labels[:count].sum())
        assert abs(dogs - count / 3) <= 1


def test_classes_may_be_called_as_splits_are(tmp_path: Path) -> None:
    write_class(tmp_path / "train", 5)
    write_class(tmp_path / "car", 5, 100)
    assert data.load("folder", tmp_path).classes == ("car", "train")


def test_names_that_are_not_ascii(tmp_path: Path) -> None:
    write_class(tmp_path / "Käse", 3)
    write(tmp_path / "猫" / "a b 'ü.png", picture(5))
    write(tmp_path / "猫" / "x.PNG", picture(6), format="PNG")
    with (tmp_path / "猫" / os.fsdecode(b"\xff.png")).open("wb") as file:  # not a text in any encoding
        picture(7).save(file, "PNG")
    found = data.load("folder", tmp_path)
    assert found.classes == ("Käse", "猫") and len(found.train) + len(found.test) == 6


def test_what_lies_between_images(tmp_path: Path) -> None:
    folder = two_splits(tmp_path)
    (folder / "train" / "cat" / ".DS_Store").write_bytes(b"hidden")
    (folder / "train" / ".thumbnails").mkdir()
    (folder / "train" / "labels.csv").write_text("beside the classes")
    assert data.load("folder", folder).source == f"the folder {folder}, test for testing"
    notes = folder / "train" / "cat" / "notes.txt"
    notes.write_text("no image")
    assert (
        data.load("folder", folder).source
        == f"the folder {folder}, test for testing, without the file {notes}"
    )
    (folder / "test" / "dog" / "more.txt").write_text("no image")
    assert data.load("folder", folder).source.endswith(
        f", without 2 files that are no images by their names, such as {notes}"
    )


def test_what_is_no_file(tmp_path: Path) -> None:
    folder = two_splits(tmp_path)
    link = folder / "train" / "cat" / "link.png"
    link.symlink_to("0.png")
    assert len(data.load("folder", folder).train) == 17
    link.unlink()
    link.symlink_to("absent.png")
    assert f"{link} is neither a file nor a link to one" in refused(folder)
    link.unlink()
    os.mkfifo(link)
    assert f"{link} is neither a file nor a link to one" in refused(folder)


def refused(tmp_path: Path, **arguments: Any) -> str:
    with pytest.raises(DataError) as caught:
        data.load("folder", tmp_path, **arguments)
    assert str(tmp_path) in str(caught.value)
    return str(caught.value)


def test_folders_that_are_not_right(tmp_path: Path) -> None:
    assert "absent is not a folder" in refused(tmp_path / "absent")
    assert f"{tmp_path} has no folders; expected one for each class" in refused(tmp_path)
    write_class(tmp_path / "cat", 2)
    assert f"{tmp_path} has the folder cat only" in refused(tmp_path)
    (tmp_path / "dog").mkdir()
    assert f"{tmp_path / 'dog'} has no images; expected files that end in .jpg" in refused(tmp_path)
    write_class(tmp_path / "dog", 1)
    assert f"{tmp_path / 'dog'} has one image; expected" in refused(tmp_path)
    write_class(tmp_path / "dog" / "puppies", 2)
    assert f"{tmp_path / 'dog' / 'puppies'} is a folder; {tmp_path / 'dog'} should hold images" in refused(
        tmp_path
    )


def test_splits_that_are_not_right(tmp_path: Path) -> None:
    two_splits(tmp_path)
    write_class(tmp_path / "train" / "eel", 1, 200)
    told = refused(tmp_path)
    assert f"{tmp_path}/train has the class eel, {tmp_path}/test has not; expected the same classes" in told
    (tmp_path / "train" / "eel").rename(tmp_path / "test" / "fox")
    assert f"{tmp_path}/test has the class fox, {tmp_path}/train has not" in refused(tmp_path)
    (tmp_path / "test").rename(tmp_path / "other")
    assert f"{tmp_path} has train, but no test and no val; expected train/CLASS" in refused(tmp_path)
    (tmp_path / "train").rename(tmp_path / "val")
    assert f"{tmp_path} has val, but no train" in refused(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads any folder")
def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    one_level(tmp_path)
    (tmp_path / "cat").chmod(0)
    assert "cat cannot be read: " in refused(tmp_path)
    (tmp_path / "cat").chmod(0o700)


# Sizes


def test_images_of_one_size_keep_it(tmp_path: Path) -> None:
    found = data.load("folder", two_splits(tmp_path, height=5, width=8))
    assert found.train.shape == (3, 5, 8)
    check_pixels(found.train, height=5, width=8)


def test_images_of_several_sizes_need_one(tmp_path: Path) -> None:
    two_splits(tmp_path)
    write(tmp_path / "test" / "dog" / "9.png", picture(9, 5, 7))
    message = refused(tmp_path)
    assert "images differ in size" in message and "test/dog/9.png 5x7; say what size" in message
    assert data.load("folder", tmp_path, image_size=4).train.shape == (3, 4, 4)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (30, 50), (51, 29), (9, 7), (16, 300)])
def test_images_are_resized_and_cropped_as_imagenet_is(tmp_path: Path, height: int, width: int) -> None:
    two_splits(tmp_path, height=height, width=width)
    found = data.load("folder", tmp_path, image_size=14)
    assert isinstance(found.train, ImageFiles)
    # The shorter side becomes 16, which is 14 of 224/256, and the centre stays.
    size = (16, int(16 * width / height)) if height <= width else (int(16 * height / width), 16)
    for index in range(3):
        resized = found.train.picture(index).resize(size[::-1], Image.BILINEAR)
        top, left = round((size[0] - 14) / 2), round((size[1] - 14) / 2)
        expected = np.asarray(resized)[top : top + 14, left : left + 14]
        made = found.train.pixels(torch.tensor([index]))[0]
        np.testing.assert_array_equal(made.permute(1, 2, 0).numpy(), expected)


def test_images_of_the_size_wanted_are_left_alone(tmp_path: Path) -> None:
    found = data.load("folder", two_splits(tmp_path, height=12, width=12), image_size=12)
    check_pixels(found.train, height=12, width=12)


def test_images_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right
    for label in ("cat", "dog"):
        for number in range(2):
            write(tmp_path / label / f"{number}.jpg", picture(number, 4, 9), exif=exif, quality=95)
    found = data.load("folder", tmp_path)
    assert found.train.shape == (3, 9, 4)
    assert isinstance(found.train, ImageFiles)
    stored = np.asarray(Image.open(found.train.path(0)))
    np.testing.assert_array_equal(
        found.train.pixels(torch.tensor([0]))[0].permute(1, 2, 0).numpy(), np.rot90(stored, -1)
    )


# Colours


def test_grey_images_stay_grey(tmp_path: Path) -> None:
    found = data.load("folder", two_splits(tmp_path, mode="L"))
    assert found.train.shape == (1, 6, 6)
    assert (len(found.mean), len(found.std)) == (1, 1)
    assert isinstance(found.train, ImageFiles)
    expected = np.asarray(Image.open(found.train.path(2)))
    np.testing.assert_array_equal(found.train.pixels(torch.tensor([2]))[0, 0].numpy(), expected)
    colour = data.load("folder", tmp_path, channels=3)
    assert torch.equal(
        colour.train.pixels(torch.arange(16)), found.train.pixels(torch.arange(16)).repeat(1, 3, 1, 1)
    )


def test_one_image_in_colour_makes_all_of_them_colour(tmp_path: Path) -> None:
    two_splits(tmp_path, mode="L")
    write(tmp_path / "test" / "cat" / "12.png", picture(12))
    assert data.load("folder", tmp_path).train.shape == (3, 6, 6)
    grey = data.load("folder", tmp_path, channels=1)
    where = names(grey.test).index("cat/12.png")
    expected = np.asarray(picture(12).convert("L"))
    np.testing.assert_array_equal(grey.test.pixels(torch.tensor([where]))[0, 0].numpy(), expected)


@pytest.mark.parametrize(
    ("mode", "suffix", "shape"),
    [
        *(("1", "png", 1), ("L", "jpg", 1), ("LA", "png", 1), ("L", "pgm", 1)),
        *(("P", "gif", 3), ("P", "png", 3), ("RGB", "jpg", 3), ("RGBA", "png", 3), ("CMYK", "jpg", 3)),
        *(("RGB", "webp", 3), ("RGB", "bmp", 3), ("RGB", "tif", 3), ("RGBA", "tiff", 3), ("RGB", "ppm", 3)),
    ],
)
def test_kinds_of_files(tmp_path: Path, mode: str, suffix: str, shape: int) -> None:
    for label in ("cat", "dog"):
        for number in range(2):
            write(tmp_path / label / f"{number}.{suffix}", picture(number, mode=mode))
    found = data.load("folder", tmp_path)
    assert isinstance(found.train, ImageFiles)
    assert found.train.shape == (shape, 6, 6)
    expected = np.asarray(Image.open(found.train.path(0)).convert("L" if shape == 1 else "RGB"))
    np.testing.assert_array_equal(
        found.train.pixels(torch.tensor([0]))[0].permute(1, 2, 0).squeeze().numpy(), expected
    )


def test_transparency_is_left_out_without_a_warning(tmp_path: Path) -> None:
    image = picture(1, mode="P")
    path = write(tmp_path / "transparent.png", image, transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = image_files.open_image(path, 3, True)
    np.testing.assert_array_equal(np.asarray(made), np.asarray(image.convert("RGB")))


# Files that are no images


def encoded(format_name: str, height: int = 20, width: int = 20) -> bytes:
    buffer = io.BytesIO()
    picture(3, height, width).save(buffer, format_name)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG file whose header claims a size, with little behind it."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return encoded("PNG")[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + encoded("PNG")[33:]


NO_IMAGES = {
    "nothing": (b"", "is no image of a kind that is read (JPEG, PNG,"),
    "text": (b"not an image", "is no image of a kind that is read"),
    "half an image": (encoded("PNG")[:400], "cannot be decoded"),
    "half a photograph": (encoded("JPEG")[:400], "cannot be decoded"),
    "a program for a printer": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n",
        "is no image of a kind that is read",
    ),
    "a page": (b"%PDF-1.4\n", "is no image of a kind that is read"),
    "a billion pixels": (png_claiming(40_000, 40_000), "is refused: Image size (1600000000 pixels) exceeds"),
}


def test_images_too_long_to_be_scaled_are_named(tmp_path: Path) -> None:
    folder = two_splits(tmp_path)
    (folder / "train/dog/wrong.png").write_bytes(encoded("PNG", 1, 301))
    assert "wrong.png is 301×1; to be scaled, the longer side may be 100 times" in refused(
        folder, image_size=6
    )


@pytest.mark.parametrize("image_size", [None, 6])
@pytest.mark.parametrize("case", NO_IMAGES)
def test_files_that_are_no_images_are_named(tmp_path: Path, case: str, image_size: int | None) -> None:
    content, message = NO_IMAGES[case]
    folder = two_splits(tmp_path)
    wrong = folder / "train" / "dog" / "wrong.png"
    wrong.write_bytes(content)
    told = refused(folder, image_size=image_size)
    assert f"{wrong} {message}" in told


def test_all_of_them_are_counted(tmp_path: Path) -> None:
    folder = two_splits(tmp_path)
    for number in range(8):
        (folder / "train" / "cat" / f"wrong{number}.png").write_bytes(b"")
    told = refused(folder).splitlines()
    assert len(told) == 6 and told[-1] == "and 3 more"
    assert all("is no image" in line for line in told[:5])


def test_images_of_16_bits_are_refused(tmp_path: Path) -> None:
    folder = two_splits(tmp_path)
    deep = Image.fromarray(np.full((6, 6), 40_000, np.uint16))
    write(folder / "test" / "cat" / "deep.png", deep)
    assert "deep.png has pixels of the kind 'I;16'; only those of 8 bits are read" in refused(folder)


FORMATS = {name: encoded(name) for name in ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "TIFF")}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("image") / "file.png"


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.tuples(st.integers(0, 500), st.binary(min_size=1, max_size=4)), max_size=3),
    st.integers(1, 2000),
)
def test_changed_images_are_decoded_or_refused(
    scratch: Path, name: str, changes: list[tuple[int, bytes]], length: int
) -> None:
    content = bytearray(FORMATS[name])
    for place, instead in changes:
        place = place % len(content)
        content[place : place + len(instead)] = instead
    scratch.write_bytes(content[:length])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of strange files
        try:
            made = image_files.open_image(scratch, 3, True)
        except DataError as error:
            assert str(error).startswith(str(scratch))
        else:
            assert made.mode == "RGB"


def test_without_pillow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without(name: str, *arguments: object, **keywords: object) -> object:
        if name.partition(".")[0] == "PIL":
            raise ImportError("no Pillow")
        return real_import(name, *arguments, **keywords)  # type: ignore[arg-type]

    folder = two_splits(tmp_path / "mine")
    for name in ("train", "val"):
        write_class(tmp_path / "imagenet" / name / "n00000001", 1)
        write_class(tmp_path / "imagenet" / name / "n00000002", 1)
    monkeypatch.setattr("builtins.__import__", without)
    for name, place in (("folder", folder), ("imagenet", tmp_path / "imagenet")):
        with pytest.raises(
            DataError, match=r"Pillow, which is not installed; try pip install 'foldbit\[vision\]'"
        ):
            data.load(name, place)  # type: ignore[arg-type]


# In memory, or not


def loader_of(image_set: images.Images, found: ImageData, **changes: Any) -> torch.utils.data.DataLoader:
    loader = images.batches(
        image_set, 4, shuffle=True, seed=2, normalize=(found.mean, found.std), augment="crop-flip", **changes
    )
    loader.sampler.set_epoch(3)  # type: ignore[attr-defined]
    return loader


def test_large_sets_are_decoded_when_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = two_splits(tmp_path, height=9, width=11)
    small = data.load("folder", folder, image_size=8)
    monkeypatch.setattr(folders, "_MOST_HELD", 3 * 8 * 8 * 23 - 1)
    large = data.load("folder", folder, image_size=8)
    assert isinstance(small.train, ImageFiles) and isinstance(large.train, ImageFiles)
    assert small.train.held is not None and large.train.held is None
    assert names(small.train) == names(large.train) and torch.equal(small.train.labels, large.train.labels)
    expected = list(loader_of(small.train, small))
    for workers in (0, 2):
        made = list(loader_of(large.train, large, workers=workers))
        assert len(made) == 4
        for (x, labels), (expected_x, expected_labels) in zip(made, expected, strict=True):
            assert torch.equal(x, expected_x) and torch.equal(labels, expected_labels)


def test_a_set_that_fits_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = two_splits(tmp_path)
    monkeypatch.setattr(folders, "_MOST_HELD", 3 * 6 * 6 * 23)
    found = data.load("folder", folder)
    for path in folder.rglob("*.png"):
        path.unlink()
    check_pixels(found.train)
    loader = loader_of(found.train, found, workers=2)
    assert loader.num_workers == 0 and len(list(loader)) == 4


def test_sets_can_be_sent_to_processes_that_are_not_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = two_splits(tmp_path)
    for most in (2**30, 0):
        monkeypatch.setattr(folders, "_MOST_HELD", most)
        found = data.load("folder", folder)
        dataset = loader_of(found.train, found).dataset
        sent = pickle.loads(pickle.dumps(dataset))
        for index in (3, 16 + 3, 5 * 16):  # in the epochs 0, 1 and 5
            assert torch.equal(sent[index][0], dataset[index][0])


def test_files_can_be_chosen_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_splits(tmp_path)
    for most in (2**30, 0):
        monkeypatch.setattr(folders, "_MOST_HELD", most)
        train = data.load("folder", tmp_path).train
        assert names(train[2:5]) == names(train)[2:5]
        assert names(train[torch.tensor([3, 1])]) == [names(train)[3], names(train)[1]]
        assert names(train[train.labels == 1]) == [name for name in names(train) if name.startswith("dog")]
        for part in (train[2:5], train[train.labels == 1]):
            check_pixels(part)
        with pytest.raises(DataError, match="0 files"):
            train[:0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_gone_or_broken_later_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(folders, "_MOST_HELD", 0)
    folder = two_splits(tmp_path)
    found = data.load("folder", folder)
    path = folder / "train" / "dog" / "103.png"
    for content, message in ((path.read_bytes()[:60], " cannot be decoded"), (None, ": no such file")):
        path.unlink() if content is None else path.write_bytes(content)
        iterator = iter(loader_of(found.train, found, workers=workers))
        with pytest.raises(DataError, match=rf"dog/103\.png{message}"):
            list(iterator)
        if workers:  # which else wait for the garbage collector, and that for them, 5 s
            iterator._shutdown_workers()  # type: ignore[attr-defined]


# ImageNet


def small_imagenet(folder: Path, **shape: Any) -> Path:
    """Two of its classes, as torchvision unpacks them."""
    for start, name in ((0, "n01440764"), (100, "n01443537")):
        for number in range(start, start + 3):
            write(folder / "train" / name / f"{name}_{number}.JPEG", picture(number, **shape), format="JPEG")
            write(
                folder / "val" / name / f"ILSVRC2012_val_{number:08}.JPEG",
                picture(number + 50, **shape),
                format="JPEG",
            )
    (folder / "meta.bin").write_bytes(b"torchvision's, which is not read")
    return folder


def test_imagenet(tmp_path: Path) -> None:
    folder = small_imagenet(tmp_path, height=60, width=80)
    found = data.load("imagenet", folder, download=False)
    assert found.name == "imagenet" and found.classes == ("n01440764", "n01443537")
    assert found.source == f"the folder {folder}, with 2 of ImageNet's 1,000 classes"
    assert found.train.shape == (3, 224, 224)
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert sorted(names(found.test))[0] == "n01440764/ILSVRC2012_val_00000000.JPEG"
    assert data.load("imagenet", folder, image_size=32, channels=1).train.shape == (1, 32, 32)


def test_imagenet_is_left_as_cameras_stored_it(tmp_path: Path) -> None:
    folder = small_imagenet(tmp_path, height=20, width=40)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write(
        folder / "val" / "n01440764" / "ILSVRC2012_val_00000000.JPEG",
        picture(1, 20, 40),
        format="JPEG",
        exif=exif,
    )
    test = data.load("imagenet", folder).test
    assert isinstance(test, ImageFiles)
    where = names(test).index(str(path.relative_to(folder / "val")))
    assert test.picture(where).size == (40, 20)


def test_imagenet_that_is_not_there(tmp_path: Path) -> None:
    def told(folder: Path) -> str:
        with pytest.raises(DataError) as caught:
            data.load("imagenet", folder)
        return str(caught.value)

    assert "has no train and no val. Get ILSVRC2012_img_train.tar" in told(tmp_path)
    folder = small_imagenet(tmp_path / "some")
    write_class(tmp_path / "flat" / "train" / "n01440764", 1)
    write_class(tmp_path / "flat" / "val", 1)
    assert "has the folder n01440764 only" in told(tmp_path / "flat")
    write_class(folder / "train" / "cats", 1)
    write_class(folder / "val" / "cats", 1)
    assert "cats is not called by a WordNet id, such as n01440764" in told(folder)
    write_class(tmp_path / "flat" / "train" / "n01443537", 1)
    assert f"{tmp_path}/flat/val has no folders" in told(tmp_path / "flat")
