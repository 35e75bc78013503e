"""Whether a start is of the run that this node consented to, with as many as were promised.

The consent that it names is this node's own, byte for byte. Of others' consents a node in a run in
clear has the coordinator's signed word alone; under masks it counts peers that its operator
approved (`client.secagg.runs`).
"""

from __future__ import annotations

from fedlora.client.node.policy import Policy
from fedlora.common.errors import BadInput, Refused
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.protocol.start import Start, digest_of


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
