"""What Flower's programs are started with."""

from __future__ import annotations

import pytest

from fedlora.common.protocol.flower_programs import environment


def test_nothing_that_calls_out_or_colours_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's kernel asks for colour, in which Flower's JSON would be none."""
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "FLWR_TELEMETRY_ENABLED", "KEPT"):
        monkeypatch.setenv(name, "1")
    found = environment()
    assert not {"FORCE_COLOR", "CLICOLOR_FORCE"} & set(found)
    assert found["FLWR_TELEMETRY_ENABLED"] == "0" and found["KEPT"] == "1"
