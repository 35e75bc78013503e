"""The runbook's commands, as in docs/operations.md: what is marked to run, runs, in order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```bash( run)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_runbook_runs(tmp_path: Path) -> None:
    script = "set -euo pipefail\n" + "".join(text for run, text in BLOCK.findall(TEXT) if run)
    assert script.count("fedlora-") >= 11
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
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
