"""A run's durable state at the server: what was committed, and which attempts were begun.

    manifest.json       the run; never changes
    attempts.json       attempts begun, in all and by phase: written before a plan goes out, so that an
                        attempt number is never used twice, whatever is killed when
    state-N.safetensors the state, the released state and the strategy's memory after round N
    progress.json       the round, and the digest of that file: the one pointer, replaced atomically

A file that does not have its digest is refused; the last good state stays until a newer one is durable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.numpy import load, save

from fedlora.common.errors import BadInput, Refused
from fedlora.common.files import write_atomically
from fedlora.common.messages import RunManifest
from fedlora.common.state import AdapterSpec, AdapterState, check_safetensors_header
from fedlora.server.strategies.base import ServerState

STATE, RELEASED, MEMORY = "state", "released", "memory."


@dataclass(frozen=True, eq=False)
class Progress:
    """Where a run stands after `round` committed rounds. `released` is what would be exported now."""

    round: int
    state: AdapterState
    released: AdapterState
    memory: ServerState = field(default_factory=ServerState)
    best: float | None = None  # the best validation score so far, higher is better
    stale: int = 0  # evaluations since then


class Checkpoint:
    """One run's folder. Not safe for two writers: the round loop owns it."""

    def __init__(self, folder: Path, manifest: RunManifest, spec: AdapterSpec) -> None:
        self.folder = folder
        self.manifest = manifest
        self._spec = spec

    @classmethod
    def create(cls, folder: Path, manifest: RunManifest, initial: AdapterState) -> Checkpoint:
        """Begin a run: nothing committed, no attempt begun."""
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "manifest.json").exists():
            raise BadInput(f"{folder}: found the checkpoint of another run, expected an empty folder or --resume")
        checkpoint = cls(folder, manifest, initial.spec)
        checkpoint._write_attempts({"total": 0, "by_phase": [0] * len(manifest.phases)})
        checkpoint.commit(Progress(0, initial, initial))
        write_atomically(folder / "manifest.json", manifest.to_bytes())  # last: it marks a run as begun
        return checkpoint

    @classmethod
    def open(cls, folder: Path, spec: AdapterSpec) -> Checkpoint:
        """The checkpoint of a run that was begun; BadInput where there is none or it is damaged."""
        path = folder / "manifest.json"
        if not path.is_file():
            raise BadInput(f"{folder}: found no run to resume, expected a checkpoint")
        manifest = RunManifest.from_bytes(path.read_bytes())
        if manifest.spec_digest != spec.digest:
            raise BadInput(f"{path} spec_digest: found {manifest.spec_digest}, expected {spec.digest}")
        checkpoint = cls(folder, manifest, spec)
        checkpoint.load()
        return checkpoint

    def begin_attempt(self, phase: int) -> int:
        """A new attempt number, durable before it is returned; Refused when the phase's attempts are spent."""
        attempts = self._attempts()
        by_phase = list(attempts["by_phase"])
        if self.manifest.mode != "none" and by_phase[phase] >= self.manifest.phases[phase].attempts:
            raise Refused(
                f"phase {self.manifest.phases[phase].name}: all {by_phase[phase]} attempts that the noise was "
                "calibrated for are spent; the last adapter is kept"
            )
        by_phase[phase] += 1
        self._write_attempts({"total": attempts["total"] + 1, "by_phase": by_phase})
        return int(attempts["total"]) + 1

    def attempts_begun(self, phase: int) -> int:
        """Attempts begun in a phase, crashed ones included."""
        return int(self._attempts()["by_phase"][phase])

    def commit(self, progress: Progress) -> None:
        """Make a round durable. The state before it stays until this one is the one pointed to."""
        vectors = {MEMORY + name: value for name, value in progress.memory.vectors.items()}
        data = bytes(save({STATE: progress.state.vector, RELEASED: progress.released.vector, **vectors}))
        name = f"state-{progress.round}.safetensors"
        write_atomically(self.folder / name, data)
        table = {
            "manifest": self.manifest.digest,
            "round": progress.round,
            "file": name,
            "digest": hashlib.sha256(data).hexdigest(),
            "counts": dict(progress.memory.counts),
            "best": progress.best,
            "stale": progress.stale,
        }
        write_atomically(self.folder / "progress.json", _sealed(table))
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self) -> Progress:
        """The last committed progress; BadInput names the file that is damaged."""
        table = _unsealed(self.folder / "progress.json")
        if table["manifest"] != self.manifest.digest:
            raise BadInput(f"{self.folder / 'progress.json'}: found manifest {table['manifest']}, expected another")
        self._attempts()
        path = self.folder / str(table["file"])
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != table["digest"]:
            raise BadInput(f"{path}: found other bytes than were committed, expected sha256 {table['digest'][:16]}…")
        check_safetensors_header(data, str(path))
        vectors = load(data)
        memory = {n.removeprefix(MEMORY): v for n, v in vectors.items() if n.startswith(MEMORY)}
        return Progress(
            round=int(table["round"]),
            state=AdapterState(self._spec, vectors[STATE]),
            released=AdapterState(self._spec, vectors[RELEASED]),
            memory=ServerState(memory, table["counts"]),
            best=table["best"],
            stale=int(table["stale"]),
        )

    def check_against_ledger(self, used: int) -> None:
        """Refused where a ledger has seen more attempts than this checkpoint began: an older copy was restored."""
        begun = int(self._attempts()["total"])
        if used > begun:
            raise Refused(
                f"{self.folder}: found {begun} attempts begun, but the ledger holds {used}: "
                "this checkpoint is older than the ledger"
            )

    def _attempts(self) -> dict[str, Any]:
        return _unsealed(self.folder / "attempts.json")

    def _write_attempts(self, table: Mapping[str, Any]) -> None:
        write_atomically(self.folder / "attempts.json", _sealed(table))


def _sealed(table: Mapping[str, Any]) -> bytes:
    """JSON that carries its own digest, so that a flipped bit is seen."""
    body = json.dumps(table, sort_keys=True)
    return json.dumps({"body": body, "sha256": hashlib.sha256(body.encode()).hexdigest()}).encode()


def _unsealed(path: Path) -> dict[str, Any]:
    try:
        outer = json.loads(path.read_bytes())
        body = outer["body"]
        if set(outer) == {"body", "sha256"} and hashlib.sha256(body.encode()).hexdigest() == outer["sha256"]:
            table: dict[str, Any] = json.loads(body)
            return table
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: found a checkpoint that can't be read ({type(error).__name__})") from error
    raise BadInput(f"{path}: found other bytes than were committed")
