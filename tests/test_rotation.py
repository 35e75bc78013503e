"""A key is rotated on both command lines, from `init --rotate` to the round that counts it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlora.client import cli as node_cli
from fedlora.client.node import enrolment, roster
from fedlora.client.node.folder import NodeFolder
from fedlora.client.node.outbox import Outbox
from fedlora.client.node.roster import read_peers
from fedlora.client.service.answer import Resident
from fedlora.common.errors import Refused
from fedlora.common.ledger.ledger import Budget
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import Delta, RoundPlan
from fedlora.common.trust.identity import Identity, seal
from fedlora.common.trust.rotation import ROTATION_TAG, rotation_from_text, rotation_to_text
from fedlora.server import cli as server_cli
from fedlora.server.coordinator.folder import Directory
from fedlora.server.deployment.cohorts import ClearCohort
from fedlora.server.deployment.participants import Participants
from fedlora.server.rounds.cohort import CohortSum, Failure
from tests.client.institution import BASE, PHASE, POLICY, FakeWork, manifest_of
from tests.server.enrolments import request
from tests.server.fakes import SPEC, START, ByAsking

NAMES = ("east", "north", "south")
RUN = manifest_of(replace(PHASE, rounds=5, attempts=6), federation="demo", spec_digest=SPEC.digest)
Command = Callable[..., tuple[int, str, str]]


class Halves(FakeWork):
    """An update of one half in each coordinate."""

    def train(
        self,
        manifest: RunManifest,
        projection: Path,
        budget: Budget,
        plan: RoundPlan,
        vector: bytes | memoryview,
    ) -> tuple[Delta, str]:
        _, digest = super().train(manifest, projection, budget, plan, vector)
        return np.full(SPEC.size, 0.5, dtype=np.float32), digest


class Federation(ByAsking):
    """A coordinator and three institutions, each made by its own commands.

    Requests go from hand to hand.
    """

    def __init__(self, root: Path, command: Command) -> None:
        self.root, self.command = root, command
        self.ok(
            "fedlora-server", "init", "coordinator", "--federation", "demo", "--host", "127.0.0.1"
        )
        self.residents: dict[str, Resident] = {}
        for name in NAMES:
            self.ok("fedlora-node", "init", name, "--organisation", f"The {name}", "--node", name)
            policy = root / name / "node.toml"
            policy.write_text(
                POLICY.format(base=BASE, folder="base").replace('"north"', f'"{name}"')
            )
            self.ok("fedlora-server", "enrol", f"{name}/enrolment.json", "--yes")
            self.ok("fedlora-node", "join", "coordinator/invitation.json", "--node", name)
            self.restart(name)

    def ok(self, *words: str) -> str:
        code, out, err = self.command(*words)
        assert code == 0, (words, err)
        return out

    def restart(self, name: str) -> None:
        folder = NodeFolder(self.root / name)
        policy = folder.load_policy()
        ledger = folder.open_ledger(policy)
        identity = Identity.load(folder.identity)
        self.residents[name] = Resident(folder, policy, identity, ledger, Halves(ledger))

    def cohort(self) -> ClearCohort:
        """As `resume` makes it: from the coordinator's folder alone."""
        coordinator = Directory.open(self.root / "coordinator").coordinator()
        run = self.root / "coordinator" / "runs" / "1"
        self.who = Participants(RUN, coordinator, self, run, 3, 5.0, sleep=lambda seconds: None)
        return ClearCohort(self.who)

    def online(self) -> set[str]:
        return set(NAMES)

    def ask(
        self, requests: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        for name, data in requests.items():
            yield name, self.residents[name].ask(data)


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    monkeypatch.chdir(tmp_path)

    def call(program: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as ended:
            {"fedlora-node": node_cli, "fedlora-server": server_cli}[program].main()
        found = capsys.readouterr()
        return int(ended.value.code or 0), found.out, found.err

    return call


@pytest.fixture
def federation(tmp_path: Path, command: Command) -> Federation:
    return Federation(tmp_path, command)


def rotate(federation: Federation, name: str) -> str:
    words = ("init", name, "--organisation", f"The {name}", "--node", name, "--rotate")
    return federation.ok("fedlora-node", *words)


def attempt(cohort: ClearCohort, number: int) -> CohortSum:
    return cohort.total(RoundPlan(RUN.digest, 0, number, number, START.digest), START)


def reasons(found: CohortSum) -> dict[str, str]:
    return {failure.client: failure.reason for failure in found.failures}


def test_the_next_round_counts_the_new_key_and_the_old_one_no_more(federation: Federation) -> None:
    cohort = federation.cohort()
    assert attempt(cohort, 1).replies == 3
    out = rotate(federation, "north")
    new = Identity.load(federation.root / "north" / "identity.pem").public
    assert "rotation.json" in out and new.fingerprint in out and "restart the trainer" in out
    # the coordinator has not taken it: the old key counts still
    assert attempt(cohort, 2).replies == 3
    assert new.fingerprint in federation.ok(
        "fedlora-server", "rotate", "north/rotation.json", "--yes"
    )
    # whoever still signs with the old key
    assert "did not make" in reasons(attempt(cohort, 3))["north"]
    federation.restart("north")
    assert attempt(cohort, 4).replies == 3
    # north's consent on disk was signed by its old key: it is asked for anew
    resumed = federation.cohort()
    assert set(federation.who.reserved) == {"east", "south"}
    assert attempt(resumed, 5).replies == 3 and set(federation.who.reserved) == set(NAMES)
    federation.cohort()
    assert set(federation.who.reserved) == set(NAMES)
    folder = NodeFolder(federation.root / "north")
    spent = [entry.body["kind"] for entry in folder.open_ledger(folder.load_policy()).entries()]
    assert spent.count("consent") == 1  # signed twice, charged once
    sent = Outbox(folder.root / "outbox").sizes(RUN.digest)
    assert [each.attempt for each in sent] == [0, 0, 1, 2, 3, 4, 5]


def test_a_lost_key_is_revoked_and_a_new_one_enrolled_beside_the_old_ledger(
    federation: Federation,
) -> None:
    assert attempt(federation.cohort(), 1).replies == 3
    (federation.root / "south" / "identity.pem").unlink()
    federation.ok("fedlora-node", "init", "south", "--organisation", "The south", "--node", "south")
    federation.ok("fedlora-server", "revoke", "south")
    federation.ok("fedlora-server", "enrol", "south/enrolment.json", "--yes")
    federation.restart("south")
    assert attempt(federation.cohort(), 2).replies == 3


def test_rotations_that_the_old_key_did_not_sign_are_refused(federation: Federation) -> None:
    before = Directory.open(federation.root / "coordinator").registry.active()
    path, new = federation.root / "forged.json", Identity.generate()
    for signer in ("coordinator/keys/coordinator.pem", "south/identity.pem"):
        text = rotation_to_text(
            Identity.load(federation.root / signer), request(new, "north", "The north")
        )
        path.write_text(text)
        code, _, err = federation.command("fedlora-server", "rotate", "forged.json", "--yes")
        assert (code, len(err.splitlines())) == (3, 1) and "expected ed25519:" in err, err
    assert Directory.open(federation.root / "coordinator").registry.active() == before


def test_two_rotations_in_a_row_are_taken_in_their_order(federation: Federation) -> None:
    rotate(federation, "north")
    for path in federation.root.glob("north/identity-*.pem"):
        path.rename(path.with_name("identity-earlier.pem"))  # both within one second
    rotate(federation, "north")
    code, _, err = federation.command("fedlora-server", "rotate", "north/rotation.json", "--yes")
    assert code == 3 and "found the signature" in err
    (earlier,) = federation.root.glob("north/rotation-*.json")
    federation.ok("fedlora-server", "rotate", str(earlier), "--yes")
    federation.ok("fedlora-server", "rotate", "north/rotation.json", "--yes")
    federation.restart("north")
    assert attempt(federation.cohort(), 1).replies == 3


def test_another_institutions_keys_are_not_rotated_by_mistake(federation: Federation) -> None:
    before = (federation.root / "north" / "identity.pem").read_bytes()
    for name, organisation in (("south", "The north"), ("north", "Another")):
        words = ("init", name, "--organisation", organisation, "--node", "north", "--rotate")
        code, _, err = federation.command("fedlora-node", *words)
        assert (code, len(err.splitlines())) == (2, 1) and "whose keys are rotated" in err
    assert (federation.root / "north" / "identity.pem").read_bytes() == before


def test_a_peer_s_new_key_is_approved_under_its_old_one_or_after_removal(
    federation: Federation,
) -> None:
    folder = NodeFolder(federation.root / "south")
    approve = ("join", "--approve", "--node", "south")
    federation.ok("fedlora-node", *approve, "north/enrolment.json")
    (federation.root / "first").mkdir()
    shutil.copy(federation.root / "north" / "identity.pem", federation.root / "first")
    rotate(federation, "north")
    code, _, err = federation.command("fedlora-node", *approve, "north/enrolment.json")
    assert code == 3 and "another key of north" in err and "rotation.json" in err
    new = Identity.load(federation.root / "north" / "identity.pem").public
    assert new.fingerprint in federation.ok("fedlora-node", *approve, "north/rotation.json")
    assert read_peers(folder)["north"].identity == new
    code, _, err = federation.command("fedlora-node", *approve, "north/rotation.json")  # a replay
    assert code == 3 and read_peers(folder)["north"].identity == new
    rotate_again = request(Identity.generate(), "north", "The north")
    for signer in ("coordinator/keys/coordinator.pem", "east/identity.pem", "first/identity.pem"):
        text = rotation_to_text(Identity.load(federation.root / signer), rotate_again)
        (federation.root / "forged.json").write_text(text)
        code, _, err = federation.command("fedlora-node", *approve, "forged.json")
        assert (code, len(err.splitlines())) == (3, 1) and "approved key" in err, err
    assert read_peers(folder)["north"].identity == new
    (federation.root / "later.json").write_text(rotate_again)
    federation.ok("fedlora-node", "join", "north", "--remove", "--node", "south")
    federation.ok("fedlora-node", *approve, "later.json")
    assert read_peers(folder)["north"].identity != new


def test_a_rotation_brings_nobody_in(federation: Federation) -> None:
    """The coordinator's signature never adds.

    Neither does any other, for a name that was not approved.
    """
    rotate(federation, "north")
    coordinator = Identity.load(federation.root / "coordinator" / "keys" / "coordinator.pem")
    text = (federation.root / "north" / "enrolment.json").read_text()
    (federation.root / "forged.json").write_text(seal(coordinator, ROTATION_TAG, {"request": text}))
    for file in ("north/rotation.json", "forged.json"):
        code, _, err = federation.command(
            "fedlora-node", "join", file, "--approve", "--node", "south"
        )
        assert code == 3 and "approved key" in err
    assert not read_peers(NodeFolder(federation.root / "south"))


def test_a_rotation_that_was_killed_goes_on_with_the_key_that_may_be_known(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between rotation.json and the key: the next call ends it, and makes no third key."""
    rename = Path.rename

    def dies(self: Path, target: Path) -> Path:
        if target.name == "identity.pem":
            raise KeyboardInterrupt
        return rename(self, target)

    folder = NodeFolder(federation.root / "north")
    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        enrolment.rotate(folder, "north", "The north")
    monkeypatch.setattr(Path, "rename", rename)
    begun = rotation_from_text(folder.rotation.read_text(), "r").request.identity
    assert enrolment.rotate(folder, "north", "The north").identity == begun
    assert Identity.load(folder.identity).public == begun and not list(
        folder.root.glob("rotation-*")
    )


def test_one_organisation_is_one_peer_however_it_is_spelt(federation: Federation) -> None:
    folder = NodeFolder(federation.root / "north")
    roster.approve(folder, (federation.root / "east" / "enrolment.json").read_text(), "e")
    for name, organisation in (("west", "THE  east"), ("west", "the North")):
        with pytest.raises(Refused, match="second key"):
            roster.approve(folder, request(Identity.generate(), name, organisation), "w")
