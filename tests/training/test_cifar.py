"""CIFAR: pickles as Python 2 wrote them, hostile pickles and archives, the places looked in, downloads."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from foldbit.training import cifar, data, pickles
from foldbit.training.cifar import CIFAR10, CIFAR100, Cifar
from foldbit.training.idx import DataError
from foldbit.training.images import ImageData

# Pickles as Python 2's cPickle writes them, protocol 2


class Python2:
    """Writes what ``cPickle.dumps(value, 2)`` wrote: str is bytes; every container and string is memoised."""

    def __init__(self) -> None:
        self.memo = 0

    def dumps(self, value: Any) -> bytes:
        return b"\x80\x02" + self.write(value) + b"."

    def put(self) -> bytes:
        self.memo += 1
        return b"q" + bytes([self.memo]) if self.memo < 256 else b"r" + struct.pack("<I", self.memo)

    def write(self, value: Any) -> bytes:
        if value is None:
            return b"N"
        if isinstance(value, bool):
            return b"\x88" if value else b"\x89"
        if isinstance(value, int):
            for code, form, most in ((b"K", "<B", 2**8), (b"M", "<H", 2**16)):
                if 0 <= value < most:
                    return code + struct.pack(form, value)
            return b"J" + struct.pack("<i", value)
        if isinstance(value, bytes):
            short = len(value) < 256
            return (
                (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value)))
                + value
                + self.put()
            )
        if isinstance(value, list):
            return b"]" + self.put() + b"(" + b"".join(map(self.write, value)) + b"e"
        if isinstance(value, dict):
            return (
                b"}"
                + self.put()
                + b"("
                + b"".join(self.write(v) for item in value.items() for v in item)
                + b"u"
            )
        if isinstance(value, tuple):
            return b"(" + b"".join(map(self.write, value)) + b"t" + self.put()
        assert isinstance(value, np.ndarray) and value.dtype == np.uint8
        return self.array(value)

    def array(self, value: np.ndarray) -> bytes:
        made = b"cnumpy.core.multiarray\n_reconstruct\n" + self.put() + b"cnumpy\nndarray\n" + self.put()
        made += self.write((0,)) + self.write(b"b") + b"\x87" + self.put() + b"R" + self.put()
        dtype = (
            b"cnumpy\ndtype\n"
            + self.put()
            + self.write(b"u1")
            + b"K\x00K\x01\x87"
            + self.put()
            + b"R"
            + self.put()
        )
        dtype += self.write((3, b"|", None, None, None, -1, -1, 0)) + b"b"
        content = self.write(value.tobytes())
        return (
            made + b"(K\x01" + self.write(value.shape) + dtype + b"\x89" + content + b"t" + self.put() + b"b"
        )


def python2(value: Any) -> bytes:
    return Python2().dumps(value)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31 - 1) | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.binary(max_size=5), inner, max_size=4),
    max_leaves=12,
)
arrays = hnp.arrays(np.uint8, hnp.array_shapes(max_dims=4, max_side=5))


@given(st.dictionaries(st.binary(max_size=20), plain, max_size=5), arrays)
@example({b"labels": list(range(300))}, np.zeros((2, 3), np.uint8))
def test_python_2_pickles_round_trip(values: dict[bytes, Any], array: np.ndarray) -> None:
    written = python2({**values, b"data": array})
    # The pickle is a real one: Python and NumPy read it, too.
    np.testing.assert_array_equal(pickle.loads(written, encoding="bytes")[b"data"], array)
    read = pickles.read(written, "file")
    given_array = read.pop(b"data")
    assert given_array.dtype == np.uint8
    np.testing.assert_array_equal(given_array, array)
    assert read == {key: value for key, value in values.items() if key != b"data"}


@given(arrays, st.sampled_from([2, 3, 4]), st.sampled_from("CF"))
def test_python_3_pickles_of_arrays(array: np.ndarray, protocol: int, order: Any) -> None:
    array = np.array(array, order=order)
    written = pickle.dumps({"data": array, "labels": [1, 2]}, protocol)
    if protocol == 2:  # where bytes are made by calling a codec
        with pytest.raises(DataError, match=r"it asks for _codecs\.encode"):
            pickles.read(written, "file")
        return
    read = pickles.read(written, "file")
    np.testing.assert_array_equal(read["data"], array)
    assert read["labels"] == [1, 2]


# Hostile pickles


class Runs:
    """Pickles to a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_does_not_run(tmp_path: Path, protocol: int) -> None:
    canary = tmp_path / "canary"
    for call in (
        Runs(os.mkdir, str(canary)),
        Runs(eval, f"__import__('os').mkdir({str(canary)!r})"),
        Runs(exec, f"import os; os.mkdir({str(canary)!r})"),
    ):
        written = pickle.dumps({"data": call, "labels": []}, protocol)
        with pytest.raises(DataError, match=r"file is refused: it (asks for|uses the operation)"):
            pickles.read(written, "file")
        assert not canary.exists()
        pickle.loads(written)  # the canary is a good one
        assert canary.exists()
        canary.rmdir()


def with_values(middle: bytes) -> bytes:
    """A pickle of a dict whose one value these operations leave on the stack."""
    return b"\x80\x02}U\x04data" + middle + b"s."


ARRAY = python2({b"data": np.zeros(2, np.uint8)})
RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
DTYPE = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
EMPTY = RECONSTRUCT + b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R"
HOSTILE = {
    "a name of the operating system": (with_values(b"cposix\nsystem\n"), "it asks for posix.system"),
    "another name of NumPy": (with_values(b"cnumpy\nload\n"), "it asks for numpy.load"),
    "a name with dots": (with_values(b"cnumpy\ncore.os.system\n"), "it asks for numpy.core.os.system"),
    "a name from the stack": (
        with_values(b"X\x05\0\0\0posixX\x06\0\0\0system\x93"),
        "it asks for posix.system",
    ),
    "a persistent id": (with_values(b"U\x01xQ"), "the operation BINPERSID"),
    "an instance": (with_values(b"(iposix\nsystem\n"), "the operation INST"),
    "an object": (with_values(b"(cnumpy\nndarray\no"), "the operation OBJ"),
    "a new object": (with_values(b"cnumpy\nndarray\n)\x81"), "the operation NEWOBJ"),
    "an extension": (with_values(b"\x82\x01"), "the operation EXT1"),
    "objects as values": (
        EMPTY[:-3].join([b"", b""]) and ARRAY.replace(b"u1", b"O8"),
        "another type than uint8",
    ),
    "floats as values": (ARRAY.replace(b"u1", b"f8"), "another type than uint8"),
    "big-endian values": (ARRAY.replace(b"U\x01|", b"U\x01>"), "another type than uint8"),
    "a call of an array": (with_values(EMPTY + b")R"), "not a pickle, or a damaged"),
    "a call of a class": (with_values(b"cnumpy\nndarray\n)R"), "not a pickle, or a damaged"),
    "an array of something else": (
        with_values(RECONSTRUCT + b"U\x01xK\x00\x85U\x01b\x87R"),
        "an unknown kind",
    ),
    "attributes of a class": (with_values(b"cnumpy\nndarray\n}U\x01aK\x01sb"), "not a pickle, or a damaged"),
    "attributes of a function": (
        with_values(RECONSTRUCT + b"N}U\x08__call__K\x01s\x86b"),
        "not a pickle, or a damaged",
    ),
    "a type with a state of its own": (with_values(DTYPE + b"}b"), "another type than uint8"),
    "an array with another state": (with_values(EMPTY + b"}b"), "another type than uint8"),
    "an array without values": (with_values(EMPTY + b"(K\x01K\x02\x85" + DTYPE + b"\x89Ntb"), "do not fit"),
    "an array of a negative size": (
        with_values(EMPTY + b"(K\x01J\xff\xff\xff\xff\x85" + DTYPE + b"\x89U\x00tb"),
        "without a proper shape",
    ),
    "an array larger than its values": (
        with_values(EMPTY + b"(K\x01J\xff\xff\xff\x7f\x85" + DTYPE + b"\x89U\x02abtb"),
        "do not fit",
    ),
    "a memo of gigabytes": (
        with_values(b"K\x01r\xff\xff\xff\xff"),
        "claims to hold 4,294,967,295 values by its byte",
    ),
    "a text longer than the file": (with_values(b"T\xff\xff\xff\x7fab"), "not a pickle, or a damaged"),
    "bytes longer than the file": (
        with_values(b"\x8e" + b"\xff" * 7 + b"\x7fab"),
        "not a pickle, or a damaged",
    ),
    "a key that cannot be one": (b"\x80\x02}]K\x01s.", "keys that are neither text nor numbers"),
    "an empty stack": (b"\x80\x02s.", "not a pickle, or a damaged"),
    "a later protocol": (b"\x80\x09}.", "not a pickle, or a damaged"),
    "more after its end": (python2({}) + b"cposix\nsystem\n", "14 bytes follow its end"),
    "a list": (python2([1]), "holds a list; expected a dict"),
    "a text": (b"hello", "file is"),
    "nothing": (b"", "not a pickle, or a damaged or truncated one: pickle exhausted before seeing STOP"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles(case: str) -> None:
    content, message = HOSTILE[case]
    with pytest.raises(DataError) as caught:
        pickles.read(content, "file")
    assert message in str(caught.value)
    assert str(caught.value).startswith("file ")


def test_what_a_file_does_to_our_objects_ends_with_it() -> None:
    for name in ("numpy.core.multiarray\n_reconstruct", "numpy\ndtype", "numpy\nndarray"):
        for state in (b"}U\x01aK\x01s", b"N}U\x01aK\x01s\x86", b"N}U\x0c__setstate__K\x01s\x86"):
            with pytest.raises(DataError):
                pickles.read(with_values(b"c" + name.encode() + b"\n" + state + b"b"), "file")
    test_python_2_pickles_round_trip.hypothesis.inner_test({}, np.ones(3, np.uint8))  # type: ignore[attr-defined]


WHOLE = python2(
    {b"data": np.arange(12, dtype=np.uint8).reshape(2, 6), b"labels": [1, 2], b"names": [b"x", b"y"]}
)


@given(st.integers(0, len(WHOLE) - 1))
def test_truncated_pickles(length: int) -> None:
    with pytest.raises(DataError, match="file is"):
        pickles.read(WHOLE[:length], "file")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")  # pickletools', of texts that are refused
@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=3)), max_size=4))
def test_changed_pickles_are_read_or_refused(changes: list[tuple[int, bytes]]) -> None:
    content = bytearray(WHOLE)
    for place, instead in changes:
        content[place : place + len(instead)] = instead
    refused_or_plain(bytes(content))


PIECES = [
    *(
        b"N",
        b"K\x01",
        b"U\x02u1",
        b"]",
        b"}",
        b"(",
        b")",
        b"t",
        b"\x85",
        b"\x86",
        b"\x87",
        b"a",
        b"e",
        b"s",
        b"u",
    ),
    *(
        b"q\x01",
        b"h\x01",
        b"\x94",
        b"R",
        b"b",
        b"cnumpy\ndtype\n",
        b"cnumpy\nndarray\n",
        RECONSTRUCT,
        EMPTY,
        DTYPE,
    ),
]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PIECES), max_size=20))
def test_any_operations_are_read_or_refused(pieces: list[bytes]) -> None:
    refused_or_plain(b"\x80\x02}" + b"".join(pieces) + b".")


def refused_or_plain(content: bytes) -> None:
    try:
        read = pickles.read(content, "file")
    except DataError as error:
        assert str(error).startswith("file ")
    else:
        assert type(read) is dict


# The data sets


def batch(count: int, seed: int, labels: str, classes: int) -> dict[bytes, Any]:
    """A file of images, with all that the published ones have."""
    drawn = np.random.default_rng(seed)
    given_labels = [int(label) for label in drawn.integers(0, classes, count)]
    return {
        b"batch_label": b"a batch",
        labels.encode(): given_labels,
        b"coarse_labels": given_labels,
        b"data": drawn.integers(0, 256, (count, 3072), dtype=np.uint8),
        b"filenames": [b"image_%d.png" % i for i in range(count)],
    }


def contents_of(known: Cifar) -> dict[str, dict[bytes, Any]]:
    """The data set's files, small: 4 images in each."""
    files = {
        name: batch(4, seed, known.labels, known.classes)
        for seed, name in enumerate([*known.train, *known.test])
    }
    (meta,) = known.meta
    names = [b"class %d" % i for i in range(known.classes)]
    return {**files, meta: {b"num_cases_per_batch": 4, known.names.encode(): names, b"num_vis": 3072}}


def files_of(known: Cifar, **changes: dict[bytes, Any]) -> dict[str, bytes]:
    return {name: python2(content) for name, content in {**contents_of(known), **changes}.items()}


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def archive_of(files: dict[str, bytes], extra: Callable[[tarfile.TarFile], None] | None = None) -> bytes:
    """A .tar.gz of files, made as tar makes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            if name.count("/") == 1 and name.partition("/")[0] not in tar.getnames():
                folder = tarfile.TarInfo(name.partition("/")[0])
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if extra is not None:
            extra(tar)
    return gzip.compress(buffer.getvalue(), mtime=0)  # the same bytes at any time


def published_archive(known: Cifar, extra: Callable[[tarfile.TarFile], None] | None = None) -> bytes:
    files = {f"{known.folder}/{name}": content for name, content in files_of(known).items()}
    return archive_of({**files, f"{known.folder}/readme.html": b"<html>"}, extra)


def check(found: ImageData, known: Cifar) -> None:
    """The images are those of :func:`contents_of`."""
    contents = contents_of(known)
    for part, names in ((found.train, known.train), (found.test, known.test)):
        expected = np.concatenate([contents[name][b"data"] for name in names])
        np.testing.assert_array_equal(part.images.flatten(1).numpy(), expected)  # type: ignore[union-attr]
        assert part.labels.tolist() == [
            label for name in names for label in contents[name][known.labels.encode()]
        ]
        assert part.shape == (3, 32, 32)
    assert found.name == known.name
    assert found.classes == tuple(f"class {i}" for i in range(known.classes))


BOTH = pytest.mark.parametrize("known", [CIFAR10, CIFAR100], ids=lambda known: known.name)


@BOTH
def test_folders_and_archives(tmp_path: Path, known: Cifar) -> None:
    folder = write_folder(tmp_path / "unpacked" / known.folder, files_of(known))
    (tmp_path / "packed").mkdir()
    archive = tmp_path / "packed" / known.archive
    archive.write_bytes(published_archive(known))
    for named, found_in in (
        (folder, folder),
        (folder.parent, folder),
        (archive, archive),
        (archive.parent, archive),
    ):
        found = data.load(known.name, named)  # type: ignore[arg-type]
        check(found, known)
        assert str(found_in) in found.source and "not the published ones" in found.source


def test_the_first_plane_is_red(tmp_path: Path) -> None:
    content = batch(4, 0, "labels", 10)
    content[b"data"][:, :1024] = 255
    content[b"data"][:, 1024:] = 0
    content[b"data"][0, 32] = 7  # row 1, column 0
    found = cifar.load(CIFAR10, write_folder(tmp_path / "folder", files_of(CIFAR10, data_batch_1=content)))
    red, green, blue = found.train.pixels(torch.tensor([0]))[0]
    assert (red[1, 0], red[0, 1], green.max(), blue.max()) == (7, 255, 0, 0)


@BOTH
def test_grey_on_demand(tmp_path: Path, known: Cifar) -> None:
    image_module = pytest.importorskip("PIL.Image")
    folder = write_folder(tmp_path / known.folder, files_of(known))
    colour, grey = (data.load(known.name, folder, channels=channels) for channels in (3, 1))  # type: ignore[arg-type]
    check(colour, known)
    for given_image, made in zip(colour.train.images, grey.train.images, strict=True):  # type: ignore[union-attr]
        expected = image_module.fromarray(given_image.permute(1, 2, 0).numpy()).convert("L")
        np.testing.assert_array_equal(made[0].numpy(), np.asarray(expected))
    assert len(grey.mean) == 1


def without(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {other: content for other, content in files.items() if other != name}


def test_published_files_are_recognised(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", files_of(CIFAR10))
    assert "not the published" not in cifar.load(publish(CIFAR10), folder).source


def publish(known: Cifar) -> Cifar:
    """As if the small files were the published ones."""
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files_of(known).items()}
    parts = {part: {name: md5[name] for name in getattr(known, part)} for part in ("train", "test", "meta")}
    archive = hashlib.md5(published_archive(known)).hexdigest()
    return dataclasses.replace(known, md5=archive, **parts)  # type: ignore[arg-type]


def changed(**changes: Any) -> dict[bytes, Any]:
    """A file of CIFAR-10's with other entries; None leaves one out."""
    content = {**batch(4, 0, "labels", 10), **{key.encode(): value for key, value in changes.items()}}
    return {key: value for key, value in content.items() if value is not None}


WRONG = {
    "no images": (changed(data=None), "has no 'data'"),
    "no labels": (changed(labels=None), "has no 'labels'"),
    "images of another size": (
        changed(data=np.zeros((4, 784), np.uint8)),
        "[4, 784] as data; expected uint8 [N",
    ),
    "images of more dimensions": (changed(data=np.zeros((4, 3, 32, 32), np.uint8)), "[4, 3, 32, 32] as data"),
    "images that are a list": (changed(data=[1, 2]), "list as data"),
    "more images than labels": (changed(data=np.zeros((5, 3072), np.uint8)), "5 images, but 4 labels"),
    "labels that are an array": (changed(labels=np.zeros(4, np.uint8)), "other labels than a list"),
    "labels that are texts": (changed(labels=[b"cat"] * 4), "other labels than a list"),
    "labels that are lists": (changed(labels=[[0]] * 4), "other labels than a list"),
    "a label too large": (changed(labels=[0, 1, 10, 2]), "gives its image 2 a label that is not 0 to 9"),
    "a label too small": (changed(labels=[-1, 0, 0, 0]), "gives its image 0 a label that is not 0 to 9"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(tmp_path: Path, case: str) -> None:
    content, message = WRONG[case]
    folder = write_folder(tmp_path / "folder", files_of(CIFAR10, data_batch_3=content))
    with pytest.raises(DataError) as caught:
        cifar.load(CIFAR10, folder)
    assert str(caught.value).startswith(f"{folder / 'data_batch_3'} ")
    assert message in str(caught.value)


@pytest.mark.parametrize("names", [[b"cat"] * 9, b"cat", [b"cat"] * 9 + [3], [b"cat"] * 9 + [b"\x1b[2J"]])
def test_wrong_names_of_classes(tmp_path: Path, names: Any) -> None:
    folder = write_folder(tmp_path / "folder", files_of(CIFAR10, **{"batches.meta": {b"label_names": names}}))
    with pytest.raises(DataError, match=r"batches\.meta (does not list 10 names|has a class without a name)"):
        cifar.load(CIFAR10, folder)


def test_folders_that_are_not_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "some", without(files_of(CIFAR10), "data_batch_4"))
    with pytest.raises(DataError, match=f"{folder} lacks data_batch_4"):
        cifar.load(CIFAR10, folder)
    with pytest.raises(DataError, match="absent: no such folder or archive"):
        cifar.load(CIFAR10, tmp_path / "absent")
    with pytest.raises(DataError, match=r"has neither cifar-100-python nor cifar-100-python\.tar\.gz"):
        cifar.load(CIFAR100, folder)
    monkeypatch.setattr(cifar, "_MOST_BYTES", 1000)
    whole = write_folder(tmp_path / "whole", files_of(CIFAR10))
    with pytest.raises(DataError, match=r"data_batch_1 has more than 1,000 bytes"):
        cifar.load(CIFAR10, whole)


# Hostile archives


def entry(name: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> Callable[[tarfile.TarFile], None]:
    """Adds an entry to an archive."""

    def add(tar: tarfile.TarFile) -> None:
        member = tarfile.TarInfo(name)
        member.type = kind
        for field, value in fields.items():
            setattr(member, field, value)
        tar.addfile(member, io.BytesIO(bytes(member.size)))

    return add


def many(tar: tarfile.TarFile) -> None:
    for i in range(100):
        entry(f"file{i}")(tar)


INSIDE = CIFAR10.folder
HOSTILE_ENTRIES = {
    "above": (entry(f"{INSIDE}/../../evil"), "its entry 'cifar-10-batches-py/../../evil' points outside"),
    "absolute": (entry("/etc/evil"), "'/etc/evil' points outside"),
    "a link": (
        entry(f"{INSIDE}/more", tarfile.SYMTYPE, linkname="/etc/passwd"),
        "neither a plain file nor a folder",
    ),
    "a hard link": (entry(f"{INSIDE}/more", tarfile.LNKTYPE, linkname="test_batch"), "neither a plain file"),
    "a device": (entry(f"{INSIDE}/more", tarfile.CHRTYPE), "neither a plain file"),
    "a pipe": (entry(f"{INSIDE}/more", tarfile.FIFOTYPE), "neither a plain file"),
    "a file twice": (entry(f"{INSIDE}/test_batch"), "holds cifar-10-batches-py/test_batch twice"),
    "too many": (many, "more than 100 entries"),
}


@pytest.mark.parametrize("case", HOSTILE_ENTRIES)
def test_hostile_archives(tmp_path: Path, case: str) -> None:
    extra, message = HOSTILE_ENTRIES[case]
    archive = tmp_path / CIFAR10.archive
    archive.write_bytes(published_archive(CIFAR10, extra))
    with pytest.raises(DataError) as caught:
        cifar.load(CIFAR10, tmp_path)
    assert message in str(caught.value) and str(archive) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [CIFAR10.archive]  # nothing is unpacked


def test_a_file_of_the_archive_that_is_a_link(tmp_path: Path) -> None:
    files = {
        f"{INSIDE}/{name}": content for name, content in without(files_of(CIFAR10), "test_batch").items()
    }
    link = entry(f"{INSIDE}/test_batch", tarfile.SYMTYPE, linkname="data_batch_1")
    (tmp_path / CIFAR10.archive).write_bytes(archive_of(files, link))
    with pytest.raises(DataError, match="test_batch' is neither a plain file nor a folder"):
        cifar.load(CIFAR10, tmp_path)


def test_archives_that_unpack_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / CIFAR10.archive
    archive.write_bytes(published_archive(CIFAR10, entry("zeros", size=2**20)))
    cifar.load(CIFAR10, archive)
    with monkeypatch.context() as patch:
        patch.setattr(cifar, "_MOST_UNPACKED", 2**19)
        with pytest.raises(DataError, match="unpacks to more than 524,288 bytes"):
            cifar.load(CIFAR10, archive)
    monkeypatch.setattr(cifar, "_MOST_BYTES", 2**19)
    with pytest.raises(DataError, match="'zeros' claims 1,048,576 bytes"):
        cifar.load(CIFAR10, archive)


ARCHIVE = published_archive(CIFAR10)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cifar") / "archive.tar.gz"


@pytest.mark.parametrize("keep", [0, 1, 20, 1000, len(ARCHIVE) // 2, len(ARCHIVE) - 9, len(ARCHIVE) - 1])
def test_truncated_archives(tmp_path: Path, keep: int) -> None:
    (tmp_path / "file").write_bytes(ARCHIVE[:keep])
    with pytest.raises(DataError, match=r"file is a damaged or truncated \.tar\.gz"):
        cifar.load(CIFAR10, tmp_path / "file")


def test_damaged_archives(tmp_path: Path) -> None:
    flipped = bytearray(ARCHIVE)
    flipped[-6] ^= 1  # in the checksum
    for content in (bytes(flipped), b"PK\x03\x04rubbish", gzip.compress(b"no tar" * 200)):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(DataError, match=r"file is a damaged or truncated \.tar\.gz"):
            cifar.load(CIFAR10, tmp_path / "file")
    (tmp_path / "file").write_bytes(archive_of({"other/file": b"x"}))
    with pytest.raises(DataError, match=r"file lacks data_batch_1, .*is it cifar-10-python\.tar\.gz"):
        cifar.load(CIFAR10, tmp_path / "file")


TAR = gzip.decompress(ARCHIVE)[:3000]  # headers of a folder and of a file


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1100), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4))
def test_changed_archives_are_refused(scratch: Path, changes: list[tuple[int, bytes]]) -> None:
    content = bytearray(TAR)
    for place, instead in changes:
        content[place : place + len(instead)] = instead
    for header in (0, 512):  # with checksums that are right, so that the rest of a header is looked at
        content[header + 148 : header + 156] = b" " * 8
        content[header + 148 : header + 156] = b"%06o\0 " % sum(content[header : header + 512])
    scratch.write_bytes(gzip.compress(bytes(content), 1))
    with pytest.raises(DataError) as caught:
        cifar.load(CIFAR10, scratch)
    assert str(scratch) in str(caught.value)


# Downloads


class Response(io.BytesIO):
    """What urlopen returns."""

    @property
    def length(self) -> int | None:
        return len(self.getbuffer())


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[str]:
    """A network with one file, or none; the addresses that are asked for."""
    urls: list[str] = []

    def urlopen(url: str, *, timeout: float) -> Response:
        urls.append(url)
        if content is None:
            raise urllib.error.URLError("no network in tests")
        return Response(content)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return urls


@BOTH
def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: Cifar) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    content, small = published_archive(known), publish(known)
    urls = serve(monkeypatch, content)
    found = cifar.load(small)
    kept = tmp_path / "foldbit" / known.name / known.archive
    check(found, known)
    assert found.source == f"a download from {known.url}, kept in {kept}"
    assert kept.read_bytes() == content and urls == [known.url]
    again = cifar.load(small, download=False)
    check(again, known)
    assert again.source == f"an earlier download ({kept})" and len(urls) == 1


def test_a_damaged_download_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, published_archive(CIFAR10))
    (tmp_path / CIFAR10.archive).write_bytes(published_archive(CIFAR10)[:1000])
    check(cifar.load(publish(CIFAR10), cache=tmp_path), CIFAR10)
    check(cifar.load(publish(CIFAR10), cache=tmp_path, download=False), CIFAR10)


def test_a_wrong_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, published_archive(CIFAR10))
    given_md5 = hashlib.md5(published_archive(CIFAR10)).hexdigest()
    with pytest.raises(DataError, match=f"not the published file: it has MD5 {given_md5}, not {CIFAR10.md5}"):
        cifar.load(CIFAR10, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_what_cannot_be_had_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = serve(monkeypatch, None)
    with pytest.raises(DataError) as caught:
        cifar.load(CIFAR100, cache=tmp_path)
    for part in (
        "CIFAR-100 is not to be had",
        "no such file",
        "no network in tests",
        f"from {CIFAR100.url}, into",
    ):
        assert part in str(caught.value)
    with pytest.raises(DataError, match=r"a download from .*: not allowed"):
        cifar.load(CIFAR100, cache=tmp_path, download=False)
    assert len(urls) == 1


def test_pickles_that_would_end_the_process_or_never_end_are_refused() -> None:
    deep = b"\x80\x02}N" + b"\x85" * 300_000 + b"Ns."  # a tuple in a tuple in a tuple …, as a key
    twice = b"\x80\x02}Nq\x00"  # a tuple of the same tuple twice, 40 times over
    twice += b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(40))
    for written in (deep, twice + b"Ns.", b"\x80\x02}(" + twice[3:] + b"Nu."):
        with pytest.raises(DataError, match="keys that are neither text nor numbers"):
            pickles.read(written, "file")
    with pytest.raises(DataError, match="without a proper shape"):
        pickles.read(python2({b"data": np.zeros((1,) * 5, np.uint8)}), "file")
