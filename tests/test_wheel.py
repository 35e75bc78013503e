"""The wheel holds what the checkout holds, and works in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.installations import CODE, ROOT, copied

EARLIER = ROOT / "tests" / "fixtures" / "earlier"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    copy = copied(tmp_path_factory.mktemp("built") / "source")
    subprocess.run([*command, str(copy)], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_module_and_configuration(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    for name in CODE:
        for path in (ROOT / name).rglob("*"):
            if (
                path.suffix in (".py", ".toml", ".html", ".conf")
                and "__pycache__" not in path.parts
            ):
                assert f"fedlora/{path.relative_to(ROOT)}" in inside
    assert not any(name.split("/")[0] in (*CODE, "tests") for name in inside)


def test_the_core_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """What a relay and a verifier install, and nothing else; the other roles: `make installs`."""
    venv.create(tmp_path / "env", with_pip=True)
    binaries = tmp_path / "env" / "bin"
    constraints = str(ROOT / "constraints.txt")
    words = ["-m", "pip", "install", "-q", "-c", constraints, str(wheel)]
    subprocess.run(
        [str(binaries / "python"), *words], check=True, env={**os.environ, "PIP_NO_COMPILE": "1"}
    )

    def run(command: str, *more: str) -> subprocess.CompletedProcess[str]:
        line = [str(binaries / command), *more]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=120)

    torch = run("python", "-c", "import torch")
    assert torch.returncode == 1 and "ModuleNotFoundError" in torch.stderr
    verified = run("fedlora-server", "verify", str(EARLIER / "export"))
    assert verified.returncode == 0 and "3, each signed by its institution" in verified.stdout
    relay = run("fedlora-node", "link", "--relay", "none", "--trainer", f"unix:{tmp_path}/socket")
    assert relay.returncode == 2 and "flower_key: found no readable file" in relay.stderr
