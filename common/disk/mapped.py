"""Arrays whose pages are a file's: what nobody looks at takes no memory.

An adapter's vector may have a gigabyte, and its sum in float64 two. So large vectors are made and
read by stretches, and a stretch's pages are let go once it was looked at: they stand in the file,
and come again when they are asked for. What is made of a mapped array is mapped too, and what is
made of one in memory lies in memory: both go through the same lines, and have the same bits.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import numpy.typing as npt

from fedlora.common.errors import FedloraError

Array = npt.NDArray[Any]

STRETCH = 1 << 20  # coordinates
AROUND = 1 << 16  # bytes that Linux brings with a page of theirs that is asked for
SCRATCH = ".scratch-"  # what a kill may leave of `alike`, where a file system can't hide it


class Mapped(mmap.mmap):
    """Pages of a file, where they begin, and the folder that has room for more like them."""

    address: int
    folder: Path


def mapped(path: Path) -> memoryview:
    """A file's bytes, read as they are looked at."""
    with path.open("rb") as stream:
        pages = Mapped(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return memoryview(_known(pages, path.parent))


def alike(array: Array, dtype: npt.DTypeLike) -> Array:
    """(array.size,) zeros: in memory where `array` lies there, else in a file beside `array`'s.

    That file has no name and goes with the array; its room is taken at once, for a page that finds
    no room later would end the process. FedloraError where there is none.
    """
    pages = _pages(array)
    if pages is None:
        return np.zeros(array.size, dtype)
    count = array.size * np.dtype(dtype).itemsize
    try:
        with TemporaryFile(dir=pages.folder, prefix=SCRATCH) as stream:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(stream.fileno(), 0, count)
            stream.truncate(count)
            made = Mapped(stream.fileno(), count)
    except OSError as error:
        raise FedloraError(
            f"{pages.folder}: found no room for {count} bytes of a sum or a step"
            f" ({error.strerror}); the last committed round is kept, and --resume goes on from it"
        ) from error
    return np.frombuffer(_known(made, pages.folder), dtype)


def by_stretches(*arrays: Array, rows: int = 1) -> Iterator[tuple[Array, ...]]:
    """The same stretch of each of these (size,) arrays, from the first to the last; each is let go
    when the next is asked for. ValueError for arrays of several sizes.

    Stretches are the shorter for `rows`, where so many of each are copied to be looked at together.
    """
    size = arrays[0].size
    if any(array.shape != (size,) for array in arrays):
        raise ValueError(f"found {[array.shape for array in arrays]}, expected all to be ({size},)")
    length = max(1, STRETCH // rows)
    for start in range(0, size, length):
        views = tuple(array[start : start + length] for array in arrays)
        yield views
        let_go(*views)


def let_go(*arrays: Array) -> None:
    """Give the pages of mapped, contiguous arrays back; what was written stands in their files."""
    for array in arrays:
        pages = _pages(array)
        if pages is not None and array.nbytes:
            begins = array.__array_interface__["data"][0]
            first = max(pages.address, begins - begins % AROUND)
            pages.madvise(mmap.MADV_DONTNEED, first - pages.address, begins + array.nbytes - first)


def _known(pages: Mapped, folder: Path) -> Mapped:
    pages.address = np.frombuffer(pages, np.uint8).__array_interface__["data"][0]
    pages.folder = folder
    return pages


def _pages(array: Array) -> Mapped | None:
    """The mapping that an array is a view of, through other views."""
    owner: Any = array
    while owner is not None and not isinstance(owner, Mapped):
        owner = owner.obj if isinstance(owner, memoryview) else getattr(owner, "base", None)
    return owner
