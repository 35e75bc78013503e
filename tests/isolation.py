"""Another user and an empty network, where this machine lets a test have them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534
ALONE = ["unshare", "-n"]
NOT_SHOWN = (
    "no other user or network namespace here: the isolation of trainer and relay was not shown"
)

_BECOME = [
    "setpriv",
    f"--reuid={NOBODY}",
    f"--regid={NOBODY}",
    "--clear-groups",
    "--bounding-set=-all",
]

# $1 Python's own folder, $2 a scratch one, $3 the folder above $1 that only root may pass: hidden
# behind an empty one that shows Python and nothing else, to what is started here alone.
_SHOW_PYTHON = """\
set -e
mount --bind "$1" "$2"
mount -t tmpfs -o mode=755 none "$3"
mkdir -p "$1"
mount --bind "$2" "$1"
shift 3
exec "$@"
"""


def as_nobody(scratch: Path) -> list[str]:
    """Words before a command that the other user runs; `scratch` is an empty folder."""
    python = Path(sys.base_prefix).resolve()
    closed = [each for each in reversed(python.parents) if not each.stat().st_mode & 0o001]
    if not closed:
        return _BECOME
    show = [
        "unshare",
        "-m",
        "sh",
        "-c",
        _SHOW_PYTHON,
        "sh",
        str(python),
        str(scratch),
        str(closed[0]),
    ]
    return [*show, *_BECOME]


def available() -> bool:
    """Whether there are both, and the other user can run a relay, but not look where root may."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("setpriv", "unshare"))):
        return False
    try:
        with public_folder() as scratch:
            relay = [
                *as_nobody(scratch),
                "env",
                sys.executable,
                "-c",
                "import fedlora.client.network.supernode, flwr",
            ]
            for words in ([*ALONE, "true"], relay):
                subprocess.run(words, check=True, capture_output=True, timeout=60)
        found = subprocess.run(
            [*_BECOME, "ls", "/root"], capture_output=True, timeout=30, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return found.returncode != 0


@contextmanager
def public_folder() -> Iterator[Path]:
    """A scratch folder that every user may pass."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        path.chmod(0o755)
        yield path
