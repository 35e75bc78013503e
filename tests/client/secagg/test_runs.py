"""What a node's secure runs ask of a cohort: the stricter of its policy and the manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.client.node import roster
from fedlora.client.node.outbox import Outbox
from fedlora.client.secagg.runs import MaskedRuns
from fedlora.common.errors import Refused
from fedlora.common.manifest.manifest import RunManifest, SecureTerms
from fedlora.common.secagg.cohort import THRESHOLD_RULE
from fedlora.common.secagg.ring import Encoding
from fedlora.common.secagg.wire import Epoch, Slot
from fedlora.server.secagg.epoch import ServerEpoch
from tests.client.institution import Institution, manifest_of
from tests.client.secagg import test_shared_records

NAMES = ("east", "north", "south")


def run_of(colluders: int = 1, mode: str = "record", minimum: int = 3) -> RunManifest:
    terms = SecureTerms(THRESHOLD_RULE, colluders, 4, 32, 1 << 20, (2.0,))
    return manifest_of(secure=terms, mode=mode, minimum_cohort=minimum)


class World:
    """Three institutions that approved each other."""

    def __init__(self, root: Path) -> None:
        self.nodes = {name: Institution(root / name, name, f"The {name}") for name in NAMES}
        for name, node in self.nodes.items():
            for other in NAMES:
                if other != name:
                    roster.approve(
                        node.folder, (root / other / "enrolment.json").read_text(), other
                    )

    def runs(self, name: str) -> MaskedRuns:
        node = self.nodes[name]
        return MaskedRuns(
            node.folder, node.folder.load_policy(), node.identity, Outbox(node.root / "outbox")
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def epoch_at(world: World, manifest: RunManifest, number: int, first: int) -> dict[str, MaskedRuns]:
    """Keys and shares of one epoch, in which north has a part."""
    runs = {name: world.runs(name) for name in NAMES}
    epoch = Epoch(manifest.federation, manifest.digest, number, first, 1)
    identities = {name: node.identity.public for name, node in world.nodes.items()}
    server = ServerEpoch(epoch, identities, 3)
    halves = {name: each.of(manifest).node for name, each in runs.items()}
    for half in halves.values():
        server.add_offer(half.offer(epoch))
    members = server.close_offers()
    for half in halves.values():
        server.add_deal(half.deal(members))
    server.close_deals()
    halves["north"].accept(server.delivery("north"))
    return runs


@pytest.mark.parametrize("colluders", [1, 2])
def test_the_manifests_colluders_count_where_they_are_more(world: World, colluders: int) -> None:
    """Three bear one: a manifest that admits two is not served by a policy that assumes one."""
    manifest = run_of(colluders)
    if colluders == 1:
        epoch_at(world, manifest, 1, 1)
    else:
        with pytest.raises(Refused, match="2 of t = 3 may collude"):
            epoch_at(world, manifest, 1, 1)


@pytest.mark.parametrize("mode", ["none", "record"])
def test_without_noise_a_round_leaves_once(world: World, mode: str) -> None:
    """Also after a restart, and in a new epoch."""
    manifest, encoding = run_of(mode=mode), Encoding(2, 32, 2.0, 1 << 20)
    world.nodes["north"].root.joinpath("outbox").mkdir(exist_ok=True)
    Outbox(world.nodes["north"].root / "outbox").masked(manifest.digest).put(1, 1, b"left")
    north = epoch_at(world, manifest, 2, 2)["north"].of(manifest).node
    again = Slot(1, 2, "sha256:a", manifest.base_digest)
    if mode == "record":
        north.check(again, encoding)
    else:
        with pytest.raises(Refused, match="leaves once only"):
            north.check(again, encoding)
    north.check(replace(again, round=2), encoding)


def test_a_run_starts_with_peers_that_are_approved_here(world: World) -> None:
    """Else it is charged, and no cohort of it can ever be."""
    north = world.runs("north")
    north.check(run_of(), set(NAMES))
    with pytest.raises(Refused, match="approved 1 peers of those it starts with, expected at le"):
        north.check(run_of(), {"east", "north", "stranger", "nobody"})


def test_a_policy_that_expects_more_colluders_holds_for_a_run_that_was_begun(world: World) -> None:
    """Its peers' parts of the noise follow from how many the manifest assumed."""
    north, manifest = world.runs("north"), test_shared_records.manifest()
    assert north.of(manifest) is north.of(manifest)
    policy = world.nodes["north"].folder.load_policy()
    north.adopt(replace(policy, limits=replace(policy.limits, max_colluders=2)))
    with pytest.raises(Refused, match="max_colluders: found 1, expected at least this node's 2"):
        north.of(manifest)
