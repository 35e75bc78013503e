"""Arrays whose pages are a file's: the same values as in memory, and no memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedlora.common.disk import mapped
from fedlora.common.disk.mapped import alike, by_stretches, let_go
from fedlora.common.errors import FedloraError
from tests.disk import fill, small_disk

SIZE = 3 * mapped.STRETCH + 5


def of_a_file(folder: Path, size: int = SIZE) -> mapped.Array:
    """(size,) float32 of zeros: a view of a file's bytes, behind 8 others."""
    path = folder / "vector"
    path.write_bytes(bytes(8 + 4 * size))
    return np.frombuffer(mapped.mapped(path)[8:], np.float32)


def resident(array: mapped.Array) -> int:
    """Bytes of its file that this process holds."""
    place, inside, found = array.__array_interface__["data"][0], False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            start, end = (int(each, 16) for each in first.split("-"))
            inside = start <= place < end
        elif inside and first == "Rss:":
            found += int(line.split()[1]) << 10
    return found


def test_what_was_written_stands_once_it_was_let_go(tmp_path: Path) -> None:
    made = alike(of_a_file(tmp_path), np.float64)
    assert [path.name for path in tmp_path.iterdir()] == ["vector"]  # the other has no name
    assert made.shape == (SIZE,) and not made.any()
    place = 0
    for (part,) in by_stretches(made):
        part += np.arange(place, place + len(part))
        place += len(part)
    assert place == SIZE
    assert resident(made) < 8 * mapped.STRETCH
    assert (made == np.arange(SIZE)).all()
    assert resident(made) > 8 * (SIZE - mapped.STRETCH)
    let_go(made.reshape(1, -1)[0, 7:])  # through any view
    assert resident(made) < 8 * mapped.STRETCH
    assert (made == np.arange(SIZE)).all()


def test_what_is_made_of_memory_is_memory(tmp_path: Path) -> None:
    held = np.arange(SIZE, dtype=np.float32)
    made = alike(held[1:], np.float64)
    assert made.flags.owndata and made.shape == (SIZE - 1,)
    for part, zero in by_stretches(held[1:], made):
        zero += part
    assert (made == held[1:]).all()


def test_arrays_of_several_sizes_are_refused() -> None:
    """A tail that nobody looks at would be missing in a sum."""
    for other in (np.zeros(4), np.zeros((1, 5)), np.zeros(6)):
        with pytest.raises(ValueError, match=r"expected all to be \(5,\)"):
            next(by_stretches(np.zeros(5), other))


def test_no_room_is_said_before_a_page_is_written(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as folder:
        vector = of_a_file(folder, 1000)
        fill(folder)
        with pytest.raises(FedloraError, match="found no room for 8000 bytes of a sum or a step"):
            alike(vector, np.float64)
        (folder / "filler").unlink()
        assert not alike(vector, np.float64).any()
