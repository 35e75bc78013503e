"""Neither an image nor the repository can sweep in a node's or a coordinator's folder, or a key."""

from __future__ import annotations

import shutil
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parents[1]
SECRET = (
    *("node/identity.pem", "node/node.toml", "node/data/notes.jsonl", "node/ledger.sqlite-wal"),
    *("coordinator/keys/coordinator.pem", "coordinator/ca/ca.key", "south/relay/flower_key"),
    *("export/README.md", "report/report.json", "identity.pem", "ca.key"),
)
# of a node, a bank's node and a coordinator in folders that nobody foresaw
ELSEWHERE = (
    *("north/identity.pem", "north/identity-20261129T101112.pem", "north/node.toml"),
    *("north/enrolment.json", "north/rotation.json", "north/federation.json", "north/peers.toml"),
    *("north/ledger.key", "north/ledger.sqlite", "north/ledger.sqlite-wal", "north/head/head.json"),
    *("north/relay/flower_key", "a/b/bank/ledger.sqlite", "a/b/bank/outbox/1/000001.reply"),
    *("coord/keys/coordinator.pem", "hospital/ca/ca.key", "tests/north/identity.pem"),
    *("client/north/node.toml", "server/c/flower_key", "client/north/peers.toml"),
    *("coord/superlink/superexec.secret", "server/coord/superexec.secret"),
)
OTHER = (".git/config", "runs/a/ledger.key", "tests/conftest.py", "notes.csv", "dist/a.whl")


def in_context(path: str) -> bool:
    """Docker's rule: the last line that names a path, or a folder above it, decides."""
    place, kept = PurePosixPath(path), True
    names = [place.as_posix(), *(each.as_posix() for each in place.parents)][:-1]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        forms = {pattern, pattern.removeprefix("**/")}
        if any(fnmatchcase(name, form) for name in names for form in forms):
            kept = line.startswith("!")
    return kept


@pytest.mark.parametrize(
    "path", [*SECRET, *ELSEWHERE, *OTHER, "client/identity.pem", "server/a/ca.key"]
)
def test_no_image_holds_it(path: str) -> None:
    assert not in_context(path)


def test_an_image_holds_what_a_wheel_is_made_of() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "client", "common", "server", "simulations"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    needed = [*listed.stdout.split(), "pyproject.toml", "constraints.txt", "README.md", "LICENSE"]
    assert len(needed) > 100 and [each for each in needed if not in_context(each)] == []


def test_git_ignores_what_a_node_or_a_coordinator_keeps_wherever_it_lies(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    for path in (*SECRET, *ELSEWHERE):
        done = subprocess.run(["git", "check-ignore", "-q", path], cwd=tmp_path, check=False)
        assert done.returncode == 0, path
    done = subprocess.run(["git", "check-ignore", "-q", "client/node/folder.py"], cwd=tmp_path)
    assert done.returncode == 1


def test_git_ignores_nothing_that_is_kept_in_it() -> None:
    """Else a fixture or a template that is added anew would be left out without a word."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=True).stdout
    assert listed.count(b"\n") > 400
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        cwd=ROOT, capture_output=True, check=False, input=listed,
    )  # fmt: skip
    assert done.stdout == b""
