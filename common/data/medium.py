"""What is no text: how bytes become the values that a base reads, all records in one shape.

Each kind is a class with one library behind it, and nothing of it is loaded before it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Medium(Protocol):
    """One kind of records, images say."""

    name: ClassVar[str]  # of the key of [data] that names their column
    plural: ClassVar[str]
    given: ClassVar[str]  # what a base calls their values
    package: ClassVar[str]  # that unpacks them
    extra: ClassVar[str]  # of the installation, which brings it

    def decoded(self, data: bytes, place: str) -> Any:
        """A record's bytes unpacked; BadInput names its place where they can't be."""

    def measure(self, record: Any) -> tuple[float, ...]:
        """The size of an unpacked record, as people measure it."""

    def values(self, record: Any, reader: Any) -> Floats:
        """What the base's own processor makes of an unpacked record."""

    def blanks(self, reader: Any) -> Sequence[Any]:
        """Unpacked records of nobody's and of several sizes, of which all values have one shape."""

    def told(self, measures: Sequence[tuple[float, ...]]) -> str:
        """The sizes of several records, in words for their owner."""
