"""Hostile code under the relay's user gets nothing: no data, no training, a line in the log.

The trainer runs in a network namespace of its own, with nothing in it; the hostile bundle under
another user. Where namespaces or users are not to be had, the test skips: this guarantee was then
not shown here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlora.common.protocol.messages import Answer
from tests.client.institution import BASE, POLICY, Institution, manifest_of, task_of
from tests.isolation import ALONE, NOBODY, NOT_SHOWN, as_nobody, available, public_folder

HOSTILE = """
import json, os, sys
from pathlib import Path
node, socket, folder = map(Path, sys.argv[1:])
found = {"read": [], "replies": []}
for name in ("notes.jsonl", "identity.pem", "ledger.sqlite", "ledger.key", "node.toml", "outbox", \
"refusals.jsonl"):
    try:
        (os.listdir if name == "outbox" else lambda p: open(p, "rb").read(1))(node / name)
        found["read"].append(name)
    except OSError:
        pass
for path in (socket, node / "node.toml"):
    try:
        path.unlink()
        found["read"].append(f"removed {path.name}")
    except OSError:
        pass
import tempfile
fake = Path(tempfile.mkdtemp())
(fake / "fedlora.py").write_text("def may_train(*_): return True")
sys.path.insert(0, str(fake))
import fedlora, grpc  # a fake fedlora is as good as the real one: the trainer only sees bytes
assert fedlora.may_train("everything")
with grpc.insecure_channel(f"unix:{socket}") as channel:
    ask = channel.unary_unary("/fedlora.Trainer/Ask")
    for request in sorted(folder.iterdir()):
        found["replies"].append(ask(request.read_bytes(), timeout=60).hex())
print(json.dumps(found))
"""


@pytest.fixture
def place() -> Iterator[Path]:
    with public_folder() as path:
        yield path


def test_a_hostile_bundle_under_the_relays_user_gets_nothing(place: Path) -> None:
    if not available():
        pytest.skip(NOT_SHOWN)
    door = place / "door"
    door.mkdir()
    os.chown(door, 0, NOBODY)
    door.chmod(0o2750)  # the socket takes the relay's group; its user may pass, and change nothing
    north = Institution(place / "node")
    north.set_policy(
        POLICY.format(base=BASE, folder="base")
        + '[trainer]\nlisten = "unix:../door/s"\ngroup_may_ask = true\n'
    )
    (north.root / "notes.jsonl").write_text('{"text": "secret", "label": "a"}\n')
    north.restart()
    run = manifest_of()
    north.begin(run)
    replayed = task_of(run)
    answer = north.resident.ask(replayed)
    assert isinstance(north.read(answer), Answer)
    before = [entry.hash for entry in north.ledger.entries()]
    north.ledger.close()
    requests = place / "requests"
    requests.mkdir()
    changed = replayed[:-1] + b"\x01"
    cut = task_of(run, attempt=2)[:-1]
    for number, data in enumerate((b"forged", changed, cut, replayed)):
        (requests / str(number)).write_bytes(data)
    script = place / "hostile.py"
    script.write_text(HOSTILE)
    words = [*ALONE, sys.executable, "-m", "fedlora.client.cli", "serve", "--node", str(north.root)]
    trainer = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while not (door / "s").exists():
            assert trainer.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)
        attack = [
            "env",
            sys.executable,
            str(script),
            str(north.root),
            str(door / "s"),
            str(requests),
        ]
        with public_folder() as scratch:
            words = [*as_nobody(scratch), *attack]
            done = subprocess.run(
                words, capture_output=True, text=True, timeout=120, check=False, cwd=place
            )
        assert done.returncode == 0, done.stderr
    finally:
        trainer.terminate()
        trainer.communicate(timeout=60)
    found = json.loads(done.stdout)
    assert found["read"] == [] and (north.root / "node.toml").exists()
    # it has left before
    assert len(found["replies"]) == 4 and bytes.fromhex(found["replies"][3]) == answer
    logs = [
        path.read_text()
        for path in (north.folder.refusals, north.folder.strangers)
        if path.exists()
    ]
    assert len("".join(logs).splitlines()) == 3
    north.restart()
    assert [entry.hash for entry in north.ledger.entries()] == before
    north.ledger.close()
