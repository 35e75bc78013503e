"""A federation, a disk and a clock-free run for the server's tests: no model, network or noise."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from fedlora.common.config.schema import Config, LoraConfig, ModelConfig
from fedlora.common.disk import files
from fedlora.common.errors import BadInput, FedloraError, Refused
from fedlora.common.manifest.manifest import Network, Phase, RunManifest
from fedlora.common.manifest.plan import RoundPlan, Update
from fedlora.common.model.state import AdapterSpec, AdapterState, TensorSpec
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.privacy.norm_bound import check_norm
from fedlora.server.deployment.talks import Talk
from fedlora.server.rounds.checkpoint import Checkpoint, Progress
from fedlora.server.rounds.cohort import CohortSum, Failure
from fedlora.server.rounds.loop import Around, RoundRecord, Rules, run_rounds
from fedlora.server.runs.schedule import NetworkFacts
from fedlora.server.strategies.fedavg import FedAvg, ServerOptimizer
from fedlora.server.strategies.gathered import Summed

SPEC = AdapterSpec((TensorSpec("lora.a", (2, 2)), TensorSpec("head.weight", (3,))))
START = AdapterState(SPEC, np.linspace(-1, 1, SPEC.size, dtype=np.float32))


def manifest_of(
    *rounds: int, spare: int = 0, mode: str = "none", spec: AdapterSpec = SPEC, **changes: object
) -> RunManifest:
    """A run with a phase for each of `rounds`; of two or more, the first is the head's."""
    names = (
        ["head", "adapter", "adapter"][-len(rounds) :] if len(rounds) != 2 else ["head", "adapter"]
    )
    phase = Phase("", 0, 0, 1, 0.1, 16.0, 0.0, 1.0, 0.0, "sgd", 0.5, False, 0.0)
    phases = tuple(
        replace(phase, name=name, rounds=count, attempts=count + spare, **changes)  # type: ignore[arg-type]
        for name, count in zip(names, rounds, strict=True)
    )
    return RunManifest(
        federation="test",
        run="00",
        task="sequence-classification",
        labels=("a", "b"),
        base_digest="sha256:base",
        spec_digest=spec.digest,
        projection_digest="",
        max_length=64,
        mode=mode,
        unit="",
        epsilon=1.0,
        delta=1e-5,
        strategy="fedavg",
        participation=1.0,
        minimum_cohort=1,
        seed=7,
        network=Network.of(ModelConfig(pooling="default"), LoraConfig(targets=("query", "value"))),
        phases=phases,
    )


def facts_of(settings: Config, moved: Mapping[str, int]) -> NetworkFacts:
    """A network of that configuration which nobody built."""
    return NetworkFacts(
        task=settings.model.task,
        labels=("a", "b"),
        max_length=settings.model.max_length,
        network=Network.of(settings.model, settings.lora),
        base_digest="sha256:0",
        spec_digest="sha256:1",
        projection_digest="",
        moved=moved,
    )


Behaviour = Callable[[Update], Update]  # may raise BadInput or Refused


def _honest(update: Update) -> Update:
    return update


def _nothing() -> None:
    return


@dataclass
class Institutions:
    """A cohort that pulls the state half the way to each client's target, and wobbles.

    What a client answers depends on client, round and state alone, as in a run without privacy.
    """

    manifest: RunManifest
    clients: int = 3
    wobble: float = 0.1
    behaviours: Mapping[int, Behaviour] = field(default_factory=dict)
    asked: Callable[[RoundPlan], range] | None = None
    before: Callable[[], None] = _nothing
    plans: list[RoundPlan] = field(default_factory=list)

    def total(self, plan: RoundPlan, state: AdapterState) -> CohortSum:
        self.before()
        assert plan.attempt not in {each.attempt for each in self.plans}, (
            "an attempt was used twice"
        )
        self.plans.append(plan)
        total, failures = Summed(state), []
        asked = self.asked(plan) if self.asked else range(self.clients)
        for client in asked:
            try:
                total.add(self.update(client, plan, state).delta)
            except (BadInput, Refused) as error:
                failures.append(Failure(f"client-{client}", str(error), isinstance(error, Refused)))
        return CohortSum(total.total(), total.count, len(asked), tuple(failures), 0.0)

    def update(self, client: int, plan: RoundPlan, state: AdapterState) -> Update:
        noise = np.random.default_rng([client, plan.round]).normal(size=state.spec.size)
        delta = 0.5 * (target(client, state.spec.size) - state.vector) + self.wobble * noise
        delta[~state.spec.moved_by(self.manifest.recipe_of(plan.round).name)] = 0.0
        honest = Update(
            f"client-{client}", plan.manifest, plan.round, plan.attempt, delta.astype(np.float32)
        )
        update = self.behaviours.get(client, _honest)(honest)
        update.check(plan, state.spec.size)
        check_norm(update, guarantee_of(self.manifest).update_bound(plan.phase, state.spec.size))
        return update


def target(client: int, size: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.arange(size, dtype=np.float64) / size + client


class Killed(BaseException):
    """kill -9: nothing that catches exceptions sees it, and nothing is cleaned up."""


@dataclass
class Disk:
    """Counts what is done to the disk, and fails where it is told to.

    Every step is numbered from 0: opening, syncing, renaming and removing a file, and whatever else
    calls `step`. A kill or a full disk at a sync leaves half of what was written.
    """

    fail_at: int | None = None
    error: Callable[[], BaseException] = Killed
    lasting: bool = False  # a full disk stays full
    steps: int = 0
    process: int = 1

    def step(self, descriptor: int | None = None) -> None:
        here, self.steps = self.steps, self.steps + 1
        if (
            self.fail_at is None
            or here < self.fail_at
            or (here > self.fail_at and not self.lasting)
        ):
            return
        if descriptor is not None and os.fstat(descriptor).st_size and not _is_folder(descriptor):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        raise self.error()

    def restarted(self) -> Disk:
        """The machine is up again: another process, no more faults."""
        self.fail_at, self.process = None, self.process + 1
        return self

    def install(self, patch: pytest.MonkeyPatch) -> Disk:
        patch.setattr(files, "os", _Os(self))
        for name in ("replace", "unlink"):
            patch.setattr(Path, name, _stepping(self, getattr(Path, name)))
        return self


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class _Os:
    """The `os` that common.disk.files sees; nothing is synced: tests would take minutes."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        self._disk.step()
        return os.open(path, flags, mode)

    def fsync(self, descriptor: int) -> None:
        self._disk.step(descriptor)

    def getpid(self) -> int:
        return self._disk.process

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)


def _stepping(disk: Disk, original: Callable[..., object]) -> Callable[..., object]:
    def stepping(path: Path, *rest: object, **options: object) -> object:
        disk.step()
        return original(path, *rest, **options)

    return stepping


def _is_folder(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").is_dir()


CENTRE = np.mean([target(client, SPEC.size) for client in range(3)], axis=0)  # of three clients


@dataclass
class Run:
    """A run in a folder, to be started, killed and started again; it keeps a log as a real one."""

    folder: Path
    manifest: RunManifest
    rules: Rules = field(default_factory=Rules)
    optimizer: str = "momentum"
    clients: int = 3
    log: list[RoundRecord] = field(default_factory=list)
    scores: Callable[[AdapterState, int], Mapping[str, float]] = lambda state, phase: {
        "loss": float(np.square(state.vector - CENTRE, dtype=np.float64).sum())
    }
    step: Callable[[], None] = _nothing
    around: Around = field(default_factory=Around)
    cohort: Institutions = field(init=False)

    def __post_init__(self) -> None:
        self.cohort = Institutions(self.manifest, self.clients, before=self.step)

    def checkpoint(self) -> Checkpoint:
        if (self.folder / "manifest.json").exists():
            return Checkpoint.open(self.folder, SPEC)
        return Checkpoint.create(self.folder, self.manifest, START)

    def go(self) -> Progress:
        checkpoint = self.checkpoint()
        committed = checkpoint.load().round
        self.log = [record for record in self.log if record.round <= committed]
        strategy = FedAvg(ServerOptimizer(self.optimizer, 0.5, 0.9, 0.99))
        strategies = [strategy for _ in self.manifest.phases]
        return run_rounds(
            checkpoint,
            self.cohort,
            strategies,
            self.rules,
            self._validate,
            self._observe,
            self.around,
        )

    def _validate(self, state: AdapterState, phase: int) -> Mapping[str, float]:
        self.step()
        return self.scores(state, phase)

    def _observe(self, record: RoundRecord, progress: Progress) -> None:
        self.step()
        self.log.append(record)
        self.step()


def same(found: Progress, expected: Progress) -> None:
    """Assert that two runs stand at the same place, bit for bit."""
    assert (found.round, found.best, found.stale) == (expected.round, expected.best, expected.stale)
    assert (found.score, found.released_round) == (expected.score, expected.released_round)
    assert [(each.state, each.score, each.round) for each in found.ended] == [
        (each.state, each.score, each.round) for each in expected.ended
    ]
    assert found.state == expected.state
    assert found.released == expected.released
    assert found.memory.counts == expected.memory.counts
    assert found.memory.vectors.keys() == expected.memory.vectors.keys()
    for name, vector in expected.memory.vectors.items():
        assert found.memory.vectors[name].tobytes() == vector.tobytes()


class ByAsking:
    """A carrier that knows how to ask: its talks go one after the other."""

    def ask(
        self, requests: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        raise NotImplementedError

    def converse(
        self, with_each: Mapping[str, Talk], deadline: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        for name, talk in with_each.items():
            yield name, self._ended(name, talk, deadline)

    def _ended(self, name: str, talk: Talk, deadline: float) -> bytes | Failure:
        try:
            asking = next(talk)
            while True:
                ((_, answer),) = self.ask({name: asking.make()}, deadline)
                if isinstance(answer, Failure):
                    return answer
                asking = talk.send(answer)
        except StopIteration as stop:
            found: bytes = stop.value
            return found
        except FedloraError as error:
            return Failure(name, str(error))
