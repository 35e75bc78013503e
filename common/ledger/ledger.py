"""The privacy ledger: the only owner of a budget.

    consent   reserves a run's whole (ε, δ), all attempts of all phases, against a budget's caps;
              asked again it notes data that came to the run since
    reserve   one attempt at one round, durable before data is touched; each attempt once
    commit    the digest of what left

Nothing is ever refunded or deleted. ε and δ add up over runs (basic composition), exactly as the
decimal numbers that people write: 0.1 three times fits a cap of 0.3, and nothing fits beyond it.
Budgets have names: data never opens one, a policy does. A budget counts one kind of unit, that of
its first consent, and a data file charges one budget. How the entries are kept is
`common.ledger.chain`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.budget import Budget, Total, beyond
from fedlora.common.ledger.chain import Chain, Entry
from fedlora.common.ledger.signed_head import Head
from fedlora.common.ledger.subject import UNKNOWN, Subject
from fedlora.common.privacy.accountant import Spend

SCHEMA = 3  # 2: a consent says whose records it is about; 3: and names each of their files
# These are read; the first consent after them is preceded by an entry that moves the ledger on.
EARLIER_SCHEMAS = (1, 2)
SAME_TERMS = 1e-4  # relative: another machine, or version, computes an ε to within that

__all__ = ["SCHEMA", "Budget", "Entry", "Ledger"]


@dataclass(frozen=True)
class _Consent:
    """What a run may do with a budget, and what it reserved for that."""

    spend: Spend
    attempts: tuple[int, ...]

    def covers(self, other: _Consent) -> bool:
        mine, asked = self.spend, other.spend
        return (
            self.attempts == other.attempts
            and asked.epsilon <= mine.epsilon * (1 + SAME_TERMS)
            and asked.delta <= mine.delta
        )


class Ledger:
    """One ledger; safe for several processes and threads at once, but not over a fork."""

    def __init__(self) -> None:
        self._consents: dict[tuple[str, str], _Consent] = {}  # by budget and manifest, as all below
        self._totals: dict[str, Total] = {}  # by budget
        self._units: dict[str, str] = {}  # by budget: of the first consent that says one
        self._payers: dict[str, str] = {}  # the budget that a path or a digest of data charges
        self._schema = SCHEMA
        self._anchored = False
        # attempt -> (phase, round)
        self._phases: dict[tuple[str, str], dict[int, tuple[int, int]]] = {}
        self._committed: set[tuple[str, str, int]] = set()
        self._chain: Chain
        self.id = ""  # drawn when the ledger was begun: which ledger this is

    @classmethod
    def open(cls, path: Path, head: Path, key: Path, anchor: Path | None = None) -> Ledger:
        """Open a ledger, or begin one where neither it nor its head nor its key exists.

        Refused where the ledger is not the one that the head was signed for, or that was anchored.
        """
        ledger = cls()
        opening = {"kind": "open", "schema": SCHEMA, "id": os.urandom(16).hex()}
        ledger._chain = Chain.open(path, head, key, opening, ledger._take_in, anchor)
        if ledger._chain.lacks_anchor:
            ledger._begin_anchor(anchor)
        return ledger

    def _begin_anchor(self, anchor: Path | None) -> None:
        """The first entry with an anchor; Refused where there was one: its disk may be away."""
        with self._chain.locked():
            if self._anchored:
                raise Refused(
                    f"ledger anchor {anchor}: is missing, expected the one that this ledger has;"
                    " where it is to lie elsewhere from now on, move it there"
                )
            self._move_on()
            self._chain.append({"kind": "anchor"})

    def consent(
        self,
        budget: Budget,
        manifest: str,
        spend: Spend,
        attempts: Sequence[int],
        subject: Subject = UNKNOWN,
    ) -> None:
        """Reserve a run's whole spend; Refused past a cap, for another unit than the budget's, or
        for data that charge another budget. A second time nothing more is reserved; data in places
        that charged nothing yet, to which a link or a policy leads since, charge this budget too.
        """
        asked = _Consent(spend, tuple(attempts))
        if not asked.attempts or any(type(each) is not int or each < 0 for each in asked.attempts):
            raise BadInput(f"consent attempts: found {list(attempts)}, expected whole numbers >= 0")
        subject = self._keyed(subject)
        with self._chain.locked():
            self._check_subject(budget.name, subject)
            given = self._consents.get((budget.name, manifest))
            if given is not None:
                if not given.covers(asked):
                    raise Refused(
                        f"budget {budget.name}: consented to {manifest[:14]} on other terms"
                    )
                if subject.beside(self._payers.keys()):
                    self._move_on()
                    run = {"budget": budget.name, "manifest": manifest}
                    self._chain.append({"kind": "data", **run, **subject.lying})
                return
            self._check_caps(budget, spend)
            self._move_on()
            self._chain.append(
                {
                    "kind": "consent",
                    "budget": budget.name,
                    "manifest": manifest,
                    **asdict(subject),
                    "epsilon": spend.epsilon,
                    "delta": spend.delta,
                    "attempts": list(asked.attempts),
                    "cap_epsilon": budget.epsilon,
                    "cap_delta": budget.delta,
                }
            )

    def check(self, budget: str, subject: Subject) -> None:
        """Refused where a consent would be, for its unit or its data; reserves nothing."""
        with self._chain.locked():
            self._check_subject(budget, self._keyed(subject))

    def reserve(
        self, budget: str, manifest: str, phase: int, round_number: int, attempt: int
    ) -> None:
        """Use up one attempt, durably; Refused without consent, twice, or beyond the number."""
        with self._chain.locked():
            consent = self._consents.get((budget, manifest))
            if consent is None:
                raise Refused(f"budget {budget}: nothing was consented to for {manifest[:14]}")
            taken = self._phases.get((budget, manifest), {})
            if attempt in taken:
                raise Refused(
                    f"budget {budget}: attempt {attempt} was used before: a replay or a rewind"
                )
            if not 0 <= phase < len(consent.attempts):
                raise Refused(
                    f"budget {budget}: phase {phase} is not one of {len(consent.attempts)}"
                    " consented to"
                )
            if sum(used == phase for used, _ in taken.values()) >= consent.attempts[phase]:
                raise Refused(
                    f"budget {budget}: all {consent.attempts[phase]} attempts of phase {phase} are"
                    " spent"
                )
            self._chain.append(
                {
                    "kind": "reserve",
                    "budget": budget,
                    "manifest": manifest,
                    "phase": phase,
                    "round": round_number,
                    "attempt": attempt,
                }
            )

    def commit(
        self, budget: str, manifest: str, round_number: int, attempt: int, update: str
    ) -> None:
        """Record the digest of what a reserved attempt releases; once."""
        with self._chain.locked():
            _, reserved = self._phases.get((budget, manifest), {}).get(attempt, (0, None))
            if reserved is None or reserved != round_number:
                raise Refused(
                    f"budget {budget}: round {round_number} attempt {attempt} was not reserved"
                )
            if (budget, manifest, attempt) in self._committed:
                raise Refused(
                    f"budget {budget}: round {round_number} attempt {attempt} was committed before"
                )
            self._chain.append(
                {
                    "kind": "commit",
                    "budget": budget,
                    "manifest": manifest,
                    "round": round_number,
                    "attempt": attempt,
                    "update": update,
                }
            )

    def spent(self, budget: str) -> Spend:
        """What a budget has reserved over all runs."""
        with self._chain.locked():
            total = self._totals.get(budget, Total())
            return Spend(float(total.epsilon), float(total.delta))

    def charges(self, budget: str) -> tuple[Spend, ...]:
        """What each run reserved of a budget, in the order of their consents."""
        with self._chain.locked():
            return tuple(
                consent.spend for (name, _), consent in self._consents.items() if name == budget
            )

    def reserved_for(self, budget: str, manifest: str) -> Spend | None:
        """What one run reserved of a budget, or None without consent."""
        with self._chain.locked():
            consent = self._consents.get((budget, manifest))
            return None if consent is None else consent.spend

    def reservations(self, manifest: str) -> dict[int, int]:
        """The attempts that any budget has reserved for a run, each with its round."""
        with self._chain.locked():
            return {
                attempt: number
                for (_, run), taken in self._phases.items()
                if run == manifest
                for attempt, (_, number) in taken.items()
            }

    def attempts_used(self, manifest: str) -> int:
        """The highest attempt number that any budget has reserved for a run; 0 for none."""
        with self._chain.locked():
            used = (
                attempt
                for (_, run), taken in self._phases.items()
                if run == manifest
                for attempt in taken
            )
            return max(used, default=0)

    def head(self) -> Head:
        """Its height, which is how many entries there are, and which ledger it is there: the last
        one's hash under the ledger's key, for an entry's own hash would let guesses be tried.
        """
        with self._chain.locked():
            at = self._chain.head
            return Head(at.count, self._chain.keyed(at.hash))

    def entries(self) -> list[Entry]:
        """All entries, oldest first, verified again."""
        return self._chain.entries()

    def secret(self, purpose: str) -> bytes:
        """(32,) bytes, the same as long as the ledger lives; nobody without its key knows them."""
        return bytes.fromhex(self._chain.keyed(purpose).removeprefix("keyed:"))

    def close(self) -> None:
        """Let go of the file; whoever uses it afterwards is refused."""
        self._chain.close()

    def _move_on(self) -> None:
        """What no earlier version knows is entered only once that would refuse the ledger."""
        if self._schema != SCHEMA:
            self._chain.append({"kind": "schema", "schema": SCHEMA})

    def _check_caps(self, budget: Budget, spend: Spend) -> None:
        reason = beyond(budget, self._totals.get(budget.name, Total()), spend)
        if reason:
            raise Refused(reason)

    def _keyed(self, subject: Subject) -> Subject:
        """As it stands in an entry: the digest of data under the ledger's key."""
        keyed = self._chain.keyed
        files = tuple((path, keyed(digest) if digest else "") for path, digest in subject.files)
        return replace(subject, data=keyed(subject.data) if subject.data else "", files=files)

    def _check_subject(self, budget: str, subject: Subject) -> None:
        """The ε of a record and of a person do not add up; nor is one file two populations."""
        unit = self._units.get(budget, subject.unit)
        if subject.unit and subject.unit != unit:
            raise Refused(
                f"budget {budget}: found the unit {subject.unit!r}, expected {unit!r}, which it has"
                " counted from its first consent on"
            )
        for each in sorted(subject.traces | subject.around):
            payer = self._payers.get(each, budget)
            if payer != budget:
                raise Refused(
                    f"budget {budget}: found data that charged budget {payer} before, by path or"
                    f" by bytes ({subject.path[:200]}), expected them to charge it again"
                )

    def _take_in(self, body: Mapping[str, Any]) -> None:
        kind = body["kind"]
        begins, moves_on = kind == "open" and not self.id, kind == "schema"
        if begins or (moves_on and self._schema < SCHEMA):
            if body["schema"] not in (*EARLIER_SCHEMAS, SCHEMA):
                raise Refused(f"ledger: found schema {body['schema']}, expected {SCHEMA}")
            self._schema, self.id = body["schema"], str(body.get("id", self.id))
            return
        if kind == "anchor" and not self._anchored:
            self._anchored = True
            return
        key = (str(body.get("budget")), str(body.get("manifest")))
        if kind == "consent" and key not in self._consents:
            spend = Spend(body["epsilon"], body["delta"])
            self._consents[key] = _Consent(spend, tuple(body["attempts"]))
            self._totals[key[0]] = self._totals.get(key[0], Total()) + spend
            self._take_in_subject(key[0], body)
        elif kind == "data" and key in self._consents:
            self._take_in_subject(key[0], body)
        elif kind == "reserve" and body["attempt"] not in self._phases.get(key, {}):
            self._phases.setdefault(key, {})[body["attempt"]] = (body["phase"], body["round"])
        elif kind == "commit" and (*key, body["attempt"]) not in self._committed:
            self._committed.add((*key, body["attempt"]))
        else:
            raise Refused(
                f"ledger: found an entry of kind {kind!r} that no ledger of this version writes"
            )

    def _take_in_subject(self, budget: str, body: Mapping[str, Any]) -> None:
        """Of a consent of this schema; an earlier one says nothing."""
        if body.get("unit"):
            self._units.setdefault(budget, str(body["unit"]))
        files = tuple((str(path), str(data)) for path, data in body.get("files", ()))
        path, data = str(body.get("path", "")), str(body.get("data", ""))
        for each in Subject(path=path, data=data, files=files).traces:
            self._payers.setdefault(each, budget)
