"""Downloads: where they are kept, how they are fetched, and that nothing unchecked is ever kept."""

from __future__ import annotations

import http.client
import importlib.util
import os
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from foldbit.packed import files
from foldbit.training.idx import DataError

T = TypeVar("T")

_TIMEOUT = 30  # seconds without an answer


def cache(name: str) -> Path:
    """Where the downloads of a data set are kept: ``foldbit/NAME`` in the user's cache folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification: a path that is not absolute is to be ignored.
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "foldbit" / name


def fetch(url: str, most_bytes: int) -> bytes:
    """What an address answers, in memory; the caller checks it, then keeps it.

    Args:
        url: the address.
        most_bytes: more than this is refused, whatever the answer's header says.

    Raises:
        DataError: where there is no answer within 30 seconds, or one too large.
    """
    data = bytearray()
    try:
        with (
            urllib.request.urlopen(url, timeout=_TIMEOUT) as response,
            progress(url.rpartition("/")[2], response.length, unit="B") as advance,
        ):
            while chunk := response.read(2**16):
                data += chunk
                advance(len(chunk))
                if len(data) > most_bytes:
                    raise DataError(f"{url} sends more than {most_bytes:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url} cannot be had: {error}") from error
    return bytes(data)


def keep(data: bytes, path: Path) -> None:
    """Write checked bytes to a file of the cache, under a temporary name that is then renamed.

    Raises:
        DataError: where the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, data)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from error


def from_places(title: str, places: dict[str, Callable[[], T]], advice: str) -> T:
    """What the first place has that has it.

    Args:
        title: the data set's name in words.
        places: in words, and how to read each; a place that has nothing raises ``DataError``.
        advice: what to do where no place has it.

    Raises:
        DataError: where no place has it, with each place's reason.
    """
    failures = []
    for place, read in places.items():
        try:
            return read()
        except DataError as error:
            failures.append(f"  {place}: {error}")
    raise DataError(f"{title} is not to be had:\n" + "\n".join(failures) + f"\n{advice}")


@contextmanager
def progress(title: str, total: int | None, *, unit: str = "it") -> Iterator[Callable[[int], object]]:
    """A progress bar's update, where there are tqdm and a terminal."""
    if importlib.util.find_spec("tqdm") is None:
        yield lambda advanced: None
        return
    from tqdm import tqdm

    with tqdm(desc=title, total=total, disable=None, unit=unit, unit_scale=True) as bar:
        yield bar.update
