"""Whether an offer, or the start of its run, is the coordinator's, for this institution, and whole.

All of it is checked before anything else is done with it. Whoever carries offers may keep them
back, or bring them to another node. So each names its receiver and its end, under a signature of
its own; and a projection is held against the manifest before it is written or kept for a run.

A start names the consent that this node signed last, byte for byte. Of others' consents a node in a
run in clear has the coordinator's signed word alone; under masks it counts peers that its operator
approved (`client.secagg.runs`).
"""

from __future__ import annotations

import time
from pathlib import Path

from fedlora.client.node.policy import Policy
from fedlora.common.codec.strict import digest_of
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.model.projection import Projection
from fedlora.common.protocol.consent import LONGEST_OFFER, Start
from fedlora.common.protocol.messages import MANIFEST_TAG, OFFER_TAG, Address, Offer
from fedlora.common.terminal import one_line
from fedlora.common.trust.identity import PublicIdentity, Signed

MAX_PROJECTION_BYTES = 64 << 20
SKEW = 300.0  # seconds by which the coordinator's clock and this one may differ


def offered(offer: Offer, coordinator: PublicIdentity, institution: str) -> RunManifest:
    """The manifest of an offer to `institution` that is still good.

    Refused where the coordinator did not sign it. BadInput, which is not for good, where it is
    another's or an old one.
    """
    address = Address.from_bytes(offer.address.opened(OFFER_TAG, coordinator))
    if address.institution != institution:
        raise BadInput(
            f"offer institution: found {one_line(address.institution)[:80]}, expected {institution}"
        )
    check_time(address)
    manifest = read_manifest(offer.manifest, coordinator)
    if address.manifest != manifest.digest:
        raise BadInput(
            f"offer manifest: found {manifest.digest}, expected {one_line(address.manifest)[:80]}"
        )
    return manifest


def check_time(address: Address) -> None:
    """BadInput where an offer, or the consent to it, is over, or would be good for too long."""
    late = time.time() - address.not_after
    if late > SKEW:
        raise BadInput(
            f"offer not_after: found {address.not_after} (UTC seconds), which by this node's clock"
            f" was {late:.0f} s ago, expected at most {SKEW:.0f} s: an old offer, or a clock of the"
            " node that is ahead by at least as much; ask again, or compare the clocks"
        )
    if -late > LONGEST_OFFER + SKEW:
        raise BadInput(
            f"offer not_after: found {address.not_after} (UTC seconds), which by this node's clock"
            f" is in {-late:.0f} s, expected at most {LONGEST_OFFER} s: an offer for too long, or a"
            " clock of the node that is behind; compare the clocks"
        )


def read_manifest(signed: Signed, coordinator: PublicIdentity) -> RunManifest:
    """The manifest that `coordinator` signed, in its one spelling."""
    return RunManifest.from_bytes(signed.opened(MANIFEST_TAG, coordinator))


def kept_manifest(path: Path) -> tuple[Signed, RunManifest]:
    """What this node once consented to, whoever signed; a fault of it begins with the file."""
    try:
        signed = Signed.from_bytes(path.read_bytes(), "manifest")
        return signed, read_manifest(signed, signed.signer)
    except BadInput as error:
        raise BadInput([f"{path}: {fault}" for fault in error.faults]) from error
    except Refused as error:
        raise Refused(f"{path}: {error}") from error


def check_projection(manifest: RunManifest, projection: bytes) -> None:
    """BadInput unless the projection is the one that the manifest names."""
    if bool(projection) != bool(manifest.projection_digest):
        raise BadInput(
            f"offer projection: found {len(projection)} bytes, expected what the manifest names"
        )
    if bool(projection) != bool(manifest.network.projection):
        raise BadInput("manifest network projection: found another than projection_digest says")
    if len(projection) > MAX_PROJECTION_BYTES:
        raise BadInput(
            f"offer projection: found {len(projection)} bytes, expected at most"
            f" {MAX_PROJECTION_BYTES}"
        )
    if projection:
        found = Projection.from_bytes(projection, "offer projection").digest
        if found != manifest.projection_digest:
            raise BadInput(
                f"offer projection: found {found}, expected"
                f" {one_line(manifest.projection_digest)[:80]}"
            )


def check_start(start: Start, manifest: RunManifest, policy: Policy, consent: bytes) -> None:
    """Refused for too few; BadInput, which is not for good, where this node is not among them.

    `consent` is what this node signed last for the run.
    """
    named = {party.institution: party.consent for party in start.cohort}
    mine, found = digest_of(consent), named.get(policy.institution)
    if found != mine:
        raise BadInput(
            f"start cohort {policy.institution}: found {found or 'no consent'}, expected {mine},"
            " this node's last"
        )
    least = max(manifest.minimum_cohort, policy.limits.minimum_cohort)
    if len(named) < least:
        raise Refused(
            f"start cohort: found {len(named)} institutions, expected at least {least}, as the"
            " manifest promises"
        )
