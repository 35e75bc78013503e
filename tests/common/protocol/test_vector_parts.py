"""The largest vector that may travel has a list of its parts, masked or not."""

from __future__ import annotations

import pytest

from fedlora.common.codec.strict import build
from fedlora.common.errors import BadInput
from fedlora.common.protocol.vector_parts import MOST_BYTES, PART_BYTES, Parts
from fedlora.server.deployment.institutions import ROOM


def test_the_largest_masked_input_is_listed_and_nothing_larger() -> None:
    largest = 8 * (MOST_BYTES // 4) + ROOM
    digests = ["0" * 64] * -(-largest // PART_BYTES)
    table = {"size": largest, "part": PART_BYTES, "digests": digests}
    build(Parts, table, "parted parts").check(largest, largest, "update")
    with pytest.raises(BadInput, match="size"):
        build(Parts, table | {"size": 2 * largest}, "parted parts")
