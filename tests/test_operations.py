"""The runbook's commands, as in docs/operations.md: what is marked to run, runs, in order."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.installations import KINDS, commands, on_path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```bash( run)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("kind", KINDS)
def test_the_runbook_runs(
    kind: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each command where its role's packages are, and no others."""
    script = "set -euo pipefail\n" + "".join(text for run, text in BLOCK.findall(TEXT) if run)
    assert script.count("fedlora-") >= 11
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=on_path(commands(kind, tmp_path_factory.getbasetemp())),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "notes: 200 records, 200 units, charges patients" in done.stdout
    assert (tmp_path / "report" / "report.html").is_file()


def test_every_command_of_the_runbook_exists() -> None:
    """Also those that are not executed: `COMMAND --help` knows each subcommand."""
    named = set(re.findall(r"^(fedlora-(?:node|server)) ([a-z-]+)", TEXT, re.MULTILINE))
    assert len(named) >= 14
    for command, subcommand in sorted(named):
        module = {"fedlora-node": "fedlora.client.cli", "fedlora-server": "fedlora.server.cli"}[
            command
        ]
        app = __import__(module, fromlist=["app"]).app
        known = {each.name or each.callback.__name__ for each in app.registered_commands}
        known |= {each.name for each in app.registered_groups}
        assert subcommand in known, (command, subcommand)
