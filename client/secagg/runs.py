"""The masked runs that a node takes part in: their secrets live here, in memory, only.

Who may be in a cohort is read from `peers.toml` at every stage, for its operator may have changed
it meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection

from fedlora.client.node.folder import NodeFolder
from fedlora.client.node.outbox import Outbox
from fedlora.client.node.policy import Policy
from fedlora.client.node.roster import read_peers
from fedlora.client.secagg.masked_run import MaskedRun, checked_terms
from fedlora.common.errors import Refused
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.secagg.cohort import CohortPolicy
from fedlora.common.trust.enrolment import Peer
from fedlora.common.trust.identity import Identity


class MaskedRuns:
    """One institution's half of each masked run that it consented to."""

    def __init__(
        self, folder: NodeFolder, policy: Policy, identity: Identity, outbox: Outbox
    ) -> None:
        self._folder, self._policy, self._identity, self._outbox = folder, policy, identity, outbox
        self._known: dict[str, MaskedRun] = {}

    def adopt(self, policy: Policy) -> None:
        """Go by this policy from now on."""
        self._policy = policy

    def check(self, manifest: RunManifest, names: Collection[str] | None = None) -> None:
        """Refused where approved peers can never make a cohort, or terms are not this node's.

        `names`: whom the run starts with; None where that is not known yet.
        """
        asked = self._asked(manifest)
        here = {name for name in asked.peers if names is None or name in names}
        if len(here) < asked.minimum_cohort:
            started = "" if names is None else " of those it starts with"
            raise Refused(
                f"manifest minimum_cohort = {asked.minimum_cohort}: this node's operator approved "
                f"{len(here) - 1} peers{started}, expected at least {asked.minimum_cohort - 1}"
            )
        checked_terms(manifest, asked)

    def of(self, manifest: RunManifest) -> MaskedRun:
        """The run's state machine, under today's roster; after a restart a new one, no secrets."""
        asked = self._asked(manifest)
        known = self._known.get(manifest.digest)
        if known is not None:
            checked_terms(manifest, asked)  # the policy may have changed since it was begun
            known.node.adopt(asked)
            return known
        outbox = self._outbox.masked(manifest.digest)
        begun = MaskedRun.begun(self._identity, asked, manifest, outbox)
        return self._known.setdefault(manifest.digest, begun)

    def _asked(self, manifest: RunManifest) -> CohortPolicy:
        """The stricter of what this node's policy and the manifest ask of a cohort."""
        me, limits = self._policy.institution, self._policy.limits
        own = self._folder.own_request()
        peers = read_peers(self._folder) | {me: Peer(me, own.organisation, self._identity.public)}
        colluders = 0 if manifest.secure is None else manifest.secure.max_colluders
        return CohortPolicy(
            me,
            peers,
            max(limits.minimum_cohort, manifest.minimum_cohort),
            max(limits.max_colluders, colluders),
        )
