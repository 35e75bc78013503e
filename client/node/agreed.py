"""When a run was consented to and started, and what the policy said then: for the node's report.

A policy is the operator's to change; what it allowed on the day is kept beside the run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedlora.client.node.policy import Policy
from fedlora.common.codec.strict import json_table
from fedlora.common.disk.files import read_bytes, write_atomically
from fedlora.common.errors import BadInput

CONSENTED, STARTED = "consented.json", "started.json"  # in a run's folder


def note(path: Path, policy: Policy, **more: object) -> None:
    """Keep, durably: now, under this policy's limits; `more` is what else belongs there."""
    table = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "policy": policy.digest,
        "limits": asdict(policy.limits),
        **more,
    }
    write_atomically(path, json.dumps(table, sort_keys=True).encode(), mode=0o600)


def noted(path: Path) -> Mapping[str, Any]:
    """What was kept; nothing of a run that an earlier version began, or where a kill left none."""
    try:
        return json_table(read_bytes(path), path.name) if path.is_file() else {}
    except BadInput:
        return {}
