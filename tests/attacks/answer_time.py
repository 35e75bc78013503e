"""Whether the time of an answer tells that a unit with many records took part.

Two nodes have 40 units of one record each; one of them has one unit more, of 12 records. At rate 1
every answer trains on all of it. Asked in turn, how well do the seconds until an answer leaves tell
them apart, and its CPU seconds? AUC is the probability that an answer with the unit took longer
than one without.

    python -m tests.attacks.answer_time BASE [--answers 60] [--every 5]

BASE is a folder of a base model, or a packaged one's name.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from fedlora.client.service.answer import Resident
from fedlora.client.service.loaded_run import LoadedRun
from fedlora.common.config.schema import LoraConfig, ModelConfig
from fedlora.common.manifest.manifest import Network
from fedlora.common.model.base import base_digest, resolve_base
from fedlora.common.model.state import AdapterState
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.messages import Answer
from fedlora.common.protocol.vectors import vector_to_bytes
from tests.client.institution import PHASE, POLICY, Institution, manifest_of, task_of

LIMITS = "attempts = 20\ndelta = 1e-4\n"
TEXT = "my card was charged twice and nobody at the bank tells me why it was"


class Node:
    """One of the two, asked one attempt after the other."""

    def __init__(self, root: Path, base: Path, answers: int, every: float, more: int) -> None:
        self.north = Institution(root)
        text = POLICY.format(base=base_digest(base), folder=base)
        text = text.replace(LIMITS, f"attempts = {answers}\ndelta = 1e-4\n")
        text = text.replace("rounds = 10", f"rounds = {answers}").replace("= 2.0", "= 500.0")
        text = text.replace("budget =", 'unit = "person"\nbudget =')
        self.north.set_policy(text + f"[trainer]\nthreads = 1\nanswer_every = {every}\n")
        people = [str(unit) for unit in range(40)] + ["one more"] * more
        rows = [
            {"person": person, "text": TEXT, "label": "ab"[place % 2]}
            for place, person in enumerate(people)
        ]
        (root / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        policy = self.north.folder.load_policy()
        loaded = LoadedRun(self.north.folder, policy, self.north.ledger)
        self.north.restart(loaded)
        north = self.north
        loaded = LoadedRun(north.folder, policy, north.ledger)
        north.resident = Resident(north.folder, policy, north.identity, north.ledger, loaded)
        lora = LoraConfig(rank=2, targets=("query", "value"))
        network = Network.of(ModelConfig(pooling="mean"), lora)
        phase = replace(
            PHASE, rounds=answers, attempts=answers, steps=1, sampling_rate=1.0,
            expected_units=40.0, noise_multiplier=1.2,
        )  # fmt: skip
        run = manifest_of(
            phase, epsilon=200.0, unit="person", base_digest=base_digest(base), network=network,
            max_length=64,
        )  # fmt: skip
        spec = loaded.spec(run, root / "none")
        self.run = replace(run, spec_digest=spec.digest)
        self.state = AdapterState(spec, np.zeros(spec.size, np.float32))
        north.begin(self.run)

    def seconds(self, attempt: int, held: bool) -> tuple[float, float]:
        """Until the answer leaves, and of CPU; `held`: as the endpoint hands it out."""
        vector = vector_to_bytes(self.state.vector)
        task = task_of(self.run, attempt=attempt, adapter=self.state.digest, vector=vector)
        resident = self.north.resident
        began, used = time.perf_counter(), time.process_time()
        answer = (resident.ask_in_time if held else resident.ask)(task)
        took = time.perf_counter() - began, time.process_time() - used
        assert isinstance(self.north.read(answer), Answer)
        return took


def auc(without: Sequence[float], with_it: Sequence[float]) -> float:
    """The share of pairs in which the one with it is larger; ties count a half."""
    less, more = np.array(without)[:, None], np.array(with_it)[None, :]
    return float(((more > less) + 0.5 * (more == less)).mean())


def main() -> None:
    """Print both AUC before and after, on this machine."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("--answers", type=int, default=60)
    parser.add_argument("--every", type=float, default=5.0)
    asked = parser.parse_args()
    base = resolve_base(asked.base)
    with TemporaryDirectory() as folder:
        root, most = Path(folder), 2 * asked.answers + 4
        few, many = (
            Node(root / name, base, most, asked.every, more)
            for name, more in (("few", 0), ("many", 12))
        )
        one = guarantee_of(few.run).epsilon_of([1])
        print(f"ε of one answer at δ = {few.run.delta:g}: {one:.2f}")
        for attempt in (1, 2):
            few.seconds(attempt, False), many.seconds(attempt, False)
        for name, held in (("at once", False), ("at a tick", True)):
            first = 3 + asked.answers * held
            took = [
                (few.seconds(attempt, held), many.seconds(attempt, held))
                for attempt in range(first, first + asked.answers)
            ]
            for kind, place in (("wall", 0), ("CPU", 1)):
                sides = [[pair[side][place] for pair in took] for side in (0, 1)]
                medians = " and ".join(f"{np.median(side):.3f}" for side in sides)
                print(f"{name}: {kind} AUC {auc(*sides):.3f} (medians {medians} s)", flush=True)


if __name__ == "__main__":
    main()
