"""The example that a package's docstring opens with is right: it is taken out, and run as it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from fedlora.client.node.enrolment import init
from fedlora.client.node.folder import NodeFolder
from fedlora.common.config.schema import config_to_toml
from tests.server import releases
from tests.simulations.experiments.test_simulate import config, data

__all__ = ["data"]
ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
POLICY = f"""
institution = "ward-7"
[budgets.notes]
epsilon = 8.0
delta = 1e-4
[data.notes]
path = "notes.jsonl"
budget = "notes"
labels = ["card", "loan"]
[bases]
"{releases.BASE}" = "minilm"
"""


def example(layer: str) -> str:
    text = ast.get_docstring(ast.parse((ROOT / layer / "__init__.py").read_text("utf-8"))) or ""
    (block,) = BLOCK.findall(text)
    lines = [line for line in block.splitlines() if line.strip()]
    assert len(lines) <= 12, f"{layer}: an example of {len(lines)} lines"
    return str(block)


def run(layer: str) -> None:
    exec(compile(example(layer), f"{layer}/__init__.py", "exec"), {"__name__": "example"})


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_common(capsys: pytest.CaptureFixture[str]) -> None:
    run("common")
    assert re.search(r"σ = 1\.\d{3} keeps .* cost [12]\.\d{3}", capsys.readouterr().out)


def test_client(capsys: pytest.CaptureFixture[str]) -> None:
    Path("manifest.json").write_bytes(releases.manifest().to_bytes())
    init(NodeFolder(Path("node")), "ward-7", "The hospital")
    Path("node/node.toml").write_text(POLICY)
    run("client")
    printed = capsys.readouterr().out
    assert "federation bank-intents allowed" in printed
    assert "minimum_cohort 2 expected at least 5" in printed


def test_server(capsys: pytest.CaptureFixture[str]) -> None:
    init(NodeFolder(Path("node")), "ward-7", "The hospital")
    Path("enrolment.json").write_bytes(Path("node/enrolment.json").read_bytes())
    of = releases.party()
    releases.exported(Path(), of)
    Path("coordinator.pub").write_text(of.coordinator.public.text)
    run("server")
    printed = capsys.readouterr().out
    assert "ward-7" in printed and "verified with the coordinator's key" in printed


def test_simulations(tiny_bert: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`ag_news` is a file of that name here, of a tiny federation."""
    settings = config_to_toml(config(tiny_bert, data, "record"))
    Path("ag_news").write_text(settings)
    run("simulations")
    printed = capsys.readouterr().out
    assert "all attempts" in printed and printed.rstrip().endswith("]")
    assert Path("runs/ag_news/report.html").is_file()
