"""A case of a benchmark in a process of its own: the memory of one is not taken for another's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def in_a_fresh_process(script: str, *words: object, **environment: str) -> dict[str, Any]:
    """The JSON table that `script` prints last when it is run with these arguments.

    `environment` is laid over this process's own; CalledProcessError where the script fails.
    """
    command = [sys.executable, script, *map(str, words)]
    own = {**os.environ, **environment}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=own, encoding="utf-8"
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures
