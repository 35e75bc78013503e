"""A configured federation on one machine: one encoded data set, one model, many institutions.

Memory does not grow with the number of institutions: a client is a slice of a partition, and its
`Trainer` is made when a round asks for it. The same object serves the sequential engine and each
actor of a cluster.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedlora.client.training.hold_out import group_places, unit_points
from fedlora.client.training.local import ClientData, LocalTraining
from fedlora.client.training.memory import Memory, check_fits
from fedlora.client.training.moments import MomentStore
from fedlora.client.training.step import PerSampleGradients
from fedlora.client.training.timing import Steps, tokens_of_run
from fedlora.client.training.trainer import Trainer, charge
from fedlora.common.config.schema import EvaluationConfig, PrivacyConfig
from fedlora.common.data.origin import Origin
from fedlora.common.data.records import UnitIndex, unit_groups
from fedlora.common.data.unit_names import unit_names
from fedlora.common.ledger.ledger import Budget, Ledger
from fedlora.common.ledger.subject import Subject
from fedlora.common.manifest.manifest import Groups, RunManifest
from fedlora.common.model.network import AdapterModel
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.tasks.batch import Encoded
from fedlora.server.runs.public_data import PublicSide
from fedlora.simulations.federation.partition import Partition
from fedlora.simulations.federation.sources import Sources

Ints = npt.NDArray[np.int64]


@dataclass(eq=False)
class Federation:
    """Everything that a run needs besides the round loop."""

    public: PublicSide
    train: Encoded
    classes: Ints | None  # of each training record; None where the task has no classes
    units: UnitIndex  # of the training part, dealt out by `partition`
    partition: Partition
    origin: Origin  # of the training file; it stays here
    training: LocalTraining
    privacy: PrivacyConfig  # names the population that the training file is drawn from
    steps: Steps  # of an adapter phase
    names: list[bytes] = field(default_factory=list)  # of units, where a run may hold some out
    groups: Ints | None = None  # of records, where a run compares some
    # where they fall in the last run that held some out
    _points: tuple[str, npt.NDArray[np.float64]] = ("", np.zeros(0))

    @classmethod
    def build(
        cls,
        public: PublicSide,
        sources: Sources,
        partition: Partition,
        privacy: PrivacyConfig,
        steps: Steps,
        tokens: int,
        folder: Path,
        asked: EvaluationConfig | None = None,
    ) -> Federation:
        """Encode the training part, whose units are dealt out by `partition`.

        `tokens` go into a micro-batch; where that is "auto", what was found lies in `folder`.
        What is `asked` of hold-outs says whether units have names, and records groups.
        """
        units = unit_groups(sources.train.units, len(sources.train))
        gradients = PerSampleGradients(public.model)
        found = tokens_of_run(tokens, gradients, public.validation.data, steps, folder)
        return cls(
            public=public,
            train=public.model.encoded(sources.train),
            classes=sources.train.labels,
            units=units,
            partition=partition,
            origin=sources.origin,
            training=LocalTraining(gradients, public.features, found),
            privacy=privacy,
            steps=steps,
            names=unit_names(sources.train) if asked and asked.hold_out else [],
            groups=group_places(sources.train, Groups(asked.group, asked.groups))
            if asked and asked.groups
            else None,
        )

    @property
    def model(self) -> AdapterModel:
        """The one network, which clients and evaluation take turns with."""
        return self.public.model

    def memory(self) -> Memory:
        """Of a step over the longest records; BadInput where it does not fit here."""
        return check_fits(
            self.model,
            self.training.tokens,
            int(self.train.lengths.max(initial=1)),
            packed=self.steps.packed,
            private=self.steps.private,
        )

    def check_memory(self, head: bool) -> None:
        """BadInput where a step does not fit here, or, with `head`, what a head phase keeps.

        Before anything is charged: how many records there are, a simulation may say.
        """
        if self.steps.drawn:  # a head's steps take next to none
            self.memory()
        if head:
            public = self.public.validation
            sizes = [len(public.data.scored(public.rows).records)]
            for client in self.clients:
                rows = self._units_of(client).records
                sizes.append(len(self.train.scored(rows).records))
            self.public.features.check_room(public.data, sizes)

    @property
    def feature_records(self) -> int:
        """Records that a head phase puts through the frozen model once."""
        return len(self.units.records) + len(self.public.validation.rows)

    @property
    def clients(self) -> range:
        """Their numbers, from 0."""
        return range(len(self.partition.sizes))

    def trainer(
        self,
        client: int,
        manifest: RunManifest,
        ledger: Ledger | None,
        moments: MomentStore,
        masked: bool = False,
    ) -> Trainer:
        """The trainer of one institution that consented to `manifest`; Refused if it may not."""
        budget = self._budget(self.budget_name(client), manifest)
        data = self.data_in(client, manifest, ledger)
        trainer = Trainer(data, self.training, ledger, budget, moments, masked)
        trainer.consent(manifest)
        return trainer

    def data_of(self, client: int) -> ClientData:
        """The records of one institution."""
        return ClientData(client_name(client), self.train, self._units_of(client))

    def data_in(self, client: int, manifest: RunManifest, ledger: Ledger | None) -> ClientData:
        """The same in a run, with where its units fall if the run holds some out."""
        data = self.data_of(client)
        if manifest.evaluation is None:
            return data
        if self._points[0] != manifest.run:  # once for all its institutions and rounds
            self._points = manifest.run, unit_points(manifest, self.names, ledger)
        points = self._points[1][self.partition.units_of(client)]
        return replace(data, points=points, groups=self.groups)

    def charge(self, manifest: RunManifest, ledger: Ledger) -> None:
        """Reserve the run's ε once for the whole population, before training; Refused past its cap.

        A partition is not a population: with other clients or another seed, the same record is
        another client's. A record is at one client, so that the run costs it what it costs a
        client.
        """
        guarantee = guarantee_of(manifest)
        if guarantee.private:
            budget = self._budget(f"population {self.privacy.population}", manifest)
            attempts = [phase.attempts for phase in manifest.accounted]
            cost, subject = charge(guarantee), Subject.of(manifest, self.origin)
            ledger.consent(budget, manifest.digest, cost, attempts, subject)

    def budget_name(self, client: int) -> str:
        """Of a client's part in the ledger, which may hold other populations' clients too."""
        name, population = client_name(client), self.privacy.population
        return name if population == PrivacyConfig.population else f"{population} {name}"

    def _budget(self, name: str, manifest: RunManifest) -> Budget:
        """What all runs may spend of it; no more than this one does, where nothing is said."""
        privacy = self.privacy
        epsilon = privacy.budget_epsilon or guarantee_of(manifest).cap(privacy.epsilon)
        return Budget(name, epsilon, privacy.budget_delta or privacy.delta)

    def label_counts(self) -> Ints | None:
        """(clients, labels) records of each class at each client; a researcher's own data."""
        if self.classes is None:
            return None
        labels = len(self.model.task.labels)
        counts = np.zeros((len(self.clients), labels), dtype=np.int64)
        for client in self.clients:
            rows = self._units_of(client).records
            counts[client] = np.bincount(self.classes[rows], minlength=labels)
        return counts

    def partition_table(self) -> dict[str, object]:
        """What the report draws: label counts by client, or sizes where there are no labels."""
        names = list(self.partition.names) or [client_name(client) for client in self.clients]
        counts = self.label_counts()
        if counts is not None:
            return {
                "clients": names,
                "labels": list(self.model.task.labels),
                "counts": counts.tolist(),
            }
        return {
            "clients": names,
            "labels": ["records"],
            "counts": [[int(size)] for size in self.partition.sizes],
        }

    def _units_of(self, client: int) -> UnitIndex:
        """The client's share of the units, over the same encoded records."""
        return self.units.take(self.partition.units_of(client))


def client_name(client: int) -> str:
    """As messages, ledger and summary name it."""
    return f"client-{client}"
