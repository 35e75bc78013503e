"""The exceptions that reach a person, and the exit code of each.

    FedloraError          1   anything that went wrong and is not below
    ├── BadInput          2   a file, field or message is not what it must be (one line to a fault)
    ├── Refused           3   a policy, a budget or a spent schedule says no
    │   └── Spent         3   every attempt that the noise was calibrated for was begun; the last
    │                         adapter stays
    └── QuorumLost        4   too few institutions answered

Every message says where, what was found and what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence


class FedloraError(Exception):
    """Base of all errors that the command line prints without a traceback."""

    exit_code = 1


class BadInput(FedloraError):
    """Input that is not what it must be; `faults` holds one line for each fault found."""

    exit_code = 2

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))


class Refused(FedloraError):
    """A policy, a privacy budget or a spent schedule forbids it; nothing was spent."""

    exit_code = 3


class Spent(Refused):
    """A phase has no attempt left: the run has ended where it stands."""


class QuorumLost(FedloraError):
    """Too few institutions answered before the deadline."""

    exit_code = 4
