"""The institutions of a run on many actors: they speak the deployment's signed messages.

Coordinator and actors share the run's folder: configuration, manifest, ledger and the trainers'
state between rounds lie there, so it does not matter which actor answers for whom. An actor builds
its federation once. Consent is the ledger's: nobody is asked for it, and each institution gives it
when it is first asked to train, as in the sequential engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fedlora.client.training.moments import MomentStore
from fedlora.client.training.trainer import Trainer
from fedlora.common.config.load import load_config
from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.ledger.ledger import Ledger
from fedlora.common.manifest.counts import answer_spec
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import Delta, RoundPlan
from fedlora.common.manifest.turns import taken
from fedlora.common.model.state import AdapterState
from fedlora.common.protocol import stages
from fedlora.common.protocol.messages import (
    PLAN_TAG,
    STAGE_TAG,
    Answer,
    Decline,
    Reply,
    Request,
    SignedStage,
    Staged,
    Task,
    reply_to_bytes,
    request_from_bytes,
)
from fedlora.common.protocol.vectors import vector_from_bytes, vector_to_bytes
from fedlora.common.terminal import one_line
from fedlora.common.trust.identity import PublicIdentity
from fedlora.server.coordinator.coordinator import Coordinator
from fedlora.server.deployment.institutions import Carrier, Institutions
from fedlora.server.rounds.cohort import Failure
from fedlora.simulations.begin import federation_of, machine_of, sources_of
from fedlora.simulations.engines.sequential import chosen_names
from fedlora.simulations.engines.shared import NODES_FILE, Shared
from fedlora.simulations.federation.population import Federation, client_name
from fedlora.simulations.federation.public_part import kept_choice
from fedlora.simulations.federation.run_folder import Paths, SimulatedRun
from fedlora.simulations.options import Options


class Simulated(Institutions):
    """All of them are there, at every moment; who is asked is drawn as the sequential engine does.

    Many share one machine, so each stage has the whole deadline.
    """

    by_parts = False  # it is one machine
    keeper: object = None  # of a masked run: its actor ends with this handle

    def __init__(self, run: SimulatedRun, carrier: Carrier, coordinator: Coordinator) -> None:
        quorum = run.rules.quorum
        super().__init__(run.manifest, coordinator, carrier, run.folder, run.deadline, quorum)
        self._federation = run.federation

    def gather(self) -> Mapping[str, PublicIdentity]:
        """Nobody is waited for."""
        return self.coordinator.members()

    def asked(
        self, members: Mapping[str, PublicIdentity], plan: RoundPlan
    ) -> tuple[list[str], list[Failure]]:
        """As drawn; nobody declines before it is asked to train."""
        return chosen_names(self.manifest, self._federation, plan), []

    @property
    def left(self) -> float:
        """The whole deadline, at each stage."""
        return self.deadline


@dataclass(eq=False)
class Resident:
    """What an actor keeps between messages."""

    federation: Federation
    manifest: RunManifest
    ledger: Ledger
    moments: MomentStore
    shared: Shared
    numbers: Mapping[str, int]  # of clients, by name

    def answer(self, name: str, data: bytes) -> bytes:
        """The reply to a request for the institution `name`, signed by it."""
        try:
            reply = self._reply(name, request_from_bytes(data))
        except FedloraError as error:
            refused = isinstance(error, Refused)
            reply = Decline(name, "", 0, 0, one_line(str(error)), refused)
        return reply_to_bytes(self.shared.identity(name), self.manifest.federation, reply)

    def _reply(self, name: str, request: Request) -> Reply:
        coordinator = PublicIdentity.from_text(self.shared.coordinator, NODES_FILE)
        if isinstance(request, Task):
            plan = RoundPlan.from_bytes(request.plan.opened(PLAN_TAG, coordinator))
            spec = answer_spec(self.manifest, plan.phase, self.federation.model.spec)
            leaving = self.manifest.leaving(spec, plan.round)
            leaves = taken(self._trained(name, plan, request.vector), leaving)
            update = vector_to_bytes(leaves, self.manifest.wire)
            return Answer(name, plan.manifest, plan.round, plan.attempt, update)
        if isinstance(request, SignedStage):
            body = request.request.opened(STAGE_TAG, coordinator)
            asked = stages.Request.from_bytes(body)
            plan, message = asked.plan, self._staged(name, asked, body)
            return Staged(name, plan.manifest, plan.round, plan.attempt, message)
        raise BadInput(f"request: found a {type(request).__name__.lower()}, expected task or stage")

    def _staged(self, name: str, asked: stages.Request, body: bytes) -> bytes:
        """The secrets are with the run's keeper, the training is here."""
        from fedlora.simulations.engines.keeper import Keeper

        spec = answer_spec(self.manifest, asked.plan.phase, self.federation.model.spec)
        return Keeper.find(self.manifest).answer(
            body, spec, lambda: self._trained(name, asked.plan, asked.vector)
        )

    def _trained(self, name: str, plan: RoundPlan, vector: bytes) -> Delta:
        if name not in self.numbers:
            raise BadInput(f"plan client: found {name}, which is not in this federation")
        spec = self.federation.model.spec
        state = AdapterState(spec, vector_from_bytes(vector, spec.size, "plan"))
        return self._trainer(name).train(plan, state).delta

    def _trainer(self, name: str) -> Trainer:
        masked, number = self.manifest.secure is not None, self.numbers[name]
        return self.federation.trainer(number, self.manifest, self.ledger, self.moments, masked)


def resident_of(folder: Path) -> Resident:
    """What answers for the run in `folder`; built once in a process."""
    return _built(folder, (folder / NODES_FILE).read_bytes())


@lru_cache(maxsize=1)
def _built(folder: Path, table: bytes) -> Resident:
    """`table`, of NODES_FILE, tells runs apart that had one folder: each has its own secret."""
    shared, config = Shared(**json.loads(table)), load_config(folder / "config.toml")
    machine = machine_of(config, Options(device=shared.device))
    federation = federation_of(
        config, sources_of(config, kept_choice(folder, config.seed)), folder, machine
    )
    return Resident(
        federation=federation,
        manifest=RunManifest.from_json((folder / "manifest.json").read_bytes()),
        ledger=Paths.of(folder, Path(shared.ledger)).open_ledger(),
        moments=MomentStore(folder / "clients"),
        shared=shared,
        numbers={client_name(client): client for client in federation.clients},
    )
