"""IDX files, the format of MNIST and its relatives: read with suspicion, for no header is believed."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

AnyPath = str | os.PathLike[str]


class DataError(ValueError):
    """A data set cannot be had, or is not what it should be. The message names the file."""


def read_idx(path: AnyPath, *, most_bytes: int = 2**30) -> np.ndarray:
    """Read an IDX file, plain or gzipped, whatever its name says: the format of MNIST and its relatives.

    Two zero bytes, the code of the type (8, unsigned bytes, is the only one read), the number of
    dimensions, each size as a big-endian uint32, then the values. Memory grows with what is really there,
    up to what the header says and never beyond ``most_bytes``.

    Args:
        path: the file.
        most_bytes: refuse a file that claims more values.

    Returns:
        uint8, with the 1 to 4 dimensions of the file.

    Raises:
        DataError: where there is no such file, or anything about it is wrong.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise DataError(f"{path}: no such file" + (", but a folder" if path.is_dir() else ""))
        with path.open("rb") as file:
            return read_stream(file, str(path), most_bytes)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def read_stream(file: BinaryIO, name: str, most_bytes: int) -> np.ndarray:
    zipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    if not zipped:
        return _parse_idx(file, name, most_bytes)
    try:
        with gzip.GzipFile(fileobj=file) as unzipped:
            return _parse_idx(cast(BinaryIO, unzipped), name, most_bytes)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name} is a damaged or truncated gzip file: {error}") from error


def _parse_idx(stream: BinaryIO, name: str, most_bytes: int) -> np.ndarray:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise DataError(
            f"{name} is not an IDX file: it starts with {magic.hex(' ') or 'nothing'}, expected 00 00 08 "
            "and the number of dimensions"
        )
    dtype, ndim = magic[2:]
    if dtype != 8:
        raise DataError(f"{name} holds values of IDX type 0x{dtype:02x}; only 0x08, unsigned bytes, is read")
    if not 1 <= ndim <= 4:
        raise DataError(f"{name} claims {ndim} dimensions; expected 1 to 4")
    header = stream.read(4 * ndim)
    if len(header) < 4 * ndim:
        raise DataError(f"{name} is truncated: it ends within its header")
    sizes = struct.unpack(f">{ndim}I", header)
    expected = math.prod(sizes)
    claim = f"{' x '.join(map(str, sizes))} values"
    if not 1 <= expected <= most_bytes:
        raise DataError(f"{name} claims {claim}; expected 1 to {most_bytes:,}")
    data = bytearray()
    # One byte more is asked for than should be there, to notice it.
    while chunk := stream.read(min(2**20, expected + 1 - len(data))):
        data += chunk
        if len(data) > expected:
            raise DataError(f"{name} has bytes left after the {claim} that its header claims")
    if len(data) < expected:
        raise DataError(f"{name} is truncated: its header claims {claim}, it holds {len(data)}")
    return np.frombuffer(data, np.uint8).reshape(sizes)
