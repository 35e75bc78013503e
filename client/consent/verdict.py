"""What a policy says to one field of a manifest, and to all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlora.common.errors import Refused
from fedlora.common.terminal import one_line


@dataclass(frozen=True)
class Verdict:
    """What the policy says to one field of a manifest; `reason` is "" where it is allowed.

    `note` is for the node's own operator, and goes to nobody else: budgets, and what other runs had
    of them. The rest is what a coordinator chose, and is one printable line: it ends on the
    operator's terminal.
    """

    field: str
    found: str
    reason: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("found", "reason", "note"):
            object.__setattr__(self, name, one_line(getattr(self, name)))

    @property
    def allowed(self) -> bool:
        """Whether there is no reason against it."""
        return not self.reason

    @property
    def denial(self) -> str:
        """The line that a refusal shows."""
        return f"manifest {self.field} = {self.found}: {self.reason}"


class Denied(Refused):
    """What a policy does not allow, for anybody; `detail` has the notes, for the operator alone."""

    def __init__(self, denied: Sequence[Verdict]) -> None:
        super().__init__("; ".join(each.denial for each in denied))
        self.detail = "; ".join(
            each.denial + (f" ({each.note})" if each.note else "") for each in denied
        )


def allow(verdicts: list[Verdict]) -> None:
    """Denied with every reason, unless all fields are allowed."""
    denied = [each for each in verdicts if not each.allowed]
    if denied:
        raise Denied(denied)


def same(field: str, found: str, expected: str) -> Verdict:
    """Allowed where `found` is `expected`."""
    return Verdict(field, found[:80], "" if found == expected else f"expected {expected}")


def one_of(field: str, found: str, known: set[str] | Mapping[str, str], reason: str) -> Verdict:
    """Allowed where `found` is among `known`, else with `reason`."""
    return Verdict(field, found[:80] or '""', "" if found in known else reason)


def at_most(field: str, found: float, most: float) -> Verdict:
    """Allowed where `found` is no more than `most`; never where it is no number."""
    return Verdict(field, f"{found:g}", "" if found <= most else f"expected at most {most:g}")


def least(field: str, found: int, least: int) -> Verdict:
    """Allowed where `found` is no less than `least`."""
    return Verdict(field, str(found), "" if found >= least else f"expected at least {least}")


def beyond(extra: list[str] | list[int], known: tuple[object, ...]) -> str:
    """The reason against items that are not `known`; "" where there is no `extra`."""
    return f"expected some of {list(known)}" if extra else ""
