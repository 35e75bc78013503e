"""A run's durable state at the server: what was committed, and which attempts were begun.

    manifest.json       the run; never changes
    attempts.json       attempts begun, in all and by phase: written before a plan goes out, so
                        that an attempt number is never used twice, whatever is killed when
    state-N.safetensors the state, the released state and the strategy's memory after round N
    progress.json       the round, and the digest of that file: the one pointer, replaced atomically

A file that is not byte for byte what was written is refused; the last good state stays until a
newer one is durable, so that neither a kill nor a full disk can lose it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from fedlora.common.disk.files import write_pieces
from fedlora.common.disk.mapped import SCRATCH, mapped
from fedlora.common.errors import BadInput, FedloraError, Refused, Spent
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.model.state import (
    AdapterSpec,
    AdapterState,
    Vector,
    safetensors_pieces,
    safetensors_vectors,
)
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.vector_parts import is_large
from fedlora.common.protocol.vectors import BYTES
from fedlora.server.rounds.sealed import digest_of_pages, hashed, sealed, unsealed
from fedlora.server.strategies.strategy import ServerState

VERSION = 1  # of these files' layout
STATE, RELEASED, MEMORY, ENDED = "state", "released", "memory.", "ended."
# a simulation's own ledger's
NAMES = r"(manifest|attempts|progress)\.json|state-\d+\.safetensors|ledger-head\.json|ledger\.key"
# the second: half written when a kill came
WRITTEN = re.compile(rf"({NAMES})|\.({NAMES})\.\d+|{re.escape(SCRATCH)}\w+")


@dataclass(frozen=True, eq=False)
class Ended:
    """What a phase came to: its best state, that state's validation score and round."""

    state: AdapterState
    score: float | None
    round: int


@dataclass(frozen=True, eq=False)
class Progress:
    """Where a run stands after `round` committed rounds.

    `released` is what the current phase has to give: the state of the round that public validation
    liked best, averaged where averaging had begun; the newest one where nothing was scored.
    """

    round: int
    state: AdapterState
    released: AdapterState
    memory: ServerState = field(default_factory=ServerState)
    best: float | None = None  # the best validation score so far, higher is better
    stale: int = 0  # evaluations since then
    score: float | None = None  # of `released`
    released_round: int = 0
    ended: tuple[Ended, ...] = ()  # the phases before this one

    @property
    def phases(self) -> tuple[Ended, ...]:
        """What each phase that was begun came to, the current one last."""
        return (*self.ended, Ended(self.released, self.score, self.released_round))

    @property
    def release(self) -> AdapterState:
        """What a run that ends here leaves: the state that public validation likes best.

        A phase that made things worse leaves what the one before it came to; of equals the later
        one is taken. All of them are noised already: choosing by public records costs no privacy.
        """
        worst = -math.inf
        best = max(reversed(self.phases), key=lambda e: worst if e.score is None else e.score)
        return best.state


@dataclass(frozen=True)
class Standing:
    """Where a run stands: rounds committed, and attempts begun by phase."""

    manifest: RunManifest
    round: int
    begun: tuple[int, ...]


def standing(folder: Path) -> Standing | None:
    """Read from the tables alone, without the vectors; None where no run was begun."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    manifest = RunManifest.from_bytes(path.read_bytes())
    checkpoint = Checkpoint(folder, manifest, AdapterSpec(()))
    begun = tuple(checkpoint.attempts_begun(phase) for phase in range(len(manifest.accounted)))
    return Standing(manifest, checkpoint.round, begun)


class Checkpoint:
    """One run's folder. Not safe for two writers: the round loop owns it."""

    def __init__(self, folder: Path, manifest: RunManifest, spec: AdapterSpec) -> None:
        self.folder = folder
        self.manifest = manifest
        self._spec = spec

    @classmethod
    def create(
        cls, folder: Path, manifest: RunManifest, initial: AdapterState, score: float | None = None
    ) -> Checkpoint:
        """Begin a run: nothing committed, no attempt begun. What scores less than `initial`, where
        its `score` is known, does not take its place.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "manifest.json").exists():
            raise BadInput(
                f"{folder}: found a checkpoint of another run, expected an empty folder or --resume"
            )
        checkpoint = cls(folder, manifest, initial.spec)
        checkpoint._write_attempts(0, [0] * len(manifest.accounted))
        checkpoint.commit(Progress(0, initial, initial, score=score))
        checkpoint._write("manifest.json", (manifest.to_bytes(),))  # last: it marks a run as begun
        return checkpoint

    @classmethod
    def open(cls, folder: Path, spec: AdapterSpec) -> Checkpoint:
        """The checkpoint of a run that was begun; BadInput where there is none or it is damaged."""
        path = folder / "manifest.json"
        if not path.is_file():
            raise BadInput(f"{folder}: found no run to resume, expected a checkpoint")
        try:
            manifest = RunManifest.from_bytes(path.read_bytes())
        except BadInput as error:
            raise BadInput([f"{path}: {fault}" for fault in error.faults]) from error
        if manifest.spec_digest != spec.digest:
            raise BadInput(
                f"{path} spec_digest: found {manifest.spec_digest}, expected {spec.digest}"
            )
        checkpoint = cls(folder, manifest, spec)
        checkpoint.load()
        checkpoint._check_names()
        return checkpoint

    def begin_attempt(self, phase: int) -> int:
        """A new attempt number, durable before it is returned; Spent when the phase has none left.

        A run without privacy has nothing to protect: there the number still grows, and never ends.
        """
        attempts = self._attempts()
        by_phase = list(attempts["by_phase"])
        if reason := self.spent(phase):
            raise Spent(reason)
        by_phase[phase] += 1
        self._write_attempts(attempts["total"] + 1, by_phase)
        return int(attempts["total"]) + 1

    def spent(self, phase: int) -> str:
        """Why a phase has no attempt left; "" where it has, as always without privacy."""
        recipe, begun = self.manifest.accounted[phase], self.attempts_begun(phase)
        if not guarantee_of(self.manifest).private or begun < recipe.attempts:
            return ""
        return (
            f"phase {recipe.name}: all {begun} attempts that the noise was calibrated for are"
            " spent; the last adapter is kept"
        )

    def attempts_begun(self, phase: int) -> int:
        """Attempts begun in a phase, crashed ones included."""
        return int(self._attempts()["by_phase"][phase])

    @property
    def attempts_in_all(self) -> int:
        """Attempts begun in all phases: the number of the last one."""
        return int(self._attempts()["total"])

    def commit(self, progress: Progress) -> None:
        """Make a round durable. The state before it stays until this one is the one pointed to."""
        name, hasher = f"state-{progress.round}.safetensors", hashlib.sha256()
        self._write(name, hashed(safetensors_pieces(_vectors(progress)), hasher))
        table = {
            "version": VERSION,
            "manifest": self.manifest.digest,
            "round": progress.round,
            "file": name,
            "digest": hasher.hexdigest(),
            "counts": dict(progress.memory.counts),
            "best": progress.best,
            "stale": progress.stale,
            "score": progress.score,
            "released_round": progress.released_round,
            "ended": [each.score for each in progress.ended],
            "ended_rounds": [each.round for each in progress.ended],
        }
        self._write("progress.json", (sealed(table),))
        self._clear(name)

    @property
    def round(self) -> int:
        """The last one that was committed."""
        return int(self._read("progress.json")["round"])

    def load(self) -> Progress:
        """The last committed progress; BadInput names the file that is damaged.

        The vectors of an adapter that is too large for a message stay in the file.
        """
        table = self._read("progress.json")
        self._attempts()  # a damaged count is found now, not when a round has begun
        path = self.folder / str(table["file"])
        data = mapped(path) if path.is_file() and path.stat().st_size else memoryview(b"")
        if digest_of_pages(data) != table["digest"]:
            raise BadInput(
                f"{path}: found {len(data)} bytes that were not committed, "
                f"expected sha256 {table['digest'][:16]}…"
            )
        vectors = safetensors_vectors(data, str(path))
        if not is_large(BYTES["float32"] * self._spec.size):
            vectors = {name: vector.copy() for name, vector in vectors.items()}
        memory = {n.removeprefix(MEMORY): v for n, v in vectors.items() if n.startswith(MEMORY)}
        return Progress(
            round=int(table["round"]),
            state=AdapterState(self._spec, vectors[STATE]),
            released=AdapterState(self._spec, vectors[RELEASED]),
            memory=ServerState(memory, table["counts"]),
            best=table["best"],
            stale=int(table["stale"]),
            score=self._score(table),
            released_round=int(table.get("released_round", table["round"])),
            ended=self._ended(table, vectors),
        )

    def _score(self, table: Mapping[str, Any]) -> float | None:
        """Of what is released. Earlier files had the last one that was found, of this round or of
        one before: it is known to be of this one at the end of a phase alone.
        """
        lasts = accumulate(phase.rounds for phase in self.manifest.phases)
        known = "released_round" in table or table["round"] in lasts
        return table.get("score") if known else None

    def _ended(self, table: Mapping[str, Any], vectors: Mapping[str, Vector]) -> tuple[Ended, ...]:
        """The phases before the current one; earlier files, where no round was kept, kept ends."""
        scores = table.get("ended", [])
        lasts = accumulate(phase.rounds for phase in self.manifest.phases)
        rounds = table.get("ended_rounds", list(lasts))
        return tuple(
            Ended(AdapterState(self._spec, vectors[f"{ENDED}{place}"]), score, int(number))
            for place, (score, number) in enumerate(zip(scores, rounds, strict=False))
        )

    def check_against_ledger(self, used: int) -> None:
        """Refused, as an older copy, where a ledger saw attempt `used` and fewer were begun."""
        begun = int(self._attempts()["total"])
        if used > begun:
            raise Refused(
                f"{self.folder}: found {begun} attempts begun, but the ledger holds {used}: "
                "this checkpoint is older than the ledger"
            )

    def _attempts(self) -> dict[str, Any]:
        return self._read("attempts.json")

    def _write_attempts(self, total: int, by_phase: Sequence[int]) -> None:
        table = {
            "version": VERSION,
            "manifest": self.manifest.digest,
            "total": total,
            "by_phase": list(by_phase),
        }
        self._write("attempts.json", (sealed(table),))

    def _read(self, name: str) -> dict[str, Any]:
        """A sealed table of this run and version; BadInput otherwise."""
        table = unsealed(self.folder / name)
        for field_, expected in (("version", VERSION), ("manifest", self.manifest.digest)):
            if table.get(field_) != expected:
                raise BadInput(
                    f"{self.folder / name} {field_}: found {table.get(field_)!r}, expected"
                    f" {expected!r}"
                )
        return table

    def _write(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        try:
            write_pieces(self.folder / name, pieces)
        except OSError as error:
            raise FedloraError(
                f"{self.folder / name}: could not be written ({error.strerror}); "
                "the last committed round is kept, and --resume goes on from there"
            ) from error

    def _check_names(self) -> None:
        """BadInput where something lies there that no run writes.

        What a kill leaves is known by its name.
        """
        for path in sorted(self.folder.iterdir()):
            if not WRITTEN.fullmatch(path.name) or path.is_symlink() or not path.is_file():
                raise BadInput(
                    f"{path}: found what no run writes, expected a checkpoint's files only"
                )

    def _clear(self, current: str) -> None:
        """Remove older states and what a kill left half written; what can't go, next time."""
        stale = [path for path in self.folder.glob("state-*.safetensors") if path.name != current]
        for pattern in ("state-*", "progress.json.*", "attempts.json.*", "manifest.json.*"):
            stale += self.folder.glob(f".{pattern}")
        stale += self.folder.glob(f"{SCRATCH}*")
        for path in stale:
            with suppress(OSError):
                path.unlink()


def _vectors(progress: Progress) -> dict[str, Vector]:
    """All vectors of a state file by name."""
    ended = {f"{ENDED}{place}": each.state.vector for place, each in enumerate(progress.ended)}
    memory = {MEMORY + name: value for name, value in progress.memory.vectors.items()}
    return {STATE: progress.state.vector, RELEASED: progress.released.vector, **ended, **memory}
