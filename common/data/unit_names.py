"""What a privacy unit is told apart by, from itself alone, and a draw that depends on nothing else.

Who is public in a simulation, and who is held out of a run's training, follows from a unit's own
name under a key: whoever else is there moves nobody to the other side.
"""

from __future__ import annotations

import hmac

import numpy as np
import numpy.typing as npt

from fedlora.common.codec.framing import digest
from fedlora.common.data.records import Records
from fedlora.common.data.values import one_spelling

UNIT_TAG, RECORD_TAG = "fedlora-public-unit-1", "fedlora-public-record-1"


def unit_names(records: Records) -> list[bytes]:
    """Of units in their order; where each record is one, its words, which alike records share."""
    if records.units is not None:
        return [digest(UNIT_TAG, unit.encode()) for unit in dict.fromkeys(records.units)]
    words = ([word.encode() for word in each] for each in said(records))
    return [digest(RECORD_TAG, *each) for each in words]


def said(records: Records) -> list[tuple[str, ...]]:
    """The words of each record: its text, its answer, and the other text of a pair."""
    more = [each for each in records.parts.values() if each and isinstance(each[0], str)]
    answers = [] if records.responses is None else [records.responses]
    return list(zip(records.texts, *answers, *more, strict=True))


def spelled_once(records: Records) -> list[tuple[str, ...]]:
    """`said`, where what differs in white space, case or Unicode's form alone is the same.

    For telling whether a public text is one of the private: an export trims lines.
    """
    return [tuple(map(one_spelling, words)) for words in said(records)]


def keyed_points(names: list[bytes], key: bytes) -> npt.NDArray[np.float64]:
    """(n,) in [0, 1), each by its own name: 53 bits, as many as a float64 tells apart."""
    points = (int.from_bytes(hmac.digest(key, name, "sha256")[:8], "big") >> 11 for name in names)
    return np.fromiter(points, dtype=np.float64, count=len(names)) / 2**53
