"""`fedlora-server resume` over a damaged checkpoint.

It is refused by name, whichever file it is, and goes on once mended.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from fedlora.common.errors import FedloraError
from fedlora.common.manifest.manifest import RunManifest
from fedlora.common.manifest.plan import RoundPlan
from fedlora.common.model.base import base_digest
from fedlora.common.privacy.accountant import Spend
from fedlora.common.privacy.modes import guarantee_of
from fedlora.common.protocol.consent import Start
from fedlora.common.protocol.messages import (
    MANIFEST_TAG,
    PLAN_TAG,
    START_TAG,
    Answer,
    Consent,
    Offer,
    SignedStart,
    Started,
    Task,
    reply_to_bytes,
    request_from_bytes,
)
from fedlora.common.trust.identity import Identity
from fedlora.server import cli
from fedlora.server.coordinator.folder import Directory
from fedlora.server.deployment import supervise
from fedlora.server.deployment.process import outcome_of
from fedlora.server.deployment.serve import serve
from fedlora.server.rounds.cohort import Failure
from fedlora.simulations.local.folders import TRAINING
from tests.server.enrolments import request
from tests.server.fakes import ByAsking

NAMES = ("east", "north", "south")
FILES = ("attempts.json", "manifest.json", "progress.json", "state-1.safetensors")


@dataclass
class Hands(ByAsking):
    """A carrier to institutions that consent and add a thousandth; cut after the round `last`."""

    directory: Directory
    identities: Mapping[str, Identity]
    last: int = 1
    answering: bool = True  # False: consents, and answers no plan
    cost: Spend = field(default_factory=lambda: Spend(0.0, 0.0))

    @property
    def said(self) -> tuple[float, float]:
        return self.cost.epsilon, self.cost.delta

    def online(self) -> set[str]:
        return set(self.identities)

    def ask(
        self, requests: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes | Failure]]:
        key = self.directory.identity.public
        for name, data in requests.items():
            asked = request_from_bytes(data)
            if isinstance(asked, Offer):
                run = RunManifest.from_bytes(asked.manifest.opened(MANIFEST_TAG, key))
                self.cost = guarantee_of(run).charge()
                reply: Answer | Consent = Consent(name, run.digest, "sha256:p", *self.said)
            elif isinstance(asked, SignedStart):
                start = Start.from_bytes(asked.start.opened(START_TAG, key))
                reply = Started(name, start.manifest, "sha256:p", *self.said, "sha256:s")
            else:
                assert isinstance(asked, Task)
                plan = RoundPlan.from_bytes(asked.plan.opened(PLAN_TAG, key))
                if not self.answering:
                    yield name, Failure(name, "no answer")
                    continue
                if plan.round > self.last:
                    raise FedloraError("the line was cut")
                vector = np.full(len(asked.vector) // 4, 1e-3, dtype="<f4").tobytes()
                reply = Answer(name, plan.manifest, plan.round, plan.attempt, vector)
            yield name, reply_to_bytes(self.identities[name], "demo", reply)


class Here:
    """A SuperLink that starts the ServerApp's work in this process; `hands` are its grid."""

    hands: Hands

    def __init__(self, files: object, port: int) -> None:
        """As SuperLink's."""

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was started."""

    def register(self, name: str, key: str, known: object) -> int:
        return 1

    def start_run(self, settings: Mapping[str, str]) -> str:
        folder = Path(settings["run"])
        coordinator = Directory.open(Path(settings["directory"])).coordinator()
        outcome_of(lambda: serve(folder, coordinator, self.hands), folder, settings["token"])
        return "1"


@pytest.fixture
def begun(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> Directory:
    """A run of two rounds whose second one was cut off."""
    directory = Directory.create(tmp_path / "coordinator", "demo", "127.0.0.1")
    identities = {name: Identity.generate() for name in NAMES}
    for name, identity in identities.items():
        directory.registry.enrol(request(identity, name), name)
    rows = "".join(
        json.dumps({"text": f"w{k} good", "label": "ab"[k % 2]}) + "\n" for k in range(20)
    )
    (tmp_path / "public.jsonl").write_text(rows)
    text = TRAINING.format(
        base=tiny_bert, digest=base_digest(tiny_bert), layers="[]", labels='["a", "b"]', clients=3,
        test=tmp_path / "public.jsonl", validation=tmp_path / "public.jsonl", rounds=2, spare=3,
        quorum=1.0, deadline=5.0, secure="false", mode="record", noise="own",
    )  # fmt: skip
    (tmp_path / "training.toml").write_text(text)
    Here.hands = Hands(directory, identities)
    monkeypatch.setattr(supervise, "SuperLink", Here)
    with pytest.raises(FedloraError, match="the line was cut"):
        folder = supervise.begin(directory, tmp_path / "training.toml")
        supervise.carry_out(directory, folder, lambda line: None)
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == list(FILES)
    return directory


def command(
    directory: Directory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *words: str,
) -> tuple[int, str]:
    """Exit code, and what was said of a fault."""
    monkeypatch.setattr(sys, "argv", ["fedlora-server", *words, "--dir", str(directory.root)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), capsys.readouterr().err


def test_a_damaged_checkpoint_is_never_gone_on_from(
    begun: Directory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte flipped in the middle and at the end of each file, and each file removed."""
    folder = begun.root / "runs" / "1"
    shutil.copytree(folder, begun.root.parent / "good")
    for name in FILES:
        path = folder / "checkpoint" / name
        good = path.read_bytes()
        places = (len(good) // 2, len(good) - 1)
        flips = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in places]
        for damaged in (*flips, None):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            code, err = command(begun, monkeypatch, capsys, "resume")
            assert code == 2 and err and all(name in line for line in err.splitlines()), (
                name,
                code,
                err,
            )
            path.write_bytes(good)
    for other in sorted((begun.root.parent / "good" / "checkpoint").iterdir()):
        assert (folder / "checkpoint" / other.name).read_bytes() == other.read_bytes()
    Here.hands.last = 2
    assert command(begun, monkeypatch, capsys, "resume")[0] == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2] and lines[1]["attempt"] == 3


@pytest.mark.parametrize("committed", [1, 0])
def test_spent_attempts_end_the_run_with_its_last_adapter(
    begun: Directory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    committed: int,
) -> None:
    """Exit 3 however the last attempt was lost, and again when it is resumed.

    What there is can be released.
    """
    Here.hands.answering = False
    if not committed:
        supervise.begin(begun, begun.root.parent / "training.toml", beside=True)
    folder = begun.runs()[-1]
    for _ in range(2):
        code, said = command(begun, monkeypatch, capsys, "resume")
        assert code == 3 and "phase adapter: all 5 attempts" in said and said.count("\n") == 1, said
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["rounds"] == committed and "attempts" in summary["ended"]
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == committed
    target = begun.root.parent / "export"
    code, said = command(begun, monkeypatch, capsys, "export", str(target))
    assert (
        code == 0
        and f"trained in {committed} of the planned 2 rounds" in (target / "README.md").read_text()
    ), said


def test_a_new_run_does_not_take_the_place_of_one_that_can_go_on(
    begun: Directory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Institutions reserved budget for it.

    It is begun `--new` only, and the older one can still be gone on with.
    """
    config = str(begun.root.parent / "training.toml")
    code, said = command(begun, monkeypatch, capsys, "run", config)
    assert code == 3 and "has not ended" in said and "--new" in said and len(begun.runs()) == 1
    Here.hands.last = 99
    code, said = command(begun, monkeypatch, capsys, "run", config, "--new")
    assert code == 0, said
    first, second = begun.runs()
    assert (second / "summary.json").exists() and not (first / "summary.json").exists()
    assert command(begun, monkeypatch, capsys, "resume", "--run", "1")[0] == 0
    assert (first / "summary.json").exists()
    assert command(begun, monkeypatch, capsys, "run", config)[0] == 0  # the last one has ended
    with (first / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, said = command(begun, monkeypatch, capsys, "run", config, "--new")
    assert code == 3 and "carries this run out" in said and len(begun.runs()) == 3


def test_a_run_is_gone_on_with_from_another_folder(
    begun: Directory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """As a service manager would: relative paths began where `run` was said."""
    monkeypatch.chdir(tmp_path)
    text = (tmp_path / "training.toml").read_text()
    (tmp_path / "training.toml").write_text(
        text.replace(f"{tmp_path}/public.jsonl", "public.jsonl")
    )
    folder = supervise.begin(begun, Path("training.toml"), beside=True)
    monkeypatch.chdir("/")
    Here.hands.last = 99
    assert command(begun, monkeypatch, capsys, "resume") == (0, "")
    assert (folder / "summary.json").exists()
