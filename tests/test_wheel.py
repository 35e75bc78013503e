"""The wheel holds what the checkout holds, and works in an environment of its own."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.installations import CODE, ROOT, copied


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


def test_an_empty_environment_imports_the_core_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    # what these modules import, not all that the core may need
    needs = ["numpy", "safetensors", "cryptography"]
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *needs], check=True
    )
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True)
    modules = (
        "errors",
        "model.state",
        "manifest.manifest",
        "config.schema",
        "data.records",
        "disk.files",
        "ledger.ledger",
        "privacy.accountant",
        "privacy.randomness",
    )
    code = (
        "import sys;"
        + "".join(f"import fedlora.common.{name};" for name in modules)
        + "assert 'torch' not in sys.modules; print(fedlora.common.config.schema.Config().seed)"
    )
    done = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "7"
