"""The in-process engine: clients train one after the other; updates are added as they come.

A `Cohort` like Flower's grid, so the round loop that runs here is the one that runs in production.
Memory is one float64 sum, whatever the number of clients; a robust mean keeps all updates.
"""

from __future__ import annotations

import time

from fedlora.client.training.moments import MomentStore
from fedlora.client.training.trainer import Trainer
from fedlora.common.errors import BadInput, Refused
from fedlora.common.ledger.ledger import Ledger
from fedlora.common.manifest.counts import answer_spec
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.privacy.randomness import OsRandom, Random, SeededRandom, participants
from fedlora.server.rounds.cohort import Cohort, CohortSum, Failure
from fedlora.server.secagg.log import SumLog
from fedlora.server.secagg.sums import SecureCohort
from fedlora.server.strategies.gathered import Gather, Summed, gathering_of
from fedlora.simulations.engines.masked import Institutions
from fedlora.simulations.federation.population import Federation, client_name
from fedlora.simulations.federation.run_folder import SimulatedRun


class SequentialCohort:
    """All clients of a federation, trained in this process."""

    def __init__(
        self,
        federation: Federation,
        manifest: RunManifest,
        ledger: Ledger | None,
        moments: MomentStore,
        gather: Gather = Summed,
    ) -> None:
        self._federation = federation
        self._manifest = manifest
        self._ledger = ledger
        self._moments = moments
        self._gather = gather

    def total(self, plan: RoundPlan, state: AdapterState) -> CohortSum:
        """The sum of one attempt's updates, or what a robust mean makes of them; and who failed."""
        started = time.monotonic()
        answers = answer_spec(self._manifest, plan.phase, state.spec)
        gathered, failures = gathering_of(self._gather, answers, state), []
        asked = choose_clients(self._manifest, self._federation, plan)
        for client in asked:
            answer = self._answer(client, plan, state, answers.size)
            if isinstance(answer, Failure):
                failures.append(answer)
            else:
                gathered.add(answer.delta, answer.client)
        seconds = time.monotonic() - started
        return CohortSum(
            gathered.total(),
            gathered.count,
            len(asked),
            tuple(failures),
            seconds,
            each=gathered.each,
        )

    def _answer(
        self, client: int, plan: RoundPlan, state: AdapterState, size: int
    ) -> Update | Failure:
        try:
            trainer = self._federation.trainer(client, self._manifest, self._ledger, self._moments)
            update = trainer.train(plan, state)
            update.check(plan, size)
        except (BadInput, Refused) as error:
            return Failure(client_name(client), str(error), refused=isinstance(error, Refused))
        return update


def masked(run: SimulatedRun) -> SecureCohort:
    """The same clients behind the state machines of secure aggregation: no sum in clear."""
    federation, manifest = run.federation, run.manifest
    numbers = {client_name(client): client for client in federation.clients}

    def trainer_of(name: str) -> Trainer:
        return federation.trainer(numbers[name], manifest, run.ledger, run.moments, masked=True)

    institutions = Institutions(
        list(numbers),
        manifest,
        run.faults,
        trainer_of,
        lambda plan: chosen_names(manifest, federation, plan),
        run.rules.quorum,
    )
    return SecureCohort(manifest, institutions, SumLog(run.folder))


def choose_clients(manifest: RunManifest, federation: Federation, plan: RoundPlan) -> list[int]:
    """Who is asked in a round: each client with the public participation rate, independently.

    Record-level ε never counts participation, so the draw need not be secret; it is repeatable only
    where the whole run is.
    """
    source: Random = (
        OsRandom()
        if guarantee_of(manifest).private
        else SeededRandom(manifest.seed, "participation", plan.round)
    )
    return participants(federation.clients, manifest.participation, source)


def chosen_names(manifest: RunManifest, federation: Federation, plan: RoundPlan) -> list[str]:
    """Names of whom `choose_clients` draws."""
    return [client_name(client) for client in choose_clients(manifest, federation, plan)]


def sequential(run: SimulatedRun) -> Cohort:
    """The in-process engine; with secure aggregation its coordinator's part learns sums only."""
    if run.manifest.secure is not None:
        return masked(run)
    return SequentialCohort(run.federation, run.manifest, run.ledger, run.moments, run.gather)
