"""What was spent stays spent: whatever is killed, edited, restored or raced."""

from __future__ import annotations

import errno
import json
import math
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.ledger import chain, signed_head
from fedlora.common.ledger import ledger as ledger_module
from fedlora.common.ledger.ledger import Budget, Ledger
from fedlora.common.ledger.subject import Subject
from fedlora.common.privacy.accountant import Spend
from fedlora.common.trust.identity import Identity

WARD = Budget("ward", 3.0, 1e-5)
RUN = "sha256:run"


@dataclass
class Place:
    """Where a test's ledger lies, and what it opened."""

    folder: Path
    opened: list[Ledger] = field(default_factory=list)

    @property
    def files(self) -> tuple[Path, Path, Path]:
        return (
            self.folder / "ledger.sqlite",
            self.folder / "elsewhere" / "head.json",
            self.folder / "keys" / "key",
        )

    def open(self) -> Ledger:
        self.opened.append(Ledger.open(*self.files))
        return self.opened[-1]

    def close(self) -> None:
        for ledger in self.opened:
            ledger.close()

    def sql(self, *statements: str) -> None:
        self.close()
        with sqlite3.connect(self.files[0]) as connection:
            for statement in statements:
                connection.execute(statement)
        connection.close()

    def save(self) -> dict[Path, bytes]:
        self.close()
        return {path: path.read_bytes() for path in self.files}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    here = Place(tmp_path)
    yield here
    here.close()


def used(place: Place, rounds: int = 3) -> Ledger:
    """A ledger with a consent and some committed rounds."""
    ledger = place.open()
    ledger.consent(WARD, RUN, Spend(1.5, 1e-6), [10])
    for number in range(1, rounds + 1):
        ledger.reserve("ward", RUN, 0, number, number)
        ledger.commit("ward", RUN, number, number, f"sha256:{number}")
    return ledger


# --- budgets --------------------------------------------------------------------------------------


def test_consent_reserves_the_whole_schedule_and_survives_a_restart(place: Place) -> None:
    ledger = place.open()
    assert ledger.spent("ward") == Spend(0, 0)
    ledger.consent(WARD, RUN, Spend(1.5, 1e-6), [4])
    for each in (ledger, place.open()):
        assert each.spent("ward") == each.reserved_for("ward", RUN) == Spend(1.5, 1e-6)
        assert each.spent("other") == Spend(0, 0)
        assert each.reserved_for("ward", "sha256:other") is None


def test_the_same_consent_again_changes_nothing(place: Place) -> None:
    ledger = place.open()
    for each in (ledger, ledger, place.open()):
        each.consent(WARD, RUN, Spend(2.0, 1e-6), [2, 3])
        each.consent(WARD, RUN, Spend(2.0 * (1 - 1e-12), 1e-6), [2, 3])
    assert ledger.spent("ward") == Spend(2.0, 1e-6)
    assert [entry.body["kind"] for entry in ledger.entries()] == ["open", "consent"]


@pytest.mark.parametrize(
    ("spend", "attempts"),
    [
        (Spend(2.1, 1e-6), [2, 3]),
        (Spend(2.0, 2e-6), [2, 3]),
        (Spend(2.0, 1e-6), [2, 4]),
        (Spend(2.0, 1e-6), [5]),
        (Spend(2.0, 1e-6), [2, 3, 0]),
    ],
)
def test_consent_on_other_terms_is_refused(place: Place, spend: Spend, attempts: list[int]) -> None:
    ledger = place.open()
    ledger.consent(WARD, RUN, Spend(2.0, 1e-6), [2, 3])
    with pytest.raises(Refused, match="on other terms"):
        ledger.consent(WARD, RUN, spend, attempts)
    assert ledger.reserved_for("ward", RUN) == Spend(2.0, 1e-6)


@pytest.mark.parametrize(("name", "spend"), [("ε", Spend(1.0000001, 0)), ("δ", Spend(0, 9.1e-6))])
def test_a_cap_is_never_passed(place: Place, name: str, spend: Spend) -> None:
    ledger = place.open()
    ledger.consent(WARD, "sha256:a", Spend(2.0, 1e-6), [1])
    with pytest.raises(Refused, match=f"budget ward: {name} .* past its cap"):
        ledger.consent(WARD, "sha256:b", spend, [1])
    assert ledger.spent("ward") == Spend(2.0, 1e-6)
    ledger.consent(Budget("other", 3.0, 1e-5), "sha256:b", spend, [1])
    ledger.consent(WARD, "sha256:c", Spend(1.0, 9e-6), [1])  # exactly what is left
    assert ledger.spent("ward") == Spend(3.0, 1e-5)
    with pytest.raises(Refused, match="ε = 3 is spent"):
        ledger.consent(WARD, "sha256:d", Spend(1e-12, 0), [1])


def test_terms_that_another_version_computed_are_the_same(place: Place) -> None:
    """Opacus' ε and ours differ by 2e-6: a run that was begun before goes on, charged once."""
    ledger = place.open()
    ledger.consent(WARD, "sha256:a", Spend(1.0, 1e-6), [2])
    ledger.consent(WARD, "sha256:a", Spend(1.0 + 2e-6, 1e-6), [2])
    assert ledger.spent("ward") == Spend(1.0, 1e-6)
    with pytest.raises(Refused, match="on other terms"):
        ledger.consent(WARD, "sha256:a", Spend(1.0 + 2e-4, 1e-6), [2])


def test_sums_are_those_of_the_numbers_that_people_write(place: Place) -> None:
    ledger, budget = place.open(), Budget("tenths", 0.3, 1e-5)
    for number in range(3):
        # 0.1 + 0.1 + 0.1 > 0.3 in floats
        ledger.consent(budget, f"sha256:{number}", Spend(0.1, 1e-6), [1])
    assert ledger.spent("tenths") == Spend(0.3, 3e-6)
    assert ledger.charges("tenths") == (Spend(0.1, 1e-6),) * 3 and not ledger.charges("other")
    with pytest.raises(Refused):
        ledger.consent(budget, "sha256:4", Spend(5e-324, 0), [1])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0, 2), max_size=12))
def test_no_order_of_runs_passes_the_cap(
    tmp_path_factory: pytest.TempPathFactory, epsilons: list[float]
) -> None:
    place = Place(tmp_path_factory.mktemp("ledger"))
    ledger, granted = place.open(), 0.0
    for number, epsilon in enumerate(epsilons):
        try:
            ledger.consent(WARD, f"sha256:{number}", Spend(epsilon, 0), [1])
            granted += epsilon
        except Refused:
            assert granted + epsilon > 3 * (1 - 1e-12)
        assert ledger.spent("ward").epsilon == pytest.approx(granted)
        assert ledger.spent("ward").epsilon <= 3
    place.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_what_is_no_number_is_refused(place: Place, value: float) -> None:
    ledger = place.open()
    for make in (
        lambda: Spend(value, 0),
        lambda: Spend(0, value),
        lambda: Budget("b", value, 1),
        lambda: Budget("b", 1, value),
    ):
        with pytest.raises(BadInput, match="expected a finite number"):
            make()
    assert len(ledger.entries()) == 1


@pytest.mark.parametrize("attempts", [[], [-1], [1.5], [True]])
def test_attempts_are_whole_numbers(place: Place, attempts: list[int]) -> None:
    with pytest.raises(BadInput, match="consent attempts"):
        place.open().consent(WARD, RUN, Spend(1, 0), attempts)


# --- attempts -------------------------------------------------------------------------------------


def test_an_attempt_is_used_once(place: Place) -> None:
    ledger = place.open()
    ledger.consent(WARD, RUN, Spend(1, 0), [2, 1])
    ledger.reserve("ward", RUN, 0, 1, 1)
    for each in (ledger, place.open()):
        for phase, number in ((0, 1), (0, 2), (1, 5)):
            with pytest.raises(Refused, match="attempt 1 was used before"):
                each.reserve("ward", RUN, phase, number, 1)
    ledger.reserve("ward", RUN, 0, 1, 2)  # the same round again, after a crash
    with pytest.raises(Refused, match="all 2 attempts of phase 0 are spent"):
        ledger.reserve("ward", RUN, 0, 2, 3)
    ledger.reserve("ward", RUN, 1, 2, 3)
    with pytest.raises(Refused, match="all 1 attempts of phase 1 are spent"):
        place.open().reserve("ward", RUN, 1, 2, 4)
    assert ledger.attempts_used(RUN) == 3
    assert ledger.attempts_used("sha256:other") == 0


@pytest.mark.parametrize(
    ("budget", "manifest", "phase", "message"),
    [
        ("ward", "sha256:other", 0, "nothing was consented to"),
        ("other", RUN, 0, "nothing was consented to"),
        ("ward", RUN, 1, "phase 1 is not one of 1"),
        ("ward", RUN, -1, "phase -1 is not one of 1"),
    ],
)
def test_nothing_is_reserved_without_consent(
    place: Place, budget: str, manifest: str, phase: int, message: str
) -> None:
    ledger = place.open()
    ledger.consent(WARD, RUN, Spend(1, 0), [2])
    with pytest.raises(Refused, match=message):
        ledger.reserve(budget, manifest, phase, 1, 1)
    assert len(ledger.entries()) == 2


def test_a_commit_needs_its_reservation_and_comes_once(place: Place) -> None:
    ledger = used(place, rounds=0)
    ledger.reserve("ward", RUN, 0, 4, 7)
    for number, attempt in ((4, 8), (5, 7), (1, 1)):
        with pytest.raises(Refused, match="was not reserved"):
            ledger.commit("ward", RUN, number, attempt, "sha256:u")
    ledger.commit("ward", RUN, 4, 7, "sha256:u")
    for each in (ledger, place.open()):
        with pytest.raises(Refused, match="was committed before"):
            each.commit("ward", RUN, 4, 7, "sha256:other")
    assert ledger.entries()[-1].body == {
        "kind": "commit", "budget": "ward", "manifest": RUN, "round": 4, "attempt": 7,
        "update": "sha256:u",
    }  # fmt: skip


def test_two_open_ledgers_see_each_other(place: Place) -> None:
    first, second = place.open(), place.open()
    first.consent(WARD, RUN, Spend(2, 0), [3])
    with pytest.raises(Refused, match="past its cap"):
        second.consent(WARD, "sha256:b", Spend(2, 0), [1])
    second.reserve("ward", RUN, 0, 1, 1)
    first.commit("ward", RUN, 1, 1, "sha256:u")
    assert first.entries() == second.entries()


# --- kills ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing in the code may catch it."""


def killing(*_: object) -> None:
    raise Killed


@pytest.mark.parametrize("reopen", [True, False])
def test_a_kill_between_the_entry_and_its_head_spends_the_attempt(
    place: Place, monkeypatch: pytest.MonkeyPatch, reopen: bool
) -> None:
    ledger = used(place)
    other = place.open()
    with monkeypatch.context() as patch:
        patch.setattr(chain.Chain, "_write_head", killing)
        with pytest.raises(Killed):
            ledger.reserve("ward", RUN, 0, 4, 4)
    ledger.close()
    survivor = place.open() if reopen else other
    with pytest.raises(Refused, match="was used before"):
        survivor.reserve("ward", RUN, 0, 4, 4)
    assert json.loads(place.files[1].read_text())["body"]["count"] == len(survivor.entries())


def test_a_kill_before_the_entry_spends_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = used(place)
    before = ledger.entries()
    with monkeypatch.context() as patch:
        patch.setattr(chain, "_canonical", killing)
        with pytest.raises(Killed):
            ledger.reserve("ward", RUN, 0, 4, 4)
    assert place.open().entries() == before
    ledger.reserve("ward", RUN, 0, 4, 4)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1),
        (PermissionError(errno.EACCES, "Permission denied"), 3),
    ],
    ids=str,
)
def test_a_head_that_cannot_be_written_ends_it_and_the_attempt_stays_spent(
    place: Place, monkeypatch: pytest.MonkeyPatch, error: OSError, code: int
) -> None:
    """With 1 where the machine ran out, as docs/operations.md says: nobody refused."""
    ledger = used(place)

    def failing(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(signed_head, "write_atomically", failing)
        with pytest.raises(FedloraError, match=error.strerror) as caught:
            ledger.reserve("ward", RUN, 0, 4, 4)
        assert caught.value.exit_code == code
    with pytest.raises(Refused, match="was used before"):
        ledger.reserve("ward", RUN, 0, 4, 4)


def test_a_database_that_can_not_grow_is_a_full_disk_and_no_damage(place: Place) -> None:
    ledger = used(place)
    connection = ledger._chain._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(FedloraError, match=r"written .database or disk is full") as end:
        for number in range(100):
            ledger.consent(WARD, f"sha256:{number}", Spend(1e-3, 1e-9), [1])
    assert end.value.exit_code == 1
    before = len(ledger.entries())
    assert len(place.open().entries()) == before > 8


@pytest.mark.parametrize("survives", range(4))
def test_a_beginning_that_was_killed_begins_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, survives: int
) -> None:
    places: dict[str, object] = dict.fromkeys(
        ("signed_head", "sync_folder", "write_atomically"), chain
    ) | {"write": Identity}
    calls: dict[str, Callable[..., object]] = {
        name: getattr(where, name) for name, where in places.items()
    }
    left = survives

    def counted(name: str) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return calls[name](*arguments, **named)

        return call

    with monkeypatch.context() as patch:
        for name, where in places.items():
            patch.setattr(where, name, counted(name))
        with pytest.raises(Killed):
            place.open()
    assert not place.files[2].exists()
    assert used(place).spent("ward") == Spend(1.5, 1e-6)


WORK = """
import sys
from pathlib import Path
from fedlora.common.ledger.ledger import Budget, Ledger
from fedlora.common.privacy.accountant import Spend
ledger = Ledger.open(*(Path(name) for name in sys.argv[1:4]))
ledger.consent(Budget("ward", 3.0, 1e-5), "sha256:run", Spend(1.5, 1e-6), [100000])
first = ledger.attempts_used("sha256:run") + 1
print("ready", flush=True)
for attempt in range(first, 100000):
    ledger.reserve("ward", "sha256:run", 0, attempt, attempt)
    print(attempt, flush=True)
    ledger.commit("ward", "sha256:run", attempt, attempt, "sha256:u")
"""


def test_a_budget_keeps_the_unit_of_its_first_consent(place: Place) -> None:
    ledger, spend = place.open(), Spend(0.5, 1e-6)
    ledger.consent(WARD, "sha256:a", spend, [1])  # by whom nothing was said
    ledger.consent(WARD, "sha256:b", spend, [1], Subject("record", "f"))
    place.close()
    ledger = place.open()
    for subject in (Subject("patient", "f"), Subject("Record", "f")):
        with pytest.raises(Refused, match=f"found the unit '{subject.unit}', expected 'record'"):
            ledger.consent(WARD, "sha256:c", spend, [1], subject)
    ledger.consent(Budget("patients", 1.0, 1e-5), "sha256:c", spend, [1], Subject("patient", "f"))
    assert ledger.spent("ward") == Spend(1.0, 2e-6)


def test_a_data_file_charges_one_budget(place: Place) -> None:
    ledger, spend, other = place.open(), Spend(0.5, 1e-6), Budget("other", 3.0, 1e-5)
    ledger.consent(WARD, RUN, spend, [1], Subject("record", "f", "/d/a.csv", "sha256:1"))
    place.close()
    ledger = place.open()
    for subject in (
        Subject("record", "g", "/d/a.csv", "sha256:2"),  # the file has grown
        Subject("record", "g", "/d/copy.csv", "sha256:1"),  # or is a copy
    ):
        with pytest.raises(Refused, match="found data that charged budget ward before"):
            ledger.consent(other, "sha256:b", spend, [1], subject)
        ledger.consent(WARD, f"sha256:b{subject.data}", spend, [1], subject)
    last = ledger.entries()[-2].body
    assert (last["unit"], last["federation"], last["path"]) == ("record", "g", "/d/a.csv")


def test_data_that_came_to_a_run_after_its_start_charge_its_budget_alone(place: Place) -> None:
    """A link, a glob or a policy leads to other files by the next attempt, which the run uses."""
    ledger, spend, other = place.open(), Spend(0.5, 1e-6), Budget("other", 3.0, 1e-5)

    def lies(path: str, *files: tuple[str, str]) -> Subject:
        return Subject("record", "f", path, files[-1][1] if files else "sha256:9", files)

    for run, subjects in {
        "sha256:a": [lies("/d/9.csv"), lies("/d/10.csv", ("/d/10.csv", "sha256:10"))],
        "sha256:b": [lies(path := "/e/*.csv", ("/e/1.csv", "sha256:1"))],
        "sha256:c": [lies("/folder", ("/folder/1.csv", "sha256:3"))],
    }.items():
        for subject in subjects:
            ledger.consent(WARD, run, spend, [1], subject)
    grown = (("/e/1.csv", "sha256:1"), ("/e/2.csv", "sha256:2"))
    for _ in range(3):  # one entry, however often it is asked
        ledger.consent(WARD, "sha256:b", spend, [1], lies(path, *grown))
    more = (("/folder/1.csv", "sha256:3"), ("/folder/2.csv", "sha256:4"))
    ledger.consent(WARD, "sha256:c", spend, [1], lies("/folder", *more))  # it was charged as such
    kinds = [entry.body["kind"] for entry in ledger.entries()]
    assert kinds == ["open", "consent", "data", "consent", "consent", "data"]
    place.close()
    ledger = place.open()
    for file in (("/d/10.csv", "sha256:x"), ("/else.csv", "sha256:10"), ("/e/2.csv", "sha256:x")):
        with pytest.raises(Refused, match="found data that charged budget ward before"):
            ledger.consent(other, "sha256:d", spend, [1], lies(file[0], file))
    assert ledger.spent("ward") == Spend(1.5, 3e-6) and ledger.spent("other") == Spend(0, 0)
    # and no other budget's data come to a run either
    theirs = lies("/g.csv", ("/g.csv", "sha256:g"))
    ledger.consent(other, "sha256:d", spend, [1], theirs)
    with pytest.raises(Refused, match="found data that charged budget other before"):
        ledger.consent(WARD, "sha256:a", spend, [1], theirs)


def as_of_schema_2(subject: Subject) -> dict[str, object]:
    table = asdict(subject)
    del table["files"]
    return table


def test_a_ledger_of_the_schema_before_knows_its_data_and_moves_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schema 2 named the data as a whole: a folder is known by its place, a file by its bytes."""
    spend, other = Spend(0.5, 1e-6), Budget("other", 3.0, 1e-5)
    with monkeypatch.context() as before:
        before.setattr(ledger_module, "SCHEMA", 2)
        before.setattr(ledger_module, "asdict", as_of_schema_2)
        earlier = place.open()
        earlier.consent(
            WARD, "sha256:a", spend, [1], Subject("record", "f", "/d/a.csv", "sha256:1")
        )
        earlier.consent(WARD, "sha256:b", spend, [1], Subject("record", "f", "/e", "sha256:2"))
        place.close()
    ledger = place.open()
    files = (("/e/part.csv", "sha256:3"), ("/d/a.csv", "sha256:4"), ("/x/copy.csv", "sha256:1"))
    for each in files:
        subject = Subject("record", "g", "/somewhere/*.csv", "sha256:9", (each,))
        with pytest.raises(Refused, match="found data that charged budget ward before"):
            ledger.consent(other, "sha256:c", spend, [1], subject)
    ledger.consent(WARD, "sha256:c", spend, [1], subject)
    assert [entry.body["kind"] for entry in ledger.entries()[-2:]] == ["schema", "consent"]
    assert ledger.spent("ward") == Spend(1.5, 3e-6)


def test_no_entry_has_a_digest_of_data_that_can_be_guessed(tmp_path: Path) -> None:
    """A head that leaves would let whoever knows the rest try guesses."""
    kept = []
    for name in ("a", "b"):
        place = Place(tmp_path / name)
        for run in ("sha256:1", "sha256:2"):
            place.open().consent(WARD, run, Spend(1.0, 0), [1], Subject("record", data="sha256:d"))
        kept.append([entry.body["data"] for entry in place.open().entries()[1:]])
        assert "sha256:d" not in json.dumps([entry.body for entry in place.open().entries()])
        place.close()
    assert kept[0][0] == kept[0][1] != kept[1][0] == kept[1][1]


def test_what_was_acknowledged_survives_kill_9(place: Place) -> None:
    rng, acknowledged = random.Random(5), 0
    for _ in range(3):
        worker = subprocess.Popen(
            [sys.executable, "-c", WORK, *map(str, place.files)], stdout=subprocess.PIPE, text=True
        )
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.02, 0.2))
        worker.send_signal(signal.SIGKILL)
        printed = [int(line) for line in worker.communicate()[0].splitlines()]
        assert printed == sorted(set(printed)) and (not printed or printed[0] > acknowledged)
        acknowledged = max([acknowledged, *printed])
        ledger = place.open()
        reserved = [
            entry.body["attempt"] for entry in ledger.entries() if entry.body["kind"] == "reserve"
        ]
        assert reserved == list(range(1, len(reserved) + 1))
        assert acknowledged <= len(reserved) <= acknowledged + 1
        assert ledger.spent("ward") == Spend(1.5, 1e-6)
        place.close()
    assert acknowledged > 0


# --- races ----------------------------------------------------------------------------------------

RACE = """
import sys, time
from pathlib import Path
from fedlora.common.errors import Refused
from fedlora.common.ledger.ledger import Budget, Ledger
from fedlora.common.privacy.accountant import Spend
time.sleep(max(0, float(sys.argv[5]) - time.time()))
ledger = Ledger.open(*(Path(name) for name in sys.argv[1:4]))
granted = 0
for number in range(10):
    try:
        ledger.consent(Budget("ward", 3.0, 1e-5), f"sha256:{sys.argv[4]}-{number}", \
Spend(0.25, 0), [1])
        granted += 1
    except Refused:
        pass
    ledger.consent(Budget("open", 1e9, 1), f"sha256:shared-{number}", Spend(1.0, 0), [2])
    try:
        ledger.reserve("open", f"sha256:shared-{number}", 0, 1, 1)
        granted += 1000
    except Refused:
        pass
print(granted)
"""


def test_processes_that_race_share_one_budget(place: Place) -> None:
    start = time.time() + 2.5  # all begin at once, with no ledger there
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, *map(str, place.files), str(number), str(start)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    granted = sum(int(worker.communicate()[0]) for worker in workers)
    assert all(worker.returncode == 0 for worker in workers)
    assert granted == 12 + 10 * 1000  # 3.0 / 0.25 consents, and each shared attempt exactly once
    assert place.open().spent("ward") == Spend(3.0, 0)


# --- tampering ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_a_ledger_without_its_parts_refuses_service(place: Place, gone: tuple[int, ...]) -> None:
    used(place)
    place.close()
    for index in gone:
        place.files[index].unlink()
    with pytest.raises(Refused, match="deleted or moved"):
        place.open()
    assert [path.exists() for path in place.files] == [index not in gone for index in range(3)]


@pytest.mark.parametrize("restored", [(0,), (1,)], ids=["ledger", "head"])
def test_an_older_copy_is_refused(place: Place, restored: tuple[int, ...]) -> None:
    used(place)
    older = place.save()
    place.open().consent(WARD, "sha256:b", Spend(1, 0), [1])
    place.open().reserve("ward", "sha256:b", 0, 1, 1)
    place.close()
    for index in restored:
        place.files[index].write_bytes(older[place.files[index]])
    with pytest.raises(Refused, match="older copy"):
        place.open()


def test_a_copy_that_is_one_entry_older_is_refused_as_well(place: Place) -> None:
    used(place)
    older = place.save()
    place.open().consent(WARD, "sha256:b", Spend(1, 0), [1])
    place.close()
    place.files[0].write_bytes(older[place.files[0]])
    with pytest.raises(Refused, match="truncated or restored"):
        place.open()


def test_what_is_deleted_under_an_open_ledger_stays_spent(place: Place) -> None:
    ledger = used(place)
    with sqlite3.connect(place.files[0]) as connection:
        connection.execute("DELETE FROM entries WHERE number > 2")
    connection.close()
    with pytest.raises(Refused, match="truncated"):
        place.open()
    with pytest.raises(Refused, match="was used before"):
        ledger.reserve("ward", RUN, 0, 1, 1)
    with pytest.raises(Refused):
        ledger.entries()


def test_what_is_forged_with_right_hashes_fails_at_the_head(place: Place) -> None:
    used(place)
    saved = place.save()
    place.sql("DELETE FROM entries WHERE number > 1")
    with pytest.raises(Refused, match="truncated"):
        place.open()
    for path, data in saved.items():
        path.write_bytes(data)
    position, rows = chain._Position(), []
    for entry in place.open().entries():
        body = json.dumps(
            {**entry.body, "epsilon": 0.0} if entry.body["kind"] == "consent" else entry.body,
            sort_keys=True,
        )
        position = position.next(body)
        rows.append(
            f"UPDATE entries SET body = '{body}', hash = '{position.hash}' WHERE number ="
            f" {entry.number}"
        )
    place.sql(*rows)
    with pytest.raises(Refused, match="another hash than was signed"):
        place.open()
    other = Place(place.folder / "other")
    used(other)
    other.close()
    place.files[1].write_bytes(other.files[1].read_bytes())
    with pytest.raises(Refused, match="none that this key signed"):
        place.open()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET body = replace(body, '1.5', '0.5') WHERE number = 2",
        "UPDATE entries SET hash = 'x' WHERE number = 3",
        "DELETE FROM entries WHERE number = 3",
        "DELETE FROM entries WHERE number = 8",
        "DELETE FROM entries",
        "DROP TABLE entries",
        "UPDATE entries SET number = 30 WHERE number = 8",
        "INSERT INTO entries VALUES (9, '{}', 'x')",
    ],
)
def test_an_edited_ledger_is_refused(place: Place, statement: str) -> None:
    assert len(used(place).entries()) == 8
    place.sql(statement)
    with pytest.raises(Refused):
        place.open()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"kind": "refund", "budget": "ward", "manifest": RUN}, "kind 'refund'"),
        ({"kind": "consent", "budget": "ward", "manifest": RUN, "epsilon": 0.0, "delta": 0.0,
          "attempts": [9]}, "consent"),
        ({"kind": "reserve", "budget": "ward", "manifest": RUN, "phase": 0, "round": 1,
          "attempt": 1}, "reserve"),
        ({"kind": "commit", "budget": "ward", "manifest": RUN, "round": 1, "attempt": 1,
          "update": ""}, "commit"),
        ({"kind": "open", "schema": 2, "id": "x"}, "kind 'open'"),
        ({"kind": "schema", "schema": 2}, "kind 'schema'"),
        ({"kind": "schema", "schema": 3}, "kind 'schema'"),
    ],
)  # fmt: skip
def test_an_entry_that_no_ledger_writes_is_refused(
    place: Place, body: dict[str, object], message: str
) -> None:
    inner = used(place)._chain
    with inner.locked():
        position = inner._at.next(text := chain._canonical(body))
        inner._connection.execute(chain._INSERT, (position.count, text, position.hash))
    place.close()
    with pytest.raises(Refused, match=message):
        place.open()


def test_flipped_bytes_are_refused_or_change_nothing(place: Place) -> None:
    expected = used(place).entries()
    saved, rng, refused = place.save(), random.Random(3), 0
    database, head, key = place.files
    for path, tries in ((database, 120), (head, 40), (key, 20)):
        for _ in range(tries):
            data = bytearray(saved[path])
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
            try:
                ledger = place.open()
                assert ledger.entries() == expected  # a byte that SQLite, JSON or PEM does not use
                assert ledger.spent("ward") == Spend(1.5, 1e-6)
            except Refused:
                refused += 1
            place.close()
            place.opened.clear()
            for each, content in saved.items():
                each.write_bytes(content)
            for suffix in ("-wal", "-shm"):
                database.with_name(database.name + suffix).unlink(missing_ok=True)
    assert refused > 60


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_refused(place: Place, share: float) -> None:
    used(place)
    for path, data in place.save().items():
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(Refused):
            place.open()
        path.write_bytes(data)


def test_an_emptied_head_does_not_begin_a_budget_anew(place: Place) -> None:
    used(place)
    place.close()
    place.sql("DELETE FROM entries WHERE number > 1")
    place.files[1].write_bytes(b"")
    with pytest.raises(Refused, match="found none that this key signed"):
        place.open()


def test_a_key_that_others_can_read_is_refused(place: Place) -> None:
    used(place)
    assert place.files[2].stat().st_mode & 0o777 == 0o600
    place.files[2].chmod(0o640)
    with pytest.raises(Refused, match="expected mode 0600"):
        place.open()


def test_a_closed_ledger_refuses(place: Place) -> None:
    ledger = used(place)
    ledger.close()
    with pytest.raises(Refused, match="closed"):
        ledger.reserve("ward", RUN, 0, 4, 4)


def test_a_database_that_is_no_ledger_is_never_removed(tmp_path: Path) -> None:
    """One mistyped path, and a beginning put an empty ledger in the place of somebody's records."""
    path = tmp_path / "notes.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE notes (text, label)")
        connection.execute("CREATE TABLE entries (text)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(BadInput, match=r"notes\.sqlite: found a database of notes, entries, "):
        Ledger.open(path, tmp_path / "head.json", tmp_path / "key")
    assert path.read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} == {path.name, f"{path.name}.lock"}


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_folder_in_the_place_of_a_file_is_bad_input(tmp_path: Path, number: int) -> None:
    files = [tmp_path / name for name in ("ledger.sqlite", "head.json", "key")]
    files[number].mkdir()
    with pytest.raises(BadInput, match=f"ledger {files[number]}: found a folder, expected a file"):
        Ledger.open(*files)
    assert [*tmp_path.iterdir()] == [files[number]]
