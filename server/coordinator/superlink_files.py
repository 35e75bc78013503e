"""Which files SuperLink is started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Files:
    """What SuperLink needs; `state` is its own folder."""

    ca: Path
    certificate: Path
    key: Path
    state: Path

    @property
    def secret(self) -> Path:
        """Between SuperLink and its executor."""
        return self.state / "superexec.secret"
